"""The sampling parameters that a prompt version may set, and between which bounds.

Names and bounds are those of OpenAI's chat completions, and what llama.cpp's and vLLM's servers take besides
(`top_k`, `min_p`, `repeat_penalty`, `cache_prompt`, `chat_template_kwargs`). They are sent as they are. What is none of
them is refused when the version is loaded: a server ignores a misspelt name, and judges otherwise than was meant.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

_STOPS = 4
"""OpenAI's limit; llama.cpp and vLLM have none."""


def _number(low: float, high: float) -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return f"a number from {low:g} to {high:g}", holds


def _integer(low: int, high: int) -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return f"an integer from {low} to {high}", holds


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= _STOPS and all(isinstance(text, str) and text for text in texts)


_KNOWN: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "top_k": _integer(-1, 2**31 - 1),  # 0 is "all" to llama.cpp, -1 to vLLM
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repeat_penalty": _number(0, 2),
    "repetition_penalty": _number(0, 2),  # what vLLM calls it
    "seed": _integer(0, 2**32 - 1),
    "max_tokens": _integer(1, 2**31 - 1),
    "stop": (f"a text, or a list of up to {_STOPS}, none of them empty", _is_stop),
    "cache_prompt": ("true or false", lambda value: isinstance(value, bool)),
    "chat_template_kwargs": ("an object", lambda value: isinstance(value, dict)),
    "reasoning_effort": ("a word", lambda value: isinstance(value, str)),
}


def problem(parameters: Mapping[str, Any]) -> str | None:
    """What is wrong with these parameters, or None."""
    for name, value in parameters.items():
        if name not in _KNOWN:
            close = get_close_matches(name, _KNOWN, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_KNOWN)}"
            return f"parameters: {name} is not known; {hint}"
        wanted, holds = _KNOWN[name]
        if not holds(value):
            return f"parameters: {name} must be {wanted}, not {value!r}"
    return None

"""How much of a window is told: the whole, or as many of its sections as the context has room for."""

from collections.abc import Awaitable, Callable, Sequence

from processors.analyze import core
from processors.analyze.core import Rendered
from processors.analyze.settings import LlmSettings
from schemas.prompts import Message, PromptError, PromptVersion
from schemas.records import Context

Count = Callable[[Sequence[Message]], Awaitable[int]]
"""Tokens of a chat by the server's own tokenizer and chat template, or more, never fewer."""


def budget(context_size: int, settings: LlmSettings, prompt: PromptVersion) -> int:
    """Tokens that a prompt may have: those of one request less the longest answer."""
    return context_size - int(prompt.sampling.get("max_tokens", settings.max_completion_tokens))


async def fit(context: Context, prompt: PromptVersion, most: int, count: Count) -> Rendered:
    """The first rendering, of those that `core.renderings` makes, that has at most `most` tokens.

    Raises:
        PromptError: it cannot be rendered, or has more tokens without any section.
        ValueError: as `core.variables`.
        Exception: what `count` raises.
    """
    size = 0
    for rendered in core.renderings(context, prompt):
        # A token holds a byte at least: most windows fit by that bound alone, and the server need not count.
        if core.token_bound(rendered.messages) <= most:
            return rendered
        size = await count(rendered.messages)
        if size <= most:
            return rendered
    raise PromptError(
        f"the prompt has {size} tokens without any section, and {most} are left of the context beside the "
        f"answer: raise llm.context_size, or lower llm.max_completion_tokens",
    )

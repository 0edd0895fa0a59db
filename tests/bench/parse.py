"""What reading a completion takes: the slowest of three of 8 KB, and a plain one with the check of its schema."""

import statistics
import time
from collections.abc import Callable

from infra.local.stack import LocalStack
from processors.analyze.answers import parse
from schemas import prompts
from tests.bench.figure import Figure, latency
from tests.processors.analyze_samples import answer

NAMES = ("llm_parse_us",)

SIZE = 8 * 1024
"""Characters: the reasoning of a model that thinks, and its answer."""

AIM_US = 1000.0
ROUNDS = 300


def completions() -> dict[str, str]:
    """What is read, of `SIZE` characters: reasoning in marks, prose with braces in it, and drafts before the answer."""
    final = f"\n```json\n{answer()}\n```"
    room = SIZE - len(final) - len("<think></think>")
    thought = "At night (23:14) a {person} waits at the door [1]; is that 40? "
    texts = {"reasoning": f"<think>{_fill(thought, room)}</think>", "prose": _fill(thought, room)}
    return {**{name: text + final for name, text in texts.items()}, "drafts": _fill(f"{answer(40)} or ", room) + final}


def _fill(text: str, size: int) -> str:
    return (text * (size // len(text) + 1))[: size // len(text) * len(text)]


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """The median of the slowest kind, in microseconds."""
    del stack
    prompt = prompts.default()
    medians: list[float] = []
    texts = completions()
    for number, text in enumerate(texts.values(), start=1):
        took: list[float] = []
        for _ in range(10 if quick else ROUNDS):
            began = time.perf_counter()
            verdict, _ = parse(text, prompt)
            took.append((time.perf_counter() - began) * 1e6)
            if verdict.risk_score != 71:
                raise AssertionError(f"the score of the final answer is 71, not {verdict.risk_score}")
        medians.append(statistics.median(took))
        progress(number / len(texts))
    return [latency("llm_parse_us", max(medians), AIM_US, unit="us")]

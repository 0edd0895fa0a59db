"""prefix_cache_share: which part of the prompts' tokens llama.cpp takes from its cache, over similar windows.

A hundred windows, of one busy camera within an hour, go through the stage's own client and judge, under each prompt
that comes with the product: what a prompt shares with the one that its slot worked on before is not evaluated again. A
prompt has what is constant first, then camera and time; with the demo's tokenizer the default one has some 90 tokens,
half of them constant, and the rest of what is shared is the beginning of the time: windows of two hours share 0.55. A
longer prompt, as real models want it, shares more.
"""

import asyncio
from collections.abc import Callable

import msgspec

from infra.local.stack import LocalStack
from processors.analyze.judge import Judge
from processors.analyze.llm import OpenAiLlm
from processors.analyze.settings import LlmSettings
from schemas import prompts
from schemas.prompts import PromptVersion
from schemas.records import Context
from tests.bench.analyze import contexts
from tests.bench.figure import Figure

NAMES: tuple[str, ...] = ("prefix_cache_share", "prefix_cache_share_second")

AIM = 0.6
WINDOWS = 100
QUICK_WINDOWS = 8

_EVENING = 1_780_000_000_000 - 1_780_000_000_000 % 86_400_000 + 20 * 3_600_000
_APART_MS = 36_000


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """Cached tokens as a share of all prompt tokens, against the aim: the default prompt, then the second."""
    figures: list[Figure] = []
    for name, prompt in zip(NAMES, (prompts.default(), prompts.deliveries_strict_nights()), strict=True):
        share = await _share(stack, prompt, lambda done: progress((len(figures) + done) / len(NAMES)), quick=quick)
        figures.append(Figure(name, share, AIM, share / AIM, "of prompt tokens", aim=1.0))
    return figures


async def _share(stack: LocalStack, prompt: PromptVersion, progress: Callable[[float], None], *, quick: bool) -> float:
    """Cached tokens as a share of all prompt tokens."""
    settings = LlmSettings(url=stack.llm_url)
    judge = Judge([OpenAiLlm(settings)], settings)
    windows = [_similar(one, n) for n, one in enumerate(contexts(QUICK_WINDOWS if quick else WINDOWS))]
    done = 0

    async def judged(number: int) -> tuple[int, int]:
        nonlocal done
        event = await judge.judge(windows[number], prompt, key=str(number))
        done += 1
        progress(done / len(windows))
        return event.cached_tokens, event.prompt_tokens

    counts = await asyncio.gather(*(judged(number) for number in range(len(windows))))
    await judge.close()
    return sum(cached for cached, _ in counts) / sum(tokens for _, tokens in counts)


def _similar(context: Context, number: int) -> Context:
    """The window as one of a single camera, half a minute after the one before."""
    began = _EVENING + number * _APART_MS
    lasted = context.batch.ended_at - context.batch.started_at
    batch = msgspec.structs.replace(context.batch, started_at=began, ended_at=began + lasted)
    return msgspec.structs.replace(context, batch=batch, camera_name="front-door")

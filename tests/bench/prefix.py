"""prefix_cache_share: which part of the prompts' tokens llama.cpp takes from its cache, over similar windows.

A hundred windows, of one camera within two hours, go through the stage's own client and judge, under the default
prompt: what a prompt shares with the one that its slot worked on before need not be evaluated again. The prompt has
what is constant first (half of its tokens, with the demo's tokenizer), then camera and time.
"""

import asyncio
from collections.abc import Callable

import msgspec

from infra.local.stack import LocalStack
from processors.analyze.judge import Judge
from processors.analyze.llm import OpenAiLlm
from processors.analyze.settings import LlmSettings
from schemas import prompts
from schemas.records import Context
from tests.bench.analyze import contexts
from tests.bench.figure import Figure

NAMES: tuple[str, ...] = ("prefix_cache_share",)

AIM = 0.6
WINDOWS = 100
QUICK_WINDOWS = 8

_EVENING = 1_780_000_000_000 - 1_780_000_000_000 % 86_400_000 + 20 * 3_600_000
_APART_MS = 72_000


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """Cached tokens as a share of all prompt tokens, against the aim."""
    settings = LlmSettings(url=stack.llm_url)
    judge = Judge([OpenAiLlm(settings)], settings)
    windows = [_similar(one, n) for n, one in enumerate(contexts(QUICK_WINDOWS if quick else WINDOWS))]
    done = 0

    async def judged(number: int) -> tuple[int, int]:
        nonlocal done
        event = await judge.judge(windows[number], prompts.default(), key=str(number))
        done += 1
        progress(done / len(windows))
        return event.cached_tokens, event.prompt_tokens

    counts = await asyncio.gather(*(judged(number) for number in range(len(windows))))
    await judge.close()
    share = sum(cached for cached, _ in counts) / sum(tokens for _, tokens in counts)
    return [Figure(NAMES[0], share, AIM, share / AIM, "of prompt tokens", aim=1.0)]


def _similar(context: Context, number: int) -> Context:
    """The window as one of a single camera, a minute or so after the one before."""
    began = _EVENING + number * _APART_MS
    lasted = context.batch.ended_at - context.batch.started_at
    batch = msgspec.structs.replace(context.batch, started_at=began, ended_at=began + lasted)
    return msgspec.structs.replace(context, batch=batch, camera_name="front-door")

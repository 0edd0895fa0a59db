"""Prompt versions in people's hands: read from a folder, checked before they judge, tried on what was recorded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from infra import topology
from infra.config import Settings
from infra.recorded import Recorded
from processors.analyze import core
from processors.analyze.core import Rendered
from processors.analyze.fitting import Count, budget, fit
from processors.analyze.gate import Priority
from processors.analyze.judge import CANARY, Judge
from processors.analyze.llm import OpenAiLlm
from processors.analyze.port import AttemptError, Llm
from processors.analyze.settings import SLOTS
from schemas import prompts
from schemas.prompts import Message, PromptError, PromptVersion
from schemas.records import Context, ContextSection, RiskEvent
from streams.errors import UnavailableError, UnprocessableError


class Shown(NamedTuple):
    """A chat as the server would get it."""

    rendered: Rendered
    tokens: int
    counted: bool
    """By the server's tokenizer; else it is a bound: no tokenizer makes more of it."""
    most: int
    """Tokens that it may have."""


class Tried(NamedTuple):
    """A recorded window, judged again."""

    recorded: Recorded
    event: RiskEvent | None
    failure: str
    """Why there is no event; empty where there is one."""


def texts_in(folder: Path, base: PromptVersion) -> dict[str, str]:
    """The texts of a folder laid out as `schemas/prompts`; what it does not hold is the base's.

    Raises:
        PromptError: a file goes by another name than those of a version, or none is there, or one is no UTF-8.
        OSError: one cannot be read.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in {".txt", ".json"}]
    strange = [path.name for path in files if path.name not in prompts.FILES]
    if strange or not files:
        what = f"{', '.join(strange)}: no file of a prompt" if strange else "no file of a prompt in it"
        raise PromptError(f"{folder}: {what}; there are {', '.join(prompts.FILES)}")
    try:
        return base.to_files() | {path.name: path.read_text(encoding="utf-8") for path in files}
    except UnicodeDecodeError as error:
        raise PromptError(f"{folder}: not UTF-8: {error}") from error


def write(texts: Mapping[str, str], folder: Path) -> None:
    """Write a version's files into a folder, made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")


@asynccontextmanager
async def servers(settings: Settings) -> AsyncIterator[list[Llm]]:
    """The servers that the settings name; nothing is recorded of what they say, so no weights are read."""
    found: list[Llm] = [OpenAiLlm(settings.llm, None, url) for url in settings.llm.urls]
    try:
        yield found
    finally:
        for server in found:
            await server.close()


async def shown(settings: Settings, llms: Sequence[Llm], context: Context, prompt: PromptVersion) -> Shown:
    """The chat for a window, its tokens counted by the first server that does; where all are away, by the settings.

    Raises:
        PromptError: it cannot be rendered, or its fixed part is too long.
        ValueError: the window cannot be told of.
    """

    async def counted(size: int, count: Count) -> Shown:
        most = budget(size, settings.llm, prompt)
        rendered = await fit(context, prompt, most, count)
        tokens = await count(rendered.messages)
        return Shown(rendered, tokens, tokens != core.token_bound(rendered.messages), most)

    async def bound(messages: Sequence[Message]) -> int:
        return core.token_bound(messages)

    for llm in llms:
        with contextlib.suppress(UnavailableError, AttemptError):
            counting = partial(llm.count_tokens, parameters=prompt.sampling)
            return await counted((await llm.server()).context_size, counting)
    # The embedded server's slots share the context.
    slots = (settings.llm.slots or SLOTS) if settings.local_llm else 1
    return await counted(settings.llm.context_size // slots, bound)


async def check(settings: Settings, llms: Sequence[Llm], prompt: PromptVersion) -> None:
    """Whether a version can judge: windows with and without sections, and one that shows nothing, can be rendered.

    Raises:
        PromptError: one cannot, or the fixed part leaves no room.
    """
    sections = tuple(
        ContextSection(name=name, text="Nothing unusual.", priority=0, made_by="check")
        for name in (*prompt.templates.sections, "another")
    )
    batch = CANARY.batch
    nothing = msgspec.structs.replace(
        batch, frames=tuple(msgspec.structs.replace(frame, boxes=()) for frame in batch.frames)
    )
    for context in (
        CANARY,
        msgspec.structs.replace(CANARY, sections=sections),
        msgspec.structs.replace(CANARY, batch=nothing),
    ):
        chat = (await shown(settings, llms, context, prompt)).rendered.messages
        prompt.repair(chat, "{}", "it is not JSON.")


async def try_out(
    settings: Settings,
    llms: Sequence[Llm],
    prompt: PromptVersion,
    windows: Sequence[Recorded],
    done: Callable[[], None],
) -> list[Tried]:
    """Judge recorded windows with a version, as analyze does, and write nothing; `done` is called after each.

    Raises:
        UnavailableError: the servers are away, or do not judge the canary with this version.
    """
    told = settings.llm.slots
    for llm in llms:
        if not told:
            with contextlib.suppress(UnavailableError):
                told = (await llm.server()).slots
    # One slot is left to live windows, where there is more than one.
    slots = max(1, (told or SLOTS) - 1)
    mine = settings.llm.model_copy(update={"slots": slots})
    judge = Judge(llms, mine, conditions=topology.conditions(settings))
    free = asyncio.Semaphore(slots * len(llms))

    async def one(recorded: Recorded) -> Tried:
        async with free:
            try:
                event = await judge.judge(
                    recorded.context, prompt, key=recorded.context.batch_id, run="test", priority=Priority.REPLAY
                )
            except UnprocessableError as error:
                return Tried(recorded, None, str(error))
            finally:
                done()
            return Tried(recorded, event, "")

    tasks = [asyncio.create_task(one(recorded)) for recorded in windows]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def canary() -> Recorded:
    """The stored window that any working analyst can judge, where nothing was recorded yet."""
    return Recorded(CANARY, "", 0, "", "")

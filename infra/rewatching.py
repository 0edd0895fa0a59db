"""The stage replay: what it is made of, and how it runs beside analyze in one process, sharing its judge."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import structlog

from infra.config import Settings
from infra.stopping import StoppedError, unless
from processors.analyze.judge import Judge
from processors.analyze.settings import LlmSettings
from processors.analyze.stage import build_judge
from processors.replay.plan import Llm
from processors.replay.stage import Judges, Look, ReplayStage
from schemas.prompts import PromptVersion
from schemas.records import Replay
from streams.control import ControlTable
from streams.host_raw import RawHost
from streams.kafka import Kafka
from streams.liveness import Liveness
from streams.lives import Lives
from streams.metrics import Together
from streams.prompts import Prompts

log = structlog.get_logger(__name__)

# How long analyze has for itself when it starts: what waits for it is live. It joins within two seconds.
_FIRST_S = 10.0
_LOOK_S = 0.1
# What ended it once ends it again, as a rule.
_AGAIN_S = 30.0


def build(settings: Settings, replays: ControlTable[Replay], prompts: Prompts, judge: Judge) -> ReplayStage:
    """The stage; it closes the judge, so another's is to be shared with it (`Judge.share`)."""

    def prompt(digest: str) -> PromptVersion | None:
        known = prompts.versions().get(digest)
        return known.version if known is not None else None

    async def load() -> None:
        await asyncio.gather(replays.load(), prompts.table.load())

    judges = Judges(judge, partial(_another, settings))
    return ReplayStage(judges, Look(replays.all, prompt, load), deadline_s=settings.llm.deadline_s)


def _another(settings: Settings, llm: Llm) -> Judge:
    """A judge that asks another LLM, otherwise as the settings say. It gets no key: that is the other server's."""
    changed = {"url": llm.url, "model": llm.model, "model_path": llm.model_path or "demo", "api_key": None}
    weights = Path(llm.model_path) if llm.model_path else None
    return build_judge(LlmSettings.model_validate(dict(settings.llm) | changed), weights=weights)


class Beside:
    """The stage in the process of analyze. Whatever becomes of it, live windows go on to be judged."""

    def __init__(self, settings: Settings, kafka: Kafka, prompts: Prompts, judge: Judge, lives: Lives) -> None:
        self._settings = settings
        self._kafka = kafka
        self._prompts = prompts
        self._judge = judge
        self._lives = lives

    async def run(
        self, stop: asyncio.Event, *, after: Liveness, status: Path, member: str | None, told: Together
    ) -> None:
        """Run it until the stop, from when analyze has joined its group; again where it fails.

        Args:
            stop: set it to end.
            after: how analyze is.
            status: where to report; not analyze's own file.
            member: analyze's name in its group.
            told: what Prometheus is told of this process.
        """
        deadline = asyncio.get_running_loop().time() + _FIRST_S
        with contextlib.suppress(StoppedError):
            while after.generation < 0 and asyncio.get_running_loop().time() < deadline:
                await unless(stop, asyncio.sleep(_LOOK_S))
            while not stop.is_set():
                try:
                    await self._run(stop, status, f"{member}-replay" if member else None, told)
                except StoppedError:
                    return
                except Exception:  # it must not take analyze with it
                    log.exception("replay ended by an error that nobody expected")
                    await unless(stop, asyncio.sleep(_AGAIN_S))

    async def _run(self, stop: asyncio.Event, status: Path, member: str | None, told: Together) -> None:
        replays = ControlTable(self._kafka, "replays", Replay)
        async with AsyncExitStack() as stack:
            await unless(stop, stack.enter_async_context(replays.following()))
            stage = build(self._settings, replays, self._prompts, self._judge.share())
            host = RawHost(self._kafka, stage, epochs=self._lives, status=status, member=member)
            told.collectors.append(host.workers.collector)
            try:
                await host.run(stop)
            finally:
                told.collectors.remove(host.workers.collector)


async def together(stop: asyncio.Event, *runs: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run them until the stop, or until one ends: then all end, in order.

    Raises:
        Exception: what ended the first of them.
    """
    over = asyncio.Event()

    async def until_over(run: Callable[[asyncio.Event], Awaitable[None]]) -> None:
        try:
            await run(over)
        finally:
            over.set()

    async def asked() -> None:
        await stop.wait()
        over.set()

    asking = asyncio.create_task(asked())
    try:
        ended = await asyncio.gather(*map(until_over, runs), return_exceptions=True)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    for error in ended:
        if error is not None:
            raise error

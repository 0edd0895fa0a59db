"""Replays, units and windows for the tests of the stage replay."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from processors.analyze.fakes import FakeLlm
from processors.analyze.judge import Judge
from processors.analyze.settings import LlmSettings
from processors.replay.plan import Change, Llm, Plan, Unit
from processors.replay.stage import Judges, Look, ReplayStage
from schemas import ids, prompts
from schemas.prompts import PromptVersion
from schemas.records import Context, Replay, ReplayUnit
from streams import codec
from streams.messages import Incoming
from tests.processors.analyze_samples import context, seen

DEFAULT = prompts.default()
STRICT = prompts.deliveries_strict_nights()


def plan(kind: str = "change", **changes: Any) -> Plan:
    return Plan(kind=kind, change=Change(prompt=STRICT.digest), **changes)


def replay(name: str, of: Plan, state: str = "running") -> Replay:
    return Replay(replay_id=name, name=f"the {name}", state=state, plan=of.encode(), updated_at=1)


def window(number: int, camera: str = "door") -> Context:
    """A window like no other: its one frame is its own."""
    found = context((seen("person", x=100.0 + number),), camera=camera, started_at=1_790_370_840_000 + number * 100_000)
    frames = tuple(msgspec.structs.replace(f, frame_id=f"{camera}:{number}") for f in found.batch.frames)
    batch_id = ids.batch_id(camera, [frame.frame_id for frame in frames])
    batch = msgspec.structs.replace(found.batch, batch_id=batch_id, frames=frames)
    return msgspec.structs.replace(found, batch_id=batch_id, batch=batch)


def unit(name: str, of: Context, prompt: PromptVersion = STRICT, **changes: Any) -> ReplayUnit:
    made = ReplayUnit(
        unit_id=str(Unit(name, of.batch_id)),
        replay_id=name,
        camera_id=of.camera_id,
        kind="judge",
        payload=codec.encode("contexts", of)[0],
        created_at=2,
        prompt_digest=prompt.digest,
    )
    return msgspec.structs.replace(made, **changes)


def read(topic: str, record: Any, offset: int = 7, *, partition: int = 0, epoch: str = "e1") -> Incoming:
    """The record as a host hands it to a stage."""
    emit = codec.emit(topic, record)
    return Incoming(topic, epoch, partition, offset, emit.key, emit.value, emit.headers)


class Known:
    """What is on the log of replays and prompts, and what the stage has read of it."""

    def __init__(self, *replays: Replay, prompts: tuple[PromptVersion, ...] = (DEFAULT, STRICT)) -> None:
        self.on_log = {one.replay_id: one for one in replays}
        self.prompts_on_log = {one.digest: one for one in prompts}
        self.replays: Mapping[str, Replay] = dict(self.on_log)
        self.prompts: Mapping[str, PromptVersion] = dict(self.prompts_on_log)
        self.loads = 0
        self.away: Exception | None = None

    async def load(self) -> None:
        self.loads += 1
        if self.away is not None:
            raise self.away
        self.replays, self.prompts = dict(self.on_log), dict(self.prompts_on_log)

    def say(self, record: Replay) -> None:
        """A step of a replay that the stage has read."""
        self.on_log[record.replay_id] = record
        self.replays = dict(self.on_log)

    @property
    def look(self) -> Look:
        return Look(lambda: self.replays, self._prompt, self.load)

    def _prompt(self, digest: str) -> PromptVersion | None:
        return self.prompts.get(digest)


def judge_of(
    script: Any, *, slots: int = 2, clock: Callable[[], float] = time.perf_counter, deadline_s: float = 30.0
) -> Judge:
    return Judge([FakeLlm(script, slots=slots)], LlmSettings(deadline_s=deadline_s), wall=lambda: 42, clock=clock)


def stage_of(judge: Judge, known: Known, others: Mapping[Llm, Judge] | None = None) -> ReplayStage:
    return ReplayStage(Judges(judge, lambda llm: (others or {})[llm]), known.look, deadline_s=30.0, clock=lambda: 3.0)

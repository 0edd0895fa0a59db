"""A past made up and put into ClickHouse through the sink: windows, verdicts, replays of them, labels."""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from processors.replay.plan import Change, Plan, Scope
from processors.sink import core
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import (
    Batch,
    BatchFrame,
    Context,
    DeadLetter,
    Label,
    Record,
    Replay,
    ReplayEvent,
    ReplayUnit,
    RiskEvent,
    SeenBox,
)
from streams import codec
from streams.messages import Incoming
from streams.stages import Range
from tests import examples
from tests.processors.compare_kit import AT, level

KEPT = (
    *("log", "batches", "contexts", "risk_events", "labels", "cameras"),
    *("replays", "replay_units", "replay_events", "dead_letters"),
)
"""Tables that a `Past` fills."""
STRICT = {
    "endpoint": "local",
    "slots": "1",
    "context_size": "4096",
    "prompt_cache": "off",
    "seed": "7",
    "server_build": "b1",
    "threads": "2",
    "gpu_layers": "0",
}
"""Conditions under which the same question has the same answer."""


class Past:
    """Records to be kept, in the order in which they are made: each topic on one partition of one life."""

    def __init__(self) -> None:
        # Of its own: the engine drops what comes again under a token that it has seen.
        self.epoch = secrets.token_hex(4)
        self.records: dict[str, list[Record]] = {}

    def add(self, topic: str, record: Any) -> int:
        """One record more; its offset."""
        of_topic = self.records.setdefault(topic, [])
        of_topic.append(record)
        return len(of_topic) - 1

    def window(
        self, camera: str, frames: Sequence[int], *, classes: Sequence[str] = ("person",), zone: str = "Europe/Berlin"
    ) -> Batch:
        """A recorded window of the camera's frames of these numbers, a second each, and its context."""
        made = batch(camera, frames, classes=classes, epoch=self.epoch, closed_at=len(self.records.get("batches", [])))
        self.add("batches", made)
        self.add("contexts", context(made, zone))
        return made

    def live(self, of: Batch, score: int, **more: Any) -> RiskEvent:
        """What live work said of it."""
        made = event(of, score, **more)
        self.add("risk_events", made)
        return made

    def replay(self, replay_id: str, state: str = "done", name: str = "", plan: Plan | None = None) -> str:
        """A replay's newest record."""
        made = plan or Plan(kind="change", scope=Scope(), change=Change(prompt="b" * 32))
        at = AT + len(self.records.get("replays", []))
        self.add("replays", Replay(replay_id=replay_id, name=name, state=state, plan=made.encode(), updated_at=at))
        return replay_id

    def unit(self, replay_id: str, of: Batch) -> int:
        """The unit that has it judged again; its offset."""
        payload, _ = codec.encode("contexts", context(of))
        return self.add(
            "replay_units",
            ReplayUnit(
                unit_id=f"{replay_id}:{of.batch_id}",
                replay_id=replay_id,
                camera_id=of.camera_id,
                kind="judge",
                payload=payload,
                created_at=AT,
                prompt_digest="b" * 32,
            ),
        )

    def again(self, replay_id: str, of: Batch, score: int, *, reused: bool = False, **more: Any) -> RiskEvent:
        """What a replay said of it, and its unit."""
        if not reused:
            self.unit(replay_id, of)
        made = event(of, score, run=replay_id, **more)
        self.add(
            "replay_events",
            ReplayEvent(
                replay_id=replay_id,
                unit_id=f"{replay_id}:{of.batch_id}",
                event_id=made.event_id,
                camera_id=of.camera_id,
                reused=reused,
                event=made,
            ),
        )
        return made

    def letter(self, offset: int) -> None:
        """A unit that could not be judged."""
        origin = ids.origin("replay_units", self.epoch, 0, offset)
        self.add("dead_letters", _letter(origin))

    def label(self, verdict: str, of: RiskEvent | None = None, **more: Any) -> None:
        """What a person said, of an event or of a span."""
        made: dict[str, Any] = {
            "label_id": secrets.token_hex(8),
            "camera_id": "gate",
            "started_at": AT,
            "ended_at": AT,
            "verdict": verdict,
            "author": "",
            "note": "",
            "labelled_at": AT + len(self.records.get("labels", [])),
        }
        if of is not None:
            made |= {
                "camera_id": of.camera_id,
                "started_at": of.started_at,
                "ended_at": of.ended_at,
                "event_id": of.event_id,
            }
        self.add("labels", Label(**made | more))

    async def keep(self, settings: ClickHouseSettings) -> None:
        """Into ClickHouse's typed tables, as the sink puts it there; into `log` only what is read from it."""
        store = ClickHouseStore(settings)
        try:
            for topic, records in self.records.items():
                came = [self._came(topic, offset, record) for offset, record in enumerate(records)]
                made = core.rows(Range(topic, self.epoch, 0, 0, len(came) - 1), came)
                await store.insert(made.typed, f"{topic}:{self.epoch}")
                if topic == "replay_units":
                    await store.insert(made.log, f"log:{topic}:{self.epoch}")
        finally:
            await store.close()

    def _came(self, topic: str, offset: int, record: Record) -> Incoming:
        made = codec.emit(topic, record)
        return Incoming(topic, self.epoch, 0, offset, made.key, made.value, made.headers)


def batch(
    camera: str, frames: Sequence[int], *, classes: Sequence[str] = ("person",), epoch: str = "e1", closed_at: int = 0
) -> Batch:
    """A window. What is seen in its first frame matters; there is a car that stands still, and a frame between."""
    names = [f"{camera}:{n:032x}" for n in frames]
    still = _box("car", stationary=True)
    return Batch(
        batch_id=ids.batch_id(camera, names),
        camera_id=camera,
        started_at=AT + 1000 * frames[0],
        ended_at=AT + 1000 * frames[-1],
        frames=tuple(
            BatchFrame(
                frame_id=name,
                offset=n,
                event_at=AT + 1000 * n,
                width=640,
                height=360,
                matters=index == 0,
                late=False,
                boxes=(*map(_box, classes), still) if index == 0 else (_box("bird"),),
            )
            for index, (n, name) in enumerate(zip(frames, names, strict=True))
        ),
        closed_by="idle",
        closed_at_offset=closed_at,
        partition=0,
        epoch=epoch,
        settings_digest="5" * 32,
    )


def context(of: Batch, zone: str = "Europe/Berlin") -> Context:
    """The window as it is told."""
    return Context(
        batch_id=of.batch_id, camera_id=of.camera_id, batch=of, camera_name=of.camera_id, time_zone=zone, sections=()
    )


def event(of: Batch, score: int, **more: Any) -> RiskEvent:
    """A verdict on the window."""
    run = more.get("run", ids.LIVE)
    made = {
        "event_id": ids.event_id(of.batch_id, run),
        "batch_id": of.batch_id,
        "camera_id": of.camera_id,
        "started_at": of.started_at,
        "ended_at": of.ended_at,
        "frame_ids": tuple(frame.frame_id for frame in of.frames),
        "risk_score": score,
        "risk_level": level(score),
        "raw_completion": f'{{"risk_score": {score}}}',
        "conditions": STRICT,
    }
    return msgspec.structs.replace(examples.risk_event, **made | more)


def _box(label: str, *, stationary: bool = False) -> SeenBox:
    return SeenBox(label=label, score=0.8, x=1.0, y=2.0, width=30.0, height=60.0, stationary=stationary)


def _letter(origin: str) -> DeadLetter:
    return msgspec.structs.replace(examples.dead_letter, origin=origin, stage="replay")

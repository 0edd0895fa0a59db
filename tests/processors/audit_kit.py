"""A small history as the stages make it, with positions and sources, and ways to keep or spoil it."""

import secrets
from array import array
from collections.abc import Mapping
from typing import Any

import msgspec
from aiokafka import TopicPartition

from processors.batch.settings import WindowsSettings
from processors.batch.stage import build
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.audit import Report, account
from processors.store.audit_sql import Bounds
from processors.store.queries import Queries
from schemas import ids
from schemas.records import Box, Context, DeadLetter, Detections, Frame, Record, RiskEvent, TopicMeta
from streams import codec
from streams.messages import SOURCE, Incoming, Tick
from streams.stages import Range
from streams.survey import READS, Count, Position, Survey, _Seen
from streams.topics import STORED
from tests import examples

WINDOWS = WindowsSettings().record()
CAMERAS = ("gate", "yard")
AT = examples.AT


class History:
    """Two cameras, each on a partition of its own: frames, detections, one window, its context and its event.

    Offsets leave a hole behind each record, as the markers of transactions do.
    """

    def __init__(self, frames: int = 6) -> None:
        # Of its own: the engine drops what comes again under a token that it has seen.
        self.epoch = secrets.token_hex(4)
        self.records: dict[str, list[Incoming]] = {topic: [] for topic in STORED}
        for partition, camera in enumerate(CAMERAS):
            fold = build(WINDOWS, lambda _: None).open(partition, self.epoch, [])
            for n in range(frames):
                frame = self.add("frames", partition, frame_of(camera, n))
                seen = self.add("detections", partition, detections_of(camera, n), frame)
                assert fold.feed(seen) == []
            # A tick goes the same way and is no data.
            tick = Tick(AT, camera).emit("frames")
            self._put(Incoming("frames", self.epoch, partition, 2 * frames, tick.key, None, tick.headers))
            closing = Incoming("detections", self.epoch, partition, 2 * frames, tick.key, None, tick.headers)
            self._put(closing)
            [closed] = fold.feed(closing)
            batch = Incoming(
                "batches", self.epoch, partition, 0, closed.key, closed.value, (*closed.headers, _made_of(closing))
            )
            self._put(batch)
            record = codec.decode(batch, examples.RECORDS["batches"].__class__)
            context = self.add("contexts", partition, context_of(record), batch)
            self.add("risk_events", partition, event_of(record), context)

    def add(
        self, topic: str, partition: int, record: Record, made_of: Incoming | None = None, **headers: str
    ) -> Incoming:
        """One record more on a topic."""
        made = codec.emit(topic, record)
        more = [*([_made_of(made_of)] if made_of else []), *((name, text.encode()) for name, text in headers.items())]
        offset = max((r.offset + 2 for r in self.records[topic] if r.partition == partition), default=0)
        return self._put(Incoming(topic, self.epoch, partition, offset, made.key, made.value, (*made.headers, *more)))

    def _put(self, record: Incoming) -> Incoming:
        self.records[record.topic].append(record)
        return record

    def of(self, topic: str, partition: int = 0) -> list[Incoming]:
        """The records of a topic's partition, without ticks."""
        return [r for r in self.records[topic] if r.partition == partition and Tick.of(r) is None]

    def drop(self, record: Incoming) -> None:
        """As if it had never been made."""
        self.records[record.topic].remove(record)

    async def keep(self, store: ClickHouseStore) -> None:
        """Into ClickHouse, through the sink."""
        stage = SinkStage(store)
        for topic, records in self.records.items():
            for partition in sorted({r.partition for r in records}):
                part = sorted((r for r in records if r.partition == partition), key=lambda r: r.offset)
                await stage.insert(Range(topic, self.epoch, partition, part[0].offset, part[-1].offset), part)

    def look(self, positions: Mapping[tuple[str, str, int], int] | None = None) -> tuple[Survey, dict[Any, Any]]:
        """What a survey says: every stage is at the end but those whose `(stage, topic, partition)` is given."""
        seen = {}
        for topic in STORED:
            for partition in range(len(CAMERAS)):
                records = sorted(r.offset for r in self.records[topic] if r.partition == partition)
                ticks = [r.offset for r in self.records[topic] if r.partition == partition and Tick.of(r) is not None]
                end = max(records, default=-1) + 2
                seen[TopicPartition(topic, partition), self.epoch] = _Seen(
                    array("q", records), array("q", ticks), 0, end
                )
        metas = {
            topic: TopicMeta(topic=topic, epoch=self.epoch, status="ready", partitions=len(CAMERAS), created_at=0)
            for topic in STORED
        }

        def position(stage: str, topic: str, partition: int) -> Position:
            tp = TopicPartition(topic, partition)
            there = seen[tp, self.epoch]
            committed = (positions or {}).get((stage, topic, partition), there.upto)
            behind = Count(sum(offset >= committed for offset in there.offsets), exact=True)
            return Position(tp, committed, 0, there.upto, behind)

        return (
            Survey(
                metas,
                {},
                {
                    stage: [position(stage, topic, p) for topic in topics for p in range(len(CAMERAS))]
                    for stage, topics in READS.items()
                },
            ),
            seen,
        )

    async def audited(
        self, queries: Queries, positions: Mapping[tuple[str, str, int], int] | None = None, **bounds: Any
    ) -> Report:
        """What the audit says of it."""
        look, memory = self.look(positions)
        return await account(queries, look, memory, WINDOWS, Bounds(**bounds))


def found(report: Report) -> set[tuple[str, str]]:
    """The violations by kind and id."""
    return {(violation.kind, violation.id) for violation in report.violations}


def frame_of(camera: str, n: int) -> Frame:
    """A camera's nth frame."""
    sha = ids.digest(camera, str(n)) * 2
    return Frame(
        frame_id=ids.frame_id(camera, sha, AT + n * 1000),
        camera_id=camera,
        sha256=sha,
        size=4000,
        width=320,
        height=240,
        captured_at=AT + n * 1000,
        captured_from="exif",
        arrived_at=AT + n * 1000 + 50,
        image=b"\xff\xd8 not a real image",
        source="folder",
        source_name=f"{n}.jpg",
    )


def detections_of(camera: str, n: int) -> Detections:
    """What was seen in it: someone who walks, beside a parked car."""
    frame = frame_of(camera, n)
    return Detections(
        frame_id=frame.frame_id,
        camera_id=camera,
        captured_at=frame.captured_at,
        arrived_at=frame.arrived_at,
        width=320,
        height=240,
        boxes=(
            Box(label="person", score=0.8, x=30.0 * n, y=20.0, width=25.0, height=80.0),
            Box(label="car", score=0.88, x=100.0, y=60.0, width=90.0, height=50.0),
        ),
        model="rtdetr",
        model_digest="d" * 64,
        runtime="torch-cpu",
        inference_ms=20.0,
        detected_at=frame.arrived_at + 50,
    )


def context_of(batch: Any) -> Context:
    """The window as it is told."""
    return Context(
        batch_id=batch.batch_id,
        camera_id=batch.camera_id,
        batch=batch,
        camera_name=batch.camera_id,
        time_zone="UTC",
        sections=(),
    )


def event_of(batch: Any) -> RiskEvent:
    """The verdict on it."""
    return msgspec.structs.replace(
        examples.risk_event,
        event_id=ids.event_id(batch.batch_id),
        batch_id=batch.batch_id,
        camera_id=batch.camera_id,
        started_at=batch.started_at,
        ended_at=batch.ended_at,
        frame_ids=tuple(frame.frame_id for frame in batch.frames),
    )


def letter_of(record: Incoming, stage: str, **other: Any) -> DeadLetter:
    """The dead letter of a record."""
    return msgspec.structs.replace(
        examples.dead_letter, origin=record.origin, stage=stage, camera_id=(record.key or b"").decode(), **other
    )


def _made_of(record: Incoming) -> tuple[str, bytes]:
    return (SOURCE, record.origin.encode())

"""What the tests of the command line share: one small story on the log, and a root that runs commands on it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import structlog
from aiokafka import TopicPartition
from typer.testing import CliRunner, Result

from infra.cli.main import app
from infra.config import Settings
from processors.sink.core import TABLES
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.queries import Lineage, Model, Row
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import (
    Batch,
    BatchFrame,
    Box,
    Context,
    ContextSection,
    DeadLetter,
    Detections,
    Frame,
    Record,
    RiskEvent,
    SeenBox,
)
from streams import codec
from streams.admin import read_meta
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.messages import Incoming, Tick
from streams.stages import Range
from streams.topics import partition_of

AT = 1_793_613_600_000
"""2026-11-02 10:00 UTC."""


def invoke(*arguments: str) -> Result:
    """Run a command as a person does, in this process."""
    try:
        return CliRunner().invoke(app, list(arguments))
    finally:
        structlog.reset_defaults()  # the root pointed it at a standard error that is gone now


def answer(*arguments: str, code: int = 0) -> Any:
    """What a command says with --json."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def story(camera: str) -> dict[str, list[Record]]:
    """Three frames of a person beside a parked car, the window that they made, its verdict, and a dead letter."""
    shas = [ids.digest(camera, str(n)) * 2 for n in range(3)]
    frame_ids = [ids.frame_id(camera, sha, AT + n * 1000) for n, sha in enumerate(shas)]
    person = {"label": "person", "score": 0.93, "x": 10.0, "y": 20.0, "width": 40.0, "height": 80.0}
    car = {"label": "car", "score": 0.88, "x": 100.0, "y": 60.0, "width": 90.0, "height": 50.0}
    bird = {"label": "bird", "score": 0.12, "x": 5.0, "y": 5.0, "width": 4.0, "height": 4.0}
    batch = Batch(
        batch_id=ids.batch_id(camera, frame_ids),
        camera_id=camera,
        started_at=AT,
        ended_at=AT + 2000,
        frames=tuple(
            BatchFrame(
                frame_id=frame_id,
                offset=n,
                event_at=AT + n * 1000,
                width=320,
                height=240,
                matters=True,
                late=False,
                boxes=(SeenBox(**person, stationary=False), SeenBox(**car, stationary=True)),
            )
            for n, frame_id in enumerate(frame_ids)
        ),
        closed_by="end_of_stream",
        closed_at_offset=4,
        partition=0,
        epoch="0" * 8,
        settings_digest="5" * 32,
    )
    event_id = ids.event_id(batch.batch_id)
    event = RiskEvent(
        event_id=event_id,
        batch_id=batch.batch_id,
        camera_id=camera,
        run="live",
        started_at=batch.started_at,
        ended_at=batch.ended_at,
        frame_ids=tuple(frame_ids),
        risk_score=72,
        risk_level="high",
        summary="A person tries [red]doors\x1b[2J of parked cars.",
        reasoning="Three frames show the same person at the car.",
        risk_factors=("night", "stays"),
        entities=("person", "car"),
        recommended_action="review",
        verdict_digest="a" * 32,
        prompt_digest="b" * 32,
        model="analyst",
        model_digest="c" * 64,
        parameters='{"temperature": 0}',
        conditions={"slots": "1", "seed": "0"},
        rendered_prompt=json.dumps([{"role": "system", "content": "Judge."}, {"role": "user", "content": "A window."}]),
        raw_completion='{"risk_score": 72}',
        dropped_sections=(),
        repaired=False,
        prompt_tokens=300,
        completion_tokens=60,
        cached_tokens=100,
        queued_ms=1.0,
        inference_ms=900.0,
        judged_at=AT + 5000,
    )
    return {
        "frames": [
            Frame(
                frame_id=frame_id,
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
            for n, (frame_id, sha) in enumerate(zip(frame_ids, shas, strict=True))
        ],
        "detections": [
            Detections(
                frame_id=frame_id,
                camera_id=camera,
                captured_at=AT + n * 1000,
                arrived_at=AT + n * 1000 + 50,
                width=320,
                height=240,
                boxes=(Box(**person), Box(**car), Box(**bird)),
                model="rtdetr",
                model_digest="d" * 64,
                runtime="torch-cpu",
                inference_ms=20.0,
                detected_at=AT + n * 1000 + 100,
            )
            for n, frame_id in enumerate(frame_ids)
        ],
        "batches": [batch],
        "contexts": [
            Context(
                batch_id=batch.batch_id,
                camera_id=camera,
                batch=batch,
                camera_name="Front door",
                time_zone="Europe/Berlin",
                sections=(
                    ContextSection(name="baseline", text="Nobody comes at this hour.", priority=1, made_by="b/1"),
                ),
            )
        ],
        "risk_events": [event],
        "dead_letters": [
            DeadLetter(
                origin=f"frames:{'e' * 8}:0:{AT % 1000}{len(camera)}",
                camera_id=camera,
                stage="detect",
                kind="error",
                error="UnidentifiedImageError",
                message="not an image\x07",
                attempt=1,
                key=camera.encode(),
                value=b"\x00\xffgarbage",
                headers={"fp": b"\x01\x02"},
                detail="",
                failed_at=AT + 60_000,
            )
        ],
    }


async def put_on_log(settings: Settings, camera: str) -> list[Incoming]:
    """The story on the log, each topic in transactions of its own (so with markers), and a tick; as it is read back."""
    kafka = Kafka(settings.kafka)
    partition = partition_of(camera, settings.kafka.partitions)
    producer = FencedProducer(kafka, kafka.transactional_id("story", camera))
    await producer.open()
    try:
        await producer.transact([Tick(AT, camera).emit("frames", partition)])
        for topic, records in story(camera).items():
            for record in records:
                await producer.transact([codec.emit(topic, record, partition)])
    finally:
        await producer.close()
    metas = await read_meta(kafka)
    found: list[Incoming] = []
    for topic in ("frames", *story(camera)):
        tp = TopicPartition(topic, partition)
        found += [record for record in await kafka.read([tp], epoch=metas[topic].epoch) if _of(record, camera)]
    return list(dict.fromkeys(found))


async def put_in_store(settings: Settings, records: Sequence[Incoming]) -> None:
    """The records in ClickHouse, as the sink puts them there."""
    store = ClickHouseStore(settings.clickhouse)
    await store.migrate()
    sink = SinkStage(store)
    try:
        for topic, epoch, partition in dict.fromkeys((r.topic, r.epoch, r.partition) for r in records):
            part = [r for r in records if (r.topic, r.epoch, r.partition) == (topic, epoch, partition)]
            await sink.insert(Range(topic, epoch, partition, part[0].offset, part[-1].offset), part)
    finally:
        await sink.close()


class FakeQueries:
    """Stands where `Queries` does, holding the story of the camera `front` as ClickHouse's tables would."""

    away: Exception | None = None
    raw_answer = b"{}"
    verdicts: ClassVar[list[Row]] = []
    """What the view `score_history` has."""
    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, _settings: ClickHouseSettings) -> None:
        self.tables = {topic: [_row(topic, n, r) for n, r in enumerate(rs)] for topic, rs in story("front").items()}

    async def aclose(self) -> None: ...

    async def counts(self) -> dict[str, int]:
        self._answer()
        return {topic: len(rows) for topic, rows in self.tables.items()}

    async def models(self) -> dict[str, Model]:
        self._answer()
        told = {"detector": self.tables["detections"][-1], "analyst": self.tables["risk_events"][-1]}
        return {role: Model(row["model"], row["model_digest"]) for role, row in told.items()}

    async def dead_letter_counts(self) -> list[Row]:
        self._answer()
        return [{"stage": "detect", "kind": "error", "count": 1}]

    async def dead_letters(self, **asked: Any) -> list[Row]:
        self._answer(asked)
        return [
            row
            | {
                "key": None if row["key"] is None else row["key"].hex(),
                "value": None if row["value"] is None else row["value"].hex(),
                "headers": [(name, value.hex()) for name, value in row["headers"]],
                "status": "open",
            }
            for row in self.tables["dead_letters"]
            if row["origin"].startswith(asked.get("origin") or "")
        ]

    async def events(self, **asked: Any) -> list[Row]:
        self._answer(asked)
        return self.tables["risk_events"]

    async def events_like(self, text: str, *, limit: int) -> list[Row]:
        self._answer()
        found = [row for row in self.tables["risk_events"] if row["event_id"].startswith(text)]
        return found[:limit]

    async def made_from(self, event: Row) -> Lineage:
        return Lineage(
            event,
            self.tables["batches"][0],
            self.tables["contexts"][0],
            {row["frame_id"]: row for row in self.tables["frames"]},
            {row["frame_id"]: row for row in self.tables["detections"]},
        )

    async def rows(self, query: str, **asked: Any) -> list[Row]:
        self._answer(asked)
        return self.verdicts if "score_history" in query else []

    async def raw(self, query: str, fmt: str, *, limit: int) -> bytes:
        self._answer({"query": query, "fmt": fmt, "limit": limit})
        return self.raw_answer

    def _answer(self, asked: dict[str, Any] | None = None) -> None:
        self.asked.append(asked or {})
        if self.away is not None:
            raise self.away


def _row(topic: str, offset: int, record: Record) -> Row:
    """The record as a row of its table: the sink's own columns, with what ClickHouse's client makes of them."""
    row: Row = {"epoch": "f" * 8, "partition": 0, "offset": offset}
    for name, get in TABLES[topic].items():
        value = get(record)
        if name.endswith("_at"):
            value = [_time(ms) for ms in value] if isinstance(value, list) else _time(value)
        elif name == "frames.boxes":
            value = [[dict(zip(SeenBox.__struct_fields__, box, strict=True)) for box in boxes] for boxes in value]
        row[name] = value
    return row


def _time(ms: int | None) -> datetime | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)


def _of(record: Incoming, camera: str) -> bool:
    name = camera.encode()
    return record.key == name or (record.topic == "dead_letters" and name in (record.value or b""))

"""What the tests of the gateway share: windows with all that stands behind them, in a ClickHouse of their own."""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
from aiokafka import TopicPartition
from starlette.types import ASGIApp

from infra.config import Settings
from processors.gateway.service import build_source
from processors.gateway.settings import GatewaySettings
from processors.gateway.source import StoredSource
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from schemas import ids, prompts
from schemas.records import BatchFrame, Box, Camera, Detections, Frame, Record, SeenBox
from streams import codec
from streams.claims import ClaimStore
from streams.control import Cameras
from streams.kafka import Kafka
from streams.messages import Incoming
from streams.serving import listen, serve
from streams.stages import Range
from streams.topics import TOPICS, partition_of
from tests import examples
from tests.conftest import PARTITIONS
from tests.processors.ingest_kit import jpeg

AT = 1_793_613_600_000
"""2026-11-02 10:00 UTC."""
EPOCH = "e" * 8
KEY = "correct horse battery staple"
WINDOW = msgspec.structs.replace(examples.window, open_on=("person",))
PROMPT = prompts.default()

PERSON = {"label": "person", "score": 0.75, "x": 10.0, "y": 20.0, "width": 40.0, "height": 80.0}
CAR = {"label": "car", "score": 0.88, "x": 100.0, "y": 60.0, "width": 90.0, "height": 50.0}
PARKED = {"label": "person", "score": 0.99, "x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0}
BIRD = {"label": "bird", "score": 0.12, "x": 5.0, "y": 5.0, "width": 4.0, "height": 4.0}

LEVELS = {12: "low", 45: "medium", 72: "high", 97: "critical"}


def moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def image(camera: str, at: int, n: int) -> bytes:
    """A picture of its own for each frame."""
    return jpeg(int(hashlib.sha256(f"{camera}{at}{n}".encode()).hexdigest()[:4], 16))


def camera(name: str, *, at: int = AT - 1_000_000, **changes) -> Camera:
    return msgspec.structs.replace(
        examples.camera, camera_id=name, name=name.title(), window=WINDOW, updated_at=at, **changes
    )


def window(name: str, at: int, *, score: int = 72, frames: int = 3, claim: str | None = None) -> list[Record]:
    """A window of `frames` frames a second apart, the second of them the surest, and all that stands behind it.

    With `claim`, its first image is in the image store, named so.
    """
    images = [image(name, at, n) for n in range(frames)]
    shas = [hashlib.sha256(data).hexdigest() for data in images]
    if claim is not None:
        shas[0] = claim
    frame_ids = [ids.frame_id(name, sha, at + n * 1000) for n, sha in enumerate(shas)]
    found: list[Record] = []
    for n, (frame_id, sha) in enumerate(zip(frame_ids, shas, strict=True)):
        captured = at + n * 1000
        claimed = n == 0 and claim is not None
        found.append(
            Frame(
                frame_id=frame_id,
                camera_id=name,
                sha256=sha,
                size=len(images[n]),
                width=320,
                height=240,
                captured_at=captured,
                captured_from="exif",
                arrived_at=captured + 50,
                image=None if claimed else images[n],
                claim=f"sha256:{sha}" if claimed else None,
                source="folder",
                source_name=f"{n}.jpg",
            )
        )
        found.append(
            Detections(
                frame_id=frame_id,
                camera_id=name,
                captured_at=captured,
                arrived_at=captured + 50,
                width=320,
                height=240,
                boxes=(Box(**_surer(n)), Box(**CAR), Box(**PARKED), Box(**BIRD)),
                model="rtdetr",
                model_digest="d" * 64,
                runtime="torch-cpu",
                inference_ms=20.0,
                detected_at=captured + 100,
            )
        )
    batch = msgspec.structs.replace(
        examples.batch,
        batch_id=ids.batch_id(name, frame_ids),
        camera_id=name,
        started_at=at,
        ended_at=at + (frames - 1) * 1000,
        frames=tuple(
            BatchFrame(
                frame_id=frame_id,
                offset=n,
                event_at=at + n * 1000,
                width=320,
                height=240,
                matters=True,
                late=n == 2,
                boxes=(
                    SeenBox(**_surer(n), stationary=False),
                    SeenBox(**CAR, stationary=False),
                    SeenBox(**PARKED, stationary=True),
                ),
            )
            for n, frame_id in enumerate(frame_ids)
        ),
        settings_digest=ids.json_digest(msgspec.to_builtins(WINDOW)),
    )
    context = msgspec.structs.replace(
        examples.context, batch_id=batch.batch_id, camera_id=name, batch=batch, camera_name=name.title()
    )
    event = msgspec.structs.replace(
        examples.risk_event,
        event_id=ids.event_id(batch.batch_id),
        batch_id=batch.batch_id,
        camera_id=name,
        started_at=batch.started_at,
        ended_at=batch.ended_at,
        frame_ids=tuple(frame_ids),
        risk_score=score,
        risk_level=LEVELS[score],
        summary=f"Somebody at {name}.",
        prompt_digest=PROMPT.digest,
        judged_at=at + 5000,
    )
    return [*found, batch, context, event]


def _surer(n: int) -> dict:
    return PERSON | {"score": PERSON["score"] + (0.1 if n == 1 else 0.0)}


def event_id(records: Sequence[Record]) -> str:
    """The id of the event of a window."""
    return str(records[-1].event_id)  # type: ignore[attr-defined]


async def store(settings: Settings, records: Sequence[Record], *, epoch: str = EPOCH, start: int = 0) -> None:
    """The records in ClickHouse, as the sink puts them there; offsets of each partition count from `start`."""
    target = ClickHouseStore(settings.clickhouse)
    await target.migrate()
    sink = SinkStage(target)
    topic_of = {topic.record: name for name, topic in TOPICS.items()}
    parts: dict[tuple[str, int], list[Incoming]] = {}
    for record in records:
        topic = topic_of[type(record)]
        partition = 0 if TOPICS[topic].single else partition_of(record.camera_id, PARTITIONS)
        made = codec.emit(topic, record)
        part = parts.setdefault((topic, partition), [])
        part.append(Incoming(topic, epoch, partition, start + len(part), made.key, made.value, made.headers))
    try:
        for (topic, partition), part in parts.items():
            await sink.insert(Range(topic, epoch, partition, part[0].offset, part[-1].offset), part)
    finally:
        await sink.close()


def own_database(settings: Settings) -> Settings:
    """The same settings with a database that nobody else uses."""
    mine = settings.clickhouse.model_copy(update={"database": f"gw_{secrets.token_hex(4)}"})
    return settings.model_copy(update={"clickhouse": mine})


@asynccontextmanager
async def source_of(settings: Settings, **known) -> AsyncIterator[StoredSource]:
    """The real source over these settings; `known` is what else `build_source` is told."""
    kafka = Kafka(settings.kafka)
    cameras = Cameras(kafka, WINDOW, "UTC")
    claims = ClaimStore(settings.images_root)
    source = build_source(kafka, settings.clickhouse, cameras, claims, Path(settings.data_dir), **known)
    try:
        yield source
    finally:
        await source.close()


@asynccontextmanager
async def client_of(app: ASGIApp, *, base_url: str = "http://localhost", **options) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app in this process; what the app fails with is its answer, not the test's end."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=base_url, timeout=30, **options) as client:
        yield client


async def signed_in(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/login", data={"key": KEY, "next": "/pipeline"}, headers={"origin": "http://localhost"})


@asynccontextmanager
async def served(app: ASGIApp, **settings: Any) -> AsyncIterator[str]:
    """The app behind a real socket, with these settings; gives its address."""
    door = GatewaySettings(port=0, **settings)
    listener = listen(door)
    stop = asyncio.Event()
    task = asyncio.create_task(serve(app, door, listener, stop))
    try:
        yield door.model_copy(update={"port": listener.getsockname()[1]}).url
    finally:
        stop.set()
        await task


def partition(topic: str, number: int) -> TopicPartition:
    return TopicPartition(topic, number)

"""own_latency_ms_p50 and _p99: from an upload to its risk event, less the time that the models took.

Every stage is the production process that `rewatch up` starts; only the models sleep (`sleeping_models.py`). Frames
come over HTTP at a steady rate, one camera after the other, each showing a sure person more than 90 s of capture time
after the last, so that each closes its window by the fast path. One reader notes when each record of the road becomes
visible to read_committed consumers; records' own timestamps are not trusted. `python -m tests.bench.latency` shows the
medians hop by hop.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import httpx
import yaml

from infra.config import Settings, load
from infra.installation import Installation
from infra.local.process import ProcessSpec, free_port
from infra.local.stack import LocalStack
from schemas.records import Batch, Context, Detections, Frame, RiskEvent
from streams import codec
from streams.kafka import incoming
from streams.messages import Incoming, Tick
from streams.topics import STORED
from tests.bench import kit
from tests.bench.figure import Figure, latency

NAMES: tuple[str, ...] = ("own_latency_ms_p50", "own_latency_ms_p99")

AIMS_MS = (100.0, 400.0)
"""On two cores."""

FRAMES = 240
PER_SECOND = 4.0
"""A dozen cameras with a motion each every three seconds; both models are idle half of the time and more."""
CAMERAS = 12

WARM_UP = 2 * CAMERAS
"""Frames before those that count: each camera's way in is opened, each stage takes its partitions."""
QUICK_FRAMES = 8

APART_S = 91
"""By capture time: the fast path closes at most one window of a camera in 90 s."""

_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
"""Of the footage: in the past, for a camera's clock counts only up to the frame's arrival."""

ROAD = ("frames", "detections", "batches", "contexts", "risk_events")

_INPUTS = {
    "detect": ("frames",),
    "batch": ("detections",),
    "enrich": ("batches",),
    "analyze": ("contexts",),
    "sink": STORED,
}

# A stage's own commit takes milliseconds; nothing on the road takes seconds but a fault.
_TIMEOUT_S = 60.0


class Trip(NamedTuple):
    """One frame's way down the road, milliseconds since just before its upload began."""

    answered: float
    seen_on: dict[str, float]
    """When readers saw its record, by topic."""
    detector: float
    """What the models took for it."""
    llm: float

    @property
    def own(self) -> float:
        """What the road itself took."""
        return self.seen_on["risk_events"] - self.detector - self.llm


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """The median and the 99th percentile of a frame's own latency."""
    found = sorted(trip.own for trip in await trips(stack, progress, QUICK_FRAMES if quick else FRAMES))
    values = statistics.median(found), found[int(0.99 * len(found))]
    return [latency(name, value, aim) for name, value, aim in zip(NAMES, values, AIMS_MS, strict=True)]


async def trips(stack: LocalStack, progress: Callable[[float], None], frames: int) -> list[Trip]:
    """Upload so many frames and watch them, after those that warm the road up."""
    home = await kit.install(stack)
    for stage, inputs in _INPUTS.items():
        await kit.begin_at_the_end(home, stage, inputs)
    models = f"http://127.0.0.1:{free_port()}"
    with _settings(home, stack, models) as (settings, config):
        installation = Installation(settings, config)
        async with installation:
            await installation.stack.supervisor.add(_models(models))
            async with _watched(home) as sightings:
                uploads = await _upload(settings, sightings, frames, progress)
            async with httpx.AsyncClient(base_url=models, trust_env=False) as client:
                took = (await client.get("/took")).json()
    return [_trip(upload, sightings, took) for upload in uploads[WARM_UP:]]


def hops(found: list[Trip]) -> dict[str, float]:
    """Median milliseconds of each hop, the models' time taken off the hop that they are in."""
    own = {
        "upload answered": [trip.answered for trip in found],
        "upload -> frames": [trip.seen_on["frames"] for trip in found],
        "frames -> detections": [trip.seen_on["detections"] - trip.seen_on["frames"] - trip.detector for trip in found],
        "detections -> batches": [trip.seen_on["batches"] - trip.seen_on["detections"] for trip in found],
        "batches -> contexts": [trip.seen_on["contexts"] - trip.seen_on["batches"] for trip in found],
        "contexts -> risk_events": [
            trip.seen_on["risk_events"] - trip.seen_on["contexts"] - trip.llm for trip in found
        ],
        "own": [trip.own for trip in found],
    }
    return {name: statistics.median(values) for name, values in own.items()}


class _Upload(NamedTuple):
    frame_id: str
    began: float
    answered: float


class _Sightings(NamedTuple):
    """When each record of the road was first seen, and what it says, by topic and the frame that it is about."""

    at: dict[str, dict[str, float]]
    detector: dict[str, int]
    """The number of the detector's request, by frame."""
    llm: dict[str, int]
    done: asyncio.Condition

    def note(self, record: Incoming, at: float) -> None:
        if Tick.of(record) is not None:
            return
        if record.topic == "frames":
            frame_id = codec.decode(record, Frame).frame_id
        elif record.topic == "detections":
            seen = codec.decode(record, Detections)
            frame_id = seen.frame_id
            self.detector[frame_id] = round(seen.boxes[0].x)
        elif record.topic == "batches":
            frame_id = codec.decode(record, Batch).frames[0].frame_id
        elif record.topic == "contexts":
            frame_id = codec.decode(record, Context).batch.frames[0].frame_id
        else:
            event = codec.decode(record, RiskEvent)
            frame_id = event.frame_ids[0]
            self.llm[frame_id] = int(event.summary)
        self.at[record.topic][frame_id] = at


@contextmanager
def _settings(home: kit.Installation, stack: LocalStack, models: str) -> Iterator[tuple[Settings, Path]]:
    """Settings of an installation on the running servers, as a person with servers of their own would write them."""
    kafka = home.kafka.settings
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-") as directory:
        root = Path(directory)
        config = root / "rewatch.yaml"
        sections = {
            "data_dir": str(root / "data"),
            "kafka": {
                "bootstrap_servers": kafka.bootstrap_servers,
                "system": kafka.system,
                "partitions": kafka.partitions,
            },
            "clickhouse": {"url": stack.clickhouse_url},
            "detector": {"url": models},
            "llm": {"url": models},
            "ingest": {
                "folder": {"root": str(root / "inbox")},
                "upload": {"port": free_port(), "auto_create": True},
            },
            "gateway": {"port": free_port()},
            "metrics": {"port": 0},
        }
        config.write_text(yaml.safe_dump(sections))
        yield load(config), config


def _models(url: str) -> ProcessSpec:
    async def ready() -> bool:
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"{url}/v1/models")).is_success
        except httpx.HTTPError:
            return False

    port = url.rpartition(":")[2]
    return ProcessSpec(
        name="models",
        argv=[sys.executable, "-m", "tests.bench.sleeping_models", port],
        env={"PYTHONPATH": str(Path.cwd())},
        ready=ready,
    )


@asynccontextmanager
async def _watched(home: kit.Installation) -> AsyncIterator[_Sightings]:
    """Note every record of the road that becomes visible from now on."""
    sightings = _Sightings({topic: {} for topic in ROAD}, {}, {}, asyncio.Condition())
    async with home.kafka.reading(auto_offset_reset="latest") as reader:
        reader.assign(kit.partitions_of(*ROAD))
        await reader.seek_to_end()

        async def watch() -> None:
            while True:
                batches = await reader.getmany(timeout_ms=1000)
                at = time.perf_counter()
                async with sightings.done:
                    for records in batches.values():
                        for record in records:
                            sightings.note(incoming(record, ""), at)
                    sightings.done.notify_all()

        watching = asyncio.create_task(watch())
        try:
            yield sightings
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _upload(
    settings: Settings, sightings: _Sightings, frames: int, progress: Callable[[float], None]
) -> list[_Upload]:
    """The uploads, at a steady rate whatever their answers take; returns when every risk event was seen."""
    pictures = kit.scenes(4)
    uploads: list[_Upload] = []
    async with httpx.AsyncClient(base_url=settings.ingest.upload.url, timeout=30, trust_env=False) as client:

        async def one(number: int) -> None:
            camera, turn = f"camera-{number % CAMERAS}", number // CAMERAS
            captured_at = (_BEGAN + timedelta(seconds=APART_S * turn)).isoformat()
            params = {"camera": camera, "captured_at": captured_at}
            began = time.perf_counter()
            answer = await client.post("/api/upload", params=params, content=pictures[number % len(pictures)])
            answered = time.perf_counter()
            uploads.append(_Upload(answer.raise_for_status().json()["frame_id"], began, answered))

        # The first of each camera one by one: a stage that takes its partitions is busy for a second.
        for number in range(WARM_UP):
            await one(number)
            await _all_seen(sightings, number + 1)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(frames):
                await asyncio.sleep(max(0.0, start + number / PER_SECOND - time.perf_counter()))
                group.create_task(one(WARM_UP + number))
                progress(number / frames)
    await _all_seen(sightings, WARM_UP + frames)
    return uploads


async def _all_seen(sightings: _Sightings, count: int) -> None:
    async with asyncio.timeout(_TIMEOUT_S), sightings.done:
        await sightings.done.wait_for(lambda: len(sightings.at["risk_events"]) >= count)


def _trip(upload: _Upload, sightings: _Sightings, took: dict[str, list[float]]) -> Trip:
    frame = upload.frame_id
    return Trip(
        (upload.answered - upload.began) * 1000,
        {topic: (at[frame] - upload.began) * 1000 for topic, at in sightings.at.items()},
        took["detector"][sightings.detector[frame]],
        took["llm"][sightings.llm[frame]],
    )


async def _show_hops() -> None:
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-") as directory:
        async with LocalStack(Path(directory), kafka_port=0, clickhouse_port=0) as stack:
            for name, value in hops(await trips(stack, lambda _: None, FRAMES)).items():
                print(f"{name:24} {value:7.1f} ms")


if __name__ == "__main__":
    asyncio.run(_show_hops())

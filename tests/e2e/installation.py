"""A whole installation for tests: servers and stages as `rewatch up` starts them, on free ports, fed and audited."""

import asyncio
import io
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import clickhouse_connect
import httpx
import psutil
import pytest
from aiokafka import TopicPartition
from PIL import Image

from infra.config import Settings, load
from infra.installation import Installation
from infra.local.process import free_port
from infra.models.scene import View, render
from infra.models.stories import DEFAULT_SEED, STORIES, cast
from processors.batch.stage import build as build_batch
from schemas import ids
from schemas.records import Batch, Context, Detections, Frame, RiskEvent
from streams import codec
from streams.admin import read_meta
from streams.kafka import Kafka
from streams.messages import Incoming, Tick
from streams.topics import STORED, TOPICS, partition_of

PARTITIONS = 4
CAMERAS = ("front-door", "driveway", "back-yard")


def settings_for(directory: Path, monkeypatch: pytest.MonkeyPatch, **more: str) -> Settings:
    """Settings of an installation of its own below the directory; child processes get them by environment."""
    for name in [name for name in os.environ if name.startswith("REWATCH_")]:
        monkeypatch.delenv(name)
    values = {
        "DATA_DIR": str(directory / "data"),
        "LOCAL__KAFKA_PORT": str(free_port()),
        "LOCAL__CLICKHOUSE_PORT": str(free_port()),
        "LOCAL__LLAMA_PORT": str(free_port()),
        "KAFKA__PARTITIONS": str(PARTITIONS),
        # A killed member is missed after this: recovery is what these tests wait for.
        "KAFKA__SESSION_TIMEOUT_MS": "6000",
        "INGEST__FOLDER__ROOT": str(directory / "inbox"),
        "INGEST__UPLOAD__PORT": str(free_port()),
        "GATEWAY__PORT": str(free_port()),
        "INGEST__UPLOAD__AUTO_CREATE": "true",
        **more,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"REWATCH_{name}", value)
    monkeypatch.chdir(directory)
    return load()


def pictures(count: int = 6) -> list[bytes]:
    """A few rendered frames with people in them, JPEG."""
    story = next(story for story in STORIES if "loiters" in story.name)
    view = View(story.camera, random.Random(f"{DEFAULT_SEED}/{story.camera}").randrange(10**9))
    found = []
    for second in range(8, 8 + count):
        image, _ = render(
            view, cast(story, second, DEFAULT_SEED), story.weather, size=(640, 360), seed=second, caption=""
        )
        out = io.BytesIO()
        image.save(out, "JPEG", quality=80)
        found.append(out.getvalue())
    return found


def stamped(jpeg: bytes, at: datetime) -> bytes:
    """The same picture with another capture time (EXIF): other bytes, another frame."""
    exif = Image.Exif()
    ifd = exif.get_ifd(0x8769)
    ifd[0x9003] = at.strftime("%Y:%m:%d %H:%M:%S")
    ifd[0x9011] = "+00:00"
    ifd[0x9291] = f"{at.microsecond // 1000:03d}"
    out = io.BytesIO()
    with Image.open(io.BytesIO(jpeg)) as image:
        image.save(out, "JPEG", quality="keep", exif=exif)
    return out.getvalue()


class Feeder:
    """Uploads frames as a camera would: it tries until it is told 200, and remembers what was accepted."""

    def __init__(self, settings: Settings, shots: list[bytes]) -> None:
        self._settings = settings
        self._shots = shots
        self.accepted: dict[str, str] = {}
        """frame_id by camera."""

    async def upload(self, camera: str, count: int, *, pause: float = 0.0, story_s: float = 60.0) -> None:
        """`count` frames a second apart by capture time, with a gap after each `story_s`: many windows."""
        at = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
        async with httpx.AsyncClient(base_url=self._settings.ingest.upload.url, timeout=30) as client:
            for number in range(count):
                at += timedelta(seconds=1 if number % int(story_s) else 61)
                body = await asyncio.to_thread(stamped, self._shots[number % len(self._shots)], at)
                self.accepted[await self._until_taken(client, camera, body)] = camera
                await asyncio.sleep(pause)

    async def _until_taken(self, client: httpx.AsyncClient, camera: str, body: bytes) -> str:
        deadline = time.monotonic() + 120
        while True:
            try:
                answer = await client.post("/api/upload", params={"camera": camera}, content=body)
                if answer.status_code == 200:
                    return str(answer.json()["frame_id"])
                assert answer.status_code in {429, 503}, answer.text
            except httpx.TransportError:
                pass  # killed meanwhile; a camera tries again
            assert time.monotonic() < deadline, "ingest did not come back"
            await asyncio.sleep(0.2)

    async def end(self, cameras: Iterable[str]) -> None:
        """No more will come: the cameras' windows close."""
        producer = Kafka(self._settings.kafka).producer()
        await producer.start()
        try:
            for camera in cameras:
                tick = Tick(int(time.time() * 1000), camera).emit("frames", partition_of(camera, PARTITIONS))
                await producer.send_and_wait(
                    tick.topic, key=tick.key, value=None, headers=list(tick.headers), partition=tick.partition
                )
        finally:
            await producer.stop()


def kill(installation: Installation, name: str, number: int = signal.SIGKILL) -> None:
    """Signal one process of the installation."""
    pid = installation.stack.supervisor.pid(name)
    if pid is not None and psutil.pid_exists(pid):
        os.kill(pid, number)


class Audit:
    """What is on the log and in ClickHouse, read from outside, and what must hold of it, by ids."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kafka = Kafka(settings.kafka)
        self.records: dict[str, list[Incoming]] = {}

    async def read(self) -> None:
        """Read every topic whole, as a read_committed reader sees it; ticks left out."""
        for topic in STORED:
            count = 1 if TOPICS[topic].single else PARTITIONS
            found = await self._kafka.read([TopicPartition(topic, number) for number in range(count)])
            self.records[topic] = [record for record in found if Tick.of(record) is None]

    def decoded(self, topic: str) -> list[Any]:
        """A topic's records."""
        return [codec.decode(record, TOPICS[topic].record) for record in self.records[topic]]

    def violations(self, accepted: dict[str, str], unjudged: Collection[str] | None = None) -> list[str]:
        """What does not hold, a line each; empty where everything does.

        `unjudged`: batches that rightly have a dead letter instead of an event; None: nothing may have one.
        """
        found: list[str] = []
        frames: list[Frame] = self.decoded("frames")
        detections: list[Detections] = self.decoded("detections")
        batches: list[Batch] = self.decoded("batches")
        contexts: list[Context] = self.decoded("contexts")
        events: list[RiskEvent] = self.decoded("risk_events")
        found += _same("frame", [f.frame_id for f in frames], accepted)
        found += _same("detections", [d.frame_id for d in detections], accepted)
        found += _same("context", [c.batch_id for c in contexts], [b.batch_id for b in batches])
        if unjudged is None:
            letters = self.decoded("dead_letters")
            found += [f"unexplained dead letter {letter.origin}: {letter.message}" for letter in letters]
        judged = [b.batch_id for b in batches if b.batch_id not in (unjudged or ())]
        found += _same("event", [e.batch_id for e in events], judged)
        placed = Counter(frame.frame_id for batch in batches for frame in batch.frames)
        found += [f"frame {frame_id} is in {count} batches" for frame_id, count in placed.items() if count > 1]
        # A person seen for certain enough matters, and is in a window. One that has not moved does not.
        found += [f"batch of strangers: {frame_id}" for frame_id in placed if frame_id not in accepted]
        found += [
            f"batch {batch.batch_id} is misnamed"
            for batch in batches
            if batch.batch_id != ids.batch_id(batch.camera_id, [frame.frame_id for frame in batch.frames])
        ]
        found += [f"event {e.event_id} is misnamed" for e in events if e.event_id != ids.event_id(e.batch_id)]
        for topic in ("frames", "detections"):
            found += self._order(topic)
        return found

    async def violations_of_replay(self) -> list[str]:
        """The log's detections and ticks, fed to a new batch core, make the very batches that the log has."""
        stage = build_batch(self._settings.windows.record(), lambda _: None)
        epoch = (await read_meta(self._kafka))["detections"].epoch
        made = []
        for number in range(PARTITIONS):
            fold = stage.open(number, epoch, [])
            for record in await self._kafka.read([TopicPartition("detections", number)], epoch=epoch):
                made += [emit.value for emit in fold.feed(record)]
        return _same("replayed batch", [str(value) for value in made], [str(r.value) for r in self.records["batches"]])

    def _order(self, topic: str) -> list[str]:
        """Cameras uploaded one frame after another, so their capture times rise along the log."""
        last: dict[str, int] = {}
        found = []
        for record in self.decoded(topic):
            if record.captured_at < last.get(record.camera_id, 0):
                found.append(f"{topic}: {record.frame_id} out of order")
            last[record.camera_id] = record.captured_at
        return found

    def violations_in_clickhouse(self) -> list[str]:
        """Each record of each topic is in `log` once, by position, and in its typed table once, by id."""
        client = clickhouse_connect.get_client(
            dsn=self._settings.clickhouse.url, database=self._settings.clickhouse.database
        )
        found = []
        for topic, records in self.records.items():
            positions = client.query(
                "SELECT partition, offset FROM log FINAL WHERE topic = {topic:String} AND NOT tick", {"topic": topic}
            ).result_rows
            found += _same(
                f"{topic} in log", [f"{p}:{o}" for p, o in positions], [f"{r.partition}:{r.offset}" for r in records]
            )
        for topic, column in (
            ("frames", "frame_id"),
            ("detections", "frame_id"),
            ("batches", "batch_id"),
            ("contexts", "batch_id"),
            ("risk_events", "event_id"),
        ):
            rows = client.query(f"SELECT {column} FROM {topic} FINAL").result_rows
            found += _same(f"{topic} row", [row[0] for row in rows], [getattr(r, column) for r in self.decoded(topic)])
        client.close()
        return found


def _same(what: str, found: list[str], expected: Iterable[str]) -> list[str]:
    counts = Counter(found)
    wanted = set(expected)
    return [
        *(f"{what} {name} is there {count} times" for name, count in counts.items() if count > 1),
        *(f"{what} {name} is lost" for name in sorted(wanted - set(counts))),
        *(f"{what} {name} came from nowhere" for name in sorted(set(counts) - wanted)),
    ]

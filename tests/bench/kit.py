"""What the benchmarks share: an installation on the running broker, pairs, and backlogs that appear at one instant."""

import asyncio
import gc
import hashlib
import io
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata
from PIL import Image

from infra.local.stack import LocalStack
from infra.models.scene import random_scene
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import Frame
from streams.admin import ensure_topics, epochs_of
from streams.delivery import FencedProducer
from streams.kafka import Kafka, KafkaSettings
from streams.liveness import Liveness
from streams.messages import Emit
from streams.topics import TOPICS
from tests.bench.figure import Pair

PARTITIONS = 4
"""Of each data topic: cameras enough for the cores at hand. As in `tests/conftest.py`, whose broker the smoke test
shares: a topic's partition count is fixed at its creation."""

# A backlog of some ten thousand records takes the embedded broker a few seconds.
_BACKLOG_TIMEOUT_MS = 120_000

# Until a process is a member of its group: some seconds, and many more on a machine that does much else.
_READY_S = 120.0

# 2026-11-21 12:00:00 UTC, where every backlog begins.
_NOON_MS = 1_795_262_400_000


class Installation(NamedTuple):
    """The product on the running broker: groups and transactional ids of its own, topics that all share."""

    kafka: Kafka
    epochs: Callable[[str], str]


async def install(stack: LocalStack, partitions: int = PARTITIONS) -> Installation:
    """A new installation. What earlier ones left on the topics is there: begin at their ends."""
    settings = KafkaSettings(
        bootstrap_servers=stack.bootstrap_servers, system=f"bench{secrets.token_hex(4)}", partitions=partitions
    )
    kafka = Kafka(settings)
    return Installation(kafka, epochs_of(await ensure_topics(kafka)))


def partitions_of(*topics: str, partitions: int = PARTITIONS) -> list[TopicPartition]:
    """Every partition of these topics."""
    return [TopicPartition(topic, p) for topic in topics for p in range(1 if TOPICS[topic].single else partitions)]


async def begin_at_the_end(home: Installation, stage: str, inputs: Sequence[str]) -> dict[TopicPartition, int]:
    """Commit the ends of the inputs as the stage's positions, as if it had done all that is there; return them."""
    bounds = await home.kafka.bounds(partitions_of(*inputs, partitions=home.kafka.settings.partitions))
    ends = {tp: end for tp, (_, end) in bounds.items()}
    producer = FencedProducer(home.kafka, home.kafka.transactional_id("begin", stage))
    await producer.open()
    try:
        positions = {tp: OffsetAndMetadata(end, home.epochs(tp.topic)) for tp, end in ends.items()}
        await producer.transact([], offsets=(home.kafka.group(stage), positions))
    finally:
        await producer.close()
    return ends


class Backlog(NamedTuple):
    """Records that are on the broker, in a transaction that is still open: no reader sees them yet."""

    positions: Mapping[TopicPartition, int]
    """Where a reader of all of them stands: behind the last one of each partition."""
    show: Callable[[], Awaitable[None]]
    """Commit: from here on readers see all of them."""


@asynccontextmanager
async def backlog(kafka: Kafka, emits: Sequence[Emit]) -> AsyncIterator[Backlog]:
    """Append records (each with its partition) so that they appear together, when asked: there the clock starts."""
    producer = kafka.producer(
        transactional_id=kafka.transactional_id("backlog", secrets.token_hex(4)),
        transaction_timeout_ms=_BACKLOG_TIMEOUT_MS,
        linger_ms=20,
    )
    await producer.start()
    try:
        await producer.begin_transaction()
        sent = [
            await producer.send(e.topic, e.value, key=e.key, partition=e.partition, headers=list(e.headers))
            for e in emits
        ]
        positions: dict[TopicPartition, int] = {}
        for done in await asyncio.gather(*sent):
            positions[done.topic_partition] = max(positions.get(done.topic_partition, 0), done.offset + 1)
        yield Backlog(positions, producer.commit_transaction)
    finally:
        await producer.stop()


async def reached(liveness: Liveness, positions: Mapping[TopicPartition, int]) -> None:
    """Wait until a host has committed these positions."""
    todo = {f"{tp.topic}-{tp.partition}": position for tp, position in positions.items()}
    while todo:
        lives = liveness.partitions
        todo = {name: at for name, at in todo.items() if name not in lives or lives[name].position < at}
        await asyncio.sleep(0.005)


@asynccontextmanager
async def running(
    home: Installation, stage: str, *, module: str = "infra.worker", **sections: Any
) -> AsyncIterator[Path]:
    """The stage's own process, a member of its group; gives the file of its settings, `status.json` beside it.

    Args:
        home: where it works.
        stage: as `rewatch run` names it.
        module: what is run, if not the production's own.
        sections: more sections of its settings.
    """
    kafka = home.kafka.settings
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-") as directory:
        config, status = Path(directory) / "rewatch.yaml", Path(directory) / "status.json"
        settings = {
            "data_dir": directory,
            "kafka": {
                "bootstrap_servers": kafka.bootstrap_servers,
                "system": kafka.system,
                "partitions": kafka.partitions,
            },
            "metrics": {"port": 0},
            **sections,
        }
        config.write_text(yaml.safe_dump(settings))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, stage, "--config", str(config), "--status", str(status)),
            env={name: value for name, value in os.environ.items() if not name.startswith("REWATCH_")},
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(_READY_S):
                while not _is_member(status):
                    assert process.returncode is None, "the stage ended by itself"
                    await asyncio.sleep(0.05)
            yield config
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()


def _is_member(status: Path) -> bool:
    try:
        return int(json.loads(status.read_text())["generation"]) >= 0
    except (OSError, ValueError):
        return False


@asynccontextmanager
async def database(stack: LocalStack) -> AsyncIterator[ClickHouseStore]:
    """A migrated database of its own, dropped in the end."""
    settings = ClickHouseSettings(url=stack.clickhouse_url, database=f"bench_{secrets.token_hex(4)}")
    store = ClickHouseStore(settings)
    await store.migrate()
    try:
        yield store
    finally:
        await (await store.connection.client()).command(f"DROP DATABASE {settings.database} SYNC")
        await store.close()


async def in_pairs(
    product: Callable[[], Awaitable[float]],
    baseline: Callable[[], Awaitable[float]],
    count: int,
    progress: Callable[[float], None],
) -> list[Pair]:
    """Product, baseline, product, baseline ...: noise that lasts longer than a half hits both halves of a pair."""
    pairs: list[Pair] = []
    for number in range(count):
        gc.collect()  # neither pays for what the other left
        value = await product()
        progress((number + 0.5) / count)
        gc.collect()
        pairs.append((value, await baseline()))
        progress((number + 1) / count)
    return pairs


def scenes(count: int, size: tuple[int, int] = (640, 360)) -> list[bytes]:
    """JPEGs of the demo's rendered scenes: 33 KB each at the cameras' own 640 x 360, on average."""
    found = []
    for seed in range(count):
        out = io.BytesIO()
        random_scene(seed)[0].resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        found.append(out.getvalue())
    return found


def distinct(image: bytes, number: int) -> bytes:
    """The same picture in a file of its own: a comment segment (T.81, B.2.4.5) behind the start of the image."""
    comment = number.to_bytes(8, "big")
    return image[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + image[2:]


def frames(images: Sequence[bytes], count: int, partitions: int = PARTITIONS) -> Iterator[tuple[int, Frame]]:
    """Records of new images, each with the partition of its camera: one camera a partition, in turn."""
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    for n in range(count):
        camera = f"camera-{n % partitions}"
        image = distinct(images[n % len(images)], secrets.randbits(64))
        sha256 = hashlib.sha256(image).hexdigest()
        captured_at = _NOON_MS + n
        width, height = sizes[n % len(images)]
        yield (
            n % partitions,
            Frame(
                frame_id=ids.frame_id(camera, sha256, captured_at),
                camera_id=camera,
                sha256=sha256,
                size=len(image),
                width=width,
                height=height,
                captured_at=captured_at,
                captured_from="exif",
                arrived_at=captured_at + 500,
                image=image,
                claim=None,
                source="folder",
                source_name=f"20261121_{n}.jpg",
            ),
        )

"""Disks that are full, on small ones of their own: what was accepted is kept, what comes waits, and room is enough."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic
from aiokafka.errors import KafkaError

from infra.local import clickhouse
from infra.local.broker import Broker
from infra.local.process import Process, free_port
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.service import Service
from processors.ingest.settings import FolderSettings, IngestSettings, UploadSettings
from processors.sink.stage import build
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from streams.claims import INLINE_LIMIT, ClaimStore
from streams.errors import UnavailableError
from streams.kafka import Kafka, KafkaSettings
from streams.stages import Range
from tests import examples
from tests.examples import EPOCH, incoming
from tests.processors.ingest_kit import jpeg
from tests.streams.conformance.harness import until

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real

MB = 1024 * 1024


class Disk:
    """A small disk of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Take all of its room but so many bytes."""
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_bsize
        with self._ballast.open("ab") as out, contextlib.suppress(OSError):
            for _ in range(max(0, free - leave) // 4096):
                out.write(bytes(4096))
                out.flush()

    def make_room(self) -> None:
        """Give the room back."""
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Makes disks of so many MB; skips where this user may not mount any."""
    mounted: list[Path] = []

    def make(size_mb: int) -> Disk:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return Disk(path)

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_a_full_image_store_takes_nothing_that_it_cannot_keep_and_all_of_it_once_there_is_room(
    tmp_path: Path, disk: Callable[[int], Disk]
) -> None:
    small = disk(1)
    log, claims = MemoryLog(), ClaimStore(str(small.path / "images"))
    inbox = tmp_path / "inbox" / "front"
    inbox.mkdir(parents=True)
    section = IngestSettings(folder=FolderSettings(root=inbox.parent, stable_s=0.0), upload=UploadSettings(port=0))
    large = [jpeg(number) + bytes(INLINE_LIMIT) for number in range(4)]
    stop = asyncio.Event()
    service = Service(log, section, MemoryCameras("front"), claims)
    running = asyncio.create_task(service.run(stop))
    try:
        async with httpx.AsyncClient(base_url=await service.url, timeout=60) as http:

            async def upload(body: bytes) -> httpx.Response:
                return await http.post("/api/upload", params={"camera": "front"}, content=body)

            assert (await upload(large[0])).status_code == 200
            small.fill(leave=INLINE_LIMIT // 2)
            refused = await upload(large[1])
            assert refused.status_code == 503
            assert "(images)" in refused.text
            assert refused.headers["retry-after"]
            (inbox / "a.jpg").write_bytes(large[2])

            async def waits() -> bool:
                return "disk" in service.waiting_on()

            await until(waits)
            assert (inbox / "a.jpg").exists()
            assert (await upload(jpeg(9))).status_code == 200, "a small one needs no room in the store"
            small.make_room()
            assert (await upload(large[1])).status_code == 200

            async def taken() -> bool:
                return not (inbox / "a.jpg").exists() and service.waiting_on() == []

            await until(taken)
    finally:
        stop.set()
        await running
    frames = log.frames()
    assert len(frames) == len({frame.frame_id for frame in frames}) == 4
    kept = [await claims.get(frame.claim, frame.sha256) for frame in frames if frame.claim is not None]
    assert sorted(kept) == sorted(large[:3])
    assert not list(small.path.rglob(".part-*")), "half an image was left behind"


@pytest.mark.timeout(300)
async def test_a_full_disk_of_the_broker_loses_nothing_that_was_acknowledged(disk: Callable[[int], Disk]) -> None:
    small = disk(96)
    broker = Broker(small.path / "kafka", 0)
    await broker.start()
    acknowledged: list[bytes] = []
    kafka = Kafka(KafkaSettings(bootstrap_servers=broker.bootstrap_servers, system="full"))
    try:
        async with kafka.admin() as admin:
            await admin.create_topics([NewTopic("t", 1, 1)])
        small.fill(leave=2 * MB)
        producer = AIOKafkaProducer(
            bootstrap_servers=broker.bootstrap_servers, acks="all", enable_idempotence=True, request_timeout_ms=5_000
        )
        await producer.start()
        said: BaseException | None = None
        try:
            for number in range(100):
                value = b"%06d" % number + os.urandom(100_000)
                async with asyncio.timeout(20):
                    await producer.send_and_wait("t", value, partition=0)
                acknowledged.append(value)
        except (KafkaError, TimeoutError) as error:
            said = error
        finally:
            with contextlib.suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(5):
                    await producer.stop()
        assert said is not None, "more was acknowledged than there was room for"
        assert acknowledged
        await broker.stop()
        small.make_room()
        await broker.start()
        found = [record.value for record in await kafka.read([TopicPartition("t", 0)])]
        assert found[: len(acknowledged)] == acknowledged
        assert len(found) <= len(acknowledged) + 1, "only the one in hand may be there although nobody was told so"
        producer = kafka.producer()
        await producer.start()
        await producer.send_and_wait("t", b"and it goes on", partition=0)
        await producer.stop()
    finally:
        await broker.stop()


@contextlib.asynccontextmanager
async def engine(directory: Path, logs: Path) -> AsyncIterator[ClickHouseSettings]:
    """A ClickHouse engine whose data lie in that directory, migrated."""
    port = free_port()
    process = Process(clickhouse.spec(directory, port), logs)
    await process.start()
    settings = ClickHouseSettings(url=f"http://127.0.0.1:{port}")
    store = ClickHouseStore(settings)
    try:
        await store.migrate()
        yield settings
    finally:
        await store.close()
        await process.stop()


@pytest.mark.timeout(300)
async def test_a_full_disk_of_clickhouse_is_waited_for_and_every_record_is_there_once(
    tmp_path: Path, disk: Callable[[int], Disk], reading
) -> None:
    small = disk(128)
    async with engine(small.path / "clickhouse", tmp_path) as settings:
        stage = build(settings)

        async def insert(lo: int, hi: int) -> None:
            records = [
                incoming(
                    "frames",
                    msgspec.structs.replace(examples.frame, frame_id=f"f{o}", image=os.urandom(1000)),
                    offset=o,
                )
                for o in range(lo, hi)
            ]
            kept.setdefault(lo, records)
            span = Range("frames", EPOCH, records[0].partition, lo, hi - 1)
            await stage.insert(span, kept[lo])

        kept: dict[int, list] = {}
        await insert(0, 100)
        small.fill()
        lo = 100
        with contextlib.suppress(UnavailableError):
            while lo < 20_000:  # some may fit into what the engine had set aside
                await insert(lo, lo + 100)
                lo += 100
        with pytest.raises(UnavailableError) as caught:
            await insert(lo, lo + 100)
        assert caught.value.waiting_on == "store"
        small.make_room()

        async def in_it() -> bool:
            with contextlib.suppress(UnavailableError):
                await insert(lo, lo + 100)
                return True
            return False

        await until(in_it, within=60)
        reader = reading(settings)
        for table in ("log", "frames"):
            rows = reader.rows(f"SELECT count(), uniqExact(offset), max(offset) FROM {table}")
            assert rows == [(lo + 100, lo + 100, lo + 99)], table
        assert reader.value("SELECT count() FROM log WHERE decode_error != ''") == 0
        await stage.close()

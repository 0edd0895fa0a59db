"""Images a second into the log: ingest's appenders against the least program that takes an image durably.

The unit is one image, checked, hashed, named and committed, with its answer; a sender waits for the answer before it
sends the next, as cameras do. HTTP is left out: the same server and client on both sides would only bring the ratio
closer to one.
"""

import asyncio
import hashlib
import io
import itertools
import os
import secrets
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import fastavro
from aiokafka import AIOKafkaProducer
from PIL import Image

from infra.local.stack import LocalStack
from processors.ingest.appender import Appenders, Entry
from processors.ingest.core import REMEMBERED, Submission
from processors.ingest.fakes import MemoryCameras
from processors.ingest.kafka_log import KafkaLog
from processors.ingest.settings import IngestSettings
from schemas import avro_schemas
from streams.claims import INLINE_LIMIT, ClaimStore
from streams.messages import Tick
from streams.topics import partition_of
from tests.bench.figure import Figure, rate
from tests.bench.kit import PARTITIONS, Installation, distinct, in_pairs, install, scenes

NAMES = ("ingest_vs_bare", "ingest_1080p_vs_bare")
AIM = 0.9

CAMERAS = tuple(f"camera-{n}" for n in range(8))
# Eight times eight is `ingest.upload.max_waiting`: as many as ingest takes at once.
SENDERS = 8
# Many short halves: what else runs on the machine comes and goes within seconds.
PAIRS = 16
HALF_S = 1.0

Send = Callable[[str, bytes], Awaitable[object]]
_numbers = itertools.count(int.from_bytes(secrets.token_bytes(6), "big") << 16)


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """A camera's snapshot inline, and one at 1080p, which is above 64 KB and goes to the image store."""
    home = await install(stack)
    figures = []
    for nth, (name, size) in enumerate(zip(NAMES, ((640, 360), (1920, 1080)), strict=True)):
        images = scenes(8, size)
        async with _product(home) as product, _bare(home) as bare:
            pairs = await in_pairs(
                lambda send=product, images=images: _rate(send, images, 0.3 if quick else HALF_S),
                lambda send=bare, images=images: _rate(send, images, 0.3 if quick else HALF_S),
                1 if quick else PAIRS,
                lambda done, nth=nth: progress((nth + done) / len(NAMES)),
            )
        figures.append(rate(name, pairs, "images/s", AIM))
    return figures


async def _rate(send: Send, images: Sequence[bytes], seconds: float) -> float:
    """Images answered a second, while every sender of every camera sends one after another."""
    began = time.perf_counter()

    async def sender(camera: str) -> int:
        sent = 0
        while time.perf_counter() < began + seconds:
            await send(camera, distinct(images[sent % len(images)], next(_numbers)))
            sent += 1
        return sent

    sent = await asyncio.gather(*(sender(camera) for camera in CAMERAS for _ in range(SENDERS)))
    return sum(sent) / (time.perf_counter() - began)


@asynccontextmanager
async def _product(home: Installation) -> AsyncIterator[Send]:
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-images-") as directory:
        log = KafkaLog(home.kafka, home.epochs("frames"))
        appenders = Appenders(log, MemoryCameras(*CAMERAS), ClaimStore(directory), IngestSettings())

        async def send(camera: str, data: bytes) -> None:
            entry = await appenders.prepare(Submission(camera, data, "upload", "", appenders.now_ms()))
            (receipt,) = await appenders.append(camera, [entry])
            assert receipt.status == "accepted"

        # Full memories, as every camera has after its first thousand frames.
        await asyncio.gather(*(appenders.append(camera, _forgotten(camera)) for camera in CAMERAS))
        try:
            yield send
        finally:
            await appenders.close()


def _forgotten(camera: str) -> list[Entry]:
    """Ticks under a thousand names: nothing that a stage acts on, and the camera's memory is full."""
    tick = Tick(0, camera).emit("frames")
    return [Entry(f"{camera}:{n}", tick) for n in range(REMEMBERED)]


@asynccontextmanager
async def _bare(home: Installation) -> AsyncIterator[Send]:
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-images-") as directory:
        cameras = {camera: _BareCamera(home, camera, Path(directory)) for camera in CAMERAS}
        await asyncio.gather(*(camera.open() for camera in cameras.values()))
        try:
            yield lambda camera, data: cameras[camera].send(data)
        finally:
            await asyncio.gather(*(camera.close() for camera in cameras.values()))


class _BareCamera:
    """Check, hash, store, produce, commit: no dedupe, no fence, no retry, no capture times, no limits."""

    def __init__(self, home: Installation, camera: str, images: Path) -> None:
        self._camera = camera
        self._images = images
        self._partition = partition_of(camera, PARTITIONS)
        self._producer: AIOKafkaProducer = home.kafka.producer(transactional_id=f"bare-{secrets.token_hex(4)}")
        self._schema = avro_schemas.current("frames")
        self._header = ("fp", avro_schemas.fingerprint("frames"))
        self._waiting: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._woken = asyncio.Event()

    async def open(self) -> None:
        await self._producer.start()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._task.cancel()
        await self._producer.stop()

    async def send(self, data: bytes) -> None:
        record = await asyncio.to_thread(self._make, data)
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((record, done))
        self._woken.set()
        await done

    def _make(self, data: bytes) -> bytes:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # As the product: every bit is read, at an eighth of the size.
            image.draft("L", (width // 8, height // 8))
            image.load()
        sha256 = hashlib.sha256(data).hexdigest()
        inline = len(data) <= INLINE_LIMIT
        if not inline:
            self._store(sha256, data)
        out = io.BytesIO(b"\0\0\0\0\0")
        out.seek(0, io.SEEK_END)
        fastavro.schemaless_writer(
            out,
            self._schema,
            {
                "frame_id": f"{self._camera}:{sha256}",
                "camera_id": self._camera,
                "sha256": sha256,
                "size": len(data),
                "width": width,
                "height": height,
                "captured_at": None,
                "captured_from": "none",
                "file_at": None,
                "arrived_at": time.time_ns() // 1_000_000,
                "image": data if inline else None,
                "claim": None if inline else f"sha256:{sha256}",
                "source": "upload",
                "source_name": "",
            },
        )
        return out.getvalue()

    def _store(self, sha256: str, data: bytes) -> None:
        """Whole and on disk before it is named: the file, then the directory that names it."""
        target = self._images / sha256[:2] / sha256[2:4] / sha256
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        with part.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        part.rename(target)
        for directory in (target.parent, target.parent.parent, self._images):
            handle = os.open(directory, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    async def _run(self) -> None:
        """Whatever waits shares a transaction, 64 at most, as the product has it."""
        key = self._camera.encode()
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(64, len(self._waiting)))]
                await self._producer.begin_transaction()
                sent = [
                    await self._producer.send("frames", r, key=key, partition=self._partition, headers=[self._header])
                    for r, _ in group
                ]
                await asyncio.gather(*sent)
                await self._producer.commit_transaction()
                for _, done in group:
                    done.set_result(None)

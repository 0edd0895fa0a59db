"""A detector ten times too slow, on the real broker: bounded memory, uploads refused, and the way back."""

import asyncio
import contextlib
import io
import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from PIL import Image

from infra.config import Settings
from infra.topology import cameras
from processors.detect.detector import FakeDetector
from processors.detect.settings import DetectorSettings
from processors.detect.stage import DetectStage
from processors.ingest.kafka_log import KafkaLog
from processors.ingest.service import Service
from processors.ingest.settings import FolderSettings, IngestSettings, UploadSettings
from processors.ingest.shed import ShedSettings
from schemas.records import Box, Detections, Frame, Record
from streams import codec
from streams.backlog import backlog
from streams.claims import ClaimStore
from streams.delivery import Ownership
from streams.host_raw import RawHost
from streams.kafka import MAX_RECORD_BYTES, Kafka
from streams.lives import Lives
from streams.topics import partition_of
from tests.conftest import PARTITIONS
from tests.streams.conformance.harness import hosting, until

pytestmark = pytest.mark.real

R = TypeVar("R", bound=Record)

# What a partition's buffer and its window may hold in this test; the product's are 8 MB each.
_BYTES = 256 * 1024
_ABOVE, _BELOW = 80, 10


class SlowDetector(FakeDetector):
    """Takes so long for each image, whatever the batch."""

    def __init__(self) -> None:
        self.each_s = 0.1

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        time.sleep(self.each_s * len(images))
        return super().detect(images)


async def test_a_flood_before_a_slow_detector_is_refused_fills_no_memory_and_is_worked_off(
    kafka: Kafka, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.partition.BUFFER_BYTES", _BYTES)
    monkeypatch.setattr("streams.partition._WINDOW_BYTES", _BYTES)
    detector = SlowDetector()
    claims = ClaimStore(str(tmp_path / "images"))
    stage = DetectStage(detector, claims, DetectorSettings(batch_size=4))
    flood, trickle = _cameras_apart()
    async with Lives(kafka).following() as lives, _taking(kafka, settings, claims, lives, flood, trickle) as http:
        host = RawHost(kafka, stage, epochs=lives)
        most = 0

        async def refused() -> bool:
            nonlocal most
            held = [worker.buffer for worker, _ in host.workers._running.values()]
            most = max([most, *(sum(record.size for record in buffer._records) for buffer in held)])
            answers = await asyncio.gather(*(_upload(http, flood) for _ in range(16)))
            return any(answer.status_code == 429 for answer in answers)

        async with hosting(host.run):
            await until(refused, within=60)
            assert await _lag(kafka) > _BELOW
            answer = await _upload(http, trickle)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
            detector.each_s = 0.0  # the lag goes, and with it the refusals: nobody does anything for it

            async def taken() -> bool:
                return (await _upload(http, trickle)).status_code == 200

            await until(taken, within=30)
            frames = [frame.frame_id for frame in await _made(kafka, Frame, flood, trickle)]

            async def detected() -> bool:
                return len(await _made(kafka, Detections, flood, trickle)) >= len(frames)

            await until(detected)
        found = await _made(kafka, Detections, flood, trickle)
        assert sorted(one.frame_id for one in found) == sorted(frames)  # what was accepted came out once
        # Waiting, in the window, and a fetch that had begun while there was room.
        assert _BYTES < most <= 2 * _BYTES + MAX_RECORD_BYTES


def _cameras_apart() -> tuple[str, str]:
    """Two cameras on two partitions."""
    names = [f"{secrets.token_hex(4)}-{number}" for number in range(20)]
    first = names[0]
    return first, next(n for n in names if partition_of(n, PARTITIONS) != partition_of(first, PARTITIONS))


@asynccontextmanager
async def _taking(
    kafka: Kafka, settings: Settings, claims: ClaimStore, lives: Lives, *senders: str
) -> AsyncIterator[httpx.AsyncClient]:
    """Ingest's endpoint, as the service runs it; what others left on the log does not count."""
    for partition in range(PARTITIONS):
        hold = Ownership(kafka, "detect", TopicPartition("frames", partition), epoch=lambda: lives("frames"))
        await until(lambda: _acquired(hold))  # noqa: B023 (awaited here)
        await hold.commit([], (await kafka.bounds([hold.tp]))[hold.tp][1])
        await hold.release()
    section = IngestSettings(
        folder=FolderSettings(enabled=False),
        upload=UploadSettings(port=0, max_waiting=500),
        shed=ShedSettings(enabled=True, detect_above=_ABOVE, detect_below=_BELOW, analyze_above=10**9, look_s=0.2),
    )
    known = cameras(settings, kafka)
    stop = asyncio.Event()
    async with known.table.following():
        for sender in senders:  # one by one: sixteen uploads at once that make a camera fence one another
            await known.ensure(sender)
        service = Service(
            KafkaLog(kafka, lives("frames")), section, known, claims, look=lambda: backlog(kafka, ("detect", "analyze"))
        )
        running = asyncio.create_task(service.run(stop))
        try:
            async with httpx.AsyncClient(base_url=await service.url, timeout=60) as http:
                yield http
        finally:
            stop.set()
            await running


async def _acquired(hold: Ownership) -> bool:
    """A new broker's coordinator takes a moment to be there."""
    with contextlib.suppress(KafkaError):
        await hold.acquire()
        return True
    return False


async def _upload(http: httpx.AsyncClient, camera: str) -> httpx.Response:
    """A frame of 55 KB that nobody has seen."""
    out = io.BytesIO()
    Image.frombytes("RGB", (176, 128), os.urandom(176 * 128 * 3)).save(out, "JPEG", quality=95)
    answer = await http.post(f"/api/upload?camera={camera}", content=out.getvalue())
    assert answer.status_code in {200, 429}, answer.text
    return answer


async def _lag(kafka: Kafka) -> int:
    return (await backlog(kafka, ("detect",)))["detect"]


async def _made(kafka: Kafka, kind: type[R], *of: str) -> list[R]:
    """These cameras' records of a kind."""
    topic = "frames" if kind is Frame else "detections"
    found = await kafka.read([TopicPartition(topic, p) for p in range(PARTITIONS)])
    keys = {camera.encode() for camera in of}
    return [codec.decode(record, kind) for record in found if record.key in keys]

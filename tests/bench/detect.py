"""Images a second through detect, frames on the log in and detections on the log out, against a bare inference loop.

The loop has the images in memory and leaves the boxes there: decode, preprocess, forward, boxes, the next batch being
decoded in a thread meanwhile. So the ratio is what is left of the model's rate by the log, the host and Avro together.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from infra.local.stack import LocalStack
from processors.detect.card import Card
from processors.detect.core import best_boxes, decode_image
from processors.detect.settings import DetectorSettings
from processors.detect.stage import DetectStage
from processors.detect.torch_detector import TorchDetector
from schemas.records import Box, Detections
from streams import codec
from streams.claims import ClaimStore
from streams.host_faust import FaustHost
from tests.bench import kit
from tests.bench.figure import Figure, rate
from tests.processors import detect_kit

NAMES = ("detect_vs_bare", "detect_r18_vs_bare")
AIM = 0.95

# 15 ms an image with the demo's detector, 600 ms with RT-DETRv2 R18 at 640 x 640, on two cores.
PAIRS, IMAGES = 6, 320
R18_PAIRS, R18_IMAGES = 3, 16

SETTINGS = DetectorSettings(runtime="torch")  # batches of 8, as many threads as torch takes


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """The stage as it is shipped, on Faust's host: with the demo's detector, and with the smallest one of users."""
    demo = TorchDetector(Card.read(detect_kit.DEMO_DETECTOR), SETTINGS)
    if quick:
        return [await _figure(NAMES[0], stack, demo, progress, count=SETTINGS.batch_size, pairs=1)]
    first = await _figure(NAMES[0], stack, demo, lambda done: progress(done / 2), count=IMAGES, pairs=PAIRS)
    r18 = await asyncio.to_thread(_r18)
    second = await _figure(
        NAMES[1], stack, r18, lambda done: progress(0.5 + done / 2), count=R18_IMAGES, pairs=R18_PAIRS
    )
    return [first, second]


async def _figure(
    name: str,
    stack: LocalStack,
    detector: TorchDetector,
    progress: Callable[[float], None],
    *,
    count: int,
    pairs: int,
) -> Figure:
    images = kit.scenes(8)
    with ThreadPoolExecutor(1) as models, ThreadPoolExecutor(1) as decoders:
        async with _product(stack, detector, images) as product:
            made = await kit.in_pairs(
                lambda: product(count),
                lambda: asyncio.wrap_future(models.submit(_bare, detector, decoders, images, count)),
                pairs,
                progress,
            )
    return rate(name, made, "images/s", AIM)


def _bare(detector: TorchDetector, decoders: ThreadPoolExecutor, images: Sequence[bytes], count: int) -> float:
    """Batches of the same size, one after another, each decoded while the one before is in the model."""
    pixels, infer, labels = detector.card.pixels, detector._infer, detector.card.labels
    batches = [
        [images[n % len(images)] for n in range(start, min(start + SETTINGS.batch_size, count))]
        for start in range(0, count, SETTINGS.batch_size)
    ]

    def decode(batch: list[bytes]) -> list[Any]:
        return [decode_image(data) for data in batch]

    seen: list[tuple[Box, ...]] = []
    began = time.perf_counter()
    ahead = decoders.submit(decode, batches[0])
    for following in [*batches[1:], []]:
        pictures = ahead.result()
        ahead = decoders.submit(decode, following)
        found = infer(pixels.of(pictures))
        seen += [best_boxes(one[:, :-4], one[:, -4:], labels, p.size) for one, p in zip(found, pictures, strict=True)]
    assert len(seen) == count
    return count / (time.perf_counter() - began)


@asynccontextmanager
async def _product(stack: LocalStack, detector: TorchDetector, images: Sequence[bytes]) -> AsyncIterator[Any]:
    home = await kit.install(stack)
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-images-") as directory:
        stage = DetectStage(detector, ClaimStore(directory), SETTINGS)
        await kit.begin_at_the_end(home, stage.name, stage.inputs)
        host = FaustHost(home.kafka, stage, epochs=home.epochs)
        stop = asyncio.Event()
        running = asyncio.create_task(host.run(stop))

        async def product(count: int) -> float:
            before = await home.kafka.bounds(kit.partitions_of("detections"))
            async with kit.backlog(
                home.kafka, [codec.emit("frames", frame, p) for p, frame in kit.frames(images, count)]
            ) as work:
                await work.show()
                began = time.perf_counter()
                await kit.reached(host.workers.liveness, work.positions)
                seconds = time.perf_counter() - began
            ends = {tp: end for tp, (_, end) in before.items()}
            made = [codec.decode(record, Detections) for record in await home.kafka.read([*before], since=ends)]
            assert len(made) == count, f"{len(made)} detections of {count} frames"
            return count / seconds

        try:
            await product(kit.PARTITIONS)  # every partition is owned, and the model is warm
            yield product
        finally:
            stop.set()
            await running


def _r18() -> TorchDetector:
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-r18-") as directory:
        return TorchDetector(Card.read(detect_kit.r18(Path(directory))), SETTINGS)

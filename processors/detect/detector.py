"""The port behind which detectors stand, its fake, and the batcher that fills one inference from many cameras."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import structlog
from PIL import Image

from processors.detect.metrics import DetectMetrics
from schemas.records import Box
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)


class Detector(Protocol):
    """A model that finds objects in images."""

    name: str
    digest: str
    """SHA-256 of the weights, hex."""

    @property
    def runtime(self) -> str:
        """What ran the last `detect`: torch-cpu, torch-cuda, openvino-cpu, onnxruntime-cpu, http, http:torch-cuda."""

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """The boxes of each image, pixels, best first. Blocking; called from one thread."""

    def close(self) -> None:
        """Let go of connections and of work beside it."""


class FakeDetector:
    """Sees one person in every image whose top left pixel is bright. For tests of everything around a detector."""

    name = "fake"
    digest = "0" * 64
    runtime = "fake"

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """A person over the whole image, or nothing."""
        return [
            (Box(label="person", score=0.9, x=0, y=0, width=image.width, height=image.height),)
            if image.convert("L").getpixel((0, 0)) > 127  # type: ignore[operator]
            else ()
            for image in images
        ]

    def close(self) -> None:
        """Nothing is held."""


class Seen(NamedTuple):
    """One image's result."""

    boxes: tuple[Box, ...]
    inference_ms: float
    """Its share of the batch's inference, milliseconds."""
    runtime: str
    """What made the boxes."""
    model: str
    model_digest: str


class Batcher:
    """Fills an inference from whoever asks: up to `size` images, or what came within `wait_s` of the first.

    Requests are taken in the order they came; partitions hand them in side by side, so no camera starves another.
    """

    def __init__(self, detector: Detector, *, size: int, wait_s: float) -> None:
        self._detector = detector
        self._size = size
        self._wait_s = wait_s
        self._waiting: asyncio.Queue[tuple[Image.Image, asyncio.Future[Seen]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detector")
        self._loop_task: asyncio.Task[None] | None = None
        self.metrics = DetectMetrics()

    async def detect(self, image: Image.Image) -> Seen:
        """The image's boxes, from whichever batch it fell into."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run(), name="detector batches")
        future: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((image, future))
        return await future

    async def close(self) -> None:
        """Stop taking requests; the inference that runs is left to end by itself."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            deadline = loop.time() + self._wait_s
            while len(batch) < self._size:
                try:
                    async with asyncio.timeout_at(deadline):
                        batch.append(await self._waiting.get())
                except TimeoutError:
                    break
            batch = [(image, future) for image, future in batch if not future.done()]  # the asker has gone
            if batch:
                await self._infer(batch)

    async def _infer(self, batch: list[tuple[Image.Image, "asyncio.Future[Seen]"]]) -> None:
        began = time.perf_counter()
        try:
            results, made_by = await asyncio.get_running_loop().run_in_executor(
                self._thread,
                self._detect,
                [image for image, _ in batch],
            )
        except UnavailableError as error:
            self._fail(batch, error)
            return
        except Exception as error:  # noqa: BLE001 (each asker is told)
            if len(batch) == 1:
                self._fail(batch, error)  # its asker gets it, and its record's attempts are counted
                return
            # One image that the model cannot bear must not take its neighbours along.
            log.warning("a batch failed: one image at a time", images=len(batch), error=repr(error))
            for one in batch:
                await self._infer([one])
            return
        took = time.perf_counter() - began
        self.metrics.inferred(len(batch), took)
        share = took * 1000 / len(batch)
        for (_, future), boxes in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(Seen(boxes, share, *made_by))

    def _detect(self, images: list[Image.Image]) -> tuple[list[tuple[Box, ...]], tuple[str, str, str]]:
        detector = self._detector
        return detector.detect(images), (detector.runtime, detector.name, detector.digest)  # the next may have others

    def _fail(self, batch: list[tuple[Image.Image, "asyncio.Future[Seen]"]], error: Exception) -> None:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)

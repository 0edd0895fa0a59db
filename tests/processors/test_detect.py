"""The detect stage: boxes from raw scores, batches filled from many cameras, ticks in order, bad images kept."""

import asyncio
import hashlib
import io
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from processors.detect.core import MAX_BOXES, best_boxes, decode_image
from processors.detect.detector import Batcher, FakeDetector
from processors.detect.settings import DetectorSettings
from processors.detect.stage import DetectStage
from schemas import ids
from schemas.records import Box, Detections, Frame
from streams import codec
from streams.claims import ClaimStore
from streams.errors import UnprocessableError
from streams.messages import Emit, Incoming, Tick


def jpeg(brightness: int = 255, size: tuple[int, int] = (32, 24)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (brightness,) * 3).save(out, "JPEG")
    return out.getvalue()


def frame(data: bytes, *, inline: bool = True) -> Frame:
    sha = hashlib.sha256(data).hexdigest()
    return Frame(
        frame_id=ids.frame_id("door", sha, 5),
        camera_id="door",
        sha256=sha,
        size=len(data),
        width=32,
        height=24,
        captured_at=5,
        captured_from="exif",
        arrived_at=9,
        image=data if inline else None,
        claim=None if inline else f"sha256:{sha}",
        source="folder",
        source_name="a.jpg",
    )


def as_incoming(emit: Emit, offset: int = 0) -> Incoming:
    return Incoming(emit.topic, "e", 0, offset, emit.key, emit.value, emit.headers)


@pytest.fixture
async def stage(tmp_path: Path):
    made = DetectStage(FakeDetector(), ClaimStore(str(tmp_path)), DetectorSettings(), clock=lambda: 7.0)
    yield made
    await made.close()


async def test_a_frame_becomes_its_detections(stage: DetectStage) -> None:
    (emit,) = await stage.handle(as_incoming(codec.emit("frames", frame(jpeg()))))
    detections = codec.decode(as_incoming(emit), Detections)
    assert detections.boxes == (Box(label="person", score=0.9, x=0, y=0, width=32, height=24),)
    assert (detections.camera_id, detections.captured_at, detections.arrived_at, detections.detected_at) == (
        "door",
        5,
        9,
        7000,
    )


async def test_the_workers_report_names_the_model_and_what_runs_it_now(stage: DetectStage) -> None:
    assert stage.details == {"detector": {"model": "fake", "runtime": "fake"}}
    stage._detector.runtime = "openvino-cpu"
    assert stage.details["detector"]["runtime"] == "openvino-cpu"


async def test_a_frame_that_shows_nothing_has_a_record_too(stage: DetectStage) -> None:
    (emit,) = await stage.handle(as_incoming(codec.emit("frames", frame(jpeg(0)))))
    assert codec.decode(as_incoming(emit), Detections).boxes == ()


async def test_a_claimed_image_comes_from_the_store(stage: DetectStage, tmp_path: Path) -> None:
    data = jpeg()
    await ClaimStore(str(tmp_path)).put(data)
    (emit,) = await stage.handle(as_incoming(codec.emit("frames", frame(data, inline=False))))
    assert len(codec.decode(as_incoming(emit), Detections).boxes) == 1


async def test_a_claim_without_image_cannot_be_processed(stage: DetectStage) -> None:
    with pytest.raises(UnprocessableError, match="is not in"):
        await stage.handle(as_incoming(codec.emit("frames", frame(jpeg(), inline=False))))


async def test_a_claim_that_names_a_path_is_refused(stage: DetectStage) -> None:
    bad = frame(jpeg(), inline=False)
    record = as_incoming(
        codec.emit(
            "frames",
            Frame(**{name: getattr(bad, name) for name in bad.__struct_fields__} | {"claim": "file:///etc/passwd"}),
        )
    )
    with pytest.raises(UnprocessableError, match="not a claim"):
        await stage.handle(record)


async def test_a_tick_goes_on_as_it_is(stage: DetectStage) -> None:
    tick = Tick(123, "door")
    (emit,) = await stage.handle(as_incoming(tick.emit("frames")))
    assert (emit.topic, Tick.of(as_incoming(emit))) == ("detections", tick)


@pytest.mark.parametrize("data", [b"", b"no image", jpeg()[:200]])
def test_bytes_that_are_no_whole_image_cannot_be_processed(data: bytes) -> None:
    with pytest.raises(UnprocessableError, match="not a readable image"):
        decode_image(data)


def test_boxes_are_pixels_clipped_and_best_first() -> None:
    scores = np.array([[0.2, 0.05], [0.1, 0.8]], np.float32)
    boxes = np.array([[0.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.2, 0.4]], np.float32)
    found = best_boxes(scores, boxes, {0: "cat", 1: "dog"}, (100, 50))
    assert [box.label for box in found] == ["dog", "cat", "cat"]
    assert (found[0].x, found[0].y, found[0].width, found[0].height) == (40, 15, 20, 20)
    assert (found[1].x, found[1].width) == (0, 25)


def test_a_score_of_exactly_the_least_is_kept_and_the_count_is_bounded() -> None:
    scores = np.full((150, 1), 0.5, np.float32)
    boxes = np.full((150, 4), 0.5, np.float32)
    assert len(best_boxes(scores, boxes, {0: "cat"}, (10, 10))) == MAX_BOXES
    assert len(best_boxes(np.array([[0.1001], [0.0999]], np.float32), boxes[:2], {0: "cat"}, (10, 10))) == 1


class Recording(FakeDetector):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        self.sizes.append(len(images))
        time.sleep(0.02)
        return super().detect(images)


async def test_one_inference_takes_what_waits() -> None:
    detector = Recording()
    batcher = Batcher(detector, size=4, wait_s=0.05)
    image = Image.new("RGB", (4, 4))
    await asyncio.gather(*(batcher.detect(image) for _ in range(10)))
    await batcher.close()
    assert detector.sizes == [4, 4, 2]


async def test_whoever_left_is_not_inferred() -> None:
    detector = Recording()
    batcher = Batcher(detector, size=2, wait_s=0.01)
    image = Image.new("RGB", (4, 4))
    leaving = asyncio.create_task(batcher.detect(image))
    await asyncio.sleep(0)
    leaving.cancel()
    await batcher.detect(image)
    await batcher.close()
    assert detector.sizes == [1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "not the one that sha256 names"),
        ({"width": 33}, "the image has 32x24 pixels, its record says 33x24"),
        ({"image": b"other"}, "not the one that sha256 names"),
        ({"image": None}, "neither image nor claim"),
    ],
)
async def test_a_frame_that_is_not_what_it_says_cannot_be_processed(stage: DetectStage, changes, says) -> None:
    record = as_incoming(codec.emit("frames", msgspec.structs.replace(frame(jpeg()), **changes)))
    with pytest.raises(UnprocessableError, match=says):
        await stage.handle(record)


def test_frames_are_jpeg_and_nothing_else_is_opened() -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")
    with pytest.raises(UnprocessableError, match="not a readable image"):
        decode_image(out.getvalue())


class Allergic(FakeDetector):
    """Fails on whatever holds an image of one pixel."""

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        if any(image.size == (1, 1) for image in images):
            raise RuntimeError("out of shape")
        return super().detect(images)


async def test_one_image_that_the_model_cannot_bear_takes_no_other_along() -> None:
    batcher = Batcher(Allergic(), size=4, wait_s=0.05)
    images = [Image.new("RGB", size, "white") for size in ((4, 4), (1, 1), (5, 5))]
    good, bad, also = await asyncio.gather(*(batcher.detect(image) for image in images), return_exceptions=True)
    await batcher.close()
    assert isinstance(bad, RuntimeError)
    assert [len(seen.boxes) for seen in (good, also)] == [1, 1]

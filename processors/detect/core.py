"""What the detector's raw output means: the best boxes in pixels, and the record made of them. Pure."""

import hashlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from schemas.records import Box, Detections, Frame
from streams.errors import UnprocessableError

MIN_SCORE = 0.10
"""Everything from here up is recorded, so a replay can lower any threshold down to it without a detector."""

MAX_BOXES = 100
"""COCO's own limit of detections an image (its maxDets)."""


def decode_image(data: bytes) -> Image.Image:
    """The JPEG in these bytes, decoded whole, RGB.

    Raises:
        UnprocessableError: they are not a whole JPEG.
    """
    try:
        # Frames are JPEG, and Pillow's other readers are a hundred more ways in.
        return Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UnprocessableError(f"not a readable image: {error}") from error


def image_of(frame: Frame, data: bytes) -> Image.Image:
    """The frame's image from its bytes, which must be what the record says: verdicts are explained down to them.

    Raises:
        UnprocessableError: they have another hash or size, or are not a whole JPEG.
    """
    if hashlib.sha256(data).hexdigest() != frame.sha256:
        raise UnprocessableError("the image is not the one that sha256 names", camera_id=frame.camera_id)
    image = decode_image(data)
    if image.size != (frame.width, frame.height):
        raise UnprocessableError(
            f"the image has {image.width}x{image.height} pixels, its record says {frame.width}x{frame.height}",
            camera_id=frame.camera_id,
        )
    return image


def best_boxes(
    scores: NDArray[np.float32],
    boxes: NDArray[np.float32],
    labels: dict[int, str],
    size: tuple[int, int],
) -> tuple[Box, ...]:
    """The best `MAX_BOXES` of at least `MIN_SCORE`, best first.

    `scores` is (queries, classes), sigmoid scores; `boxes` (queries, 4) are centre x, centre y, width and height as
    fractions; `size` is the image's (width, height) in pixels. A query can count for several classes, as in
    RT-DETR's own post-processing (arXiv 2304.08069), which takes the top scores over queries and classes together.
    """
    width, height = size
    flat = scores.ravel()
    enough = np.flatnonzero(flat >= MIN_SCORE)  # a few of 24,000: sorting all of them takes 1.5 ms an image
    order = enough[np.argsort(-flat[enough], kind="stable")[:MAX_BOXES]]
    found: list[Box] = []
    for index in order:
        query, label = divmod(int(index), scores.shape[1])
        score = float(flat[index])
        cx, cy, w, h = (float(value) for value in boxes[query])
        left, top = max(0.0, (cx - w / 2) * width), max(0.0, (cy - h / 2) * height)
        right, bottom = min(float(width), (cx + w / 2) * width), min(float(height), (cy + h / 2) * height)
        if right > left and bottom > top:
            found.append(
                Box(
                    label=labels[label],
                    score=round(score, 4),
                    x=round(left, 1),
                    y=round(top, 1),
                    width=round(right - left, 1),
                    height=round(bottom - top, 1),
                ),
            )
    return tuple(found)


def record(
    frame: Frame,
    boxes: tuple[Box, ...],
    *,
    model: str,
    model_digest: str,
    runtime: str,
    inference_ms: float,
    detected_at: int,
) -> Detections:
    """The `detections` record of a frame."""
    return Detections(
        frame_id=frame.frame_id,
        camera_id=frame.camera_id,
        captured_at=frame.captured_at,
        arrived_at=frame.arrived_at,
        width=frame.width,
        height=frame.height,
        boxes=boxes,
        model=model,
        model_digest=model_digest,
        runtime=runtime,
        inference_ms=inference_ms,
        detected_at=detected_at,
    )

"""The work that both stream runtimes do: of each frame's detections keep the sure boxes. Avro in, Avro out.

Small on purpose: what is measured is the runtime around it. `detections` is the product's most frequent record.
"""

import random
from collections.abc import Iterator

import msgspec

from schemas.records import Box, Detections
from streams import codec

TOPIC = "detections"
"""Whose schema both ends have."""

SURE = 0.5
"""Boxes of at least this score are kept: the product's own default threshold."""

_BOXES = 8
_LABELS = ("person", "car", "dog", "bicycle")


def kept(seen: Detections) -> Detections:
    """The record with its sure boxes only."""
    return msgspec.structs.replace(seen, boxes=tuple(box for box in seen.boxes if box.score >= SURE))


def inputs(camera: str, count: int) -> Iterator[tuple[bytes, bytes]]:
    """`(value, fingerprint)` of `count` records of 8 boxes, the same for a camera each time."""
    chance = random.Random(camera)
    for number in range(count):
        boxes = tuple(
            Box(
                label=chance.choice(_LABELS),
                score=round(chance.uniform(0.1, 1.0), 4),
                x=round(chance.uniform(0, 1800), 1),
                y=round(chance.uniform(0, 900), 1),
                width=round(chance.uniform(20, 120), 1),
                height=round(chance.uniform(40, 180), 1),
            )
            for _ in range(_BOXES)
        )
        yield codec.encode(
            TOPIC,
            Detections(
                frame_id=f"{camera}:{chance.randbytes(16).hex()}:{number}",
                camera_id=camera,
                captured_at=1_780_000_000_000 + 500 * number,
                arrived_at=1_780_000_000_040 + 500 * number,
                width=1920,
                height=1080,
                boxes=boxes,
                model="bench",
                model_digest="0" * 64,
                runtime="none",
                inference_ms=1.0,
                detected_at=1_780_000_000_080 + 500 * number,
            ),
        )


def expected(value: bytes, fingerprint: bytes) -> bytes:
    """The output's value for an input's."""
    return codec.encode(TOPIC, kept(codec.decode_bytes(TOPIC, value, fingerprint, Detections)))[0]

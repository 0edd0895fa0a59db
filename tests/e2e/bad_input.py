"""The bad input of the matrix: pictures that are none, records that nobody can read, records that are nonsense."""

import hashlib
import io
import math
import os
import struct
import time
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from msgspec.structs import replace
from PIL import Image

from processors.ingest import core
from schemas import ids
from schemas.records import Batch, BatchFrame, Box, Context, Detections, Frame, SeenBox
from streams import codec
from streams.messages import FINGERPRINT
from tests import examples

MAX_BYTES = 400_000
"""`ingest.max_bytes` of the installation."""


def jpeg(size: tuple[int, int] = (320, 180), mode: str = "RGB", **options: Any) -> bytes:
    """A black JPEG."""
    out = io.BytesIO()
    Image.new(mode, size).save(out, "JPEG", **options)
    return out.getvalue()


def resized(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG, its header (SOF0, ITU T.81 B.2.2) claiming another size."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def exif(body: bytes, data: bytes) -> bytes:
    """The same JPEG with these bytes as its EXIF, in as many APP1 segments as they need."""
    parts = [b"Exif\0\0" + body[i : i + 65_000] for i in range(0, len(body), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
    return data[:2] + segments + data[2:]


def exif_bomb(data: bytes) -> bytes:
    """20,000 EXIF entries that each claim to be 260 KB long: 5 GB, were they believed."""
    count, size = 20_000, 260_000
    entries = b"".join(struct.pack("<HHLL", 0x1000 + number, 1, size, 0) for number in range(count))
    return exif((b"II*\0" + struct.pack("<LH", 8, count) + entries).ljust(size, b"A"), data)


def exif_loop(data: bytes) -> bytes:
    """An EXIF directory that is its own sub-directory, and its own successor."""
    return exif(b"II*\0" + struct.pack("<LHHHLLL", 8, 1, 0x8769, 4, 1, 8, 8), data)


def scans(data: bytes, count: int) -> bytes:
    """The same picture with its scans again and again: a few kilobytes that ask for minutes."""
    at = data.index(b"\xff\xda")
    return data[:at] + data[at:-2] * count + data[-2:]


class Picture(NamedTuple):
    """A file that a camera or a person may send."""

    data: bytes
    status: int = 200
    """What an upload is answered with; 200 is taken."""
    reason: str = ""
    """What the answer, the file's reason beside it and its dead letter say."""


_SMALL = jpeg()
PICTURES = {
    "zero bytes": Picture(b"", 400, "the file is empty"),
    "truncated": Picture(jpeg(quality=95)[:-400], 400, "the JPEG is cut off"),
    "cut in its header": Picture(_SMALL[:100], 400, "the JPEG is cut off"),
    "zeros of the right length": Picture(bytes(5000), 400, "this is no JPEG"),
    "PNG named .jpg": Picture(
        b"\x89PNG\r\n\x1a\n" + bytes(64), 400, "this is a PNG, whatever its name says: send JPEG"
    ),
    "video named .jpg": Picture(b"\0\0\0\x18ftypmp42" + bytes(64), 400, "this is a video or a HEIC image"),
    "text file": Picture(b"camera offline\n", 400, "this is no JPEG (it begins with 63 61 6d 65 72 61 20 6f)"),
    "bomb of 60,000 x 60,000": Picture(
        resized(_SMALL, 60_000, 60_000),
        400,
        "60000x60000 are 3,600,000,000 pixels, ingest.max_pixels allows 50,000,000",
    ),
    "bomb of scans": Picture(scans(jpeg(progressive=True), 200), 400, "scans: no camera makes that"),
    "header of 65,535 x 1": Picture(resized(_SMALL, 65_535, 1), 400, "the JPEG is corrupt"),
    "above the limit": Picture(_SMALL + bytes(MAX_BYTES), 413, "ingest.max_bytes"),
    # Odd, and good: nothing may be refused that is a picture.
    "grey": Picture(jpeg((321, 180), "L")),
    "CMYK": Picture(jpeg((322, 180), "CMYK")),
    "progressive": Picture(jpeg((323, 180), progressive=True)),
    "one pixel": Picture(jpeg((1, 1))),
    "as wide as libjpeg goes": Picture(jpeg((65_500, 1))),
    "as high as libjpeg goes": Picture(jpeg((1, 65_500))),
    "EXIF that is a bomb": Picture(exif_bomb(jpeg((324, 180)))),
    "EXIF that is a loop": Picture(exif_loop(jpeg((325, 180)))),
    "EXIF that is garbage": Picture(exif(os.urandom(3000), jpeg((326, 180)))),
    # libjpeg paints what is missing grey and says nothing of it, as every viewer shows such a file.
    "header larger than its data": Picture(resized(_SMALL, 3200, 1800)),
    "zeros behind the picture": Picture(jpeg((327, 180)) + bytes(999)),
}


class Raw(NamedTuple):
    """A record that nobody can read."""

    value: bytes | None
    key: bytes | None
    headers: tuple[tuple[str, bytes], ...]


FAULTS = (
    "no value",
    "empty",
    "text",
    "framed noise",
    "cut off",
    "bytes left over",
    "unknown schema",
    "another topic's schema",
    "no key",
    "another's key",
    "key that is no text",
    "3.9 MB of garbage",
    "1 MB of headers",
    "1 MB as a fingerprint",
    "1 MB as a key",
)


def unreadable(topic: str, fault: str) -> Raw:
    """A record of the topic with that fault; all else about it is as it should be."""
    good = codec.emit(topic, examples.RECORDS[topic])
    assert good.value is not None
    other = "labels" if topic != "labels" else "alerts"
    big = bytes(1_000_000)
    value, key, headers = good.value, good.key, good.headers
    return {
        "no value": Raw(None, key, headers),
        "empty": Raw(b"", key, headers),
        "text": Raw(b'{"frame_id": 5}', key, headers),
        "framed noise": Raw(value[:5] + os.urandom(200) + b"\xff" * 20, key, headers),
        "cut off": Raw(value[:-3], key, headers),
        "bytes left over": Raw(value + b"x", key, headers),
        "unknown schema": Raw(value, key, ((FINGERPRINT, b"\x07" * 8),)),
        "another topic's schema": Raw(value, key, codec.emit(other, examples.RECORDS[other]).headers),
        "no key": Raw(value, None, headers),
        "another's key": Raw(value, b"somebody-else", headers),
        "key that is no text": Raw(value, b"\xff\xfe", headers),
        "3.9 MB of garbage": Raw(value[:5] + bytes(3_900_000), key, headers),
        "1 MB of headers": Raw(value[:-3], key, (*headers, ("x", big))),
        "1 MB as a fingerprint": Raw(value, key, ((FINGERPRINT, big),)),
        "1 MB as a key": Raw(value, b"k" * len(big), headers),
    }[fault]


def frames(camera: str) -> dict[str, tuple[Frame, str]]:
    """Frames that are not what they say, and what their dead letter says."""
    data, text = jpeg((330, 190)), b"text"
    bomb = resized(data, 60_000, 60_000)
    good = core.build_frame(
        core.Submission(camera, data, "upload", "", arrived_at=int(time.time() * 1000)),
        core.look(data, max_bytes=MAX_BYTES, max_pixels=10**6, zone=ZoneInfo("UTC")),
        (None, "none"),
        claim=None,
    )
    bare = replace(good, image=None)
    climbing = "../../../etc/passwd"
    faults = {
        "a claim to a file": (replace(bare, claim="file:///etc/passwd"), "not a claim of this store"),
        "a claim to a host": (replace(bare, claim="http://169.254.169.254/"), "not a claim of this store"),
        "a claim that climbs": (
            replace(bare, claim=f"sha256:{climbing}", sha256=climbing),
            "not a claim of this store",
        ),
        "a claim of 2 MB": (replace(bare, claim="\0" * 2_000_000), "not a claim of this store"),
        "a claim to nothing": (replace(bare, claim=f"sha256:{good.sha256}"), "is not in"),
        "neither image nor claim": (bare, "neither image nor claim"),
        "another image's hash": (replace(good, sha256="0" * 64), "not the one that sha256 names"),
        "another size": (replace(good, width=10), "the image has 330x190 pixels, its record says 10x190"),
        "a text as its image": (
            replace(good, image=text, sha256=hashlib.sha256(text).hexdigest()),
            "not a readable image",
        ),
        "a bomb as its image": (
            replace(good, image=bomb, sha256=hashlib.sha256(bomb).hexdigest()),
            "not a readable image",
        ),
    }
    return {
        fault: (replace(frame, frame_id=f"{camera}:forged {fault}"), says) for fault, (frame, says) in faults.items()
    }


def detections(camera: str) -> dict[str, tuple[Detections, str]]:
    """Detections that no detector makes, and what their dead letter says."""
    good = replace(
        examples.detections,
        frame_id=f"{camera}:forged",
        camera_id=camera,
        captured_at=None,
        arrived_at=int(time.time() * 1000),
        boxes=(),
    )
    box = Box(label="person", score=0.95, x=1, y=2, width=30, height=40)
    boxes = {
        "a score of NaN": (replace(box, score=math.nan), "a box of score nan"),
        "a score of infinity": (replace(box, score=math.inf), "a box of score inf"),
        "a score of 95": (replace(box, score=95.0), "a box of score 95.0"),
        "a negative score": (replace(box, score=-0.5), "a box of score -0.5"),
        "a box at NaN": (replace(box, x=math.nan), "a box at nan"),
        "an endless box": (replace(box, width=math.inf), "a box at 1.0, 2.0 of inf"),
        "a box inside out": (replace(box, height=-40), "x -40.0 pixels"),
        "a class of 2 MB": (replace(box, label="x" * 2_000_000), "a name of 2,000,000 characters"),
    }
    faults = {fault: (replace(good, boxes=(odd,)), says) for fault, (odd, says) in boxes.items()} | {
        "100,000 boxes": (replace(good, boxes=(box,) * 100_000), "100,000 boxes: a frame has 100 at most"),
        "no camera": (replace(good, camera_id=""), "without a camera"),
        "before 1970": (replace(good, arrived_at=-1), "arrived_at -1 is outside the years"),
        "captured before 1970": (replace(good, captured_at=-(2**63)), "captured_at -9223372036854775808 is outside"),
        "in the year 292,278,994": (replace(good, arrived_at=2**63 - 1), "is outside the years"),
    }
    return {fault: (replace(seen, frame_id=f"forged {fault}"), says) for fault, (seen, says) in faults.items()}


def batches(camera: str) -> dict[str, tuple[Batch, str]]:
    """Batches of no window, and what their dead letter says."""
    good = _batch(camera)
    return {
        "no frames": (replace(good, frames=(), batch_id=ids.batch_id(camera, [])), "a batch of 0 frames"),
        "another's name": (replace(good, batch_id=f"{camera}:{'0' * 32}"), "whose name is not theirs"),
        "a name of 1 MB": (replace(good, batch_id="b" * 1_000_000), "whose name is not theirs"),
    }


def contexts(camera: str) -> dict[str, tuple[Context, str]]:
    """Contexts that cannot be judged, and what their dead letter says."""
    batch = _batch(camera)
    good = Context(
        batch_id=batch.batch_id, camera_id=camera, batch=batch, camera_name=camera, time_zone="UTC", sections=()
    )
    [frame] = batch.frames
    crowded = replace(frame, boxes=tuple(replace(frame.boxes[0], label=f"thing-{n}") for n in range(600)))
    faults = {
        "no frames": (replace(good, batch=replace(batch, frames=())), "a window without frames"),
        "no time zone": (replace(good, time_zone="Mars/Olympus"), "no local time in zone 'Mars/Olympus'"),
        "a time zone that climbs": (replace(good, time_zone="../../etc/passwd"), "etc/passwd"),
        "before the calendar": (replace(good, batch=replace(batch, started_at=-(2**63))), "no local time"),
        "hundreds of classes": (replace(good, batch=replace(batch, frames=(crowded,))), "raise llm.context_size"),
    }
    return {fault: (replace(context, batch_id=f"forged {fault}"), says) for fault, (context, says) in faults.items()}


def _batch(camera: str) -> Batch:
    frame = BatchFrame(
        frame_id=f"{camera}:forged",
        offset=0,
        event_at=examples.AT,
        width=640,
        height=360,
        matters=True,
        late=False,
        boxes=(SeenBox(label="person", score=0.95, x=1, y=2, width=30, height=40, stationary=False),),
    )
    return replace(examples.batch, camera_id=camera, frames=(frame,), batch_id=ids.batch_id(camera, [frame.frame_id]))

"""What an image must be, when it was captured, and whether its camera has sent it before: pure decisions."""

import hashlib
import io
import itertools
import math
import re
import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from PIL import ExifTags, Image, JpegImagePlugin

from schemas import ids
from schemas.records import Frame, IngestState
from streams import jpeg
from streams.errors import UnprocessableError

REMEMBERED = 1000
"""How many of a camera's last frame ids ingest remembers: 17 minutes at one frame a second, in an 8 KB record."""

_SHORT = 8  # bytes kept of each id's SHA-256: among 1,000 a stranger matches with probability 5e-17

_CAMERA_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

# The last millisecond of the year 9999, the end of what `datetime` and ClickHouse's DateTime64 can say.
_LAST_MS = 253_402_300_799_999

CapturedFrom = Literal["exif", "client", "filename", "none"]
Source = Literal["folder", "upload", "snapshot", "video"]


class RejectedError(UnprocessableError):
    """This is no image that can be taken, and the message says why."""

    def __init__(self, message: str, *, incomplete: bool = False) -> None:
        super().__init__(message, kind="rejected")
        self.incomplete = incomplete
        """More bytes could make it whole: a file still being written looks like this."""


class UnknownCameraError(Exception):
    """No such camera is set; the message names the command that makes it."""

    def __init__(self, camera_id: str) -> None:
        super().__init__(f"camera {camera_id} is not known: `rewatch camera add {camera_id}` adds it")


class Submission(NamedTuple):
    """One image as it came, and what came with it."""

    camera_id: str
    data: bytes
    source: Source
    name: str
    """The file's name as it came, with folders below the camera's; empty where there was none."""
    arrived_at: int
    """Wall time, ms since the Unix epoch."""
    client_at: int | None = None
    """Capture time as the client gave it, ms since the Unix epoch."""
    file_at: int | None = None
    """The file's modification time, ms since the Unix epoch."""


class Picture(NamedTuple):
    """What an image says of itself."""

    width: int
    """Pixels, as stored: EXIF's orientation is not applied."""
    height: int
    exif_at: int | None
    """Capture time by EXIF, ms since the Unix epoch."""


def check_camera_id(camera_id: str) -> str:
    """The id, if it is one.

    Raises:
        RejectedError: it is none; the message says what an id is made of.
    """
    if not _CAMERA_ID.fullmatch(camera_id):
        raise RejectedError(
            f"{camera_id[:80]!r} is no camera id: 1 to 63 lower-case letters, digits, - and _, a letter or digit first",
        )
    return camera_id


def clean_name(name: str) -> str:
    """A name fit for a record: no way up or to the root, no control characters, valid UTF-8, at most 255 characters."""
    parts = [p for p in PurePosixPath(name.replace("\\", "/")).parts if p not in {"/", ".", ".."}]
    text = "/".join(parts).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)[-255:]


def look(data: bytes, *, max_bytes: int, max_pixels: int, zone: ZoneInfo) -> Picture:
    """Decode the whole image and say what it is.

    Args:
        data: the file's bytes.
        max_bytes: the longest file taken.
        max_pixels: the largest picture decoded, width times height; checked before anything is decoded.
        zone: the camera's time zone, for EXIF times without an offset.

    Raises:
        RejectedError: empty, too long, no JPEG, cut off, corrupt, or a bomb.
    """
    if not data:
        raise RejectedError("the file is empty", incomplete=True)
    if len(data) > max_bytes:
        raise RejectedError(f"the file has {len(data):,} bytes, ingest.max_bytes allows {max_bytes:,}")
    if not data.startswith(jpeg.START):
        # Windows shares and some FTP servers set a file's length first: zeros will be filled.
        raise RejectedError(_what_else(data), incomplete=len(data.rstrip(b"\0")) < len(jpeg.START))
    if too_many := jpeg.scans_too_many(data):
        raise RejectedError(too_many)
    try:
        # The plugin's class, not Image.open: that one guesses formats and has a pixel limit of its own.
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise RejectedError(
                    f"{width}x{height} are {width * height:,} pixels, ingest.max_pixels allows {max_pixels:,}",
                )
            # libjpeg reads every bit all the same at an eighth of the size, which takes half the time and a
            # 64th of the memory (1080p: 4.8 ms against 10.8 ms).
            image.draft("L", (max(1, width // 8), max(1, height // 8)))
            image.load()
            return Picture(width, height, _exif_at(image, zone))
    except (OSError, SyntaxError, ValueError, IndexError, struct.error) as error:  # what Pillow's reader raises
        cut = "truncated" in str(error) or not data.rstrip(b"\0").endswith(b"\xff\xd9")
        what = "the JPEG is cut off" if cut else "the JPEG is corrupt"
        raise RejectedError(f"{what}: {error}", incomplete=cut) from error


def read_exif(head: bytes, zone: ZoneInfo) -> int | None:
    """Capture time by EXIF from the first bytes of a JPEG, ms since the Unix epoch; None where there is none."""
    try:
        with JpegImagePlugin.JpegImageFile(io.BytesIO(head)) as image:
            return _exif_at(image, zone)
    except (OSError, SyntaxError, ValueError, IndexError, struct.error):
        return None


def exif_time(original: str, offset: str, subsec: str, zone: ZoneInfo) -> int | None:
    """DateTimeOriginal, OffsetTimeOriginal and SubSecTimeOriginal as ms since the Unix epoch (EXIF 2.31, 4.6.5).

    Without an offset it is local time of the zone; of an hour that the clocks repeat, the first one. None where
    the camera wrote blanks, zeros, nonsense or a time before 1970.
    """
    try:
        at = datetime.strptime(original.strip("\0 "), "%Y:%m:%d %H:%M:%S")  # noqa: DTZ007 (the zone comes below)
        digits = subsec.strip("\0 ")
        fraction = float(f"0.{digits}") if digits.isascii() and digits.isdigit() else 0.0
        match = re.fullmatch(r"([+-])(\d\d):(\d\d)", offset.strip("\0 "))
        tz: timezone | ZoneInfo = zone
        if match:
            sign, hours, minutes = match.groups()
            tz = timezone((-1 if sign == "-" else 1) * timedelta(hours=int(hours), minutes=int(minutes)))
        return _in_calendar(_ms(at.replace(tzinfo=tz), fraction))
    except (ValueError, OverflowError):
        return None


class NamePatterns:
    """Capture time from file names, by patterns of the settings: the first one that fits."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = [compile_pattern(pattern) for pattern in patterns]

    def find(self, name: str, zone: ZoneInfo) -> int | None:
        """Capture time in the name, ms since the Unix epoch; local times are of the zone. None: no pattern fits."""
        for pattern in self._patterns:
            match = pattern.search(name)
            if match:
                at = _named_time({k: v for k, v in match.groupdict().items() if v is not None}, zone)
                if at is not None:
                    return at
        return None


_DIRECTIVES = {
    "Y": r"(?P<year>\d{4})",
    "y": r"(?P<year>\d{2})",
    "m": r"(?P<month>\d{2})",
    "d": r"(?P<day>\d{2})",
    "H": r"(?P<hour>\d{2})",
    "M": r"(?P<minute>\d{2})",
    "S": r"(?P<second>\d{2})",
    "f": r"(?P<fraction>\d{1,9})",
    "s": r"(?P<epoch>\d{9,10})",
    "z": r"(?P<offset>Z|[+-]\d{2}:?\d{2})",
    "%": "%",
}


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A setting of `time_patterns` as a regular expression that is searched for in file names.

    One that has named groups is taken as it is: year, month, day, hour, minute, second, fraction and offset, or
    epoch (seconds) and fraction. Else it is written as for strptime, with %Y %y %m %d %H %M %S %f %z and
    %s (seconds since the Unix epoch), and must not stand inside a longer run of digits.

    Raises:
        ValueError: it is neither, or names no whole time.
    """
    if "(?P<" in pattern:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"time pattern {pattern!r} is no regular expression: {error}") from error
    else:
        text, i = "", 0
        while i < len(pattern):
            if pattern[i] == "%":
                i += 1
                if pattern[i : i + 1] not in _DIRECTIVES:
                    raise ValueError(f"time pattern {pattern!r}: %{pattern[i : i + 1]} is not known here")
                text += _DIRECTIVES[pattern[i]]
            else:
                text += re.escape(pattern[i])
            i += 1
        try:
            regex = re.compile(rf"(?<!\d){text}(?!\d)")
        except re.error as error:
            raise ValueError(f"time pattern {pattern!r} names a part of the time twice: {error}") from error
    if "epoch" not in regex.groupindex and not {"year", "month", "day", "hour", "minute"} <= set(regex.groupindex):
        raise ValueError(
            f"time pattern {pattern!r} names no whole time: it needs %s, or %Y %m %d %H %M and best %S",
        )
    return regex


def client_time(text: str, zone: ZoneInfo) -> int:
    """A client's capture time, ISO 8601 or ms since the Unix epoch, as the latter; without an offset of the zone.

    Raises:
        RejectedError: it is neither; the message says what would be.
    """
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= 20:  # longer ones are no time, and Python reads no 5,000
        at = int(text)
        # As milliseconds this is before March 1973, as seconds it is any time to come.
        if at < 100_000_000_000:
            raise RejectedError(f"captured_at={text} looks like seconds: send milliseconds since 1970, or ISO 8601")
    else:
        # A + that was not written %2B arrives as a blank.
        text = re.sub(r" (\d\d:?\d\d)$", r"+\1", text) if re.search(r"[Tt ].* \d\d:?\d\d$", text) else text
        try:
            moment = datetime.fromisoformat(text)
            at = _ms(moment if moment.tzinfo else moment.replace(tzinfo=zone))
        except (ValueError, OverflowError):
            raise RejectedError(
                f"captured_at={text[:80]!r} is no time: send ISO 8601 (2026-11-01T12:00:00Z) or ms since 1970",
            ) from None
    if not 0 <= at <= _LAST_MS:
        raise RejectedError(f"captured_at={text[:80]!r} is outside the years 1970 to 9999")
    return at


def capture_time(
    picture: Picture,
    submission: Submission,
    patterns: NamePatterns,
    zone: ZoneInfo,
) -> tuple[int | None, CapturedFrom]:
    """When the image was captured, and who says so.

    The client comes first, because it says so on purpose and can correct a camera whose clock is wrong; then
    EXIF; then the file's name, but not the address that a snapshot is always fetched from. File and arrival time
    are no capture time.
    """
    if submission.client_at is not None:
        return submission.client_at, "client"
    if picture.exif_at is not None:
        return picture.exif_at, "exif"
    named = patterns.find(submission.name, zone) if submission.source != "snapshot" else None
    return (named, "filename") if named is not None else (None, "none")


def build_frame(
    submission: Submission,
    picture: Picture,
    captured: tuple[int | None, CapturedFrom],
    *,
    claim: str | None,
) -> Frame:
    """The record of an image: its bytes inline, or their claim."""
    sha256 = hashlib.sha256(submission.data).hexdigest()
    captured_at, captured_from = captured
    return Frame(
        frame_id=ids.frame_id(submission.camera_id, sha256, captured_at),
        camera_id=submission.camera_id,
        sha256=sha256,
        size=len(submission.data),
        width=picture.width,
        height=picture.height,
        captured_at=captured_at,
        captured_from=captured_from,
        file_at=submission.file_at,
        arrived_at=submission.arrived_at,
        image=submission.data if claim is None else None,
        claim=claim,
        source=submission.source,
        source_name=submission.name,
    )


class Memory:
    """What ingest remembers of one camera: its last frame ids, and how many frames and repeats there were."""

    def __init__(self, camera_id: str, state: IngestState | None = None) -> None:
        self._camera_id = camera_id
        digests = state.digests if state is not None else b""
        self._known = dict.fromkeys(digests[i : i + _SHORT] for i in range(0, len(digests), _SHORT))
        self.frames = state.frames if state is not None else 0
        self.unchanged = state.unchanged if state is not None else 0

    def knows(self, name: str) -> bool:
        """Whether the frame (or rejected file) of this name is among the last ones."""
        return _short(name) in self._known

    def state(self, names: Sequence[str] = (), frames: int = 0, unchanged: int = 0) -> IngestState:
        """The memory with these names as its newest and these counts added, as a record.

        Nothing changes here before it is `committed`.
        """
        kept = [*self._known, *dict.fromkeys(map(_short, names))][-REMEMBERED:]
        return IngestState(
            camera_id=self._camera_id,
            digests=b"".join(kept),
            frames=self.frames + frames,
            unchanged=self.unchanged + unchanged,
        )

    def committed(self, state: IngestState, names: Sequence[str]) -> None:
        """Be what `state` made of these names: a new `Memory` of the record would say the same, in 120 us."""
        self._known.update(dict.fromkeys(map(_short, names)))
        for digest in list(itertools.islice(self._known, max(0, len(self._known) - REMEMBERED))):
            del self._known[digest]
        self.frames, self.unchanged = state.frames, state.unchanged


def _short(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:_SHORT]


def _what_else(data: bytes) -> str:
    """What a file that is no JPEG is, so that its sender knows what to change."""
    for magic, name in (
        (b"\x89PNG", "a PNG"),
        (b"GIF8", "a GIF"),
        (b"BM", "a BMP"),
        (b"%PDF", "a PDF"),
        (b"II*\x00", "a TIFF"),
        (b"MM\x00*", "a TIFF"),
    ):
        if data.startswith(magic):
            return f"this is {name}, whatever its name says: send JPEG"
    if data[4:8] == b"ftyp":
        return "this is a video or a HEIC image, whatever its name says: send JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "this is a WebP, whatever its name says: send JPEG"
    if data.lstrip()[:1] == b"<":
        return "this is a web page (a log-in, an error?), no JPEG"
    return f"this is no JPEG (it begins with {data[:8].hex(' ')})"


def _exif_at(image: Image.Image, zone: ZoneInfo) -> int | None:
    tags = ExifTags.Base
    try:
        exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    except (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, struct.error):
        return None  # bad EXIF does not make a bad picture
    original, offset, subsec = (
        exif.get(tag) for tag in (tags.DateTimeOriginal, tags.OffsetTimeOriginal, tags.SubsecTimeOriginal)
    )
    if not isinstance(original, str):
        return None
    return exif_time(
        original,
        offset if isinstance(offset, str) else "",
        subsec if isinstance(subsec, str) else "",
        zone,
    )


def _named_time(groups: dict[str, str], zone: ZoneInfo) -> int | None:
    fraction = float(f"0.{groups.get('fraction', '0')}")
    try:
        if "epoch" in groups:
            return _ms(datetime.fromtimestamp(int(groups["epoch"]), UTC), fraction)
        year = int(groups["year"])
        month, day, hour, minute, second = (
            int(groups.get(part, "0")) for part in ("month", "day", "hour", "minute", "second")
        )
        at = datetime(year + 2000 if year < 100 else year, month, day, hour, minute, second, tzinfo=zone)
        if "offset" in groups:
            at = at.replace(tzinfo=datetime.fromisoformat(f"2000-01-01T00:00{groups['offset']}").tzinfo)
        return _in_calendar(_ms(at, fraction))
    except (ValueError, OverflowError):
        return None


def _in_calendar(at: int) -> int | None:
    """The time, unless it is outside the years 1970 to 9999: a clock that was never set."""
    return at if 0 <= at <= _LAST_MS else None


def _ms(at: datetime, fraction: float = 0.0) -> int:
    # floor, so that a fraction never rounds into the next second
    return int(at.replace(microsecond=0).timestamp()) * 1000 + math.floor(
        (at.microsecond / 1e6 + fraction) * 1000 + 1e-6
    )

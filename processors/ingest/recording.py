"""A video file as JPEGs at a wanted rate: decoded by FFmpeg (PyAV), picked by timestamp, turned upright.

The same file, rate and quality give the same bytes, so that a frame taken twice has one id.
"""

import io
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

if TYPE_CHECKING:  # at run time it takes no parameter
    from av.packet import Packet

# FFmpeg takes texts and single pictures for videos too.
_NO_VIDEOS = {"tty", "image2", "bin", "xbin", "adf", "idf"}

# A recorder whose clock was never set writes 1904 or 1970.
_CLOCK_SET = datetime(1990, 1, 1, tzinfo=UTC)

# How long one look into the file may last, seconds, so that progress is seen and a stop is soon.
_LOOK_S = 0.5

# A file that ends so much before its length is cut off; less is how muxers round, seconds.
_CUT_S = Fraction(1)

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class RecordingError(Exception):
    """This is no video that can be decoded; the message says why."""


class Still(NamedTuple):
    """One frame of a recording."""

    position_ms: int
    """Its time since the first frame."""
    data: bytes
    """JPEG; empty where it is known already."""


class Recording:
    """A video file, read from its beginning to its end. Its methods block: call them in a thread.

    Args:
        path: the file.
        fps: frames a second to pick, never more than there are.
        quality: of the JPEGs, 1 to 95.
        max_pixels: the largest picture decoded.
        known: whether the frame at this position, ms, need not be encoded.

    Raises:
        RecordingError: it is no video, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: Fraction,
        quality: int,
        max_pixels: int,
        known: Callable[[int], bool] = lambda _position_ms: False,
    ) -> None:
        self.known = known
        self.position_ms = 0
        """How far it is read."""
        self.ended = False
        """Whether everything was read."""
        self.broken = 0
        """Packets and frames that could not be decoded; they are left out."""
        self.frames = 0
        """Frames decoded."""
        self._name = path.name
        self._fps = fps
        self._quality = quality
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        if not path.is_file():
            raise RecordingError(f"{path} is no file")
        try:
            # A play list must not make us read elsewhere.
            self._container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
        except (FFmpegError, OSError, ValueError) as error:
            raise RecordingError(
                f"{path.name} is no video, or is cut off before its index (as an MP4 whose recording was not ended): "
                f"{_reason(error)}"
            ) from error
        try:
            self._stream = self._find()
            self.duration_ms = self._duration()
            self.created_at = self._creation_time()
        except RecordingError:
            self._container.close()
            raise
        self._last = self._reached = Fraction(0)  # when the last frame began and ended, seconds since the first
        self._stills = self._pick()

    @property
    def fault(self) -> str:
        """What is wrong with the file, as far as it was read; empty where nothing is."""
        if self.ended and self._cut_off():
            return f"it is cut off: it ends at {float(self._reached):.1f} s of {(self.duration_ms or 0) / 1000:.1f} s"
        if self.broken:
            return f"{self.broken} of its packets could not be decoded"
        return ""

    def take(self, count: int) -> list[Still]:
        """The next frames, so many at most; fewer, or none, after half a second, at a stop, or at the end.

        Raises:
            RecordingError: nothing in it can be decoded.
        """
        with self._lock:
            until = time.monotonic() + _LOOK_S
            found: list[Still] = []
            while len(found) < count and not self._stopping.is_set() and time.monotonic() < until:
                try:
                    still = next(self._stills)
                except StopIteration:
                    self.ended = True
                    if not self.frames:
                        raise RecordingError(f"{self._name}: no frame of it can be decoded") from None
                    break
                if still is not None:
                    found.append(still)
            return found

    def close(self) -> None:
        """Stop what is being read, and let go of the file."""
        self._stopping.set()
        with self._lock:
            self._stills.close()
            self._container.close()

    def _find(self) -> VideoStream:
        kind = self._container.format.name
        covers = Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & covers]
        if kind in _NO_VIDEOS or kind.endswith("_pipe"):
            raise RecordingError(f"{self._name} is no video: FFmpeg takes it for {kind}")
        if not streams:
            found = "sound only" if self._container.streams.audio else "no pictures"
            raise RecordingError(f"{self._name} is no video: there is {found} in it")
        stream = streams[0]
        self._check_size(stream.width, stream.height)
        stream.thread_type = "AUTO"
        return stream

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise RecordingError(
                f"{self._name}: {width}x{height} are {width * height:,} pixels, "
                f"ingest.max_pixels allows {self._max_pixels:,}"
            )

    def _duration(self) -> int | None:
        """Length of the pictures, ms; that of the whole where they do not tell; None where nothing does."""
        stream, seconds = self._stream, None
        if stream.duration and stream.time_base:
            seconds = stream.duration * stream.time_base
        elif tag := stream.metadata.get("DURATION"):  # Matroska's: 00:00:02.000000000
            try:
                hours, minutes, rest = tag.split(":")
                seconds = int(hours) * 3600 + int(minutes) * 60 + Fraction(rest)
            except ValueError:
                seconds = None
        if seconds is None and self._container.duration:
            seconds = Fraction(self._container.duration, av.time_base)
        return int(seconds * 1000) if seconds is not None and seconds > 0 else None

    def _creation_time(self) -> int | None:
        """When the container says that it was made, ms since the Unix epoch."""
        for metadata in (self._container.metadata, self._stream.metadata):
            try:
                at = datetime.fromisoformat(metadata.get("creation_time", ""))
            except ValueError:
                continue
            at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
            if at >= _CLOCK_SET:
                return int(at.timestamp() * 1000)
        return None

    def _pick(self) -> Generator[Still | None, None, None]:
        """The frames at the wanted rate; None for each that is passed over.

        The beats are at whole multiples of 1/fps; a frame is picked if it is the first at or after one.
        """
        tick = self._stream.time_base or Fraction(0)
        beat = 0
        for at, frame in self._timed():
            self.position_ms = int(at * 1000)
            # Containers round times to their tick (Matroska: 1 ms), so a frame may stand up to one before its beat.
            here = int((at + tick) * self._fps)
            if here < beat:
                yield None
                continue
            beat = here + 1
            position = self.position_ms
            yield Still(position, b"" if self.known(position) else self._encode(frame))

    def _timed(self) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Frames with their times since the first, seconds, never going back."""
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        first: Fraction | None = None
        for frame in self._decoded():
            tick = frame.time_base or self._stream.time_base
            stamp = frame.pts * Fraction(tick) if frame.pts is not None and tick else None
            if first is None:
                first, at = stamp or Fraction(0), Fraction(0)
            elif stamp is None:  # a bare stream has no times
                at = self._reached
            else:
                at = stamp - first
                if at < self._last:  # recordings joined to one: the clock starts again
                    at = self._reached
                    first = stamp - at
            lasts = frame.duration * Fraction(tick) if frame.duration and tick else 1 / rate
            self._last, self._reached = at, at + lasts
            yield at, frame

    def _decoded(self) -> Iterator[VideoFrame]:
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except FFmpegError:
                self.broken += 1
                continue
            for frame in frames:
                if frame.is_corrupt:  # what the decoder makes up for a lost packet is grey, and no evidence
                    self.broken += 1
                    continue
                self._check_size(frame.width, frame.height)
                self.frames += 1
                yield frame

    def _packets(self) -> "Iterator[Packet[VideoStream] | None]":
        """Packets, then an empty one (None after a break), which asks the decoder for what it still holds."""
        try:
            yield from self._container.demux(self._stream)
        except (FFmpegError, OSError):
            self.broken += 1
            yield None

    def _encode(self, frame: VideoFrame) -> bytes:
        image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
        turn = _TURNS.get(frame.rotation % 360)
        if turn is not None:
            image = image.transpose(turn)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self._quality)
        return out.getvalue()

    def _cut_off(self) -> bool:
        return self.duration_ms is not None and self._reached + _CUT_S < Fraction(self.duration_ms, 1000)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__

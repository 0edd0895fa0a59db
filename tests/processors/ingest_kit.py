"""What the tests of ingest share: small real JPEGs, appenders on a log in memory, a clock that is set by hand."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from processors.ingest.appender import Appenders
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.settings import IngestSettings
from streams.claims import ClaimStore
from streams.errors import UnavailableError

# 2026-11-21 12:00:00 UTC
NOW = 1_795_262_400.0


class Clock:
    """Seconds, moved by hand."""

    def __init__(self, at: float = NOW) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def jpeg(shade: int = 0, *, size=(48, 32), exif: dict[int, str] | None = None, progressive: bool = False) -> bytes:
    """A JPEG whose bytes differ by shade; `exif` are tags of its Exif directory."""
    image = Image.new("RGB", size, (shade % 256, shade // 256 % 256, 128))
    image.putpixel((0, 0), (255 - shade % 256, 0, 0))
    meta = Image.Exif()
    if exif:
        meta.get_ifd(0x8769).update(exif)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, exif=meta, progressive=progressive, comment=str(shade).encode())
    return out.getvalue()


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def away(calls: int = sys.maxsize) -> Callable[[str], None]:
    """A broker that does not answer, as a `MemoryLog.fault`: for the first calls, or until it is replaced."""
    opened = 0

    def fault(step: str) -> None:
        nonlocal opened
        opened += step == "open"
        if opened <= calls:
            raise UnavailableError("broker", "away")

    return fault


def appenders(
    log: MemoryLog,
    tmp_path: Path,
    *,
    cameras: MemoryCameras | None = None,
    clock: Clock | None = None,
    **settings,
) -> Appenders:
    return Appenders(
        log,
        cameras if cameras is not None else MemoryCameras("front"),
        ClaimStore(str(tmp_path / "images")),
        IngestSettings(**settings),
        clock=clock or Clock(),
        backoff_s=0.0,
    )

"""Recordings for the tests of video, made by PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (96, 64)


def record(
    path: Path,
    *,
    times_ms: list[int] | None = None,
    rate: int = 25,
    frames: int = 50,
    rotation: int = 0,
    created: str = "",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    size: tuple[int, int] = SIZE,
) -> Path:
    """A recording whose frames all differ: at a constant rate, or at the given times. The corner up left is white."""
    width, height = size
    with av.open(str(path), "w", options=options or {}) as container:
        if created:
            container.metadata["creation_time"] = created
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = 10
        if rotation:
            stream.set_display_rotation(rotation)
        times = times_ms if times_ms is not None else [n * 1000 // rate for n in range(frames)]
        for n, at in enumerate(times):
            shade = np.zeros((height, width, 3), np.uint8)
            shade[:, : 1 + n % width] = (0, 0, 160)
            shade[: height // 4, : width // 4] = 255
            frame = av.VideoFrame.from_ndarray(shade, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            if times_ms is None:
                frame.pts, frame.time_base = n, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """A recording without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """The same file, ended early, as by a power cut or a full disk."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path

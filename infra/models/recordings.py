"""The demo's footage as MP4: one recording a camera, as `rewatch ingest video` takes them."""

import itertools
from datetime import UTC
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

from infra.models.stories import Footage, Frame

# Frames are whole seconds apart, but a camera's clock need not stand on a whole one.
_TICK = Fraction(1, 1000)
# H.264 that loses nothing that one sees: 40 KB a frame of 640x360. A slower preset saves a tenth of that.
_X264 = {"crf": "18", "preset": "veryfast"}
_MPEG4 = {"qscale": "3"}
# Players jump to whole pictures only: one every ten frames.
_GOP = 10


def write_recordings(footage: Footage, directory: Path) -> list[Path]:
    """Encode the footage into `directory/<camera>.mp4`, H.264 where FFmpeg was built with it, else MPEG-4.

    Each frame stands at its capture time since the camera's first, so the hours between two stories are in the
    recording, as one long still picture each. The container's creation_time is the first frame's capture time, to
    the millisecond: in the movie's header, where cameras write it, there is room for seconds alone.

    Args:
        footage: What was written as JPEGs.
        directory: Made if missing. Existing files of the same names are replaced.

    Returns:
        The files, in the order of the cameras.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _write(list(frames), directory / f"{camera}.mp4")
        for camera, frames in itertools.groupby(footage.frames, key=lambda frame: frame.camera)
    ]


def _write(frames: list[Frame], path: Path) -> Path:
    began = frames[0].captured_at
    x264 = "libx264" in av.codecs_available
    # `use_metadata_tags` writes the metadata as they are, beside the header.
    with av.open(str(path), "w", options={"movflags": "use_metadata_tags+faststart"}) as container:
        container.metadata["creation_time"] = began.astimezone(UTC).isoformat(timespec="milliseconds")
        stream = container.add_stream("libx264" if x264 else "mpeg4", rate=1)
        with Image.open(frames[0].path) as first:
            stream.width, stream.height = first.size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = _TICK
        stream.codec_context.gop_size = _GOP
        stream.options = {**(_X264 if x264 else _MPEG4)}
        for frame in frames:
            with Image.open(frame.path) as image:
                picture = av.VideoFrame.from_image(image.convert("RGB"))  # type: ignore[no-untyped-call]
            since = frame.captured_at - began
            picture.pts = round(since.total_seconds() / _TICK)
            picture.time_base = _TICK
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path

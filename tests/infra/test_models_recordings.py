"""The footage as MP4, read back by the very reader of `rewatch ingest video`."""

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from infra.models.recordings import write_recordings
from infra.models.stories import Footage, write_footage
from processors.ingest.recording import Recording, Still


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Footage:
    return write_footage(tmp_path_factory.mktemp("footage"), cameras=("front-door", "back-yard"))


def read(path: Path, fps: int) -> tuple[Recording, list[Still]]:
    recording = Recording(path, fps=Fraction(fps), quality=85, max_pixels=10**7)
    stills = []
    while not recording.ended:
        stills += recording.take(100)
    recording.close()
    return recording, stills


@pytest.fixture(scope="module")
def files(footage: Footage, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_recordings(footage, tmp_path_factory.mktemp("recordings"))


@pytest.mark.parametrize("fps", [1, 5])
def test_a_recording_gives_back_every_frame_with_its_capture_time(
    footage: Footage, files: list[Path], fps: int
) -> None:
    assert [path.name for path in files] == ["front-door.mp4", "back-yard.mp4"]
    for path in files:
        wanted = [round(f.captured_at.timestamp() * 1000) for f in footage.frames if f.camera == path.stem]
        recording, stills = read(path, fps)
        assert recording.created_at == wanted[0]
        assert [wanted[0] + still.position_ms for still in stills] == wanted
        assert recording.fault == ""


def test_a_recording_shows_what_the_camera_saw(footage: Footage, files: list[Path]) -> None:
    # The last second of the last story at the door, some 20 hours into the recording.
    drawn_at = [frame.path for frame in footage.frames if frame.camera == "front-door"][-1]
    _, stills = read(files[0], 1)
    with Image.open(io.BytesIO(stills[-1].data)) as seen, Image.open(drawn_at) as drawn:
        assert seen.size == drawn.size
        apart = ImageStat.Stat(ImageChops.difference(seen.convert("RGB"), drawn.convert("RGB"))).mean
    assert max(apart) < 6  # sensor noise and two lossy codecs


def test_the_same_footage_is_the_same_recording_byte_for_byte(footage: Footage, tmp_path: Path) -> None:
    short = replace(footage, frames=footage.frames[:6])
    [first], [second] = write_recordings(short, tmp_path / "a"), write_recordings(short, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()

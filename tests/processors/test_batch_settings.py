"""The `windows:` section: defaults, the way to the log and back, and errors that name the setting and the fix."""

import pytest
from pydantic import ValidationError

from processors.batch.core import settings_digest
from processors.batch.settings import WindowsSettings
from schemas.records import BatchState, WindowSettings
from streams import codec


def test_defaults_are_those_of_the_design():
    assert WindowsSettings().record() == WindowSettings(
        open_on=("person", "bicycle", "car", "motorcycle", "bus", "truck", "bird", "cat", "dog"),
        threshold=0.5,
        idle_ms=30_000,
        max_ms=90_000,
        max_frames=50,
        fast_label="person",
        fast_score=0.90,
        fast_cooldown_ms=90_000,
        stationary_iou=0.85,
    )


def test_there_and_back():
    section = WindowsSettings(idle_s=12.345, max_s=60, open_on=("person",), threshold=0.25)
    assert WindowsSettings.of(section.record()) == section


def test_whole_numbers_keep_their_digest_on_the_log():
    settings = WindowsSettings(threshold=1, fast_score=1, stationary_iou=1).record()
    state = BatchState(camera_id="gate", epoch="e", resume_offset=0, recent=(), settings=settings)
    value, fingerprint = codec.encode("batch_state", state)
    read = codec.decode_bytes("batch_state", value, fingerprint, BatchState).settings
    assert read is not None
    settings_digest.cache_clear()
    before = settings_digest(settings)
    settings_digest.cache_clear()
    assert settings_digest(read) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threshold": 0.05}, "threshold"),
        ({"idle_s": 100}, r"idle_s \(100\) exceeds max_s \(90\): lower idle_s or raise max_s"),
        ({"idle_s": 0}, "idle_s"),
        ({"max_s": 90_000}, "max_s"),
        ({"max_frames": 0}, "max_frames"),
        ({"max_frames": 1000}, "max_frames"),
        ({"open_on": ()}, "open_on"),
        ({"open_on": ("person", " ")}, "open_on"),
        ({"open_on": ("car",)}, 'fast_label "person" is not in open_on.*set fast_label to ""'),
        ({"threshold": 0.95}, r"fast_score \(0.9\) lies below threshold \(0.95\): raise fast_score"),
        ({"stationary_iou": 0}, "stationary_iou"),
        ({"idle": 3}, "idle"),
    ],
)
def test_what_cannot_work_is_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        WindowsSettings(**changes)


def test_without_a_fast_path_its_score_and_class_do_not_matter():
    WindowsSettings(open_on=("car",), threshold=0.95, fast_label="")

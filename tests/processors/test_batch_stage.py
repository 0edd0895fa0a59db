"""The fold of a partition: many cameras, bad records, snapshots, position."""

import re

import pytest

from processors.batch.settings import WindowsSettings
from processors.batch.stage import PARTITION, build
from schemas.records import Batch, BatchState
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import KIND, TICK, Tick
from streams.stages import FoldStage
from tests.processors.batch_kit import DEFAULT, EPOCH, T0, Host, box, on_log, replace, seen


def person(number: int, at: float, camera: str = "gate", score: float = 0.6):
    return seen(number, T0 + round(at * 1000), box(200 * (number % 10), score=score), camera=camera)


def nothing(number: int, at: float, camera: str = "gate"):
    return seen(number, T0 + round(at * 1000), camera=camera)


def tick(at: float, camera: str | None = None) -> Tick:
    return Tick(T0 + round(at * 1000), camera)


def log_of(*items):
    return [on_log(offset, item) for offset, item in enumerate(items)]


def test_it_is_a_fold_stage():
    stage = build(DEFAULT, lambda _camera: None)
    assert isinstance(stage, FoldStage)
    assert (stage.name, stage.inputs, stage.state_topic, stage.tick_topic) == (
        "batch",
        ("detections",),
        "batch_state",
        "frames",
    )


def test_cameras_have_their_own_windows():
    host = Host(log_of(person(0, 0), person(1, 0, "door"), person(2, 31, "door"), tick(31.5))).run()
    assert [(b.camera_id, b.closed_by, b.closed_at_offset) for b in host.batches] == [
        ("door", "idle", 2),
        ("gate", "tick", 3),
    ]
    assert host.open_windows == 1
    assert host.position == 2


def test_end_of_stream_closes_only_its_camera():
    host = Host(log_of(person(0, 0), person(1, 0, "door"), tick(0, "door"), tick(0, "nobody"))).run()
    assert [(b.camera_id, b.closed_by) for b in host.batches] == [("door", "end_of_stream")]
    assert host.open_windows == 1


def test_position_is_the_oldest_open_window_else_the_next_offset():
    host = Host(log_of(nothing(0, 0), person(1, 1), nothing(2, 2, "door"), person(3, 3, "door"), tick(31.5), tick(99)))
    positions = []
    for record in host.waiting():
        host.step(record)
        host.commit()
        positions.append(host.position)
    assert positions == [1, 1, 1, 1, 3, 6]


def test_only_what_moved_is_written():
    host = Host(log_of(nothing(0, 0), person(1, 1), person(2, 2), tick(3), nothing(4, 4, "door"), tick(99)))
    written = []
    for record in host.waiting():
        host.step(record)
        written.append([(s.camera_id, s.resume_offset, s.settings is not None) for s in host.commit()])
    # The window opens at offset 1, where the snapshot stood anyway: it is written once more, for its settings.
    assert written == [[("gate", 1, False)], [("gate", 1, True)], [], [], [("door", 5, False)], [("gate", 6, False)]]
    assert host.commit() == []


def test_snapshots_survive_the_codec():
    host = Host(log_of(person(0, 0, score=0.95), seen(1, T0 + 1500, box(0.1, "car", 0.7, 33.3)), person(2, 2)))
    for record in host.waiting():
        host.step(record)
    (state,) = host.commit()
    assert state.fast_closed_at == T0
    assert state.resume_offset == 1
    value, fingerprint = codec.encode("batch_state", state)
    assert codec.decode_bytes("batch_state", value, fingerprint, BatchState) == state


def test_a_record_that_cannot_be_read_is_refused_and_changes_no_window():
    fold = build(DEFAULT, lambda _camera: None).open(3, EPOCH, [])
    fold.feed(on_log(0, person(0, 0)))
    fold.moved(1)
    for offset, bad in enumerate((b"", b"junk", b"\0\0\0\0\0junk", person(4, 4, camera="")), start=1):
        with pytest.raises(UnprocessableError):
            fold.feed(on_log(offset, bad))
    unreadable = on_log(5, tick(31))._replace(headers=((KIND, TICK), ("wall", b"soon")))
    with pytest.raises(UnprocessableError):
        fold.feed(unreadable)
    assert [(s.camera_id, s.resume_offset) for s in fold.moved(6)] == [(PARTITION, 6)]
    assert fold.open_windows == 1
    assert fold.position(6) == 0
    assert len(fold.feed(on_log(6, tick(31)))) == 1


def test_a_record_is_refused_once_though_an_open_window_brings_it_again():
    log = log_of(person(0, 0), b"junk", person(2, 2), b"junk", person(4, 4), tick(40))
    for killed_at in range(len(log) + 1):
        host = Host(log).run(upto=killed_at)
        host.take_over()
        host.run()
        assert host.dead == [1, 3]
        assert [len(b.frames) for b in host.batches] == [3]


def test_a_camera_that_is_done_drops_what_an_open_window_of_another_brings_again():
    log = log_of(person(0, 0), person(1, 1, "door"), tick(1, "door"), person(3, 3, "door"), tick(60))
    host = Host(log).run(upto=3)
    assert host.position == 0
    host.take_over()
    host.run()
    assert [(b.camera_id, [f.offset for f in b.frames]) for b in host.batches] == [
        ("door", [1]),
        ("gate", [0]),
        ("door", [3]),
    ]


def test_the_camera_s_own_settings_come_before_the_default():
    dogs = replace(DEFAULT, open_on=("dog",))
    host = Host(
        log_of(person(0, 0), person(1, 0, "door")),
        settings=lambda camera, _offset: dogs if camera == "gate" else None,
    ).run()
    assert host.open_windows == 1
    assert host.position == 1


def test_settings_changed_inside_a_window_hold_after_a_takeover_too():
    dogs = replace(DEFAULT, open_on=("dog",), idle_ms=5_000)
    log = log_of(nothing(0, 0), person(1, 1), person(2, 20), person(3, 52), nothing(4, 53), tick(60))
    for killed_at in range(len(log) + 1):
        host = Host(log, settings=lambda _camera, offset: dogs if offset >= 2 else None).run(upto=killed_at)
        # What is in force when the successor begins is the new settings, at the first offset too.
        host._stage = build(DEFAULT, lambda _camera: dogs if killed_at >= 2 else None)  # noqa: B023
        host.take_over()
        if killed_at < 2:
            host.run(upto=2)
            host._stage = build(DEFAULT, lambda _camera: dogs)
            host.take_over()
        host.run()
        assert [[f.offset for f in b.frames] for b in host.batches] == [[1, 2]], killed_at


def test_many_cameras_cost_only_what_moves():
    cameras = [f"cam{number}" for number in range(2000)]
    host = Host(log_of(*(nothing(number, number / 100, camera) for number, camera in enumerate(cameras))))
    for record in host.waiting():
        host.step(record)
    assert len(host.commit()) == 2000
    host.log = [*host.log, on_log(2000, person(1, 30, "cam7"))]
    for record in host.waiting():
        host.step(record)
    assert [state.camera_id for state in host.commit()] == ["cam7"]


def test_the_largest_batch_fits_a_record():
    parked = tuple(box(6 * n, "refrigerator", 0.6) for n in range(99))
    most = WindowsSettings(max_frames=200, fast_label="").record()
    fold = build(most, lambda _camera: None).open(3, EPOCH, [])
    emits = []
    for number in range(200):
        emits += fold.feed(on_log(number, seen(number, T0 + number, *parked, box(200 * (number % 9)))))
    (emit,) = emits
    assert emit.value is not None
    assert 700_000 < len(emit.value) < 1_000_000


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"boxes": (box(),) * 101}, "101 boxes: a frame has 100 at most"),
        ({"boxes": (box(label="x" * 256),)}, "a name of 256 characters"),
        ({"frame_id": "f" * 256}, "a name of 256 characters"),
        ({"boxes": (box(score=float("nan")),)}, "a box of score nan"),
        ({"boxes": (box(score=1.01),)}, "a box of score 1.01"),
        ({"boxes": (box(float("inf")),)}, "a box at inf"),
        ({"boxes": (box(width=-1),)}, "of -1.0 x 100.0"),
        ({"arrived_at": -1}, "arrived_at -1 is outside"),
        ({"captured_at": 2**62}, "captured_at 4611686018427387904 is outside"),
    ],
)
def test_detections_of_no_detector_are_refused_and_change_no_window(odd, says):
    """Taken, they would stay: 100,000 boxes in the snapshot, a clock that never comes back."""
    fold = build(DEFAULT, lambda _camera: None).open(3, EPOCH, [])
    fold.feed(on_log(0, person(0, 0)))
    before = fold.moved(1)
    with pytest.raises(UnprocessableError, match=re.escape(says)):
        fold.feed(on_log(1, replace(person(1, 1), **odd)))
    assert [state.camera_id for state in fold.moved(2)] == [PARTITION]
    assert [state.resume_offset for state in before] == [0]
    (emit,) = fold.feed(on_log(2, tick(31)))
    assert len(codec.decode_bytes("batches", emit.value, None, Batch).frames) == 1


@pytest.mark.parametrize(
    "window",
    [{"max_frames": 2**31 - 1}, {"max_frames": 0}, {"threshold": float("nan")}, {"idle_ms": -1}, {"max_ms": -1}],
)
def test_window_settings_that_cannot_be_give_way_to_the_default(window):
    """Nobody can set them by the command line; a camera record on the log can have any."""
    odd = replace(DEFAULT, **window)
    log = log_of(*(person(second, second) for second in range(60)), tick(200))
    ours, theirs = Host(log).run(), Host(log, settings=lambda _camera, _offset: odd).run()
    assert theirs.batches == ours.batches

"""The windows of one camera, edge by edge."""

import pytest

from processors.batch.core import REMEMBERED, CameraWindows, Resume, iou, settings_digest
from schemas import ids
from tests.processors.batch_kit import DEFAULT, EPOCH, T0, Road, box, replace, seen

NO_FAST = replace(DEFAULT, fast_label="")


def offsets(batch):
    return [frame.offset for frame in batch.frames]


# --- opening and closing by event time


def test_silence_opens_nothing():
    road = Road()
    for at in range(0, 300, 10):
        road.nothing(at)
    assert road.batches == []
    assert not road.windows.is_open


def test_gap_of_exactly_30_s_joins():
    road = Road()
    road.person(0)
    assert road.person(30) == []
    (batch,) = road.end()
    assert offsets(batch) == [0, 1]


def test_gap_of_one_ms_more_closes_and_opens_the_next():
    road = Road()
    road.person(0)
    (batch,) = road.person(30.001)
    assert (offsets(batch), batch.closed_by, batch.closed_at_offset) == ([0], "idle", 1)
    (after,) = road.end()
    assert offsets(after) == [1]


def test_gap_counts_from_the_last_frame_that_matters():
    road = Road()
    road.person(0)
    assert road.nothing(30) == []
    (batch,) = road.nothing(30.001)
    assert (offsets(batch), batch.closed_by) == ([0], "idle")
    assert not road.windows.is_open


def test_length_of_exactly_90_s_joins():
    road = Road(NO_FAST)
    for at in (0, 30, 60, 90):
        assert road.person(at) == []
    (batch,) = road.end()
    assert batch.ended_at - batch.started_at == 90_000


def test_length_of_one_ms_more_closes_and_opens_the_next():
    road = Road(NO_FAST)
    for at in (0, 30, 60, 90):
        road.person(at)
    (batch,) = road.person(90.001)
    assert (offsets(batch), batch.closed_by) == ([0, 1, 2, 3], "length")
    assert offsets(road.end()[0]) == [4]


def test_the_limit_that_came_first_is_the_reason():
    road = Road(NO_FAST)
    for at in (0, 30, 60, 80):
        road.person(at)
    (batch,) = road.nothing(200)  # full at 90 s, idle at 110 s
    assert batch.closed_by == "length"
    road.person(300)
    (batch,) = road.nothing(500)  # idle at 330 s, full at 390 s
    assert batch.closed_by == "idle"


def test_the_50th_frame_closes_at_once():
    road = Road(NO_FAST)
    for number in range(49):
        assert road.person(number) == []
    (batch,) = road.person(49)
    assert (len(batch.frames), batch.closed_by, batch.closed_at_offset) == (50, "frames", 49)
    assert not road.windows.is_open
    assert road.windows.resume.offset == 50


def test_the_50th_frame_closes_though_it_shows_nothing():
    road = Road(NO_FAST)
    road.person(0)
    for number in range(1, 49):
        assert road.nothing(number / 10) == []
    (batch,) = road.nothing(4.9)
    assert (offsets(batch), batch.closed_by) == ([0], "frames")


def test_equal_timestamps_join_and_none_is_late():
    road = Road(NO_FAST)
    for _ in range(50):
        road.person(7)
    (batch,) = road.batches
    assert len(batch.frames) == 50
    assert {frame.event_at for frame in batch.frames} == {T0 + 7000}
    assert not any(frame.late for frame in batch.frames)


def test_frames_between_are_listed_and_marked_and_trailing_silence_is_not():
    road = Road()
    road.person(0)
    road.nothing(1)
    road.person(2)
    road.nothing(3)
    (batch,) = road.nothing(40)
    assert [(frame.offset, frame.matters) for frame in batch.frames] == [(0, True), (1, False), (2, True)]
    assert batch.ended_at == T0 + 2000


def test_a_record_can_close_one_window_and_its_own():
    road = Road()
    road.person(0)
    first, second = road.person(31, score=0.9)
    assert (first.closed_by, offsets(first)) == ("idle", [0])
    assert (second.closed_by, offsets(second)) == ("fast_path", [1])
    assert first.closed_at_offset == second.closed_at_offset == 1
    assert road.windows.resume.offset == 2


def test_the_batch_names_what_it_was_made_of():
    road = Road()
    road.person(0)
    road.person(1)
    (batch,) = road.end()
    assert batch.batch_id == ids.batch_id("gate", [frame.frame_id for frame in batch.frames])
    assert (batch.camera_id, batch.partition, batch.epoch) == ("gate", 3, EPOCH)
    assert batch.settings_digest == settings_digest(DEFAULT)
    assert (batch.closed_by, batch.closed_at_offset) == ("end_of_stream", 2)


# --- what matters


@pytest.mark.parametrize(
    ("label", "score", "opens"),
    [("person", 0.5, True), ("person", 0.4999, False), ("chair", 0.99, False), ("dog", 0.5, True)],
)
def test_class_and_threshold(label, score, opens):
    road = Road()
    road.frame(0, box(label=label, score=score))
    assert road.windows.is_open is opens


def test_boxes_below_the_threshold_are_left_out_others_of_any_class_stay():
    road = Road()
    road.frame(0, box(0, "chair", 0.9), box(200, "person", 0.6), box(400, "person", 0.49))
    (batch,) = road.end()
    assert [(b.label, b.stationary) for b in batch.frames[0].boxes] == [("chair", False), ("person", False)]


def test_a_score_that_is_no_number_does_not_matter():
    road = Road()
    road.frame(0, box(score=float("nan")))
    assert not road.windows.is_open


def test_parked_car_for_an_hour_is_one_window():
    road = Road()
    for at in range(3600):
        road.frame(at, box(50, "car", 0.8))
    (batch,) = road.batches
    assert offsets(batch) == [0]


def test_parked_car_that_jitters_and_is_missed_now_and_then_is_one_window():
    road = Road()
    for at in range(3600):
        missed = at % 11 in (3, 4, 7)
        road.frame(at, *(() if missed else (box(50 + at % 4, "car", 0.8),)))
    (batch,) = road.batches
    assert offsets(batch) == [0]


@pytest.mark.parametrize(("hidden", "news"), [(REMEMBERED - 1, False), (REMEMBERED, True)])
def test_stationary_is_judged_by_the_previous_5_records(hidden, news):
    road = Road()
    road.frame(0, box(50, "car"))
    for number in range(hidden):
        road.nothing(1 + number)
    road.end()
    road.frame(20, box(50, "car"))
    assert road.windows.is_open is news


def test_stationary_asks_for_the_same_class():
    road = Road()
    road.frame(0, box(50, "car"))
    road.end()
    road.frame(1, box(50, "truck"))
    assert road.windows.is_open


def test_iou_of_exactly_the_limit_has_not_moved():
    # 170 of 200 px in common, side by side in height: 170 / 200 = 0.85.
    half = replace(DEFAULT, stationary_iou=170 / 200)
    road = Road(half)
    road.frame(0, box(0, "car", width=200))
    road.end()
    road.frame(1, box(0, "car", width=170))
    assert not road.windows.is_open
    road.frame(2, box(0, "car", width=144))  # 144 / 170 = 0.847, 144 / 200 = 0.72
    assert road.windows.is_open


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        (box(0), box(0), 1.0),
        (box(0), box(50), 1 / 3),
        (box(0), box(100), 0.0),
        (box(0), box(0, y=100), 0.0),
        (box(0, width=0), box(0, width=0), 0.0),
        (box(0, width=-5), box(0), 0.0),
        (box(2.0**54 + 4, width=2), box(2.0**54 + 4, width=2), 0.0),  # in doubles its right edge is 4 px off
    ],
)
def test_iou(a, b, value):
    assert iou(a, b) == pytest.approx(value)
    assert iou(b, a) == pytest.approx(value)


# --- the fast path


@pytest.mark.parametrize(("score", "fast"), [(0.9, True), (0.8999, False)])
def test_a_sure_person_closes_at_once(score, fast):
    road = Road()
    closed = road.person(0, score=score)
    assert [batch.closed_by for batch in closed] == (["fast_path"] if fast else [])


def test_a_sure_car_does_not():
    road = Road()
    assert road.frame(0, box(label="car", score=0.99)) == []


def test_a_sure_person_closes_the_window_that_is_open():
    road = Road()
    road.person(0)
    road.nothing(1)
    (batch,) = road.person(2, score=0.95)
    assert (offsets(batch), batch.closed_by) == ([0, 1, 2], "fast_path")


@pytest.mark.parametrize(("at", "fast"), [(89.999, False), (90, True)])
def test_at_most_one_fast_close_in_90_s(at, fast):
    road = Road()
    road.person(0, score=0.95)
    closed = road.person(at, score=0.95)
    assert [batch.closed_by for batch in closed] == (["fast_path"] if fast else [])
    assert road.windows.is_open is not fast


def test_a_mannequin_closes_nothing():
    road = Road()
    road.frame(0, box(0, score=0.95))
    for at in range(1, 200):
        road.frame(at, box(0, score=0.95))
    road.frame(200, box(0, score=0.95), box(300, "car", 0.7))
    assert [batch.closed_by for batch in road.batches] == ["fast_path"]
    assert road.windows.is_open


@pytest.mark.parametrize("every", [1.25, 2, 5, 10])
def test_person_for_60_s_is_at_most_two_events(every):
    road = Road()
    for number in range(int(60 / every) + 1):
        road.person(number * every, score=0.95)
    road.end()
    assert [batch.closed_by for batch in road.batches] == ["fast_path", "end_of_stream"]
    assert sum(len(batch.frames) for batch in road.batches) == int(60 / every) + 1


def test_the_fast_path_can_be_turned_off():
    road = Road(NO_FAST)
    assert road.frame(0, box(label="", score=1.0), box(score=1.0)) == []
    assert road.windows.is_open


def test_fast_path_wins_over_the_50th_frame():
    road = Road(replace(DEFAULT, max_frames=2))
    road.person(0)
    (batch,) = road.person(1, score=0.95)
    assert batch.closed_by == "fast_path"


# --- clocks


def test_camera_without_a_clock_goes_by_arrival():
    road = Road()
    road.frame(None, box(), arrived=5)
    (batch,) = road.end()
    assert batch.started_at == T0 + 5000


def test_capture_time_zero_is_a_time():
    windows = CameraWindows("gate", 0, EPOCH)
    windows.feed(0, seen(0, 0, box(), arrived_at=T0), DEFAULT)
    batch = windows.end_of_stream(1)
    assert batch is not None
    assert batch.started_at == 0


def test_camera_clock_one_year_ahead_goes_by_arrival():
    year = 365 * 86_400
    road = Road()
    for at in (0, 30):
        assert road.person(at + year, arrived=at) == []
    (batch,) = road.person(60.001 + year, arrived=60.001)
    assert [frame.event_at - T0 for frame in batch.frames] == [0, 30_000]
    assert not any(frame.late for frame in batch.frames)


def test_camera_clock_ten_minutes_slow_makes_the_same_windows():
    right, slow = Road(), Road()
    for at in (0, 10, 40, 40.5, 71, 200):
        right.person(at)
        slow.person(at - 600, arrived=at)
        right.tick(at + 4)
        slow.tick(at + 4)
    assert [offsets(batch) for batch in slow.batches] == [offsets(batch) for batch in right.batches]
    assert len(right.batches) == 2


def test_camera_clock_set_back_an_hour():
    road = Road(NO_FAST)
    road.person(3600, arrived=3600)
    assert road.person(1, arrived=3601) == []
    (batch,) = road.tick(3601 + 30.001)
    assert [(frame.event_at - T0, frame.late) for frame in batch.frames] == [(3_600_000, False), (3_600_000, True)]
    # Until its clock has caught up all its frames are late; what matters opens windows, and ticks close them.
    road.person(100, arrived=3700)
    (batch,) = road.tick(3731)
    assert [frame.late for frame in batch.frames] == [True]
    road.person(3601, arrived=7201)
    assert not road.end()[0].frames[0].late


def test_a_late_frame_that_matters_opens_a_window():
    road = Road()
    road.nothing(100)
    road.person(50, arrived=101)
    (batch,) = road.end()
    assert [(frame.event_at - T0, frame.late) for frame in batch.frames] == [(100_000, True)]


def test_a_late_frame_joins_the_open_window():
    road = Road()
    road.person(100)
    assert road.person(10, arrived=101) == []
    assert offsets(road.end()[0]) == [0, 1]


# --- ticks


def test_tick_of_exactly_30_s_leaves_open_one_ms_more_closes():
    road = Road()
    road.person(0)
    assert road.tick(30) == []
    (batch,) = road.tick(30.001)
    assert (offsets(batch), batch.closed_by, batch.closed_at_offset) == ([0], "tick", 2)
    assert road.windows.resume.offset == 3


def test_tick_is_judged_by_arrival_not_by_capture():
    road = Road()
    month = 30 * 86_400
    road.person(-month, arrived=100)
    assert road.tick(130) == []
    assert len(road.tick(130.001)) == 1


def test_tick_is_judged_by_the_last_frame_that_matters():
    road = Road()
    road.person(0)
    road.person(10)
    road.nothing(29)
    assert road.tick(40) == []
    (batch,) = road.tick(40.001)
    assert offsets(batch) == [0, 1]


def test_old_doubled_and_idle_ticks_are_harmless():
    road = Road()
    assert road.tick(0) == []
    before = road.windows.resume
    assert before is road.windows.resume
    road.person(1000)
    for at in (0, 5, 5, 1000, 1010, 1010, 990):
        assert road.tick(at) == []
    assert road.windows.is_open


def test_end_of_stream_closes_whatever_the_time():
    road = Road()
    assert road.end() == []
    road.person(0)
    (batch,) = road.end()
    assert batch.closed_by == "end_of_stream"
    assert road.end() == []


def test_footage_a_month_old_with_ticks_makes_the_same_windows():
    month = 30 * 86_400
    at_once, ticked = Road(), Road()
    for number, at in enumerate((0, 3, 33, 64, 65, 110, 140, 141, 300)):
        arrived = month + number * 0.2
        at_once.person(at, arrived=arrived)
        ticked.person(at, arrived=arrived)
        ticked.tick(arrived + 0.1)
        ticked.tick(arrived + 5)
    at_once.end()
    ticked.end()
    assert [b.batch_id for b in at_once.batches] != []
    # The offsets differ, since ticks take some; what was seen, and so when, does not.
    strip = [[(f.event_at, f.matters, f.late) for f in b.frames] for b in at_once.batches]
    assert [[(f.event_at, f.matters, f.late) for f in b.frames] for b in ticked.batches] == strip
    assert [b.closed_by for b in ticked.batches] == [b.closed_by for b in at_once.batches]


# --- settings


def test_settings_changed_inside_a_window_take_effect_after_it():
    road = Road()
    road.person(0)
    road.settings = replace(DEFAULT, idle_ms=5_000, open_on=("dog",), threshold=0.9)
    assert road.person(20) == []  # five seconds would not have borne it, and no dog is in it
    (batch,) = road.frame(51, box(0, "dog", 0.95))
    assert (offsets(batch), batch.settings_digest) == ([0, 1], settings_digest(DEFAULT))
    (after,) = road.nothing(57)
    assert (offsets(after), after.settings_digest) == ([2], settings_digest(road.settings))


def test_settings_changed_between_windows_take_effect_at_once():
    road = Road()
    road.frame(0, box(label="dog"))
    road.end()
    road.settings = replace(DEFAULT, open_on=("car",))
    road.frame(10, box(500, label="dog"))
    assert not road.windows.is_open


# --- snapshots


def test_resume_stays_at_the_first_offset_while_a_window_is_open():
    road = Road()
    road.nothing(0)
    assert road.windows.resume.offset == 1
    memory = road.windows.resume.memory
    road.person(1)
    opened = road.windows.resume
    assert opened == Resume(1, memory, DEFAULT)
    for at in range(2, 20):
        road.person(at)
        road.tick(at)
    assert road.windows.resume is opened
    road.end()
    assert road.windows.resume.offset == 39
    assert road.windows.resume.settings is None
    assert road.windows.resume.memory.event_at == T0 + 19_000


def test_memory_is_what_stood_just_before_the_window():
    road = Road()
    road.person(0, score=0.95)
    road.frame(10, box(5, "car"))
    road.person(20)
    state = road.windows.snapshot()
    assert state.resume_offset == 1
    assert state.event_at == T0
    assert state.fast_closed_at == T0
    assert [len(record.boxes) for record in state.recent] == [1]
    assert state.settings == DEFAULT


def test_memory_keeps_five_records():
    road = Road()
    for at in range(20):
        road.frame(at, box(at, "chair"))
    assert [record.boxes[0].x for record in road.windows.resume.memory.recent] == [15, 16, 17, 18, 19]


def test_an_open_window_is_made_again_with_its_own_settings():
    road = Road()
    road.person(0)
    again = Road(
        replace(DEFAULT, open_on=("dog",), idle_ms=1),
        CameraWindows.restore(road.windows.snapshot(), 3),
    )
    again.person(0)
    assert again.person(25) == []
    road.person(25)
    assert road.end() == again.end()


def test_without_an_open_window_the_settings_in_force_are_taken():
    road = Road()
    road.nothing(0)
    again = Road(replace(DEFAULT, open_on=("dog",)), CameraWindows.restore(road.windows.snapshot(), 3))
    again.person(1)
    assert not again.windows.is_open


def test_an_open_window_whose_first_record_is_lost_leaves_no_settings_behind():
    road = Road()
    road.person(0)
    again = Road(replace(DEFAULT, open_on=("dog",)), CameraWindows.restore(road.windows.snapshot(), 3))
    again.offset = 7  # retention overtook offset 0
    again.person(5)
    assert not again.windows.is_open


def test_records_below_the_resume_offset_are_dropped():
    road = Road()
    for at in range(5):
        road.nothing(at)
    windows = CameraWindows.restore(road.windows.snapshot(), 3)
    before = windows.resume
    assert windows.feed(4, seen(4, T0 + 4000, box()), DEFAULT) == []
    assert windows.resume is before
    windows.feed(5, seen(5, T0 + 5000, box()), DEFAULT)
    assert windows.is_open

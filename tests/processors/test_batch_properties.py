"""Any history at all: the windows are those of the naive reference, through kills at any point."""

from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from processors.batch.core import CameraWindows
from schemas.records import Detections
from streams import codec
from streams.messages import Tick
from tests.processors.batch_kit import DEFAULT, EPOCH, T0, Host, box, on_log, replace, seen
from tests.processors.naive_windows import Event, windows

CAMERAS = ("gate", "door")

# Small limits, so that short histories reach all of them; steps that land on, just below and just above them.
SMALL = replace(DEFAULT, idle_ms=30, max_ms=90, max_frames=5, fast_cooldown_ms=90)
OTHER = replace(SMALL, open_on=("car",), threshold=0.3, idle_ms=10, max_frames=3, stationary_iou=0.95)
STEPS = st.sampled_from((0, 0, 1, 5, 10, 11, 29, 30, 30, 31, 59, 90, 91, 200))

# Positions that overlap by 1, 0.94, 0.74 and 0 of each other.
BOXES = st.builds(
    box,
    x=st.sampled_from((0, 3, 15, 300)),
    label=st.sampled_from(("person", "person", "car", "chair")),
    score=st.sampled_from((0.2, 0.4, 0.5, 0.7, 0.9, 0.97)),
)

# How a camera's clock is off against the arrival, ms: right, slow, set back, far ahead, without.
CLOCKS = st.sampled_from((0, 0, 0, 0, -7, -600, -3_600_000, 31_536_000_000, None))


@st.composite
def histories(draw, max_size=40):
    """(log, switch): records and ticks as they arrive, and the offset from which other settings are in force."""
    wall = T0
    items: list[Detections | Tick] = []
    for number in range(draw(st.integers(1, max_size))):
        wall += draw(STEPS)
        what = draw(st.integers(0, 9))
        if what == 0:
            items.append(Tick(wall, draw(st.sampled_from(CAMERAS))))
        elif what in (1, 2):
            items.append(Tick(max(0, wall - draw(st.sampled_from((0, 0, 40, 10_000))))))
        else:
            off = draw(CLOCKS)
            boxes = draw(st.lists(BOXES, max_size=3))
            captured_at = None if off is None else wall + off
            camera = draw(st.sampled_from(CAMERAS))
            items.append(seen(number, captured_at, *boxes, arrived_at=wall, camera=camera))
    return items, draw(st.integers(0, max_size))


def in_force(switch):
    return lambda _camera, offset: SMALL if offset < switch else OTHER


def naive(items, switch):
    """By camera; among cameras, a tick closes in the order of opening."""
    events = [
        Event(offset, None, item.wall_at, item.camera_id) if isinstance(item, Tick) else Event(offset, item)
        for offset, item in enumerate(items)
    ]
    batches = [
        batch
        for camera in CAMERAS
        for batch in windows(camera, events, lambda offset: in_force(switch)("", offset), (3, EPOCH))
    ]
    return in_order(batches)


def in_order(batches):
    return sorted(batches, key=lambda batch: (batch.closed_at_offset, batch.frames[0].offset))


def log_of(items):
    return [on_log(offset, item) for offset, item in enumerate(items)]


quick = settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


@given(histories())
@settings(quick, max_examples=300)
def test_windows_are_those_of_the_naive_reference(history):
    items, switch = history
    assert Host(log_of(items), in_force(switch)).run().batches == naive(items, switch)


@given(histories(max_size=25))
@settings(quick, max_examples=60)
def test_killed_between_any_two_records_it_makes_the_same(history):
    items, switch = history
    log = log_of(items)
    whole = Host(log, in_force(switch)).run()
    for killed_at in range(len(log) + 1):
        host = Host(log, in_force(switch)).run(upto=killed_at)
        host.take_over()
        assert host.run().batches == whole.batches


@given(histories())
@quick
def test_killed_after_every_record_it_makes_the_same(history):
    items, switch = history
    log = log_of(items)
    # A successor finds the settings as they are by now, also for an open window that it makes again.
    now = [0]
    host = Host(log, lambda camera, _offset: in_force(switch)(camera, now[0]))
    for upto in range(1, len(log) + 1):
        now[0] = upto - 1
        host.run(upto=upto)
        host.take_over()
    assert host.batches == Host(log, in_force(switch)).run().batches


@given(histories(), st.integers(1, 7), st.lists(st.integers(0, 40), max_size=5))
@quick
def test_killed_inside_transactions_it_makes_the_same(history, commit_every, kills):
    items, _ = history
    log = log_of(items)
    host = Host(log, in_force(0))
    for killed_at in sorted(kills):
        host.run(upto=killed_at, commit_every=commit_every)
        host.take_over()
    assert host.run().batches == Host(log, in_force(0)).run().batches


@given(histories())
@quick
def test_replaying_the_log_through_the_core_makes_the_same_batches_record_for_record(history):
    items, switch = history
    log = log_of(items)
    live = Host(log, in_force(switch)).run().batches
    replayed = []
    for camera in CAMERAS:
        core = CameraWindows(camera, 3, EPOCH)
        for record in log:
            tick = Tick.of(record)
            if tick is None:
                recorded = codec.decode(record, Detections)
                if recorded.camera_id == camera:
                    replayed += core.feed(record.offset, recorded, in_force(switch)(camera, record.offset))
            elif tick.camera_id is None:
                replayed.append(core.tick(record.offset, tick.wall_at))
            elif tick.camera_id == camera:
                replayed.append(core.end_of_stream(record.offset))
    assert in_order(batch for batch in replayed if batch is not None) == live


@given(histories(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100_000)), max_size=10))
@quick
def test_old_ticks_change_nothing_but_offsets(history, extra):
    """Doubled ticks, or ticks of a host whose clock is behind, sent by a zombie at any time."""
    items, _ = history
    more = list(items)
    for at, age in extra:
        more.insert(min(at, len(more)), Tick(T0 - age))

    def told(items):
        batches = Host(log_of(items), in_force(len(items))).run().batches
        return [(b.batch_id, b.closed_by, [(f.event_at, f.matters, f.late) for f in b.frames]) for b in batches]

    assert told(more) == told(items)


@given(
    st.lists(st.tuples(STEPS, st.lists(BOXES, max_size=2)), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=20),
)
@quick
def test_footage_a_month_old_with_ticks_at_random_makes_the_same_windows(footage, ticks):
    """Played as fast as it can be read: wall time has hardly moved, whatever the footage's own time does."""
    month = 30 * 86_400_000
    captured_at = T0 - month
    items: list[Detections | Tick] = []
    for number, (step, boxes) in enumerate(footage):
        captured_at += step
        items.append(seen(number, captured_at, *boxes, arrived_at=T0 + number // 2))
    ticked = list(items)
    for at in ticks:
        place = min(at, len(ticked))
        ticked.insert(place, Tick(T0 + place // 4))
    end = Tick(T0 + 25, "gate")

    def told(items):
        batches = Host(log_of(items), in_force(1000)).run().batches
        return [(b.batch_id, b.closed_by, [(f.event_at, f.matters, f.late) for f in b.frames]) for b in batches]

    assert told([*ticked, end]) == told([*items, end])


@given(histories())
@quick
def test_every_frame_that_matters_is_in_one_batch_within_the_limits(history):
    items, _ = history
    items = [*items, *(Tick(T0, camera) for camera in CAMERAS)]
    batches = Host(log_of(items), in_force(len(items))).run().batches
    offsets = [frame.offset for batch in batches for frame in batch.frames]
    assert len(offsets) == len(set(offsets))
    for batch in batches:
        assert batch.frames[0].matters
        assert batch.frames[-1].matters
        assert len(batch.frames) <= SMALL.max_frames
        assert batch.ended_at - batch.started_at <= SMALL.max_ms
        news = [frame.event_at for frame in batch.frames if frame.matters]
        assert all(later - earlier <= SMALL.idle_ms for earlier, later in pairwise(news))

"""A cut of recorded detections makes what live work makes: without a change the very windows that were recorded."""

import asyncio
import random
import secrets
import sys
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from processors.batch.core import settings_digest
from processors.replay.cut import Cut
from processors.replay.folding import Folding, Taken, UnsettledError
from processors.replay.plan import Change, PlanError
from processors.replay.recording import InForce, corrected
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import BatchState, ContextSection
from streams import codec
from streams.messages import REDRIVE, Tick
from tests.processors.batch_kit import DEFAULT, T0, box, seen
from tests.processors.cut_kit import PARTITION, Past, camera, keep, keep_records
from tests.processors.test_batch_properties import OTHER, SMALL, histories

pytest_plugins = ["tests.clickhouse_kit"]

CAMERAS = ("gate", "door")
quick = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def kept(clickhouse_url):
    """One database for all: each test has lives of the log, or cameras, of its own."""
    settings = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")

    async def migrate():
        store = ClickHouseStore(settings)
        await store.migrate()
        await store.close()

    asyncio.run(migrate())
    return settings


@pytest_asyncio.fixture
async def store(kept) -> AsyncIterator[ClickHouseStore]:
    made = ClickHouseStore(kept)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def queries(kept) -> AsyncIterator[Queries]:
    made = Queries(kept)
    yield made
    await made.aclose()


async def cut(queries, plan, default=DEFAULT, **more):
    made = Cut(queries, plan, default, **more)
    return [window async for window in made.windows()], made


# Any history at all, in memory: the fold.


def versions(switch, *windows):
    """Settings in force by offset, of both cameras: the first, and from `switch` on the second."""
    return InForce(
        {
            name: [(0, camera(name, windows[0])), (switch, camera(name, windows[1]))]
            if switch
            else [(0, camera(name, windows[1]))]
            for name in CAMERAS
        }
    )


def folded(past, plan, in_force, **more):
    folding = Folding(past.bounds[1], plan, DEFAULT, in_force, **more)
    return [batch for record in past.log for batch in folding.feed(record)], folding


@given(histories())
@settings(quick, max_examples=200)
def test_without_a_change_the_fold_makes_the_batches_of_live_work_record_for_record(history):
    items, switch = history
    in_force = versions(switch, SMALL, OTHER)
    past = Past(items, in_force.at)
    made, folding = folded(past, past.plan(), in_force)
    assert made == past.batches
    assert len(folding.open()) == past.open_windows


@given(histories(), st.sampled_from((0.3, 0.5, 0.8)), st.sampled_from((None, 10, 60)), st.sampled_from((None, 30, 200)))
@quick
def test_with_a_change_it_makes_what_live_work_would_have_made_by_those_settings(history, threshold, idle_ms, max_ms):
    items, switch = history
    change = Change(threshold=threshold, idle_ms=idle_ms, max_ms=max_ms)
    in_force = versions(switch, SMALL, OTHER)
    past = Past(items, in_force.at)
    would = Past(items, versions(switch, change.window(SMALL), change.window(OTHER)).at, epoch=past.epoch)
    assert folded(past, past.plan(change), in_force)[0] == would.batches


def taken_up(past, own, in_force, since, lo):
    """The windows of the scope, begun at an offset with nothing but the cameras' event times; None: it cannot."""
    taken, whole = [], set()
    for name in CAMERAS:
        before = [time for offset, (of, time) in own.items() if of == name and offset < lo]
        due = min((offset for offset, (of, time) in own.items() if of == name and time >= since), default=None)
        if not before:
            whole.add(name)
        elif due is not None:
            state = BatchState(
                camera_id=name,
                epoch=past.epoch,
                resume_offset=lo,
                event_at=max(before),
                fast_closed_at=None,
                recent=(),
                settings=None,
            )
            taken.append(Taken(state, due))
    plan = past.plan(since=since)
    folding = Folding(past.bounds[1], plan, DEFAULT, in_force, lo=lo, taken=taken)
    try:
        made = [batch for record in past.log[lo:] for batch in folding.feed(record)]
    except UnsettledError:
        return None
    reached = whole | {one.state.camera_id for one in taken}
    assert made == [batch for batch in past.batches if batch.started_at >= since and batch.camera_id in reached]
    return made


def own_times(past, items):
    return {
        record.offset: (item.camera_id, min(item.captured_at or item.arrived_at, item.arrived_at))
        for record, item in zip(past.log, items, strict=True)
        if not isinstance(item, Tick)
    }


@given(histories(max_size=60), st.integers(0, 60), st.integers(0, 30))
@quick
def test_taken_up_anywhere_it_makes_the_same_windows_or_says_that_it_cannot(history, at, back):
    items, switch = history
    in_force = versions(switch, SMALL, OTHER)
    past = Past(items, in_force.at)
    own = own_times(past, items)
    if at in own:
        taken_up(past, own, in_force, own[at][1], max(0, at - back))


def test_taken_up_on_a_busy_camera_it_makes_the_same_windows_or_says_that_it_cannot():
    """Somebody is mostly there, and things stand still for a while: what was seen before is what decides."""
    chance = random.Random(7)
    in_force = InForce({"gate": [(0, camera("gate", SMALL))]})
    made = 0
    for _ in range(1500):
        wall, items = T0, []
        stands, steps = None, chance.choice(((5, 10, 20), (10, 29, 31), (10, 31, 91), (31, 91, 100)))
        for number in range(50):
            wall += chance.choice(steps)
            if chance.random() < 0.15:
                stands = None if stands is not None else chance.choice((0, 300))
            boxes = [box(stands, label="car")] if stands is not None and chance.random() < 0.6 else []
            if chance.random() < 0.25:
                boxes.append(box(100 * (number % 9), score=chance.choice((0.6, 0.95, 0.95))))
            items.append(seen(number, wall, *boxes))
        items.append(Tick(wall + 1000))
        past = Past(items, in_force.at)
        at = chance.randrange(8, 45)
        own = own_times(past, items)
        made += taken_up(past, own, in_force, own[at][1], max(0, at - chance.randrange(30))) is not None
    assert 150 < made < 1350  # it says both


def test_a_quiet_time_of_a_few_records_does_not_settle_a_camera_whose_parked_car_may_be_remembered():
    in_force = InForce({"gate": [(0, camera("gate", SMALL))]})
    parked = box(300, label="car")
    items = [seen(0, T0, parked), *(seen(n, T0 + 200 * n) for n in (1, 2, 3)), seen(4, T0 + 800, parked)]
    past = Past([*items, Tick(T0 + 9000)], in_force.at)
    assert len(past.windows) == 1  # the car is no news the second time
    assert taken_up(past, own_times(past, [*items, Tick(0)]), in_force, T0 + 800, 1) is None


# The same from ClickHouse.


@pytest.mark.real
@given(histories())
@settings(quick, max_examples=12, phases=[Phase.generate])  # to shrink takes minutes here
def test_from_clickhouse_a_cut_without_a_change_gives_the_contexts_that_live_work_gave(kept, history):
    """Cameras were renamed and set otherwise in between; offsets have holes; two partitions."""
    items, switch = history

    async def example():
        names = [f"{name}-{secrets.token_hex(6)}" for name in CAMERAS]  # `random` is the same each time here
        before = {name: camera(name, SMALL, at=-1, name="Before", time_zone="Europe/Berlin") for name in names}
        after = {name: camera(name, OTHER, at=2 * switch, name="After") for name in names}

        def in_force(name, offset):
            return (before if offset < 2 * switch else after)[name]

        of = dict(zip(CAMERAS, names, strict=True))
        renamed = [_renamed(item, of, number) for number, item in enumerate(items)]
        past = Past(renamed, in_force, gap=2)
        store = ClickHouseStore(kept)
        queries = Queries(kept)
        try:
            await keep(store, past, cameras=[*before.values(), *after.values()])
            made, whole = await cut(queries, past.plan(Change(idle_ms=None)))
            assert made == past.windows
            assert (len(whole.open), whole.records, whole.skipped.count) == (past.open_windows, len(past.log), 0)
            # What was recorded of the windows is not needed to make them again.
            alone, _ = await cut(queries, msgspec.structs.replace(past.plan(), upto=past.bounds[1:]))
            assert [window.batch for window in alone] == past.batches
        finally:
            await queries.aclose()
            await store.close()

    asyncio.run(example())


def _renamed(item, names, number):
    """The same of another camera; each frame has an id of its own, as `detections` in ClickHouse is keyed by it."""
    if isinstance(item, Tick):
        return item._replace(camera_id=names.get(item.camera_id))
    name = names[item.camera_id]
    return msgspec.structs.replace(item, camera_id=name, frame_id=f"{name}:{number}")


def day(hours=3, every_s=20, cameras=("gate",), seed=1):
    """A camera's day: a car that stands there all the time, now and then a person for some minutes."""
    chance = random.Random(seed)
    items = []
    until = dict.fromkeys(cameras, 0)
    for number in range(0, hours * 3600, every_s):
        for name in cameras:
            boxes = [box(400, label="car", score=0.8)]
            if chance.random() < 0.02:
                until[name] = number + chance.randrange(20, 400)
            if number < until[name]:
                boxes.append(box(chance.randrange(200), score=chance.choice((0.45, 0.6, 0.95))))
            items.append(seen(number, T0 + 1000 * number, *boxes, arrived_at=T0 + 1000 * number + 300, camera=name))
        if number % 300 == 0:
            items.append(Tick(T0 + 1000 * number + 600))
    return items


@pytest.fixture
async def past(store):
    made = Past(day(cameras=CAMERAS))
    await keep(store, made)
    return made


@pytest.mark.real
async def test_a_scope_with_a_beginning_and_an_end_has_the_windows_that_began_in_it(past, queries):
    """Begun wherever it may be: at a window's beginning, a millisecond before and after."""
    begins = sorted({batch.started_at for batch in past.batches})
    edges = [
        begins[0],
        begins[1] + 1,
        begins[len(begins) // 2] - 1,
        begins[len(begins) // 2],
        begins[-1],
        begins[-1] + 1,
    ]
    for since in edges:
        for until in (None, since + 1, since + 1_800_000):
            made, whole = await cut(queries, past.plan(since=since, until=until))
            expected = [w for w in past.windows if since <= w.batch.started_at < (until or sys.maxsize)]
            assert made == expected, (since, until)
            assert until is not None or len(whole.open) == past.open_windows


@pytest.mark.real
async def test_a_window_that_began_before_the_end_is_read_until_it_closes(store, queries, monkeypatch):
    monkeypatch.setattr("processors.replay.cut.CHUNK", 3)
    past = Past([seen(n, T0 + 2000 * n, box(200 * (n % 10))) for n in range(200)])
    await keep(store, past)
    made, whole = await cut(queries, past.plan(until=T0 + 1))
    assert made == past.windows[:1]
    assert whole.records < 60
    assert whole.open == []


@pytest.mark.real
async def test_a_late_scope_reads_an_hour_before_it_not_the_whole_history(past, queries):
    since = T0 + int(2.5 * 3_600_000)
    made, whole = await cut(queries, past.plan(since=since))
    assert made == [window for window in past.windows if window.batch.started_at >= since]
    assert whole.records < 0.6 * len(past.log)


@pytest.mark.real
async def test_a_camera_that_was_never_quiet_is_read_from_its_beginning(store, queries):
    """Somebody is always there, in a new place: when the fast path was free last depends on all that was."""
    items = [seen(n, T0 + 10_000 * n, box(200 * (n % 10), score=0.95)) for n in range(800)]
    past = Past(items)
    await keep(store, past)
    since = T0 + 7_000_000
    made, whole = await cut(queries, past.plan(since=since))
    assert made == [window for window in past.windows if window.batch.started_at >= since]
    assert whole.records == len(past.log)


@pytest.mark.real
async def test_a_camera_that_sends_little_remembers_what_stood_there_hours_before(store, queries):
    """A snapshot every twelve hours of the same parked car is no news, also where the scope begins."""
    half_a_day = 12 * 3_600_000
    items = [seen(n, T0 + half_a_day * n, box(400, label="car", score=0.8)) for n in range(100)]
    items += [seen(999, T0 + half_a_day * 100, box(10)), Tick(T0 + half_a_day * 101)]
    past = Past(items)
    await keep(store, past)
    made, whole = await cut(queries, past.plan(since=T0 + half_a_day * 90))
    assert made == [past.windows[-1]]
    assert len(past.windows) == 2
    assert whole.records < 40  # twenty before, not all


@pytest.mark.real
async def test_only_the_cameras_of_the_scope_are_read(past, queries):
    made, whole = await cut(queries, past.plan(cameras=("gate",)))
    assert made == [window for window in past.windows if window.camera_id == "gate"]
    assert whole.records < 0.6 * len(past.log)


@pytest.mark.real
async def test_a_sample_is_the_same_windows_each_time(past, queries):
    first, _ = await cut(queries, past.plan(sample=5))
    again, _ = await cut(queries, past.plan(sample=5))
    more, _ = await cut(queries, past.plan(sample=8))
    assert first == again
    assert len(first) == 5
    assert {w.batch_id for w in first} < {w.batch_id for w in more}
    assert [w for w in past.windows if w in first] == first


@pytest.mark.real
async def test_partitions_take_turns_and_each_keeps_its_order(store, queries):
    pasts = [Past(day(hours=1, seed=p, cameras=(f"c{p}",)), partition=p, epoch="two") for p in (0, 1)]
    await keep(store, *pasts)
    plan = msgspec.structs.replace(pasts[0].plan(), upto=tuple(b for past in pasts for b in past.bounds))
    made, _ = await cut(queries, plan)
    assert [w for w in made if w.camera_id == "c0"] == pasts[0].windows
    assert [w for w in made if w.camera_id == "c1"] == pasts[1].windows
    assert [w.camera_id for w in made[:4]] == ["c0", "c1", "c0", "c1"]
    assert made == (await cut(queries, plan))[0]


@pytest.fixture
async def two_lives(store):
    """The broker was made anew: the second half of a camera's day was taken in again, and the next day besides."""
    items = day(hours=6, cameras=("twice",))
    first, second = len(items) * 2 // 3, len(items) // 3
    pasts = Past(items[:first]), Past(items[second:])
    await keep(store, *pasts)
    return pasts


def of_both(pasts, **scope):
    upto = tuple(bound for past in pasts for bound in past.bounds)
    return msgspec.structs.replace(pasts[0].plan(**scope), upto=upto)


@pytest.mark.real
async def test_a_window_whose_frames_are_in_two_lives_of_the_log_is_made_once(two_lives, queries):
    recorded = [{window.batch_id for window in past.windows} for past in two_lives]
    assert len(recorded[0] & recorded[1]) > 5
    assert recorded[0] - recorded[1]
    assert recorded[1] - recorded[0]
    made, whole = await cut(queries, of_both(two_lives))
    batches = [window.batch_id for window in made]
    assert sorted(batches) == sorted(recorded[0] | recorded[1])
    assert len(whole.open) == len(set(whole.open))
    assert [window.batch_id async for window in whole.windows()] == batches


@pytest.mark.real
async def test_a_sample_of_two_lives_has_as_many_windows_as_were_asked_for(two_lives, queries):
    made, _ = await cut(queries, of_both(two_lives, sample=40))
    assert len({window.batch_id for window in made}) == len(made) == 40


@pytest.mark.real
@pytest.mark.parametrize("whole", [False, True], ids=["from its middle on", "whole"])
async def test_windows_are_the_same_when_the_rows_of_a_later_life_have_replaced_an_earlier_ones(store, queries, whole):
    """Where a camera's records lie and how it was set then is told by its rows: one for a frame, once merged."""
    name = f"merged-{whole}"
    items = day(hours=6, cameras=(name,))
    first, switch = len(items) * 2 // 3, len(items) // 2
    versions = camera(name, SMALL, at=-1), camera(name, DEFAULT, at=switch)
    parts = items[:first], items[0 if whole else len(items) // 3 :]
    pasts = [Past(part, lambda _, offset: versions[offset >= switch]) for part in parts]
    await keep(store, *pasts, cameras=versions)
    recorded = {window.batch_id: window.batch for past in pasts for window in past.windows}
    scopes = [{}, {"since": T0 + 7_920_000}, {"since": T0 + 10_800_000}, {"until": T0 + 10_800_000}]
    for merged in (False, True):
        if merged:
            client = await store.connection.client()
            for table in ("detections", "batches", "contexts"):
                await client.command(f"OPTIMIZE TABLE {table} FINAL")
        for scope in scopes:
            made, _ = await cut(queries, of_both(pasts, **scope))
            since, until = scope.get("since", 0), scope.get("until", sys.maxsize)
            expected = [batch for batch, of in recorded.items() if since <= of.started_at < until]
            assert sorted(window.batch_id for window in made) == sorted(expected), (merged, scope)


@pytest.mark.real
async def test_what_came_after_the_plan_was_made_is_not_read(past, queries):
    bound = past.bounds[1]
    earlier = msgspec.structs.replace(bound, offset=bound.offset // 2)
    made, _ = await cut(queries, msgspec.structs.replace(past.plan(), upto=(earlier,)))
    whole = past.windows
    assert made == [window for window in whole if window.batch.closed_at_offset < earlier.offset]
    assert 0 < len(made) < len(whole)


@pytest.mark.real
async def test_history_longer_than_a_chunk_and_rows_that_are_there_twice(store, queries, monkeypatch):
    past = Past(day(hours=1))
    await keep(store, past)
    await _again(store, past)
    monkeypatch.setattr("processors.replay.cut.CHUNK", 7)
    made, whole = await cut(queries, past.plan())
    assert made == past.windows
    assert whole.records == len(past.log)


async def _again(store, past):
    """The same rows under other tokens, as a sink that was restored from a backup would bring them."""
    for start in range(0, len(past.log), 50):
        await keep_records(store, past.log[start : start + 50])


@pytest.mark.real
async def test_what_cannot_be_read_is_skipped_counted_and_named(store, queries):
    items = day(hours=1)
    items[40:40] = [b"\x00garbage", b""]
    past = Past(items)
    await keep(store, past)
    made, whole = await cut(queries, past.plan())
    assert made == past.windows
    assert set(whole.skipped.named) == {past.log[40].origin, past.log[41].origin}
    assert "framing" in whole.skipped.named[past.log[41].origin]


@pytest.mark.real
async def test_a_redriven_record_counts_once_where_live_work_took_it(store, queries):
    items = day(hours=1)
    bad = Past([b"\x00garbage"]).log[0]
    items[10] = bad
    origin = ids.origin("detections", "redriven", PARTITION, 10)
    good = codec.emit("detections", seen(7777, T0 + 3_700_000, box(90)))
    redriven = bad._replace(value=good.value, key=good.key, headers=(*good.headers, (REDRIVE, origin.encode())))
    ordinary = Past(items).log[11]
    twice = ordinary._replace(
        headers=(*ordinary.headers, (REDRIVE, ids.origin("detections", "redriven", PARTITION, 11).encode()))
    )
    items += [redriven, Tick(T0 + 7_200_000)]
    past = Past(items, epoch="redriven")
    more = Past([*items, redriven, twice], epoch="redriven")
    await keep(store, more)
    made, whole = await cut(queries, more.plan())
    assert made == past.windows
    assert "gate" in made[-1].batch.frames[-1].frame_id
    assert whole.skipped.count == 0


@pytest.mark.real
async def test_a_new_window_is_told_of_by_the_name_that_its_camera_had_then(store, queries):
    past = Past(day(hours=2, cameras=("porch",)))
    half = past.log[len(past.log) // 2].offset
    names = [camera("porch", name="Porch", time_zone="Europe/Berlin"), camera("porch", at=half, name="Old porch")]
    await keep(store, past, cameras=names)
    made, _ = await cut(queries, past.plan(Change(threshold=0.4)))
    recorded = {window.batch_id for window in past.windows}
    told = {
        (window.batch.closed_at_offset < half, window.camera_name, window.time_zone)
        for window in made
        if window.batch_id not in recorded
    }
    assert told == {(True, "Porch", "Europe/Berlin"), (False, "Old porch", "UTC")}


@pytest.mark.real
async def test_what_was_said_of_an_unchanged_window_beside_its_boxes_is_kept(store, queries):
    past = Past(day(hours=1))
    section = ContextSection(name="captions", text="A van.", priority=1, made_by="blip 2")
    past.windows[0] = msgspec.structs.replace(past.windows[0], sections=(section,), camera_name="Then")
    await keep(store, past)
    made, _ = await cut(queries, past.plan())
    assert made == past.windows


@pytest.mark.real
async def test_a_camera_whose_time_zone_is_none_is_named(store, queries):
    past = Past(day(hours=1, cameras=("rover",)))
    await keep(store, past, cameras=[camera("rover", at=-1, time_zone="Mars/Olympus")])
    made, whole = await cut(queries, msgspec.structs.replace(past.plan(), upto=past.bounds[1:]))
    assert made == []
    assert set(whole.skipped.named) == {window.batch_id for window in past.windows}


def test_windows_that_were_opened_tell_better_than_clocks_when_settings_changed():
    """Batch was behind when they were set, or ahead of the clock of whoever set them."""
    versions = [camera("gate", SMALL), camera("gate", OTHER), camera("gate", OTHER, name="Gate"), camera("gate", SMALL)]
    small, other = settings_digest(SMALL), settings_digest(OTHER)
    assert corrected([0, 100, 150, 200], versions, [(90, small), (110, other), (210, small)]) == [0, 100, 150, 200]
    assert corrected([0, 100, 150, 200], versions, [(90, small), (110, small), (120, other)]) == [0, 111, 150, 200]
    assert corrected([0, 100, 150, 200], versions, [(80, other), (110, other), (190, small)]) == [0, 80, 150, 190]


@pytest.mark.real
async def test_a_condition_on_events_is_refused(past, queries):
    with pytest.raises(PlanError, match="--where"):
        await cut(queries, past.plan(where="risk_score > 50"))


@pytest.mark.real
async def test_a_cut_loads_no_detector(past, kept):
    script = f"""
import asyncio, sys
from processors.batch.settings import WindowsSettings
from processors.batch.core import settings_digest
from processors.replay.cut import Cut
from processors.replay.plan import Plan
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings

async def main():
    queries = Queries(ClickHouseSettings(url={kept.url!r}, database={kept.database!r}))
    cut = Cut(queries, Plan.decode(sys.argv[1]), WindowsSettings().record())
    print(len([window async for window in cut.windows()]))
    await queries.aclose()

asyncio.run(main())
assert not {{"torch", "transformers", "openvino", "onnxruntime", "PIL"}} & sys.modules.keys()
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, past.plan(Change(threshold=0.7)).encode(), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert int(out) > 0

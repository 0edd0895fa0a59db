"""Comparing what ClickHouse holds: hundreds of made verdicts, and every figure once more by SQL and scipy."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
from scipy import stats

from processors.replay.compare import compare
from processors.replay.comparison import Comparison
from processors.replay.plan import Bound, Change, Plan, Scope
from processors.replay.sides import SideError, find, replays
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from tests import examples
from tests.processors.compare_kit import AT
from tests.processors.compare_store_kit import KEPT, STRICT, Past, batch

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def migrated(clickhouse_url: str) -> ClickHouseSettings:
    """One database for all tests here: to migrate one takes longer than most of them."""
    made = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")

    async def main() -> None:
        store = ClickHouseStore(made)
        await store.migrate()
        await store.close()

    asyncio.run(main())
    return made


@pytest.fixture
def database(migrated: ClickHouseSettings, reading: Callable[[ClickHouseSettings], Any]) -> ClickHouseSettings:
    """It, emptied."""
    reader = reading(migrated)
    for table in KEPT:
        reader.command(f"TRUNCATE TABLE IF EXISTS {table}")
    return migrated


@pytest_asyncio.fixture
async def queries(database: ClickHouseSettings) -> AsyncIterator[Queries]:
    made = Queries(database)
    yield made
    await made.aclose()


class Made:
    """A few hundred windows of three cameras, judged live, by a replay, and by a baseline; some labelled."""

    def __init__(self, windows: int = 400) -> None:
        chance = random.Random(7)
        self.past = Past()
        again = Plan(kind="baseline", scope=Scope(sample=120))
        self.past.replay("rbaseline", name="again", plan=again)
        self.past.replay(
            "rchange", name="stricter", plan=Plan(kind="change", change=Change(prompt="b" * 32), baseline="rbaseline")
        )
        for n in range(windows):
            camera = ("gate", "yard", "porch")[n % 3]
            zone = ("Europe/Berlin", "America/New_York", "UTC")[n % 3]
            first = 900 * n  # a quarter of an hour: the windows cover four days and nights
            of = self.past.window(
                camera,
                range(first, first + chance.randint(1, 5)),
                classes=chance.sample(["person", "dog", "truck"], chance.randint(0, 2)),
                zone=zone,
            )
            score = chance.randint(0, 100)
            live = self.past.live(of, score)
            moved = min(max(score + chance.choice([0, 0, 0, -3, 4, 35, -40]), 0), 100)
            self.past.again("rchange", of, moved, prompt_digest="b" * 32)
            if n % 3 == 0:
                self.past.again("rbaseline", of, min(max(score + chance.choice([0, 0, 0, 0, 1, -2, 6]), 0), 100))
            if n % 4 == 0:
                said = "true_alarm" if chance.random() < score / 100 else "false_alarm"
                self.past.label(said, live, chance=0.5 if score >= 60 else 0.125, selection="near_threshold")
        self.past.label("missed", camera_id="yard", started_at=AT + 5_000, ended_at=AT + 10_000, chance=1.0)


@pytest.mark.asyncio
async def test_the_figures_agree_with_sql_and_scipy_on_the_same_rows(
    database: ClickHouseSettings, queries: Queries, ask: Any
) -> None:
    made = Made()
    await made.past.keep(database)
    found = await compare(queries, "live", "stricter")
    _agrees(found, ask)


PAIRS = """
    (SELECT l.risk_score AS a, r.risk_score AS b, l.risk_level AS la, r.risk_level AS lb, l.camera_id AS camera_id,
        l.raw_completion = r.raw_completion AS same, l.event_id AS event_id, l.batch_id AS batch_id
    FROM (SELECT * FROM risk_events FINAL) AS l
    INNER JOIN (SELECT * FROM replay_events FINAL WHERE replay_id = '{}') AS r ON r.batch_id = l.batch_id)
"""
ALARM = "IN ('high', 'critical')"


def _agrees(found: Comparison, ask: Any) -> None:
    pairs, baseline = PAIRS.format("rchange"), PAIRS.format("rbaseline")
    [(compared, identical, flips, mean, lost, new)] = ask.rows(
        f"SELECT count(), countIf(same), countIf(la != lb), avg(b - a), countIf(la {ALARM} AND NOT lb {ALARM}), "
        f"countIf(NOT la {ALARM} AND lb {ALARM}) FROM {pairs}"
    )
    assert compared == 400
    assert (found.compared, found.identical, len(found.flips)) == (compared, identical, flips)
    assert (found.flips_of("alarm_lost"), found.flips_of("alarm_new")) == (lost, new)
    assert found.deltas.mean == pytest.approx(mean)
    quantiles = ask.value(f"SELECT quantilesExactInclusive(0.05, 0.25, 0.5, 0.75, 0.95)(b - a) FROM {pairs}")
    assert (found.deltas.p05, found.deltas.p25, found.deltas.median, found.deltas.p75, found.deltas.p95) == (
        pytest.approx(quantiles)
    )
    histogram = dict(ask.rows(f"SELECT floor((b - a) / 10) * 10 AS bar, count() FROM {pairs} GROUP BY bar"))
    assert {bar.least: bar.count for bar in found.deltas.histogram if bar.count} == histogram
    transitions = {(a, b): n for a, b, n in ask.rows(f"SELECT la, lb, count() FROM {pairs} GROUP BY la, lb")}
    assert {(a, b): n for a, row in found.transitions.items() for b, n in row.items() if n} == transitions

    cameras = ask.rows(f"SELECT camera_id, count(), countIf(la != lb) FROM {pairs} GROUP BY camera_id")
    assert {(one.name, one.compared, one.flips) for one in found.by_camera} == set(cameras)
    hours = ask.rows(
        f"SELECT substring(e.started_local, 12, 2) AS hour, count(), countIf(la != lb) FROM {pairs} AS p "
        "INNER JOIN events AS e ON e.event_id = p.event_id GROUP BY hour"
    )
    assert {(one.name, one.compared, one.flips) for one in found.by_hour} == set(hours)
    classes = ask.rows(
        f"SELECT class, count(), countIf(la != lb) FROM {pairs} AS p INNER JOIN "
        "(SELECT DISTINCT batch_id, box.1 AS class FROM (SELECT batch_id, "
        "arrayJoin(arrayFlatten(arrayFilter((b, m) -> m, frames.boxes, frames.matters))) AS box "
        "FROM batches FINAL) WHERE NOT box.7) AS c ON c.batch_id = p.batch_id GROUP BY class"
    )
    assert {(one.name, one.compared, one.flips) for one in found.by_class if one.name != "none"} == set(classes)

    [(noisy, quiet_flips)] = ask.rows(f"SELECT count(), countIf(la != lb) FROM {baseline}")
    moves = [a - b for a, b in ask.rows(f"SELECT a, b FROM {baseline}")]
    assert found.noise is not None
    assert (found.noise.name, found.noise.compared, found.noise.flips) == ("again", noisy, quiet_flips)
    assert found.noise.floor == quiet_flips / noisy
    assert found.noise.band == pytest.approx(np.quantile(np.abs(moves), 0.95))
    table = [[flips, compared - flips], [quiet_flips, noisy - quiet_flips]]
    assert found.p_value == pytest.approx(stats.fisher_exact(table).pvalue)
    within = ask.value(f"SELECT countIf(la != lb AND abs(b - a) <= {found.noise.band}) FROM {pairs}")
    assert found.flips_in_noise == within > 0

    _agrees_with_labels(found, ask, pairs)


def _agrees_with_labels(found: Comparison, ask: Any, pairs: str) -> None:
    for side, column in ((found.labels.a, "la"), (found.labels.b, "lb")):
        # Every label is on a live event but the missed one, over whose span no window of its camera lies.
        rows = ask.rows(
            f"SELECT l.verdict != 'false_alarm', p.{column} {ALARM}, l.chance FROM labels AS l FINAL "
            f"LEFT JOIN {pairs} AS p ON p.event_id = l.event_id"
        )
        assert len(rows) == found.labels.labels == 101
        for given, hits, others in (
            (side.precision, (True, True), (False, True)),
            (side.recall, (True, True), (True, False)),
            (side.false_alarm_rate, (False, True), (False, False)),
        ):
            weights = [1 / chance for worth, alarm, chance in rows if (worth, alarm) == hits]
            all_weights = weights + [1 / chance for worth, alarm, chance in rows if (worth, alarm) == others]
            share = np.sum(weights) / np.sum(all_weights)
            assert (given.weighted, given.count) == (True, len(all_weights))
            assert given.value == pytest.approx(share)
            effective = np.sum(all_weights) ** 2 / np.sum(np.square(all_weights))
            assert given.effective == pytest.approx(effective)
            z = stats.norm.ppf(0.975)
            middle = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
            around = z / (1 + z**2 / effective) * np.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2))
            assert (given.low, given.high) == pytest.approx((middle - around, middle + around))


def _four(past: Past) -> list[Any]:
    """Four windows, their live verdicts 10, 40, 70 and 95."""
    made = [past.window("gate", [10 * n, 10 * n + 1]) for n in range(4)]
    return [(of, past.live(of, score)) for of, score in zip(made, (10, 40, 70, 95), strict=True)]


@pytest.mark.asyncio
async def test_only_what_the_replay_has_judged_so_far_is_compared(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    (one, _), (two, _), (three, _), _ = _four(past)
    past.replay("r1", "running", "half", Plan(kind="change", change=Change(prompt="b"), windows=4))
    past.again("r1", one, 20)
    past.again("r1", two, 90, reused=True)
    past.letter(past.unit("r1", three))
    await past.keep(database)
    found = await compare(queries, "live", "half")
    assert (found.compared, len(found.flips), found.pairing.vanished) == (2, 1, ())
    coverage = found.coverage
    assert (coverage.planned, coverage.units, coverage.judged, coverage.failed) == (4, 2, 2, 1)
    assert not coverage.complete
    assert (found.b.reused, found.b.verdicts, found.b.alarms, found.b.tokens) == (1, 2, 1, 608)
    assert (found.noise, found.p_value, found.flips_in_noise) == (None, None, None)


@pytest.mark.asyncio
async def test_the_other_way_round_it_is_the_other_way_round(database: ClickHouseSettings, queries: Queries) -> None:
    past = Past()
    windows = _four(past)
    past.replay("r1", name="one")
    for (of, _), score in zip(windows, (90, 40, 10, 95), strict=True):
        past.again("r1", of, score)
    await past.keep(database)
    there, back = await compare(queries, "live", "one"), await compare(queries, "one", "live")
    assert there.deltas.mean == -(back.deltas.mean or 0)
    assert there.flips_of("alarm_lost") == back.flips_of("alarm_new") == 1
    assert (back.a.name, back.b.name) == ("one", "live")


@pytest.mark.asyncio
async def test_two_replays_are_compared_on_the_windows_that_both_judged(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    windows = _four(past)
    past.replay("r1", name="one")
    past.replay("r2", name="two")
    for of, _ in windows:
        past.again("r1", of, 50)
    for of, _ in windows[1:]:
        past.again("r2", of, 90)
    await past.keep(database)
    found = await compare(queries, "r1", "two")
    assert (found.compared, found.pairing.vanished, found.coverage.unreached) == (3, (), 1)
    assert any("left out" in note for note in found.notes)


CUT = Plan(kind="change", change=Change(threshold=0.7))


def _cut(past: Past, plan: Plan, state: str = "done") -> None:
    """Live windows of ten frames, and a replay: it splits the first, keeps the second, loses the third, makes one."""
    past.replay("rcut", state, "finer", plan)
    for frames in (range(10), range(20, 30), range(40, 50)):
        past.live(past.window("gate", frames), 70)
    for frames in (range(5), range(5, 10), range(20, 30), range(60, 65)):
        past.again("rcut", batch("gate", frames, classes=("dog",)), 20)


@pytest.mark.asyncio
async def test_a_replay_that_cuts_anew_shows_what_split_vanished_and_appeared(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    _cut(past, CUT)
    past.live(past.window("yard", range(5)), 70)  # of a camera that never was in its scope: see below
    await past.keep(database)
    found = await compare(queries, "live", "finer")
    paired = found.pairing
    assert (len(paired.pairs), len(paired.split), len(paired.vanished), len(paired.appeared)) == (1, 1, 2, 1)
    assert [len(group.b) for group in paired.split] == [2]
    # What a window holds that nobody recorded is in its unit; the second was recorded as well.
    assert paired.appeared[0].classes == ("dog",)
    assert [one.name for one in found.by_class] == ["person"]
    assert found.labels.events == 5


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("plan", "state", "vanished"),
    [
        (CUT, "running", 0),
        (msgspec.structs.replace(CUT, scope=Scope(sample=3)), "done", 0),
        (msgspec.structs.replace(CUT, scope=Scope(where="risk_score > 60")), "done", 0),
        (msgspec.structs.replace(CUT, scope=Scope(cameras=("gate",))), "done", 1),
        (msgspec.structs.replace(CUT, scope=Scope(until=AT + 30_000)), "done", 0),
        (msgspec.structs.replace(CUT, scope=Scope(since=AT + 1_000)), "done", 1),
    ],
    ids=["running", "sample", "condition", "cameras", "until", "since"],
)
async def test_a_window_vanished_only_where_the_replay_looked_at_everything(
    database: ClickHouseSettings, queries: Queries, plan: Plan, state: str, vanished: int
) -> None:
    past = Past()
    _cut(past, plan, state)
    await past.keep(database)
    found = await compare(queries, "live", "finer")
    assert len(found.pairing.vanished) == vanished


@pytest.mark.asyncio
async def test_windows_that_closed_after_the_replay_was_planned_did_not_vanish(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    # Windows of this past close at offset 0, 1 and 2 of `detections`.
    for offset, vanished in ((3, 1), (2, 0)):
        bound = Bound(topic="detections", epoch=past.epoch, partition=0, offset=offset)
        past.records.clear()
        past.epoch = secrets.token_hex(4)
        bound = msgspec.structs.replace(bound, epoch=past.epoch)
        _cut(past, msgspec.structs.replace(CUT, upto=(bound,)))
        await past.keep(database)
        found = await compare(queries, "live", "finer")
        assert (len(found.pairing.vanished), found.coverage.unreached) == (vanished, 1 - vanished)


@pytest.mark.asyncio
async def test_the_noise_is_measured_by_the_baseline_that_was_run_for_it(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    windows = _four(past)
    again = Plan(kind="baseline")
    past.replay("rold", name="old", plan=again)
    past.replay("rmine", name="mine", plan=again)
    past.replay("rhalf", "running", "half done", again)
    past.replay("rother", name="other", plan=again)
    past.replay("r1", name="one", plan=Plan(kind="change", change=Change(prompt="b"), baseline="rold"))
    past.replay("r2", name="two", plan=Plan(kind="change", change=Change(prompt="c")))
    for of, live in windows:
        for replay_id, more in (("r1", 5), ("r2", 5), ("rmine", 1)):
            past.again(replay_id, of, live.risk_score + more)
        past.again("rold", of, live.risk_score, judged_at=AT)
        past.again("rhalf", of, live.risk_score, judged_at=AT + 10**9)
    for n in range(5):  # over other windows than those compared
        past.again("rother", past.window("yard", [n]), 50, judged_at=AT + 10**10)
    await past.keep(database)
    one, two = await compare(queries, "live", "one"), await compare(queries, "live", "two")
    assert one.noise is not None
    assert (one.noise.name, one.noise.band, one.noise.itself) == ("old", 0, False)
    assert two.noise is not None
    assert (two.noise.name, two.noise.band) == ("mine", 1)  # the newest that is done
    itself = await compare(queries, "live", "mine")
    assert itself.noise is not None
    assert (itself.noise.name, itself.noise.itself, itself.p_value) == ("mine", True, 1.0)


@pytest.mark.asyncio
async def test_a_strict_comparison_tells_what_is_the_same_what_differs_and_what_cannot_be_compared(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    windows = [past.window("gate", [10 * n, 10 * n + 1]) for n in range(6)]
    past.replay("r1", name="exact", plan=Plan(kind="baseline", mode="strict"))
    said = [({}, {}), ({}, {"raw_completion": '{"risk_score": 70, "summary": "?"}'}),
            ({}, {"rendered_prompt": '[{"role": "system", "content": "Judge!"}]'}),
            ({"conditions": STRICT | {"slots": "8"}}, {}),
            ({"conditions": STRICT | {"threads": "4"}}, {}),
            ({"parameters": '{"temperature": 1}'}, {})]  # fmt: skip
    for of, (live, again) in zip(windows, said, strict=True):
        past.live(of, 70, **live)
        past.again("r1", of, 70, **again)
    await past.keep(database)
    strict = (await compare(queries, "live", "exact")).strict  # unasked: the replay was
    assert strict is not None
    assert (strict.eligible, strict.identical, strict.calls, strict.models, strict.failed) == (3, 1, 6, (), True)
    assert {(one.event_id, one.field, one.position) for one in strict.differences} == {
        (f"{windows[1].batch_id}:live", "raw_completion", 17),
        (f"{windows[2].batch_id}:live", "rendered_prompt", 37),
    }
    assert {one.reason: one.count for one in strict.ineligible} == {
        "recorded with 8 slots": 1,
        "another threads: 4, then 2": 1,
        'other sampling parameters: {"temperature": 1}, then {"temperature": 0}': 1,
    }


@pytest.mark.asyncio
async def test_other_weights_fail_a_strict_comparison_even_where_the_answers_are_the_same(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    for of, live in _four(past):
        past.again("r1", of, live.risk_score, model_digest="d" * 64)
    past.replay("r1", name="exact")
    await past.keep(database)
    strict = (await compare(queries, "live", "exact", strictly=True)).strict
    assert strict is not None
    assert (strict.identical, strict.eligible, strict.models, strict.failed) == (4, 4, (("c" * 64, "d" * 64),), True)
    assert (await compare(queries, "live", "exact")).strict is None


@pytest.mark.asyncio
async def test_what_was_missed_counts_only_where_the_replay_looked(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    windows = _four(past)
    for name, scope in (("all", Scope()), ("some", Scope(sample=4)), ("yard", Scope(cameras=("yard",)))):
        past.replay(f"r{name}", name=name, plan=Plan(kind="change", scope=scope, change=Change(prompt="b")))
        for of, live in windows:
            past.again(f"r{name}", of, live.risk_score)
    past.label("missed", started_at=AT + 15_000, ended_at=AT + 16_000)  # between two windows
    past.label("missed", started_at=AT + 10_500, ended_at=AT + 12_000)  # over the second, which says 40
    past.label("missed", started_at=AT + 10**9, ended_at=AT + 10**9)  # long after
    past.label("true_alarm", windows[3][1])
    await past.keep(database)
    whole, some = await compare(queries, "live", "all"), await compare(queries, "live", "some")
    assert (whole.labels.missed, whole.labels.b.recall.value) == (2, 1 / 3)
    assert (some.labels.missed, some.labels.b.recall.value) == (1, 1 / 2)
    assert any("missed" in note for note in some.notes)
    assert (await compare(queries, "live", "yard")).labels.missed == 1


@pytest.mark.asyncio
async def test_names_and_zones_are_what_the_camera_has_now(database: ClickHouseSettings, queries: Queries) -> None:
    past = Past()
    for of, live in _four(past):
        past.again("r1", of, live.risk_score)
    past.replay("r1")
    past.add("cameras", msgspec.structs.replace(examples.camera, camera_id="gate", name="Old", updated_at=AT))
    past.add(
        "cameras",
        msgspec.structs.replace(
            examples.camera, camera_id="gate", name="New", time_zone="Asia/Kolkata", updated_at=AT + 1
        ),
    )
    await past.keep(database)
    found = await compare(queries, "live", "r1")
    assert [(one.name, one.title) for one in found.by_camera] == [("gate", "New")]
    assert [one.name for one in found.by_hour] == ["01"]  # 20:26 UTC


@pytest.mark.asyncio
async def test_a_side_that_is_not_there_names_what_is_near(database: ClickHouseSettings, queries: Queries) -> None:
    with pytest.raises(SideError, match="none was run yet"):
        await compare(queries, "live", "stricter")
    past = Past()
    for name in ("stricter", "stricter nights", "twice", "twice"):
        past.replay(f"r{secrets.token_hex(4)}", name=name)
    await past.keep(database)
    for text, words in (("strictr", "near it: stricter"), ("twice", "name one by its id"), ("live", "both sides")):
        with pytest.raises(SideError, match=words):
            await compare(queries, "live", text)
    known = await replays(queries)
    assert find(next(iter(known))[:5], known) == next(iter(known.values()))


@pytest.mark.asyncio
async def test_a_plan_that_cannot_be_read_is_told_and_ends_nothing(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    for of, live in _four(past):
        past.again("r1", of, live.risk_score)
    past.add("replays", msgspec.structs.replace(examples.replay, replay_id="r1", name="torn", plan="{"))
    await past.keep(database)
    found = await compare(queries, "live", "torn")
    assert found.compared == 4
    assert any("plan of torn" in note for note in found.notes)


@pytest.mark.asyncio
async def test_a_side_that_said_nothing_yet_gives_an_empty_comparison(
    database: ClickHouseSettings, queries: Queries
) -> None:
    past = Past()
    _four(past)
    past.replay("r1", "planned", "soon")
    past.replay("rcut", "planned", "later", CUT)
    await past.keep(database)
    for name, unreached in (("soon", 0), ("later", 4)):
        found = await compare(queries, "live", name)
        assert (found.compared, found.deltas.mean, found.p_value) == (0, None, None)
        assert found.coverage.unreached == unreached

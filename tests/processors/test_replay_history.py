"""Recorded windows, read from the real ClickHouse engine: which a scope holds, in which order, and what is left out."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from processors.replay import history
from processors.replay.history import MadeWindows, RecordedWindows, Skips, Timeline, Window, said
from processors.replay.plan import Bound, PlanError, Scope
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas.records import Context, ReplayUnit
from streams import codec
from tests.processors.analyze_samples import EVENING
from tests.processors.planner_kit import OTHER, replay_event, verdict
from tests.processors.recorded_kit import EPOCH, judged, on_log, put, window, windows

pytestmark = pytest.mark.real
pytest_plugins = ["tests.clickhouse_kit"]

COUNT = 60


@pytest.fixture(scope="module")
def recorded(clickhouse_url: str) -> ClickHouseSettings:
    """Sixty windows of three cameras, all but the last three judged, for tests that only read."""
    contexts = windows(COUNT)
    settings = ClickHouseSettings(url=clickhouse_url, database="t_replay_history")
    with ThreadPoolExecutor(1) as thread:  # a loop of its own
        putting = put(settings, on_log("contexts", contexts), on_log("risk_events", judged(contexts[:-3])))
        thread.submit(asyncio.run, putting).result()
    return settings


@pytest.fixture
async def store(recorded: ClickHouseSettings) -> AsyncIterator[Queries]:
    """What asks them."""
    async with aclosing(Queries(recorded)) as queries:
        yield queries


async def of(
    store: Queries, scope: Scope | None = None, *, upto: Sequence[Bound] | None = None, known: Sequence[str] = ()
) -> list[Window]:
    found = RecordedWindows(store, scope or Scope(), await history.ends(store, "contexts") if upto is None else upto)
    pages = [page async for page in found.pages(set(known).__contains__)]
    assert all(0 < len(page) <= history.PAGE for page in pages)
    assert await found.count() == len(await found.batches())
    return [window for page in pages for window in page]


def batches(found: Sequence[Window | Context]) -> list[str]:
    return [(one.context if isinstance(one, Window) else one).batch_id for one in found]


async def test_all_windows_come_once_with_what_live_work_said_and_partitions_take_turns(store, monkeypatch) -> None:
    monkeypatch.setattr(history, "PAGE", 7)
    found = await of(store)
    contexts = windows(COUNT)
    assert batches(found) == batches(contexts), "one of each camera in turn, each in the order of its log"
    assert [one.context for one in found] == contexts
    for one, event in zip(found, judged(contexts[:-3]), strict=False):
        assert one.live is not None
        assert one.live.event_id == event.event_id
        assert (one.live.prompt_digest, one.live.verdict_digest) == (event.prompt_digest, event.verdict_digest)
        assert (one.live.parameters, one.live.conditions) == (event.parameters, event.conditions)
        assert (one.live.score, one.live.level) == (event.risk_score, event.risk_level)
    assert [one.live for one in found[-3:]] == [None] * 3
    assert batches(await of(store, known=batches(found)[:50])) == batches(found)[50:]


async def test_a_scope_holds_what_it_says(store) -> None:
    contexts = windows(COUNT)
    at = EVENING + 60_000 * 10
    assert sorted(batches(await of(store, Scope(since=at)))) == sorted(batches(contexts[10:]))
    assert batches(await of(store, Scope(until=at))) == batches(contexts[:10])
    assert batches(await of(store, Scope(cameras=("yard",)))) == batches(contexts[2::3])
    assert sorted(batches(await of(store, Scope(where="risk_score >= 50")))) == sorted(batches(contexts[50:-3]))
    both = Scope(where="risk_level = 'low' -- a comment", cameras=("yard",), since=at)
    assert batches(await of(store, both)) == batches([one for one in contexts[10:30] if one.camera_id == "yard"])
    assert await of(store, Scope(since=2**62)) == []
    assert await of(store, Scope(cameras=("nowhere",))) == []


async def test_a_sample_is_the_same_each_time_and_a_larger_one_holds_the_smaller(store) -> None:
    ten, again, twenty = [await of(store, Scope(sample=n)) for n in (10, 10, 20)]
    assert batches(ten) == batches(again)
    assert len(ten) == 10
    assert set(batches(ten)) < set(batches(twenty))
    assert batches(ten) != batches(windows(COUNT)[:10])
    assert len(await of(store, Scope(sample=1000))) == COUNT


async def test_what_came_after_the_plan_is_not_in_it(database, ask) -> None:
    await put(database, on_log("contexts", windows(COUNT)))
    async with aclosing(Queries(database)) as store:
        await _later(store, database, ask)


async def _later(store: Queries, database: ClickHouseSettings, ask: Any) -> None:
    before = await history.ends(store, "contexts")
    assert {(bound.epoch, bound.partition, bound.offset) for bound in before} == {(EPOCH, n, 20) for n in range(3)}
    later = [window(number, "yard") for number in range(100, 105)]
    await put(database, on_log("contexts", later, first=20))
    another_life = [window(200, "yard")]
    await put(database, on_log("contexts", another_life, epoch="ffffffff"))
    assert batches(await of(store, upto=before)) == batches(windows(COUNT))
    assert len(await of(store)) == COUNT + 6
    # A window of the plan that was recorded once more, later, is still what it was.
    first = windows(COUNT)[0]
    renamed = msgspec.structs.replace(first, camera_name="Another name")
    await put(database, on_log("contexts", [renamed], first=50))
    ask.command("OPTIMIZE TABLE contexts FINAL")  # as a merge does, sooner or later
    assert first in [one.context for one in await of(store, upto=before)]
    assert first in [one.context for one in await of(store, Scope(sample=COUNT), upto=before)]
    assert len(await of(store, Scope(until=EVENING), upto=before)) == 0
    assert await of(store, upto=()) == []


@pytest.mark.parametrize(
    "condition",
    [
        "1) ; DROP TABLE contexts --",
        "1); INSERT INTO labels (label_id) VALUES ('x') --",
        "event_id IN (SELECT no_column FROM events)",
        "no_column = 1",
        "risk_score >",
        "(SELECT 1",
    ],
)
async def test_a_condition_that_would_write_or_is_none_is_refused_in_clickhouses_words(store, condition) -> None:
    with pytest.raises(PlanError, match="--where: ClickHouse says: "):
        await of(store, Scope(where=condition))
    assert len(await of(store)) == COUNT
    [row] = await store.rows("SELECT count() AS n FROM labels")
    assert row["n"] == 0


async def test_what_cannot_be_read_is_left_out_and_named(database) -> None:
    contexts = windows(12)
    torn = codec.encode("contexts", contexts[4])[0][:40]
    records = on_log("contexts", contexts, values={4: torn})
    await put(database, records)
    async with aclosing(Queries(database)) as store:
        found = RecordedWindows(store, Scope(), await history.ends(store, "contexts"))
        got = [one async for page in found.pages(lambda _: False) for one in page]
        assert sorted(batches(got)) == sorted(batches(contexts[:4] + contexts[5:]))
        origin = f"contexts:{EPOCH}:{records[4].partition}:{records[4].offset}"
        assert list(found.skipped.named) == [origin]
        assert "not a record of contexts" in found.skipped.named[origin]
        assert (await found.count(), found.skipped.count) == (11, 1)
        # Of one that lies outside the span nobody hears.
        late = RecordedWindows(store, Scope(since=EVENING + 8 * 60_000), await history.ends(store, "contexts"))
        assert await late.count() == 4
        assert late.skipped.count == 0


async def test_bytes_that_went_bad_on_disk_are_named_by_their_window(database, ask) -> None:
    contexts = windows(COUNT)
    await put(database, on_log("contexts", contexts))
    at = "topic = 'contexts' AND partition = 1 SETTINGS mutations_sync = 1"
    ask.command(f"ALTER TABLE log UPDATE value = 'rotten' WHERE offset = 3 AND {at}")
    ask.command(f"ALTER TABLE log DELETE WHERE offset = 4 AND {at}")
    async with aclosing(Queries(database)) as store:
        found = RecordedWindows(store, Scope(), await history.ends(store, "contexts"))
        got = [one async for page in found.pages(lambda _: False) for one in page]
    rotten, gone = contexts[3 * 3 + 1].batch_id, contexts[4 * 3 + 1].batch_id
    assert len(got) == COUNT - 2
    assert "Confluent's framing" in found.skipped.named[rotten]
    assert "not in ClickHouse any more" in found.skipped.named[gone]


async def test_recorded_verdicts_are_found_with_the_window_that_they_were_given_on(database) -> None:
    contexts = windows(COUNT)
    other = [verdict(one, "r111111111111", OTHER) for one in contexts[:4]]
    # What the replay judged was told of in other words than what was recorded.
    given = msgspec.structs.replace(contexts[1], camera_name="The yard, renamed")
    units = [
        ReplayUnit(
            unit_id=f"r111111111111:{one.batch_id}",
            replay_id="r111111111111",
            camera_id=one.camera_id,
            kind="judge",
            payload=codec.encode("contexts", one)[0],
            created_at=EVENING,
            prompt_digest=OTHER.digest,
        )
        for one in (given,)
    ]
    reused = replay_event(verdict(contexts[5], "r222222222222", OTHER), reused=True)
    await put(
        database,
        on_log("contexts", contexts),
        on_log("risk_events", judged(contexts[:-3])),
        on_log("replay_events", [*map(replay_event, other), reused]),
        on_log("replay_units", units),
    )
    async with aclosing(Queries(database)) as store:
        live = judged(contexts[:1])[0].verdict_digest
        found = await said(store, {one.batch_id: live for one in contexts})
        assert sorted(found) == sorted(batches(contexts[:-3]))
        assert all(
            one.event.run == "live" and one.context == wanted
            for one, wanted in zip([found[batch] for batch in batches(contexts[:-3])], contexts, strict=False)
        )
        found = await said(store, {one.batch_id: other[0].verdict_digest for one in contexts})
        assert sorted(found) == sorted(batches(contexts[:4])), "what only repeats a verdict is no verdict"
        assert found[contexts[0].batch_id].event == other[0]
        assert found[contexts[0].batch_id].context == contexts[0], (
            "no such unit: a shadow's, which judges the live window"
        )
        assert found[contexts[1].batch_id].context == given
        assert await said(store, {}) == {}
        assert await said(store, {contexts[0].batch_id: "no such digest"}) == {}


async def test_windows_that_are_made_anew_come_with_what_live_work_said_of_the_same(store) -> None:
    class Maker:
        skipped = Skips()

        async def windows(self) -> AsyncIterator[Context]:
            for one in (windows(COUNT)[0], window(999), windows(COUNT)[1]):
                yield one

    made = MadeWindows(store, Maker())
    assert await made.count() is None
    found = [one async for page in made.pages(lambda _: False) for one in page]
    assert batches(found) == batches([windows(COUNT)[0], window(999), windows(COUNT)[1]])
    assert [one.live is not None for one in found] == [True, False, True]


async def test_a_window_that_nobody_judged_gets_the_prompt_of_its_time(store) -> None:
    line = await Timeline.read(store)
    default = judged(windows(1))[0].prompt_digest
    assert line.at("yard", EVENING + 60_000) == default
    assert line.at("nowhere", EVENING) == ""
    line = Timeline([("yard", 100, "first"), ("yard", 200, "second"), ("front-door", 50, "other")])
    assert [line.at("yard", at) for at in (0, 100, 199, 200, 999)] == ["first", "first", "first", "second", "second"]

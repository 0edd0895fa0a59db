"""Events as they come, over the real ClickHouse engine: each once, none missed, however slow or absent a client was."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest

from infra.config import Settings
from processors.gateway.live import OVERLAP, Cursor, Feed
from processors.gateway.models import EventSummary
from processors.gateway.ports import InvalidError
from processors.gateway.reads import Arrived
from streams.errors import UnavailableError
from tests.processors import gateway_kit as kit
from tests.processors.gateway_kit import AT, event_id, window
from tests.processors.test_gateway_api import event as shown

NOW = datetime(2026, 11, 2, 10, tzinfo=UTC)


class Table:
    """Stands where `Reads` does: rows that become visible when they are put here, whatever time they carry."""

    def __init__(self) -> None:
        self.rows: list[Arrived] = []
        self.away = False
        self.asked = 0

    def put(self, offset: int, *, late_s: float = 0, partition: int = 0) -> str:
        name = f"front:{partition}-{offset}:live"
        at = NOW + timedelta(seconds=offset - late_s)
        self.rows.append(Arrived(at, "e", partition, offset, "front", name))
        return name

    async def clock(self) -> datetime:
        self._answer()
        return max([NOW, *(row.inserted_at for row in self.rows)])

    async def arrived(self, since: datetime, *, after: Arrived | None, limit: int) -> list[Arrived]:
        self._answer()
        rows = sorted(row for row in self.rows if row.inserted_at >= since and (after is None or row > after))
        return rows[:limit]

    async def described(self, event_ids) -> list[EventSummary]:
        return [EventSummary(**shown(name).model_dump(include=set(EventSummary.model_fields))) for name in event_ids]

    def _answer(self) -> None:
        self.asked += 1
        if self.away:
            raise UnavailableError("store", "away")


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
async def feed(table: Table):
    made = Feed(table, table.described, poll_s=0.01, queue=4)  # type: ignore[arg-type]
    yield made
    await made.close()


async def take(events: AsyncGenerator[tuple[str, EventSummary]], count: int) -> tuple[list[str], str]:
    """The next events' ids, and the last one's cursor."""
    found: list[str] = []
    cursor = ""
    async with asyncio.timeout(10):
        while len(found) < count:
            cursor, event = await anext(events)
            found.append(event.event_id)
    return found, cursor


async def begun(feed: Feed) -> None:
    async with asyncio.timeout(10):
        await feed._begun.wait()


async def following(feed: Feed, table: Table) -> AsyncGenerator[tuple[str, EventSummary]]:
    """A client that listens already: its generator waits for the first event."""
    events = feed.events(None)
    first = asyncio.create_task(take(events, 1))
    await asyncio.sleep(0)
    await begun(feed)
    table.put(1, partition=9)
    await first
    return events


async def test_what_was_there_is_no_news_and_what_comes_is(feed: Feed, table: Table) -> None:
    table.put(0)
    events = await following(feed, table)
    names = [table.put(offset) for offset in (2, 3)]
    assert (await take(events, 2))[0] == names


async def test_a_row_that_became_visible_late_is_not_missed(feed: Feed, table: Table) -> None:
    events = await following(feed, table)
    ahead = table.put(20, partition=1)
    assert (await take(events, 1))[0] == [ahead]
    # Another partition's insert took 15 s: it carries a time that was passed long ago.
    late = table.put(21, late_s=15, partition=2)
    assert (await take(events, 1))[0] == [late]


async def test_a_client_resumes_behind_its_cursor_without_a_hole_or_a_double(feed: Feed, table: Table) -> None:
    events = await following(feed, table)
    table.put(2)
    _, cursor = await take(events, 1)
    await events.aclose()
    missed = [table.put(3), table.put(4, late_s=30, partition=3), table.put(5)]
    resumed = feed.events(Cursor.parse(cursor))
    found, cursor = await take(resumed, 3)
    assert sorted(found) == sorted(missed)
    more = table.put(6)
    assert (await take(resumed, 1))[0] == [more]
    await resumed.aclose()


async def test_a_client_that_was_away_for_days_gets_everything_in_pieces(feed: Feed, table: Table) -> None:
    old = str(Cursor(NOW - timedelta(days=3), {}))
    names = [table.put(offset) for offset in range(1, 451)]
    resumed = feed.events(Cursor.parse(old))
    assert (await take(resumed, 450))[0] == names
    await resumed.aclose()


async def test_a_slow_client_is_let_go_and_misses_nothing_when_it_resumes(feed: Feed, table: Table) -> None:
    slow, quick = await following(feed, table), feed.events(None)
    reading = asyncio.create_task(take(quick, 1))
    await asyncio.sleep(0.05)
    first = table.put(2)
    assert (await reading)[0] == [first]
    _, cursor = await take(slow, 1)
    names = [table.put(3)]
    assert (await take(quick, 1))[0] == names
    for offset in range(4, 12):
        names.append(table.put(offset))
        assert (await take(quick, 1))[0] == names[-1:]
    with pytest.raises(StopAsyncIteration):  # four would have waited for it, nine came
        await anext(slow)
    again = feed.events(Cursor.parse(cursor))
    assert (await take(again, 9))[0] == names
    await again.aclose()
    await quick.aclose()


async def test_one_poller_serves_everybody_and_rests_when_nobody_listens(feed: Feed, table: Table) -> None:
    clients = [await following(feed, table)]
    clients += [feed.events(None) for _ in range(20)]
    reading = [asyncio.create_task(take(client, 1)) for client in clients[1:]]
    await asyncio.sleep(0.05)
    before, began = table.asked, asyncio.get_running_loop().time()
    await asyncio.sleep(0.2)
    polls = (asyncio.get_running_loop().time() - began) / 0.01
    assert table.asked - before <= polls + 2
    name = table.put(2)
    assert [found for found, _ in await asyncio.gather(*reading)] == [[name]] * 20
    for client in clients:
        await client.aclose()
    await asyncio.sleep(0.05)
    before = table.asked
    await asyncio.sleep(0.1)
    assert table.asked == before


async def test_a_store_that_is_away_is_waited_for(feed: Feed, table: Table) -> None:
    events = await following(feed, table)
    table.away = True
    reading = asyncio.create_task(take(events, 1))
    await asyncio.sleep(0.05)
    name = table.put(2)
    table.away = False
    assert (await reading)[0] == [name]


async def test_a_stop_ends_every_client(feed: Feed, table: Table) -> None:
    events = await following(feed, table)
    reading = asyncio.create_task(take(events, 1))
    await asyncio.sleep(0.02)
    await feed.close()
    with pytest.raises(StopAsyncIteration):
        await reading


def test_a_cursor_survives_being_given_out_and_stays_small() -> None:
    cursor = Cursor(NOW, {})
    for n in range(500):
        at = NOW + timedelta(seconds=n)
        cursor = cursor.behind(Arrived(at, "epoch123", n % 64, n, "front", "x"))
    assert Cursor.parse(str(cursor)) == cursor
    assert len(cursor.seen) <= OVERLAP.total_seconds() + 1
    assert len(str(cursor)) < 4000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "W10",
        "WzEsMV0",
        "WzEsW1sxLDJdXV0",
        "\x00",
        "bnVsbA",
        "WzFlOTk5LFtdXQ",
        "Wy02MjEzNTU5NjgwMDAwMCwgW11d",
        "Ww" * 3000,
    ],
)
def test_a_cursor_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidError):
        Cursor.parse(text)


@pytest.mark.real
async def test_an_event_that_the_sink_stores_comes_to_whoever_listens(settings: Settings) -> None:
    mine = kit.own_database(settings)
    old, new, later = (window(f"cam-{n}", AT + n * 60_000) for n in range(3))
    await kit.store(mine, old)
    async with kit.source_of(mine) as source, aclosing(source.live()) as events:
        reading = asyncio.create_task(take(events, 1))
        await begun(source.feed)
        await kit.store(mine, new, start=100)
        found, cursor = await reading
        assert found == [event_id(new)]
    await kit.store(mine, later, start=200)
    async with kit.source_of(mine) as restarted, aclosing(restarted.live(after=cursor)) as events:
        found, _ = await take(events, 1)
        assert found == [event_id(later)]

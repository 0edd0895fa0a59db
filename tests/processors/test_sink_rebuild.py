"""Rebuilding on the real engine: what the sink made is made again from `log`, row for row, wherever it is killed."""

import asyncio
import secrets

import msgspec
import pytest

from processors.sink.rebuild import Progress, Rebuild
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from streams.stages import Range
from streams.topics import STORED
from tests import examples
from tests.examples import CAMERA, PARTITION, incoming, tick

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real


class KilledError(Exception):
    """The process ends here, as far as the store can see."""


class Killed(Rebuild):
    """A rebuild that is killed before its nth step, or after it while nobody hears of it."""

    def __init__(self, store, step, *, after=False):
        super().__init__(store)
        self.left = step
        self._after = after

    async def _command(self, statement):
        await self._step(super()._command(statement))

    async def _bring(self, work, records):
        await self._step(super()._bring(work, records))

    async def _step(self, doing):
        self.left -= 1
        if self.left < 0 and not self._after:
            doing.close()
            raise KilledError
        await doing
        if self.left < 0:
            raise KilledError


@pytest.fixture(scope="module")
def migrated(clickhouse_url):
    """One database for all tests here: to migrate one takes longer than most of them."""
    made = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")

    async def main():
        store = ClickHouseStore(made)
        await store.migrate()
        await store.close()

    asyncio.run(main())
    return made


@pytest.fixture
def database(migrated, reading):
    """It, emptied."""
    reader = reading(migrated)
    for table in ("log", "sink_progress", *STORED):
        reader.command(f"TRUNCATE TABLE {table}")
    return migrated


@pytest.fixture
def life():
    """An epoch of this test's own: the engine drops what comes again under a token that it has seen."""
    return secrets.token_hex(4)


def frames(epoch, *offsets):
    return [
        incoming("frames", msgspec.structs.replace(examples.frame, frame_id=f"{CAMERA}:{o}"), offset=o, epoch=epoch)
        for o in offsets
    ]


async def sunk(store, records):
    """Through the real sink, a range a partition."""
    first = records[0]
    await SinkStage(store).insert(
        Range(first.topic, first.epoch, first.partition, first.offset, records[-1].offset), records
    )


async def fill(store, epoch):
    """Every kind of record: each topic's own, ticks, what cannot be read, what is refused, what came twice."""
    for topic in STORED:
        good = incoming(topic, offset=5, epoch=epoch)
        bad = good._replace(offset=7, value=b"\x00\xfe\xff")
        await sunk(store, [good, bad, tick(topic, offset=8)._replace(epoch=epoch)])
    # Avro's numbers are longer than the table's: it refuses the one, and takes the others.
    broken = incoming("frames", msgspec.structs.replace(examples.frame, width=2**40), offset=13, epoch=epoch)
    await sunk(store, [*frames(epoch, 10, 12), broken, *frames(epoch, 14)])
    await sunk(store, [frames(epoch, 10)[0]._replace(offset=30)])


def rows(ask, *, without="inserted_at"):
    return {table: ask.rows(f"SELECT * EXCEPT ({without}) FROM {table} FINAL ORDER BY ALL") for table in STORED}


def made(ask):
    """How each table was made."""
    return {table: ask.value(f"SHOW CREATE TABLE {table}") for table in STORED}


async def rebuilt(store, *tables, told=lambda _: None):
    rebuild = Rebuild(store, told)
    await rebuild.views()
    return {table: await rebuild.table(table) for table in tables}


async def test_every_table_is_the_same_row_for_row(store, ask, life):
    await fill(store, life)
    before, how, logged = rows(ask), made(ask), ask.rows("SELECT * FROM log ORDER BY ALL")
    said: list[Progress] = []
    done = await rebuilt(store, *STORED, told=said.append)
    assert rows(ask) == before
    assert made(ask) == how
    assert ask.rows("SELECT * FROM log ORDER BY ALL") == logged
    assert (done["frames"].records, done["frames"].rows, done["frames"].undecodable) == (7, 4, 2)
    assert all(one.rows == one.rows_before and one.corrected == 0 for one in done.values())
    assert Progress("frames", 7, 7) in said
    # Times of insertion are those of `log`: a second rebuild changes not even them.
    first = rows(ask, without="epoch")
    await rebuilt(store, "frames", "cameras")
    assert rows(ask, without="epoch") == first
    assert ask.rows("SELECT name FROM system.tables WHERE database = currentDatabase() AND name LIKE '%rebuild%'") == []


async def test_a_damaged_table_is_whole_again(store, ask, life):
    await fill(store, life)
    before = rows(ask)
    ask.command("DELETE FROM frames WHERE offset = 12")
    ask.command(f"INSERT INTO labels (label_id, camera_id) VALUES ('stray', '{CAMERA}')")
    ask.command("DROP VIEW events")
    ask.command("DROP TABLE dead_letter_status")
    how = made_of(ask, "detections")
    done = await rebuilt(store, "frames", "labels", "dead_letter_status")
    assert rows(ask) == before
    assert made_of(ask, "detections") == how
    assert ask.value("SELECT count() FROM events") == 1
    assert (done["frames"].rows_before, done["frames"].rows) == (3, 4)
    assert "`record`" in made_of(ask, "dead_letter_status")


def made_of(ask, table):
    return ask.value(f"SHOW CREATE TABLE {table}")


@pytest.mark.parametrize("after", [False, True], ids=["before-the-step", "after-the-step"])
async def test_killed_at_any_step_and_run_again_it_comes_to_the_same_rows(store, ask, life, after):
    await fill(store, life)
    before = rows(ask)["frames"]
    for step in range(20):
        killed = Killed(store, step, after=after)
        try:
            await killed.table("frames")
        except KilledError:
            # Readers see the old rows or the new ones, never a part.
            assert ask.rows("SELECT * EXCEPT inserted_at FROM frames FINAL ORDER BY ALL") == before
            await Rebuild(store).table("frames")
            assert ask.rows("SELECT * EXCEPT inserted_at FROM frames FINAL ORDER BY ALL") == before
            assert ask.value("SELECT count() FROM system.tables WHERE name LIKE 'frames\\_\\_%'") == 0
        else:
            break
    assert 3 <= step < 20


class Watched(Rebuild):
    """A rebuild beside a sink that goes on: rows come before and after the exchange, and across it."""

    def __init__(self, store, epoch):
        super().__init__(store)
        self._sink = SinkStage(store)
        self._epoch = epoch

    async def _command(self, statement):
        exchange = statement.startswith("EXCHANGE")
        if exchange:
            await sunk(self._store, frames(self._epoch, 100, 102))
            # This one has come as far as `log` ...
            crossing = frames(self._epoch, 104)
            spanned = Range("frames", self._epoch, PARTITION, 104, 104)
            half = HalfStore(self._store)
            with pytest.raises(KilledError):
                await SinkStage(half).insert(spanned, crossing)
        await super()._command(statement)
        if exchange:
            # ... and its row goes into the new table.
            await SinkStage(self._store).insert(spanned, crossing)
            await sunk(self._store, frames(self._epoch, 106, 108))


class HalfStore:
    """A store whose sink is killed between `log` and the typed table."""

    def __init__(self, store):
        self._store = store

    async def insert(self, block, token):
        if block.table != "log":
            raise KilledError
        await self._store.insert(block, token)


async def test_what_the_sink_brings_meanwhile_is_there_once(store, ask, life):
    await sunk(store, frames(life, 0, 2, 4))
    done = await Watched(store, life).table("frames")
    assert ask.rows("SELECT offset FROM frames FINAL ORDER BY offset") == [
        (offset,) for offset in (0, 2, 4, 100, 102, 104, 106, 108)
    ]
    assert done.rows == 8


async def test_what_this_version_can_read_and_an_older_one_could_not_has_a_row_now(store, ask, life):
    await sunk(store, frames(life, 0, 2))
    ask.command("DELETE FROM frames WHERE offset = 2")
    ask.command(
        "INSERT INTO log SELECT * REPLACE ('schema 00 of frames is not known to this version' AS decode_error) "
        "FROM log WHERE offset = 2"
    )
    done = await Rebuild(store).table("frames")
    assert (done.corrected, done.undecodable, done.rows) == (1, 0, 2)
    assert ask.rows("SELECT offset, decode_error FROM log FINAL ORDER BY offset") == [(0, ""), (2, "")]

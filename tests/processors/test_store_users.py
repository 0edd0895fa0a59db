"""ClickHouse's three users under the engine's own access control: each can do its work, and nothing else."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from processors.gateway.reads import Reads
from processors.sink.rebuild import Rebuild
from processors.sink.stage import SinkStage, build
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries, QueryError
from schemas.migrations import migrations
from schemas.users import USERS
from streams.errors import UnavailableError
from streams.stages import Range
from streams.topics import STORED
from tests.clickhouse_users import Guarded
from tests.examples import CAMERA, EPOCH, PARTITION, incoming

pytest_plugins = ["tests.users_kit"]

ROOT = Path(__file__).resolve().parents[2]

# What ClickHouse shows everybody, even where tables of `system` need grants: addImplicitAccessRights in its
# src/Access/ContextAccess.cpp. `time_zones` is one of those that never change.
OPEN = {"tables", "columns", "databases", "settings", "time_zones"}


@asynccontextmanager
async def store_of(guarded: Guarded, role: str) -> AsyncIterator[ClickHouseStore]:
    store = ClickHouseStore(guarded.settings(role))
    try:
        yield store
    finally:
        await store.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled(guarded: Guarded) -> Guarded:
    """The database, made by the admin and filled by the writer: a record of every topic, and one that is none."""
    async with store_of(guarded, "admin") as admin:
        assert await admin.migrate() == list(migrations())
    sink = build(guarded.settings("writer"))
    try:
        for topic in STORED:
            await put(sink, topic, 0)
        junk = incoming("frames", offset=1)._replace(value=b"junk")
        await sink.insert(Range("frames", EPOCH, PARTITION, 1, 1), [junk])
    finally:
        await sink.close()
    return guarded


async def put(sink: SinkStage, topic: str, offset: int) -> None:
    await sink.insert(Range(topic, EPOCH, PARTITION, offset, offset), [incoming(topic, offset=offset)])


def product() -> Iterator[tuple[Path, str]]:
    """Every file of the product that may hold SQL."""
    for room in ("schemas", "streams", "processors", "infra"):
        for pattern in ("*.py", "*.sql"):
            for path in (ROOT / room).rglob(pattern):
                yield path, path.read_text()


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="module")
async def test_the_reader_asks_of_every_table_and_view_what_the_writer_put_there(filled: Guarded) -> None:
    async with aclosing(Queries(filled.settings("reader"))) as reader:
        names = [row["name"] for row in await reader.rows("SHOW TABLES")]
        assert set(STORED) | {"log", "events", "score_history"} <= set(names)
        for name in names:
            # What the product asks of a moment in the past takes the moment, and one of them the prompt.
            of = {"events_by_prompt": f"(prompt = '{'a' * 32}')"}.get(name, "")
            of = "(at = '2299-01-01')" if name.endswith("_as_of") else of
            of = f"(prompt = '{'a' * 32}', at = '2299-01-01')" if name == "events_by_prompt_as_of" else of
            found = await reader.rows(f"SELECT * FROM {name}{of}")
            assert found or name not in STORED, name
        assert {topic: count.ids for topic, count in (await reader.in_clickhouse()).items()} == dict.fromkeys(STORED, 1)
        # What the product asks in words of its own.
        assert await reader.pending_migrations() == []
        await reader.version_and_clock()
        [event] = await reader.events(limit=5)
        assert (await reader.live_event(event["event_id"])) is not None
        [event] = await reader.events_like(event["event_id"][:20], limit=2)
        assert (await reader.made_from(event)).frames is not None
        for asked in (reader.flow, reader.latency, reader.models, reader.dead_letter_counts):
            await asked()
        assert await reader.dead_letters(limit=5)
        assert await reader.raw("SELECT count() FROM log", "TSV", limit=1)
        assert await Reads(reader).page(camera=CAMERA, levels=(), since=None, until=None, before=None, limit=5)


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("role", "statement"),
    [
        *(("reader", statement) for statement in (
            "INSERT INTO labels (camera_id) VALUES ('x')",
            "ALTER TABLE log DELETE WHERE 1",
            "DELETE FROM log WHERE 1",
            "TRUNCATE TABLE log",
            "DROP TABLE log",
            "DROP DATABASE rewatch",
            "CREATE TABLE mine (a Int8) ENGINE = ReplacingMergeTree ORDER BY a",
            "CREATE OR REPLACE VIEW events AS SELECT 1",
            "CREATE TABLE default.mine (a Int8) ENGINE = ReplacingMergeTree ORDER BY a",
            "OPTIMIZE TABLE log FINAL",
            "CREATE USER other",
            "GRANT SELECT ON *.* TO rewatch_writer",
            "SELECT 1 SETTINGS readonly = 0",
            "SELECT 1 SETTINGS max_memory_usage = 0",
            "SELECT 1 SETTINGS max_execution_time = 601",
            "SELECT 1 SETTINGS max_result_bytes = 2000000000",
        )),
        *(("writer", statement) for statement in (
            "SELECT value FROM log",
            "SELECT * FROM events",
            "SELECT count() FROM frames",
            "INSERT INTO labels SELECT * FROM labels",
            "ALTER TABLE log DELETE WHERE 1",
            "DELETE FROM log WHERE 1",
            "TRUNCATE TABLE log",
            "DROP TABLE log",
            "CREATE TABLE mine (a Int8) ENGINE = ReplacingMergeTree ORDER BY a",
            "CREATE USER other",
        )),
        *(("admin", statement) for statement in (
            "DROP DATABASE rewatch",
            "CREATE DATABASE other",
            "CREATE TABLE default.mine (a Int8) ENGINE = ReplacingMergeTree ORDER BY a",
            "CREATE USER other",
            "GRANT SELECT ON rewatch.* TO rewatch_writer",
        )),
    ],
)  # fmt: skip
async def test_what_a_user_need_not_do_is_refused(filled: Guarded, role: str, statement: str) -> None:
    async with store_of(filled, role) as store:
        with pytest.raises(UnavailableError, match=r"clickhouse\.user") as refused, store.connection.naming():
            await (await store.connection.client()).command(statement)
        assert re.search("Not enough privileges|ACCESS_DENIED|READONLY|shouldn't be", str(refused.value))
    async with aclosing(Queries(filled.settings("reader"))) as reader:
        assert await reader.rows("SELECT count() AS n FROM labels") == [{"n": 1}]


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="module")
async def test_a_persons_query_as_the_reader_cannot_write_and_says_why_in_the_engines_words(filled: Guarded) -> None:
    async with aclosing(Queries(filled.settings("reader"))) as reader:
        with pytest.raises(QueryError, match=r"readonly|privileges"):
            await reader.raw("INSERT INTO labels (camera_id) VALUES ('x')", "TSV", limit=0)
        for source in ("url('http://127.0.0.1:1/', 'LineAsString')", "file('/etc/passwd', 'LineAsString')"):
            with pytest.raises(QueryError, match="Not enough privileges"):
                await reader.raw(f"SELECT * FROM {source}", "TSV", limit=0)


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="module")
async def test_tables_are_made_anew_by_the_admin_and_by_nobody_else(filled: Guarded) -> None:
    async with store_of(filled, "admin") as admin:
        rebuild = Rebuild(admin)
        assert await admin.migrate() == []
        await rebuild.views()
        assert (await rebuild.table("frames")).rows == 1
    for role in ("writer", "reader"):
        async with store_of(filled, role) as store:
            with pytest.raises(UnavailableError, match=r"rewatch migrate --users"):
                await Rebuild(store).table("labels")


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="module")
async def test_a_wrong_password_names_the_setting_and_rows_wait_until_it_is_right_again(filled: Guarded) -> None:
    sink = build(filled.settings("writer"))
    right = filled.password("writer")
    try:
        await put(sink, "frames", 2)
        filled.change_password("writer", "another")
        with pytest.raises(UnavailableError, match="rewatch_writer: Authentication failed") as refused:
            await put(sink, "frames", 3)
        assert refused.value.waiting_on == "store"
        assert "REWATCH_CLICKHOUSE__PASSWORD" in str(refused.value)
        assert "does not answer" not in str(refused.value)
        assert right not in str(refused.value)
        filled.change_password("writer", right)
        await put(sink, "frames", 3)
    finally:
        await sink.close()
    async with aclosing(Queries(filled.settings("reader"))) as reader:
        found = await reader.rows("SELECT offset FROM log WHERE topic = 'frames' ORDER BY offset")
    assert [row["offset"] for row in found] == [0, 1, 2, 3]


def test_every_system_table_that_the_product_reads_is_open_or_granted_to_the_admin() -> None:
    found = {
        name: path.name
        for path, text in product()
        for name in re.findall(r"(?:FROM|JOIN)\s+system\.(\w+)", text)
        if "infra/local" not in str(path)
    }
    granted = {name for grant in USERS[0].grants for name in re.findall(r"SELECT ON system\.(\w+)", grant)}
    assert set(found) - OPEN == granted, found


def test_no_statement_of_the_product_asks_for_more_than_the_reader_may() -> None:
    [reader] = [user for user in USERS if user.role == "reader"]
    bounds = {limit.setting: limit.most for limit in reader.limits if limit.most is not None}
    for path, text in product():
        if path.name == "users.py" or "infra/local" in str(path):
            continue
        for setting, value in re.findall(rf"\b({'|'.join(bounds)})\s*=\s*(\d+)", text):
            assert 0 < int(value) <= bounds[setting], f"{path}: {setting} = {value}"


def test_every_engine_of_a_table_is_one_that_the_admin_may_use() -> None:
    [admin] = [user for user in USERS if user.role == "admin"]
    granted = {name for grant in admin.grants for name in re.findall(r"TABLE ENGINE ON (\w+)", grant)}
    used = {name for migration in migrations() for name in re.findall(r"ENGINE\s*=\s*(\w+)", migration.sql)}
    assert used == granted

"""A database of each earlier release, with data, brought to this version: nothing is lost and everything is read."""

import asyncio
import secrets
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

import httpx
import pytest
import typer

from infra.cli.errors import mendable
from infra.cli.output import USAGE
from infra.config import Settings
from processors.sink import store as sink_store
from processors.sink.core import Block
from processors.sink.rebuild import Rebuild
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas.migrations import MigrationError, migrations
from streams.messages import Incoming
from streams.stages import Range
from streams.topics import STORED
from tests.processors.audit_kit import CAMERAS, History
from tests.schemas import recorded

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real

RELEASES: Mapping[int, Mapping[str, int]] = {
    3: {},
    6: {"dead_letter_status": 2, "gpu_metrics": 2},
    8: dict.fromkeys(("dead_letter_status", "gpu_metrics", "labels", "prompts", "replays", "replay_units"), 2),
}
"""The last migration of some releases, the first and the last among them; their Avro schemas beyond version 1."""

FLOW = ("frames", "detections", "batches", "contexts", "risk_events")


class Release(NamedTuple):
    """A database as an earlier release left it."""

    settings: ClickHouseSettings
    version: int
    history: History
    others: Mapping[str, Incoming]
    """One record, of that release's schema, of each topic that the pipeline itself does not fill."""


class OldStore(ClickHouseStore):
    """Inserts what the sink of that release inserted: it knew the columns that its tables had."""

    async def insert(self, block: Block, token: str) -> None:
        there = await self._columns(await self.connection.client(), block.table)
        await super().insert(
            Block(block.table, {name: values for name, values in block.columns.items() if name in there}), token
        )


@pytest.fixture(scope="module", params=RELEASES, ids=lambda version: f"{version:03}")
def release(clickhouse_url: str, request: pytest.FixtureRequest) -> Iterator[Release]:
    settings = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")
    made = Release(settings, request.param, History(), dict(_others(RELEASES[request.param])))
    asyncio.run(_release(made))
    yield made
    httpx.post(clickhouse_url, params={"query": f"DROP DATABASE {settings.database} SYNC"}, timeout=60)


async def _release(made: Release) -> None:
    """Make it, with its migrations, by its own sink."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink_store, "migrations", lambda: migrations()[: made.version + 1])
        async with aclosing(_Closing(OldStore(made.settings))) as old:
            applied = await old.store.migrate()
            assert [migration.version for migration in applied] == list(range(made.version + 1))
            await made.history.keep(old.store)
            sink = SinkStage(old.store)
            for topic, record in made.others.items():
                await sink.insert(Range(topic, record.epoch, record.partition, record.offset, record.offset), [record])


class _Closing:
    """A store that `aclosing` closes."""

    def __init__(self, store: ClickHouseStore) -> None:
        self.store = store

    async def aclose(self) -> None:
        await self.store.close()


def _others(versions: Mapping[str, int]) -> Iterator[tuple[str, Incoming]]:
    for topic in STORED:
        # The letter that was recorded is of a frame that this history has not; holds came after all of these.
        if topic not in {*FLOW, "dead_letters", "holds"}:
            yield topic, recorded.load(topic, versions.get(topic, 1)).incoming


async def test_it_is_upgraded_audited_read_and_can_be_rebuilt(release: Release) -> None:
    async with aclosing(_Closing(ClickHouseStore(release.settings))) as new:
        applied = await new.store.migrate()
        assert [migration.version for migration in applied] == list(range(release.version + 1, len(migrations())))
        assert await new.store.migrate() == []
        async with aclosing(Queries(release.settings)) as queries:
            assert await queries.pending_migrations() == []
            counted = await _everything(queries)
            assert counted["events"] == len(CAMERAS)
            assert {topic: counted[topic] for topic in release.others} == dict.fromkeys(release.others, 1)
            report = await release.history.audited(queries)
            assert (report.violations, report.lost, report.duplicates) == ([], 0, 0)
            # Whatever a newer column says is made from the record's own bytes, so a table made anew says the same.
            rebuild = Rebuild(new.store)
            for topic in ("labels", "gpu_metrics"):
                rows = f"SELECT * EXCEPT inserted_at FROM {topic} FINAL"
                before = await queries.rows(rows)
                assert (await rebuild.table(topic)).undecodable == 0
                assert await queries.rows(rows) == before


async def test_the_new_sink_goes_on_where_the_old_one_stopped(release: Release) -> None:
    """A range that the old sink had in hand when it was stopped comes again, and its rows are there once."""
    async with aclosing(_Closing(ClickHouseStore(release.settings))) as new:
        await new.store.migrate()
        await release.history.keep(new.store)
        more = History(frames=4)
        await more.keep(new.store)
        async with aclosing(Queries(release.settings)) as queries:
            assert (await queries.in_clickhouse())["frames"].undecodable == 0
            [row] = await queries.rows("SELECT count() AS n, uniqExact(epoch) AS lives FROM log FINAL WHERE NOT tick")
            expected = sum(
                len([r for r in history.records[topic] if r.value is not None])
                for history in (release.history, more)
                for topic in FLOW
            )
            assert row["n"] == expected + len(release.others)


def test_a_database_of_a_newer_version_is_refused_and_the_way_out_is_named(
    clickhouse_url: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")

    async def downgraded() -> None:
        async with aclosing(_Closing(ClickHouseStore(settings))) as newer:
            await newer.store.migrate()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sink_store, "migrations", lambda: migrations()[:-1])
            async with aclosing(_Closing(ClickHouseStore(settings))) as older:
                await older.store.migrate()

    with pytest.raises(MigrationError, match=f"has migration {len(migrations()) - 1:03}"):
        asyncio.run(downgraded())
    with pytest.raises(typer.Exit) as ended:
        mendable(Settings(data_dir=tmp_path), lambda: asyncio.run(downgraded()))
    assert ended.value.exit_code == USAGE
    said = capsys.readouterr().err
    for part in ("upgrade rewatch", "docs/upgrades.md"):
        assert part in said
    httpx.post(clickhouse_url, params={"query": f"DROP DATABASE {settings.database} SYNC"}, timeout=60)


async def _everything(queries: Queries) -> dict[str, int]:
    """What people and the product ask, counted: every typed table, `log`, and the views that have no parameters."""
    views = await queries.rows(
        "SELECT name FROM system.tables WHERE database = currentDatabase() AND engine = 'View' "
        "AND position(create_table_query, '{') = 0 ORDER BY name"
    )
    asked = ["log", *(f"{topic} FINAL" for topic in STORED), *(row["name"] for row in views)]
    counted = [(await queries.rows(f"SELECT count() AS n FROM {name}"))[0]["n"] for name in asked]
    return dict(zip((name.removesuffix(" FINAL") for name in asked), counted, strict=True))

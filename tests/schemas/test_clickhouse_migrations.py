"""The migrations: how files are read and split, and what applying them to the real engine gives."""

import pytest

from processors.sink.store import ClickHouseStore
from schemas.migrations import Migration, MigrationError, migrations, pending, split
from streams.topics import STORED, TOPICS

pytest_plugins = ["tests.clickhouse_kit"]

POSITION = {"epoch", "partition", "offset", "inserted_at"}


def test_semicolons_in_comments_strings_and_names_end_no_statement():
    sql = "-- a; b\nSELECT ';''x\\';', `a;b` /* ; */ ;\n\n/* only a comment; */ ;\nSELECT 2 -- end;\n"
    assert list(split(sql)) == ["SELECT ';''x\\';', `a;b` /* ; */", "SELECT 2 -- end;"]


def test_comments_before_a_statement_are_left_out():
    assert list(split("-- one\n/* two */\n  -- three\nSELECT 1;")) == ["SELECT 1"]


def test_every_file_of_the_tree_is_numbered_without_holes():
    assert [migration.version for migration in migrations()] == list(range(len(migrations())))
    assert all(migration.statements for migration in migrations())


@pytest.mark.parametrize("names", [["000_a.sql", "002_b.sql"], ["000_a.sql", "000_b.sql"], ["0_a.sql"], ["000-a.sql"]])
def test_a_missing_doubled_or_misnamed_file_is_an_error(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("SELECT 1")
    with pytest.raises(MigrationError):
        migrations(tmp_path)


def test_pending_is_what_the_database_lacks():
    first, second = Migration(0, "a", "SELECT 1"), Migration(1, "b", "SELECT 2")
    assert pending([first, second], {}) == [first, second]
    assert pending([first, second], {0: first.sha256}) == [second]
    assert pending([first, second], {0: first.sha256, 1: second.sha256}) == []


def test_a_file_changed_after_it_was_applied_is_an_error_that_names_it():
    with pytest.raises(MigrationError, match=r"000_a\.sql was changed after it was applied"):
        pending([Migration(0, "a", "SELECT 1")], {0: Migration(0, "a", "SELECT 2").sha256})


def test_a_database_newer_than_this_version_is_an_error():
    with pytest.raises(MigrationError, match="upgrade"):
        pending([Migration(0, "a", "SELECT 1")], {0: Migration(0, "a", "SELECT 1").sha256, 7: "x"})


@pytest.mark.real
async def test_every_statement_can_be_repeated(ask):
    for migration in migrations():
        for statement in migration.statements:
            ask.command(statement)
    assert ask.rows("SELECT version, name FROM schema_migrations FINAL ORDER BY version") == [
        (migration.version, migration.name) for migration in migrations()
    ]


@pytest.mark.real
async def test_migrating_again_applies_nothing(store):
    assert await store.migrate() == []


@pytest.mark.real
async def test_a_crash_inside_a_migration_is_mended_by_migrating_again(database, ask):
    # As after a kill between the last table and the entry: the tables of 002 are half there, the rest has never run.
    ask.command("DROP VIEW events")
    ask.command("DROP TABLE risk_events")
    ask.command("DELETE FROM schema_migrations WHERE version >= 2")
    again = ClickHouseStore(database)
    assert await again.migrate() == list(migrations()[2:])
    await again.close()
    assert ask.value("SELECT count() FROM events") == 0


@pytest.mark.real
async def test_a_changed_migration_is_refused_by_the_store(store, ask):
    ask.command("INSERT INTO schema_migrations (version, name, sha256) VALUES (1, 'log', 'other')")
    with pytest.raises(MigrationError, match=r"001_log\.sql was changed"):
        await store.migrate()


@pytest.mark.real
def test_every_column_of_every_table_and_view_is_documented(ask):
    undocumented = ask.rows(
        "SELECT table, name FROM system.columns WHERE database = currentDatabase() AND comment = '' ORDER BY ALL"
    )
    assert undocumented == []
    assert ask.rows("SELECT name FROM system.tables WHERE database = currentDatabase() AND comment = ''") == []


@pytest.mark.real
def test_every_table_deduplicates_and_reaches_the_disk(ask):
    engines = dict(
        ask.rows("SELECT name, engine_full FROM system.tables WHERE database = currentDatabase() AND engine != 'View'")
    )
    by_gc = {"forgotten", "forgotten_images", "gc_passes"}
    assert set(STORED) | {"log", "sink_progress", "schema_migrations"} | by_gc == set(engines)
    for name, engine in engines.items():
        assert engine.startswith("ReplacingMergeTree"), name
        assert "fsync_after_insert = 1" in engine, name
        if name not in {"schema_migrations", *by_gc}:  # the sink inserts into the others, by ranges
            # Ten times the ranges that can be in flight: one a partition and topic, 64 partitions in production.
            topics = len(STORED) if name in ("log", "sink_progress") else 1
            window = int(engine.split("non_replicated_deduplication_window = ")[1].split(",")[0])
            assert window >= 10 * 64 * topics, name


@pytest.mark.real
def test_positions_can_be_named_without_quotes(ask):
    assert ask.rows("SELECT epoch, partition, offset FROM frames") == []


@pytest.mark.real
def test_typed_tables_have_the_position_and_types_that_hold_what_avro_can(ask):
    holds = {int: ("Int", "DateTime64"), float: ("Float",), bool: ("Bool",), str: ("String", "LowCardinality")}
    for topic in STORED:
        columns = dict(
            ask.rows(f"SELECT name, type FROM system.columns WHERE database = currentDatabase() AND table = '{topic}'")
        )
        assert columns.keys() >= POSITION
        for field, hint in TOPICS[topic].record.__annotations__.items():
            if field in columns and hint in holds and field not in POSITION:
                held = columns[field].removeprefix("Nullable(")  # what the log has a mark for, as NaN, is NULL here
                assert held.startswith(holds[hint]), f"{topic}.{field}"

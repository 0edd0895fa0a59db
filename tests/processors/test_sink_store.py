"""The sink on the real engine: what goes in comes out, once, and what cannot go in is kept with the reason."""

import asyncio
import math
import os
import signal
import time
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from infra.local import clickhouse
from infra.local.process import Process, free_port
from processors.sink import core
from processors.sink.stage import SinkStage, build
from processors.sink.store import ClickHouseStore
from processors.store.connection import RefusedError
from processors.store.queries import Count, Queries
from processors.store.settings import ClickHouseSettings
from streams.errors import UnavailableError
from streams.stages import Range
from streams.topics import STORED, TOPICS
from tests import examples
from tests.examples import AT, CAMERA, EPOCH, PARTITION, RECORDS, incoming, tick

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real


def span(records):
    first = records[0]
    return Range(first.topic, first.epoch, first.partition, first.offset, records[-1].offset)


def when(ms):
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)


def frames(*offsets):
    return [
        incoming("frames", msgspec.structs.replace(examples.frame, frame_id=f"{CAMERA}:{o}"), offset=o) for o in offsets
    ]


@pytest.fixture
def stage(store):
    return SinkStage(store)


async def insert(stage, *records):
    await stage.insert(span(records), records)


async def test_every_topic_comes_out_as_it_went_in(stage, database, ask):
    for topic in STORED:
        await insert(stage, incoming(topic, offset=5))
    for topic in STORED:
        [row] = ask.dicts(f"SELECT * FROM {topic}")
        assert (row["epoch"], row["partition"], row["offset"]) == (EPOCH, PARTITION, 5)
        for name, get in core.TABLES[topic].items():
            want = get(RECORDS[topic])
            if (name.endswith("_at") or name == "at") and want is not None:
                want = [when(at) for at in want] if isinstance(want, list) else when(want)
            assert plain(row[name]) == plain(want), f"{topic}.{name}"
        [kept] = ask.rows(f"SELECT hex(value), hex(key), source, decode_error FROM log WHERE topic = '{topic}'")
        record = incoming(topic)
        assert kept == (record.value.hex().upper(), record.key.hex().upper(), "somewhere:e1:3:9", "")
    queries = Queries(database)
    assert await queries.in_clickhouse() == dict.fromkeys(STORED, Count(1, 1, 0))
    await queries.aclose()


def plain(value):
    """Values whatever they are carried in: the client gives named tuples as dicts and undecodable bytes as hex."""
    if isinstance(value, dict):
        return plain(list(value.values()))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    return value


def test_every_column_of_a_typed_table_has_a_source(ask):
    for topic in STORED:
        columns = ask.rows(f"SELECT name FROM system.columns WHERE database = currentDatabase() AND table = '{topic}'")
        assert {name for (name,) in columns} == {*core.TABLES[topic], *core.POSITION, "inserted_at"}


def test_every_field_of_a_record_has_a_column():
    left_out = {
        ("frames", "image"): "inline",
        ("replay_units", "payload"): "payload_size",
        ("contexts", "batch"): "frame_ids",
        ("replay_events", "event"): "risk_score",
        ("batches", "partition"): "detections_partition",
        ("batches", "epoch"): "detections_epoch",
        ("cameras", "partition"): "partition_pin",
    }
    for topic in STORED:
        columns = core.TABLES[topic]
        for field in TOPICS[topic].record.__struct_fields__:
            name = left_out.get((topic, field), field)
            assert any(column == name or column.startswith((f"{name}.", f"{name}_")) for column in columns)


async def test_what_a_gpu_does_not_tell_is_null(stage, ask):
    silent = msgspec.structs.replace(
        examples.gpu_metrics, utilization=math.nan, power=math.nan, memory_used=-1, throttled=None, process_count=None,
        processes=(examples.GpuProcess(pid=7),),
    )  # fmt: skip
    await insert(stage, incoming("gpu_metrics", silent))
    [row] = ask.dicts("SELECT * FROM gpu_metrics FINAL")
    told = ("utilization", "power", "memory_used", "throttled", "process_count", "ecc_volatile", "temperature")
    assert [row[name] for name in told] == [None] * 6 + [61.0]
    assert (row["processes.pid"], row["processes.name"], row["processes.memory"]) == ([7], [None], [None])


async def test_a_range_inserted_twice_is_there_once_in_log_tables_and_views(stage, database, ask):
    again = build(database)
    for topic in STORED:
        records = [incoming(topic, offset=0)]
        await insert(stage, *records)
        await asyncio.sleep(0.002)  # inserted_at differs: the token decides, not the rows
        await insert(again, *records)
    await again.close()
    tables = ("log", "sink_progress", *STORED)
    # Without FINAL: nothing reached the tables the second time.
    counts = {table: ask.value(f"SELECT count() FROM {table}") for table in tables}
    assert counts == {table: len(STORED) if table in ("log", "sink_progress") else 1 for table in tables}
    assert ask.value("SELECT count() FROM events") == 1
    assert ask.rows("SELECT frames, windows, events FROM camera_activity") == [(1, 1, 1)]
    assert set(ask.rows("SELECT records, undecodable FROM pipeline_lag")) == {(1, 0)}


async def test_a_token_that_was_forgotten_costs_nothing_that_is_seen(stage, ask):
    records = frames(0, 1)
    await insert(stage, *records)
    # As when the window has passed: the same rows go in under a name that the table does not know.
    for block in core.rows(span(records), records):
        await stage._store.insert(block, f"another-{block.table}")
    assert ask.value("SELECT count() FROM frames") == 4
    for table, count in (("frames", 2), ("log", 2), ("sink_progress", 1)):
        assert ask.value(f"SELECT count() FROM {table} FINAL") == count
    assert ask.value("SELECT records FROM pipeline_lag WHERE topic = 'frames'") == 2


async def test_a_record_that_reached_the_log_twice_is_one_row(stage, ask):
    """A repeat that ingest has forgotten: another offset and arrival, a month later, the same frame."""
    again = msgspec.structs.replace(examples.frame, arrived_at=AT + 40 * 24 * 3_600_000)
    await insert(stage, incoming("frames", offset=0), incoming("frames", again, offset=1))
    assert ask.value("SELECT count() FROM frames FINAL") == 1
    assert ask.value("SELECT count() FROM log FINAL") == 2


async def test_other_rows_under_the_same_token_are_silently_dropped(store, ask):
    """ClickHouse's own rule, and why a range is committed before it is inserted."""
    first, other = frames(0), frames(1)
    await store.insert(core.rows(span(first), first).log, "one token")
    await store.insert(core.rows(span(other), other).log, "one token")
    assert ask.rows("SELECT offset FROM log FINAL") == [(0,)]


async def test_what_cannot_be_decoded_is_in_the_log_with_its_bytes_and_the_reason(stage, database, ask):
    junk = incoming("detections", offset=0)._replace(value=b"\x00\xff junk")
    unknown = incoming("detections", offset=1)._replace(headers=(("fp", b"\xff\x00unknown"[:8]),))
    await insert(stage, junk, unknown, incoming("detections", offset=2))
    rows = ask.rows("SELECT offset, hex(value), decode_error, fingerprint FROM log FINAL ORDER BY offset")
    assert [bytes.fromhex(row[1]) for row in rows] == [junk.value, unknown.value, unknown.value]
    assert "not a record of detections" in rows[0][2] or "framing" in rows[0][2]
    assert (rows[1][2][:24], rows[1][3]) == ("schema ff00756e6b6e6f77 ", "ff00756e6b6e6f77")
    assert rows[2][2] == ""
    assert ask.rows("SELECT offset FROM detections") == [(2,)]
    queries = Queries(database)
    assert (await queries.in_clickhouse())["detections"] == Count(records=3, ids=1, undecodable=2)
    await queries.aclose()


async def test_ticks_are_kept_and_not_counted(stage, database, ask):
    await insert(stage, incoming("frames", offset=0), tick(offset=1), tick(offset=2))
    assert ask.rows("SELECT count(), countIf(tick) FROM log") == [(3, 2)]
    assert ask.rows("SELECT records, ticks FROM pipeline_lag WHERE topic = 'frames'") == [(1, 2)]
    queries = Queries(database)
    assert (await queries.in_clickhouse())["frames"] == Count(1, 1, 0)
    await queries.aclose()


async def test_a_number_too_large_for_its_type_is_refused_and_kept(stage, ask):
    """Avro's int and long are the same bytes, so a broken writer can send an int beyond 32 bits."""
    broken = msgspec.structs.replace(examples.frame, frame_id="broken", width=2**40)
    await insert(stage, *frames(0, 1), incoming("frames", broken, offset=2), *frames(3))
    assert ask.rows("SELECT offset FROM frames FINAL ORDER BY offset") == [(0,), (1,), (3,)]
    errors = ask.rows("SELECT offset, decode_error FROM log FINAL WHERE decode_error != ''")
    assert [offset for offset, _ in errors] == [2]
    assert errors[0][1].startswith("refused by table frames: ")
    assert ask.rows("SELECT rows, undecodable FROM sink_progress") == [(4, 1)]


async def test_what_the_server_refuses_is_kept_too(stage, ask):
    ask.command(f"ALTER TABLE frames ADD CONSTRAINT no_ones CHECK frame_id != '{CAMERA}:1'")
    await insert(stage, *frames(0, 1, 2))
    assert ask.rows("SELECT offset FROM frames FINAL ORDER BY offset") == [(0,), (2,)]
    assert ask.rows("SELECT offset FROM log FINAL WHERE decode_error LIKE 'refused by table frames%'") == [(1,)]


async def test_times_out_of_range_can_be_read_back(stage, ask):
    await insert(stage, incoming("frames", msgspec.structs.replace(examples.frame, captured_at=2**62)))
    assert ask.value("SELECT toString(captured_at) FROM frames") == "2299-12-31 23:59:59.999"
    assert ask.value("SELECT captured_at FROM frames").year == 2299


# ---- the views


@pytest.fixture
async def pipeline(stage):
    """One frame's way, at its offsets, and a replay of it."""
    for offset, topic in enumerate(STORED):
        await insert(stage, incoming(topic, offset=offset))
    return {topic: offset for offset, topic in enumerate(STORED)}


@pytest.mark.usefixtures("pipeline")
async def test_events_says_what_happened_by_the_cameras_clock(database, ask):
    [event] = ask.dicts("SELECT * FROM events")
    assert event["started_at"] == when(AT)
    assert (event["started_local"], event["time_zone"]) == ("2026-05-28 22:26:40", "Europe/Berlin")
    assert (event["camera_name"], event["risk_score"], event["risk_level"]) == ("Front door", 72, "high")
    assert (event["summary"], event["frames"]) == (examples.risk_event.summary, 1)
    queries = Queries(database)
    assert [row["event_id"] for row in await queries.events(order="risk", camera=CAMERA, limit=9)] == [
        event["event_id"]
    ]
    assert await queries.events(camera="another", limit=9) == []
    await queries.aclose()


@pytest.mark.usefixtures("pipeline")
async def test_events_leaves_replays_out(ask):
    assert ask.value("SELECT count() FROM replay_events") == 1
    assert ask.rows("SELECT event_id FROM events") == [(examples.risk_event.event_id,)]


async def test_an_unknown_time_zone_costs_the_local_time_alone(stage, ask):
    await insert(stage, incoming("contexts", msgspec.structs.replace(examples.context, time_zone="Mars/Olympus")))
    await insert(stage, incoming("risk_events"))
    assert ask.rows("SELECT started_local, time_zone FROM events") == [("2026-05-28 20:26:40", "UTC")]


async def test_an_event_is_shown_before_its_context_has_come(stage, ask):
    await insert(stage, incoming("risk_events"))
    assert ask.rows("SELECT camera_name, time_zone FROM events") == [("", "UTC")]


async def test_lineage_leads_from_the_event_to_the_frames_hash_and_offsets(pipeline, ask):
    [row] = ask.dicts("SELECT * FROM event_lineage")
    assert (row["n"], row["frame_id"], row["sha256"]) == (1, examples.frame.frame_id, examples.SHA256)
    assert row["labels"] == ["person"]
    assert (row["partition"], row["frame_epoch"], row["event_epoch"]) == (PARTITION, EPOCH, EPOCH)
    assert row["frame_offset"] == pipeline["frames"]
    assert row["batch_offset"] == pipeline["batches"]
    assert row["event_offset"] == pipeline["risk_events"]
    assert row["detection_offset"] == 0  # as the batch names it
    assert (row["detector"], row["detector_digest"]) == ("rtdetr_v2_r18vd", "d" * 64)
    assert (row["model"], row["model_digest"]) == ("nemotron-demo", "c" * 64)
    assert (row["prompt_digest"], row["prompt_name"]) == ("a" * 32, "plain")
    assert row["conditions"] == {"slots": "1", "seed": "7"}


async def test_lineage_still_has_frames_whose_rows_are_gone(stage, ask):
    await insert(stage, incoming("batches"))
    await insert(stage, incoming("risk_events"))
    assert ask.rows("SELECT n, frame_id, sha256 FROM event_lineage") == [(1, examples.frame.frame_id, "")]


@pytest.mark.usefixtures("pipeline")
async def test_activity_counts_by_the_hour_and_the_cameras_threshold(stage, ask):
    low = examples.Box(label="car", score=0.3, x=0.0, y=0.0, width=1.0, height=1.0)
    seen = msgspec.structs.replace(examples.detections, frame_id="another", boxes=(low, examples.box))
    await insert(stage, incoming("detections", seen, offset=90))
    fast = msgspec.structs.replace(
        examples.frame, frame_id="fast clock", captured_at=AT + 10**10, arrived_at=AT + 3_600_000
    )
    await insert(stage, incoming("frames", fast, offset=90))
    assert ask.dicts("SELECT * FROM camera_activity ORDER BY hour") == [
        {
            "camera_id": CAMERA,
            "hour": datetime(2026, 5, 28, 20, tzinfo=UTC),
            "frames": 1,
            "detections": {"person": 2},
            "windows": 1,
            "events": 1,
            "top_risk": 72,
            "last_seen": when(AT),
        },
        {
            # Its clock runs ahead: it is counted when it arrived.
            "camera_id": CAMERA,
            "hour": datetime(2026, 5, 28, 21, tzinfo=UTC),
            "frames": 1,
            "detections": {},
            "windows": 0,
            "events": 0,
            "top_risk": None,
            "last_seen": when(AT + 3_600_000),
        },
    ]
    # The camera's own threshold is lowered: what was below it counts.
    lowered = msgspec.structs.replace(
        examples.camera, window=msgspec.structs.replace(examples.window, threshold=0.25), updated_at=AT
    )
    await insert(stage, incoming("cameras", lowered, offset=90))
    assert ask.value("SELECT detections FROM camera_activity ORDER BY hour LIMIT 1") == {"car": 1, "person": 2}


@pytest.mark.usefixtures("pipeline")
async def test_lag_shows_every_topic_and_the_time_since_arrival(ask):
    lag = {row["topic"]: row for row in ask.dicts("SELECT * FROM pipeline_lag")}
    assert set(lag) == set(STORED)
    assert all(row["records"] == 1 and row["partitions"] == 1 for row in lag.values())
    assert lag["frames"]["last_at"] == when(examples.frame.arrived_at)
    assert lag["risk_events"]["last_at"] == when(examples.risk_event.judged_at)
    assert lag["risk_events"]["last_inserted_at"] > datetime.now(UTC) - timedelta(minutes=5)
    assert lag["detections"]["arrival_p50_s"] == pytest.approx(0.4)
    assert lag["risk_events"]["arrival_p95_s"] == pytest.approx(2.0)
    assert lag["batches"]["arrival_p50_s"] is None


def test_lag_of_an_empty_database_has_every_topic(ask):
    rows = ask.rows("SELECT records, last_at, last_inserted_at, arrival_p50_s FROM pipeline_lag")
    assert rows == [(0, None, None, None)] * len(STORED)


async def test_gaps_name_the_range(stage, ask):
    gap = msgspec.structs.replace(
        examples.dead_letter, kind="gap", origin="frames:e9:2:100", detail='{"from": 100, "resume_at": 150}'
    )
    await insert(stage, incoming("dead_letters", gap, offset=0), incoming("dead_letters", offset=1))
    assert ask.rows("SELECT topic, epoch, partition, lo, hi, stage FROM gaps") == [
        ("frames", "e9", 2, 100, 149, "detect")
    ]


# ---- what can go wrong


async def test_a_store_that_is_away_names_the_setting():
    stage = build(ClickHouseSettings(url=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(UnavailableError, match=r"clickhouse\.url") as caught:
        await insert(stage, *frames(0))
    assert caught.value.waiting_on == "store"
    await stage.close()


async def test_a_store_that_never_answers_is_given_up_after_the_read_timeout():
    gone = asyncio.Event()

    async def hang(reader, writer):
        await reader.read()
        writer.close()
        gone.set()

    async with await asyncio.start_server(hang, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        stage = build(ClickHouseSettings(url=f"http://127.0.0.1:{port}", read_timeout_s=0.2))
        with pytest.raises(UnavailableError):
            await insert(stage, *frames(0))
        await stage.close()
        await gone.wait()  # the connection was let go of, too


async def test_a_database_that_was_never_migrated_names_the_fix(clickhouse_url):
    stage = build(ClickHouseSettings(url=clickhouse_url, database="never_made"))
    with pytest.raises(UnavailableError, match="rewatch migrate"):
        await insert(stage, *frames(0))
    await stage.close()


async def test_a_table_of_another_version_waits_for_migration(stage, ask):
    ask.command("ALTER TABLE frames DROP COLUMN inline")
    with pytest.raises(UnavailableError, match="no column 'inline': run `rewatch migrate`"):
        await insert(stage, *frames(0))
    ask.command("ALTER TABLE frames ADD COLUMN inline Bool")
    await insert(stage, *frames(0))
    assert ask.value("SELECT count() FROM frames") == 1


async def test_a_table_that_changes_under_a_running_sink_is_seen(stage, ask):
    await insert(stage, *frames(0))
    ask.command("ALTER TABLE frames RENAME COLUMN inline TO held_inline")
    with pytest.raises(UnavailableError, match="rewatch migrate"):
        await insert(stage, *frames(1))
    ask.command("ALTER TABLE frames RENAME COLUMN held_inline TO inline")
    await insert(stage, *frames(1))
    assert ask.value("SELECT count() FROM frames FINAL") == 2


async def test_one_value_that_does_not_fit_takes_none_of_its_block_in(store, ask):
    records = [*frames(0), incoming("frames", msgspec.structs.replace(examples.frame, height=2**35), offset=1)]
    with pytest.raises(RefusedError):
        await store.insert(core.rows(span(records), records).typed, "t")
    assert ask.value("SELECT count() FROM frames") == 0


async def test_the_engine_killed_inside_inserts_leaves_no_gap_and_no_double(tmp_path, reading):
    """SIGKILL twice while four partitions insert; each repeats its range until it is answered."""
    port = free_port()
    settings = ClickHouseSettings(url=f"http://127.0.0.1:{port}", connect_timeout_s=1, read_timeout_s=5)
    spec = clickhouse.spec(tmp_path / "data", port)
    process = Process(spec, tmp_path)
    await process.start()
    first = ClickHouseStore(settings)
    await first.migrate()
    await first.close()
    stage, ranges, size, retries = build(settings), 12, 20, 0

    async def partition(number):
        nonlocal retries
        for index in range(ranges):
            records = [
                incoming(
                    "frames", msgspec.structs.replace(examples.frame, frame_id=f"{number}:{o}"), offset=o
                )._replace(partition=number)
                for o in range(index * size, (index + 1) * size)
            ]
            while True:
                try:
                    await stage.insert(span(records), records)
                    break
                except UnavailableError:
                    retries += 1
                    await asyncio.sleep(0.1)

    working = [asyncio.create_task(partition(number)) for number in range(4)]
    try:
        for _ in range(2):
            await asyncio.sleep(0.2)
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            process = Process(spec, tmp_path)
            await process.start()
        await asyncio.gather(*working)
        assert retries, "nothing was in flight when it was killed"
        reader = reading(settings)
        for table in ("frames", "log"):
            # Without FINAL too: the tokens survived the kill.
            for final in ("", "FINAL"):
                [(count, distinct)] = reader.rows(
                    f"SELECT count(), uniqExact(epoch, partition, offset) FROM {table} {final}"
                )
                assert (count, distinct) == (4 * ranges * size, 4 * ranges * size), f"{table} {final}"
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        await stage.close()
        await process.stop()


async def test_an_insert_that_was_cancelled_anywhere_can_be_repeated(stage, ask):
    """As when the partition is revoked: the request is cut off at once, whatever it has reached."""
    records = frames(*range(50))
    await insert(stage, *frames(100))  # connected
    for delay in (0, 0.001, 0.003, 0.01, 0.02, 0.04):
        task = asyncio.create_task(insert(stage, *records))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await insert(stage, *records)
    assert ask.rows("SELECT count(), uniqExact(frame_id) FROM frames") == [(51, 51)]
    assert ask.value("SELECT count() FROM log") == 51


async def test_throughput_is_printed(stage, ask, capsys):
    """Figures, not limits: `pytest -s -k throughput`."""
    figures = []
    for topic, size in (("frames", 500), ("detections", 5000), ("risk_events", 1000)):
        records = [incoming(topic, offset=offset) for offset in range(size)]
        began = time.perf_counter()
        core.rows(span(records), records)
        made = time.perf_counter() - began
        began = time.perf_counter()
        await insert(stage, *records)
        whole = time.perf_counter() - began
        assert ask.value(f"SELECT count() FROM log WHERE topic = '{topic}'") == size
        figures.append(f"{topic}: {size} records, rows {size / made:,.0f}/s, rows and inserts {size / whole:,.0f}/s")
    with capsys.disabled():
        print("\n  " + "\n  ".join(figures))


def test_a_url_with_a_password_inside_is_refused():
    with pytest.raises(ValueError, match="pattern"):
        ClickHouseSettings(url="http://user:secret@host:8123")

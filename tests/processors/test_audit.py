"""The audit on the real engine: a healthy history is clean, and each thing that must not be is found and named."""

import asyncio
import secrets

import msgspec
import pytest
import pytest_asyncio

from processors.sink.store import ClickHouseStore
from processors.store.audit import account
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import Batch, Detections, RiskEvent
from streams import codec
from streams.topics import STORED, TOPICS
from tests import examples
from tests.processors.audit_kit import (
    CAMERAS,
    WINDOWS,
    History,
    context_of,
    detections_of,
    event_of,
    found,
    frame_of,
    letter_of,
)

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def migrated(clickhouse_url):
    """One database for all tests here: to migrate one takes longer than any of them."""
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


@pytest_asyncio.fixture
async def queries(database):
    made = Queries(database)
    yield made
    await made.aclose()


async def test_a_healthy_history_is_clean(store, queries):
    history = History()
    await history.keep(store)
    report = await history.audited(queries)
    assert found(report) == set()
    assert report.clean
    assert report.accepted == 12
    assert not any(report.in_flight.values())


async def test_a_frame_that_was_passed_without_a_result_is_lost(store, queries):
    history = History()
    record = history.of("frames")[2]
    seen = history.of("detections")[2]
    history.drop(seen)
    await history.keep(store)
    report = await history.audited(queries)
    assert ("lost", record.origin) in found(report)
    # The window tells of it all the same.
    assert found(report) == {("lost", record.origin), ("from_nowhere", seen.origin)}
    assert (report.lost, report.duplicates) == (1, 0)


async def test_a_frame_with_a_dead_letter_is_accounted_for(store, queries):
    history = History()
    bad = history.add("frames", 0, frame_of(CAMERAS[0], 9))
    history.add("dead_letters", 0, letter_of(bad, "detect"), bad)
    await history.keep(store)
    report = await history.audited(queries)
    assert found(report) == set()
    assert report.dead_letters == [{"stage": "detect", "kind": "error", "status": "open", "count": 1}]


async def test_what_a_stage_has_not_reached_is_in_flight_and_not_lost(store, queries):
    history = History()
    for topic in ("detections", "batches", "contexts", "risk_events"):
        history.records[topic] = [r for r in history.records[topic] if r.partition == 1]
    await history.keep(store)
    stands = {("detect", "frames", 0): 0}
    report = await history.audited(queries, stands)
    assert found(report) == set()
    assert report.in_flight["detect"] == 7  # six frames and a tick
    assert report.in_flight["analyze"] == 0
    assert (await history.audited(queries)).lost == 6


async def test_what_the_sink_has_not_brought_yet_is_in_flight_and_not_lost(store, queries):
    history = History()
    whole = {topic: list(records) for topic, records in history.records.items()}
    late = history.of("detections")[4:] + history.of("batches") + history.of("contexts") + history.of("risk_events")
    for record in late:
        history.drop(record)
    await history.keep(store)
    history.records = whole
    stands = {("sink", "detections", 0): late[0].offset} | {
        ("sink", topic, 0): 0 for topic in ("batches", "contexts", "risk_events")
    }
    report = await history.audited(queries, stands)
    assert found(report) == set()
    assert report.in_flight["sink"] == 6  # two detections, a tick, a batch, a context, an event
    # Were the sink to have one of the two, the other would be lost: it is the older.
    history.drop(late[0])
    report = await history.audited(queries, stands | {("sink", "detections", 0): late[1].offset})
    assert ("lost", history.of("frames")[4].origin) in found(report)


async def test_an_event_made_twice_is_found(store, queries):
    history = History()
    [context] = history.of("contexts")
    [event] = history.of("risk_events")
    again = history.add("risk_events", 0, codec.decode(event, RiskEvent), context)
    await history.keep(store)
    report = await history.audited(queries)
    assert ("doubled", context.origin) in found(report)
    assert report.duplicates == 1
    assert again.origin not in str(found(report) - {("repeated", event.origin)})


async def test_a_result_beside_a_dead_letter_of_the_same_record_is_one_too_many(store, queries):
    history = History()
    record = history.of("frames")[0]
    history.add("dead_letters", 0, letter_of(record, "detect"), record)
    await history.keep(store)
    assert found(await history.audited(queries)) == {("doubled", record.origin)}


async def test_a_frame_in_two_batches_is_found(store, queries):
    history = History()
    [batch] = history.of("batches")
    made = codec.decode(batch, Batch)
    fewer = made.frames[2:]
    other = msgspec.structs.replace(
        made, frames=fewer, batch_id=ids.batch_id(made.camera_id, [frame.frame_id for frame in fewer])
    )
    second = history.add("batches", 0, other, history.records["detections"][6])
    context = history.add("contexts", 0, context_of(other), second)
    history.add("risk_events", 0, event_of(other), context)
    await history.keep(store)
    report = await history.audited(queries)
    seen = history.of("detections")
    assert {("frame_in_two_batches", record.origin) for record in seen[2:]} <= found(report)
    assert ("out_of_order", other.batch_id) in found(report)
    assert report.duplicates == 4


async def test_what_matters_and_is_in_no_batch_is_lost_unless_its_window_may_be_open(store, queries):
    history = History()
    frame = history.add("frames", 0, frame_of(CAMERAS[0], 8))
    seen = history.add("detections", 0, detections_of(CAMERAS[0], 8), frame)
    await history.keep(store)
    assert found(await history.audited(queries)) == {("lost", seen.origin)}
    report = await history.audited(queries, {("batch", "detections", 0): seen.offset})
    assert found(report) == set()
    assert report.in_flight["batch"] == 1


async def test_what_stands_still_does_not_matter(store, queries):
    history = History()
    frame = history.add("frames", 0, frame_of(CAMERAS[0], 8))
    still = msgspec.structs.replace(detections_of(CAMERAS[0], 8), boxes=detections_of(CAMERAS[0], 5).boxes)
    history.add("detections", 0, still, frame)
    await history.keep(store)
    assert found(await history.audited(queries)) == set()


async def test_a_wrong_id_is_found(store, queries):
    history = History()
    wrong = msgspec.structs.replace(frame_of(CAMERAS[0], 9), frame_id=f"{CAMERAS[0]}:not-its-hash")
    frame = history.add("frames", 0, wrong)
    seen = msgspec.structs.replace(detections_of(CAMERAS[0], 9), frame_id=wrong.frame_id, boxes=())
    history.add("detections", 0, seen, frame)
    await history.keep(store)
    assert found(await history.audited(queries)) == {("wrong_id", wrong.frame_id)}


@pytest.mark.parametrize("kind", ["batches", "risk_events"])
async def test_a_window_or_event_that_is_misnamed_is_found(store, queries, kind):
    history = History()
    [record] = history.of(kind)
    made = codec.decode(record, TOPICS[kind].record)
    wrong = (
        msgspec.structs.replace(made, batch_id="gate:0")
        if isinstance(made, Batch)
        else msgspec.structs.replace(made, event_id="gate:0:live")
    )
    value, _ = codec.encode(kind, wrong)
    history.drop(record)
    history.records[kind].append(record._replace(value=value))
    await history.keep(store)
    assert ("wrong_id", "gate:0" if kind == "batches" else "gate:0:live") in found(await history.audited(queries))


async def test_a_row_that_clickhouse_lost_is_found(store, queries, ask):
    history = History()
    await history.keep(store)
    one, other = history.of("detections")[1], history.of("risk_events")[0]
    ask.command(f"DELETE FROM detections WHERE partition = 0 AND offset = {one.offset}")
    ask.command(f"DELETE FROM log WHERE topic = 'risk_events' AND partition = 0 AND offset = {other.offset}")
    report = await history.audited(queries)
    assert {("missing_row", one.origin), ("missing_in_clickhouse", other.origin)} <= found(report)
    assert ("stray_row", other.origin) in found(report)
    # Where the log is too long to be read, the sink's own notes tell of it.
    look, memory = history.look()
    memory = {key: seen._replace(since=seen.upto) for key, seen in memory.items()}
    report = await account(queries, look, memory, WINDOWS)
    assert "risk_events" in report.unread
    assert ("missing_in_log", f"risk_events:{history.epoch}:0:0-0") in found(report)


async def test_a_record_that_no_reader_of_the_log_sees_is_found(store, queries):
    history = History()
    aborted = history.add("frames", 0, frame_of(CAMERAS[0], 9))
    history.drop(aborted)
    aborted = aborted._replace(offset=3)  # where a marker should lie
    history.records["frames"].append(aborted)
    await history.keep(store)
    history.drop(aborted)
    assert ("not_on_log", aborted.origin) in found(await history.audited(queries))


async def test_a_dead_letter_without_reason_or_record_is_found(store, queries):
    history = History()
    bad = history.add("frames", 0, frame_of(CAMERAS[0], 9))
    history.add("dead_letters", 0, letter_of(bad, "detect", message=""), bad)
    history.add("dead_letters", 0, letter_of(bad._replace(offset=1), "detect"))
    history.add(
        "dead_letters", 1, msgspec.structs.replace(examples.dead_letter, origin="upload:gate/x@1", stage="ingest")
    )
    await history.keep(store)
    report = await history.audited(queries)
    assert found(report) == {
        ("unexplained_dead_letter", bad.origin),
        ("unexplained_dead_letter", bad._replace(offset=1).origin),
    }
    assert report.unexplained_dead_letters == 2


async def test_results_out_of_order_and_without_a_source_are_found(store, queries):
    history = History()
    one, two = history.of("detections")[1:3]
    history.drop(one)
    history.drop(two)
    history.records["detections"] += [one._replace(offset=two.offset), two._replace(offset=one.offset)]
    [event] = history.of("risk_events", 1)
    history.drop(event)
    history.records["risk_events"].append(event._replace(headers=event.headers[:1]))
    await history.keep(store)
    wrong = found(await history.audited(queries))
    assert {("out_of_order", one._replace(offset=two.offset).origin), ("from_nowhere", event.origin)} <= wrong


async def test_a_redriven_record_is_resolved_by_its_result(store, queries):
    history = History()
    bad = history.add("frames", 0, frame_of(CAMERAS[0], 9))
    history.add("dead_letters", 0, letter_of(bad, "detect"), bad)
    again = history.add("frames", 0, frame_of(CAMERAS[0], 9), redrive=bad.origin)
    empty = msgspec.structs.replace(detections_of(CAMERAS[0], 9), boxes=())
    result = history.add("detections", 0, empty, again, redrive=bad.origin)
    # Asked for twice: of the second nothing is made.
    history.add("frames", 0, frame_of(CAMERAS[0], 9), redrive=bad.origin)
    status = msgspec.structs.replace(examples.dead_letter_status, origin=bad.origin, status="resolved", by="detect")
    history.add("dead_letter_status", 0, status)
    await history.keep(store)
    report = await history.audited(queries)
    assert found(report) == set()
    assert (report.accepted, report.repeated) == (13, 2)
    assert report.dead_letters == [{"stage": "detect", "kind": "error", "status": "resolved", "count": 1}]
    history.drop(result)


async def test_a_dead_letter_that_is_called_resolved_without_a_result_is_found(store, queries):
    history = History()
    bad = history.add("frames", 0, frame_of(CAMERAS[0], 9))
    history.add("dead_letters", 0, letter_of(bad, "detect"), bad)
    status = msgspec.structs.replace(examples.dead_letter_status, origin=bad.origin, status="resolved", by="detect")
    history.add("dead_letter_status", 0, status)
    await history.keep(store)
    assert found(await history.audited(queries)) == {("resolved_without_result", bad.origin)}


async def test_what_a_stage_could_not_read_is_told_by_its_gap(store, queries):
    history = History()
    lost = history.of("frames", 1)[0]
    seen = history.of("detections", 1)[0]
    history.drop(seen)
    for topic in ("batches", "contexts", "risk_events"):
        history.records[topic] = [r for r in history.records[topic] if r.partition == 0]
    gap = msgspec.structs.replace(
        examples.dead_letter, origin=lost.origin, stage="detect", kind="gap", detail='{"from": 0, "resume_at": 1}'
    )
    history.add("dead_letters", 1, gap)
    await history.keep(store)
    report = await history.audited(queries, {("batch", "detections", 1): 0})
    assert found(report) == set()


async def test_a_frame_that_came_again_soon_is_doubled_and_one_long_after_is_not(store, queries):
    history = History()
    first = history.of("frames")[0]
    for record, offset in ((first, 500), (history.of("frames", 1)[0], 5000)):
        history.records["frames"].append(record._replace(offset=offset))
        seen = next(r for r in history.records["detections"] if r.partition == record.partition)
        source = (seen.headers[0], ("src", record._replace(offset=offset).origin.encode()))
        empty, _ = codec.encode("detections", msgspec.structs.replace(codec.decode(seen, Detections), boxes=()))
        history.records["detections"].append(seen._replace(offset=offset, headers=source, value=empty))
    await history.keep(store)
    report = await history.audited(queries)
    assert found(report) == {("doubled", first.origin)}
    assert report.repeated == 3  # the other frame, and what was seen in the two


async def test_bounds_leave_out_what_lies_beyond_them(store, queries):
    history = History()
    gone = history.of("detections", 1)[2]
    history.drop(gone)
    await history.keep(store)
    assert found(await history.audited(queries, camera=CAMERAS[0])) == set()
    wrong = await history.audited(queries, camera=CAMERAS[1])
    assert wrong.accepted == 6
    assert wrong.lost == 1
    [last] = await queries.rows("SELECT toUnixTimestamp64Milli(max(inserted_at)) AS at FROM log")
    assert found(await history.audited(queries, since=last["at"] + 1)) == set()
    assert (await history.audited(queries, until=last["at"] + 1)).lost == 1

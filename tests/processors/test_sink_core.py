"""Records to rows, without a store."""

import msgspec
import pytest

from processors.sink import core
from streams.stages import Range
from streams.topics import STORED
from tests import examples
from tests.examples import EPOCH, PARTITION, incoming, tick


def rows_of(*records, topic="frames"):
    return core.rows(Range(topic, EPOCH, PARTITION, records[0].offset, records[-1].offset), records)


def row(block, index=0):
    return {name: values[index] for name, values in block.columns.items()}


def test_the_log_has_every_record_byte_for_byte():
    record = incoming("frames", offset=7)
    log = row(rows_of(record).log)
    assert (log["topic"], log["epoch"], log["partition"], log["offset"]) == ("frames", EPOCH, PARTITION, 7)
    assert (log["key"], log["value"], log["headers"]) == (record.key, record.value, list(record.headers))
    assert (log["source"], log["fingerprint"]) == (b"somewhere:e1:3:9", record.header("fp").hex())
    assert (log["tick"], log["decode_error"]) == (False, "")


@pytest.mark.parametrize("topic", STORED)
def test_every_topic_gives_a_typed_row_with_its_position(topic):
    made = rows_of(incoming(topic, offset=5), topic=topic)
    assert len(made.typed) == 1
    assert made.typed.table == topic
    typed = row(made.typed)
    assert (typed["epoch"], typed["partition"], typed["offset"]) == (EPOCH, PARTITION, 5)


@pytest.mark.parametrize("topic", STORED)
def test_the_same_range_gives_the_same_rows(topic):
    records = [incoming(topic, offset=offset) for offset in (2, 3, 9)]
    assert rows_of(*records, topic=topic) == rows_of(*records, topic=topic)


def test_a_list_of_records_becomes_one_array_a_field():
    typed = row(rows_of(incoming("detections"), topic="detections").typed)
    assert typed["boxes.label"] == ["person", "dog"]
    assert typed["boxes.score"] == [0.93, 0.12]


def test_lists_in_lists_become_tuples_in_the_order_of_the_columns():
    typed = row(rows_of(incoming("batches"), topic="batches").typed)
    assert typed["frames.boxes"] == [[("person", 0.93, 10.5, 20.0, 80.0, 160.25, False)]]


def test_a_batch_keeps_the_position_that_it_read_apart_from_its_own():
    typed = row(rows_of(incoming("batches", partition=4, epoch="other"), topic="batches").typed)
    assert (typed["detections_partition"], typed["detections_epoch"]) == (PARTITION, EPOCH)
    assert (typed["partition"], typed["epoch"]) == (4, "other")


def test_the_image_stays_out_of_the_typed_row():
    kept, claimed = rows_of(
        incoming("frames"),
        incoming("frames", msgspec.structs.replace(examples.frame, image=None, claim="sha256:x"), offset=1),
    ).typed.columns["inline"]
    assert (kept, claimed) == (True, False)


def test_a_replayed_verdict_has_the_columns_of_a_live_one():
    live = set(core.TABLES["risk_events"])
    replayed = set(core.TABLES["replay_events"])
    assert replayed - live == {"replay_id", "unit_id", "reused"}
    assert live <= replayed


def test_a_tick_is_kept_but_is_no_data():
    made = rows_of(incoming("frames"), tick(offset=1))
    assert made.log.columns["tick"] == [False, True]
    assert made.log.columns["decode_error"] == ["", ""]
    assert made.log.columns["value"][1] is None
    assert len(made.typed) == 1
    assert (row(made.progress)["rows"], row(made.progress)["ticks"], row(made.progress)["undecodable"]) == (2, 1, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value": b"\x00\x01"}, "framing"),
        ({"value": None}, "framing"),
        ({"value": b"{}      "}, "framing"),
        ({"headers": (("fp", b"unknown!"),)}, "not known to this version"),
    ],
    ids=["cut", "empty", "json", "unknown schema"],
)
def test_what_cannot_be_decoded_stays_in_the_log_with_the_reason(change, says):
    bad = incoming("frames", offset=1)._replace(**change)
    made = rows_of(incoming("frames"), bad, incoming("frames", offset=2))
    assert made.log.columns["value"][1] == bad.value
    assert says in made.log.columns["decode_error"][1]
    assert made.typed.columns["offset"] == [0, 2]
    assert row(made.progress)["undecodable"] == 1


def test_a_tick_whose_time_cannot_be_read_is_undecodable():
    bad = tick()._replace(headers=(("kind", b"tick"), ("wall", b"soon")))
    log = row(rows_of(bad).log)
    assert not log["tick"]
    assert log["decode_error"]


def test_times_beyond_what_clickhouse_shows_are_held_at_its_bounds():
    far = msgspec.structs.replace(examples.frame, captured_at=2**62, file_at=-(2**62))
    typed = row(rows_of(incoming("frames", far)).typed)
    assert (typed["captured_at"], typed["file_at"]) == (10_413_791_999_999, -2_208_988_800_000)


def test_unknown_times_stay_unknown():
    typed = row(rows_of(incoming("frames", msgspec.structs.replace(examples.frame, captured_at=None))).typed)
    assert typed["captured_at"] is None


def test_a_header_that_comes_twice_is_kept_twice():
    record = incoming("frames")._replace(headers=(("a", b"1"), ("a", b"\xff")))
    assert row(rows_of(record).log)["headers"] == [("a", b"1"), ("a", b"\xff")]


def test_a_range_of_ticks_alone_has_no_typed_rows():
    assert len(rows_of(tick(), tick(offset=1)).typed) == 0

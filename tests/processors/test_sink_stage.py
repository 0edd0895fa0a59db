"""The sink's order of work, over a store in memory."""

import msgspec
import pytest

from processors.sink.fakes import MemoryStore
from processors.sink.stage import SinkStage
from streams.errors import UnavailableError
from streams.stages import Range, RangeStage
from streams.topics import STORED
from tests import examples
from tests.examples import EPOCH, PARTITION, incoming, tick


def span(records, topic="frames"):
    return Range(topic, EPOCH, PARTITION, records[0].offset, records[-1].offset)


def frames(*offsets):
    return [incoming("frames", msgspec.structs.replace(examples.frame, frame_id=f"f{o}"), offset=o) for o in offsets]


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def stage(store):
    return SinkStage(store)


def test_it_is_a_range_stage_over_every_stored_topic(stage):
    whole: RangeStage = stage
    assert whole.inputs == STORED
    assert (whole.name, whole.state_topic) == ("sink", "sink_state")


async def test_log_then_typed_then_progress_each_under_its_token(stage, store):
    records = frames(4, 6)
    await stage.insert(span(records), records)
    assert list(store.calls) == [f"v1:{table}:frames:e1:3:4-6" for table in ("log", "frames", "sink_progress")]
    assert [len(store.tables[table]) for table in ("log", "frames", "sink_progress")] == [2, 2, 1]


async def test_a_range_inserted_twice_is_there_once(stage, store):
    records = [*frames(0, 1), tick(offset=2)]
    await stage.insert(span(records), records)
    before = {table: list(rows) for table, rows in store.tables.items()}
    await stage.insert(span(records), records)
    assert store.tables == before


async def test_an_answer_that_was_lost_is_asked_for_again_and_changes_nothing(stage, store):
    records = frames(0, 1)
    store.silent = True
    with pytest.raises(UnavailableError):
        await stage.insert(span(records), records)
    assert "frames" not in store.tables
    store.silent = False
    await stage.insert(span(records), records)
    assert [len(store.tables[table]) for table in ("log", "frames", "sink_progress")] == [2, 2, 1]


async def test_a_store_that_is_away_is_waited_for(stage, store):
    store.away = True
    records = frames(0)
    with pytest.raises(UnavailableError) as caught:
        await stage.insert(span(records), records)
    assert caught.value.waiting_on == "store"
    assert store.tables == {}


async def test_undecodable_and_ticks_alone_still_make_progress(stage, store):
    records = [tick(offset=3), incoming("frames", offset=4)._replace(value=b"junk")]
    await stage.insert(span(records), records)
    assert "frames" not in store.tables
    assert [row["undecodable"] for row in store.tables["sink_progress"]] == [1]


@pytest.mark.parametrize("bad", [[0], [6], [3, 4], [0, 1, 2, 3, 4, 5, 6]])
async def test_refused_rows_stay_in_the_log_with_the_reason_and_the_others_go_in(stage, store, bad):
    store.poison = {f"f{offset}" for offset in bad}
    records = frames(*range(7))
    await stage.insert(span(records), records)
    assert [row["offset"] for row in store.tables.get("frames", [])] == [o for o in range(7) if o not in bad]
    marked = store.tables["log"][7:]
    assert [row["offset"] for row in marked] == bad
    assert all(row["decode_error"].startswith("refused by table frames: ") for row in marked)
    assert store.tables["sink_progress"][0]["undecodable"] == len(bad)


async def test_a_range_with_refused_rows_can_be_repeated(stage, store):
    store.poison = {"f1"}
    records = frames(0, 1, 2)
    await stage.insert(span(records), records)
    before = {table: list(rows) for table, rows in store.tables.items()}
    await stage.insert(span(records), records)
    assert store.tables == before

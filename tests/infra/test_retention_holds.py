"""Holds: what is in force, and that a hold and a collector that meet see one another."""

import asyncio

import pytest

from infra.retention import kafka_log
from infra.retention.collector import NotNowError
from infra.retention.holds import GoingError, Holds, UnreadableHoldError
from infra.retention.kafka_log import KafkaLog
from processors.replay.plan import Plan, Scope
from schemas.records import Hold
from tests import examples

EVENT = {
    "event_id": "gate:7c1b:live",
    "batch_id": "gate:7c1b",
    "camera_id": "gate",
    "epoch": "e1",
    "partition": 0,
    "offset": 7,
}


class FakeTable:
    """A control topic in memory."""

    def __init__(self, *records):
        self.latest = {record.event_id: record for record in records}
        self.skipped = 0

    async def load(self): ...

    def all(self):
        return dict(self.latest)

    async def append(self, record):
        self.latest[record.event_id] = record


class FakeStore:
    """ClickHouse: its holds, and the marks on the event, one answer after another; the last stays."""

    def __init__(self, held=(), marks=((),), there=True):
        self.held = held
        self.marks = list(marks)
        self.there = there
        self.asked = 0

    async def rows(self, query, **_):
        if "FROM held" in query:
            return list(self.held)
        self.asked += 1
        states = self.marks.pop(0) if len(self.marks) > 1 else self.marks[0]
        return [{"pass": f"p{n}", "state": state, "own": 1} for n, state in enumerate(states)]

    async def live_event(self, _):
        return EVENT if self.there else None


def hold(event="gate:7c1b:live", state="held", at=1):
    return Hold(event_id=event, batch_id=event[:-5], camera_id="gate", state=state, why="w", author="", at=at)


def holds_of(table, store, settled_s=60.0):
    made = Holds(None, store, clock=lambda: 2.0, settled_s=settled_s)
    made._table = table
    return made


async def test_the_broker_has_the_last_word_and_what_it_knows_nothing_of_clickhouse():
    stored = [
        {name: getattr(hold(event), name) for name in Hold.__struct_fields__ if name != "state"}
        for event in ("a:1:live", "b:2:live", "c:3:live")
    ]
    table = FakeTable(hold("b:2:live", "released"), hold("c:3:live", at=9), hold("d:4:live", at=5))
    found = await holds_of(table, FakeStore(stored)).all()
    assert [one.event_id for one in found] == ["a:1:live", "d:4:live", "c:3:live"]


async def test_a_hold_looks_at_the_marks_behind_itself():
    table, store = FakeTable(), FakeStore()
    order = []
    append, rows = table.append, store.rows

    async def appended(record):
        order.append("held")
        await append(record)

    async def looked(query, **parameters):
        order.append("looked")
        return await rows(query, **parameters)

    table.append, store.rows = appended, looked
    made = await holds_of(table, store).hold(EVENT, why="the insurance asks", author="maria")
    assert order == ["held", "looked"]
    assert made == Hold(
        event_id="gate:7c1b:live", batch_id="gate:7c1b", camera_id="gate", state="held",
        why="the insurance asks", author="maria", at=2000,
    )  # fmt: skip
    assert await holds_of(table, store).all() == [made]


async def test_a_hold_waits_for_a_collector_to_take_its_marks_back(monkeypatch):
    monkeypatch.setattr("infra.retention.holds._LOOK_S", 0)
    store = FakeStore(marks=[("marking",), ("marked",), ()])
    await holds_of(FakeTable(), store).hold(EVENT, why="w")
    assert store.asked == 3


@pytest.mark.parametrize("states", [("deleting",), ("done",)])
async def test_a_hold_that_comes_too_late_says_so_and_is_taken_back(states):
    table = FakeTable()
    with pytest.raises(GoingError, match="cannot be held any more"):
        await holds_of(table, FakeStore(marks=[states], there=False)).hold(EVENT, why="w")
    assert table.latest[EVENT["event_id"]].state == "released"


async def test_an_event_that_was_deleted_and_came_again_can_be_held():
    await holds_of(FakeTable(), FakeStore(marks=[("done",)])).hold(EVENT, why="w")


async def test_a_collector_that_never_ends_leaves_the_hold_on_the_log_and_says_that_it_is_not_certain():
    table = FakeTable()
    with pytest.raises(GoingError, match="run `rewatch gc`"):
        await holds_of(table, FakeStore(marks=[("marked",)]), settled_s=0).hold(EVENT, why="w")
    assert table.latest[EVENT["event_id"]].state == "held"


async def test_a_hold_that_cannot_be_read_stops_everything():
    table = FakeTable()
    table.skipped = 1
    for ask in (lambda h: h.all(), lambda h: h.hold(EVENT, why="w")):
        with pytest.raises(UnreadableHoldError, match="upgrade"):
            await ask(holds_of(table, FakeStore()))


def replays_of(monkeypatch, *replays, skipped=0):
    class Table:
        def __init__(self, *_):
            self.skipped = skipped

        async def load(self): ...

        def all(self):
            return {replay.replay_id: replay for replay in replays}

    monkeypatch.setattr(kafka_log, "ControlTable", Table)
    return asyncio.run(KafkaLog(None, None).replays())


def replay(name, state, **plan):
    kind = plan.pop("kind", "change")
    encoded = Plan(kind=kind, **plan).encode()
    return examples.RECORDS["replays"].__class__(replay_id=name, name=name, state=state, plan=encoded, updated_at=1)


def test_replays_that_have_not_ended_keep_what_they_read(monkeypatch):
    gate = Scope(cameras=("gate",))
    scopes, names = replays_of(
        monkeypatch,
        replay("r1", "running", scope=gate, baseline="r0"),
        replay("r2", "failed"),
        replay("r3", "done", scope=Scope(cameras=("yard",))),
        replay("r4", "cancelled"),
        replay("r5", "running", kind="shadow"),
    )
    assert scopes == [gate, Scope()]
    assert names == ["r1", "r0", "r2", "r5"]


def test_a_replay_that_cannot_be_read_stops_everything(monkeypatch):
    with pytest.raises(NotNowError, match="upgrade"):
        replays_of(monkeypatch, skipped=1)
    broken = examples.RECORDS["replays"].__class__(replay_id="r", name="r", state="paused", plan="{", updated_at=1)
    with pytest.raises(NotNowError, match=r"replay r: .*replay cancel"):
        replays_of(monkeypatch, broken)

"""The buffer, and what a worker does when things go wrong; no broker."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from schemas.records import BatchState, DeadLetter, SinkState
from streams import codec
from streams.delivery import Ownership
from streams.errors import FencedError, UncertainError
from streams.kafka import Kafka, KafkaSettings
from streams.liveness import Liveness
from streams.messages import FINGERPRINT, Emit, Incoming
from streams.partition import Buffer, PartitionWorker
from streams.stages import Range
from streams.turns import Turns

TP = TopicPartition("in", 2)


def record(offset: int, value: bytes = b"x") -> Incoming:
    return Incoming("in", "e1", 2, offset, b"camera", value, ())


def taken(buffer: Buffer) -> list[int]:
    offsets = []
    while (one := buffer.take()) is not None:
        offsets.append(one.offset)
    return offsets


def test_buffer_gives_each_record_once_and_again_after_a_rewind() -> None:
    buffer = Buffer()
    for offset in (3, 5, 6):
        buffer.add(record(offset))
    assert taken(buffer) == [3, 5, 6]
    buffer.rewind(5)
    assert taken(buffer) == [5, 6]


def test_buffer_drops_what_a_host_reads_again() -> None:
    buffer = Buffer()
    for offset in (3, 4, 3, 4, 5):
        buffer.add(record(offset))
    assert taken(buffer) == [3, 4, 5]


def test_buffer_drops_what_is_done_even_when_it_comes_late() -> None:
    buffer = Buffer()
    buffer.add(record(3))
    buffer.rewind(100)  # the position lies ahead of where the host began
    for offset in (4, 99, 100):
        buffer.add(record(offset))
    assert taken(buffer) == [100]


def test_buffer_takes_up_to_an_offset() -> None:
    buffer = Buffer()
    for offset in (3, 7):
        buffer.add(record(offset))
    assert buffer.take(upto=6) == record(3)
    assert buffer.take(upto=6) is None
    assert buffer.waiting == 1


def test_buffer_is_full_by_count_or_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition.BUFFER_RECORDS", 3)
    monkeypatch.setattr("streams.partition.BUFFER_BYTES", 100)
    buffer = Buffer()
    buffer.add(record(0))
    buffer.add(record(1))
    assert not buffer.full
    buffer.add(record(2))
    assert buffer.full
    buffer.take()
    assert not buffer.full
    buffer.add(record(3, bytes(100)))
    buffer.take()
    assert buffer.full


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "commit", "rewind"]), st.integers(0, 30)), max_size=60))
def test_buffer_agrees_with_a_list(steps: list[tuple[str, int]]) -> None:
    buffer, kept, cursor, floor = Buffer(), list[int](), 0, 0
    for step, number in steps:
        if step == "add":
            buffer.add(record(number))
            if number >= floor and (not kept or number > kept[-1]):
                kept.append(number)
        elif step == "take":
            one = buffer.take()
            assert (one.offset if one else None) == (kept[cursor] if cursor < len(kept) else None)
            cursor += one is not None
        else:
            floor = number
            cursor = 0 if step == "rewind" else max(0, cursor - sum(offset < number for offset in kept[:cursor]))
            kept = [offset for offset in kept if offset >= number]
            (buffer.rewind if step == "rewind" else buffer.committed)(number)
        assert (len(buffer), buffer.waiting) == (len(kept), len(kept) - cursor)
        assert buffer._waiting_bytes == (len(kept) - cursor) * record(0).size


class Log(Kafka):
    """What the worker would read from the broker."""

    def __init__(self, records: Sequence[Incoming] = ()) -> None:
        super().__init__(KafkaSettings())
        self.records = list(records)

    async def read(self, *_: Any, **__: Any) -> list[Incoming]:
        return self.records


class Hold(Ownership):
    """An ownership whose broker is this object."""

    def __init__(self, log: Log, failures: Sequence[Exception] = ()) -> None:
        super().__init__(log, "toy", TP, epoch=lambda: "e1", clock=lambda: 1.0)
        self.failures = list(failures)
        self.emits: list[Emit] = []
        self.positions: list[int] = []
        self.acquired = 0

    async def acquire(self) -> None:
        self.acquired += 1

    async def commit(self, emits: Sequence[Emit], position: int) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.emits += emits
        self.position = position
        self.positions.append(position)

    async def release(self) -> None:
        pass


class Collect:
    """A fold that hands each record on, and breaks on `broken`."""

    name = "toy"
    inputs = ("in",)
    state_topic = "batch_state"
    tick_topic = "frames"
    open_windows = 0

    def __init__(self) -> None:
        self.opened = 0

    def open(self, _partition: int, _epoch: str, _states: Sequence[BatchState]) -> "Collect":
        self.opened += 1
        return self

    def feed(self, one: Incoming) -> Sequence[Emit]:
        if one.value == b"broken":
            raise ZeroDivisionError
        return [Emit("out", b"camera", one.value)]

    def position(self, next_offset: int) -> int:
        return next_offset

    def moved(self, _next_offset: int) -> Sequence[BatchState]:
        return ()


class Table:
    """A store that is broken so many times."""

    name = "toy"
    inputs = ("in",)
    state_topic = "sink_state"
    linger_s = 0.0
    max_records = 2

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.inserted: list[tuple[int, int, list[int]]] = []

    async def insert(self, span: Range, records: Sequence[Incoming]) -> None:
        if self.failures:
            self.failures -= 1
            raise ZeroDivisionError
        self.inserted.append((span.lo, span.hi, [one.offset for one in records]))

    async def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition.random.uniform", lambda *_: 0.0)


@asynccontextmanager
async def working(
    stage: Any, hold: Hold, *, ours: Sequence[bool] = (), slots: int = 1
) -> AsyncIterator[PartitionWorker]:
    answers = list(ours)

    async def still_ours() -> bool:
        return answers.pop(0) if answers else True

    life = Liveness("toy").partition("in-2")
    worker = PartitionWorker(stage, hold, life, still_ours=still_ours, slots=Turns(slots))
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled(), "the worker ended by itself"


async def position(hold: Hold, reached: int) -> None:
    async with asyncio.timeout(20):
        while hold.position < reached:
            await asyncio.sleep(0)


async def turns(count: int = 50) -> None:
    """Let everything that can go on go on."""
    for _ in range(count):
        await asyncio.sleep(0)


class Echo:
    """A map stage. A record whose value is the name of a gate waits until that is open; `broken` ones cannot be done.

    Every result has `size` bytes more.
    """

    name = "toy"
    inputs = ("in",)
    outputs = ("out",)

    def __init__(self, concurrency: int = 4, size: int = 0) -> None:
        self.concurrency = concurrency
        self.gates = {b"one": asyncio.Event(), b"other": asyncio.Event()}
        self.begun: list[int] = []
        self.running = 0
        self._padding = bytes(size)

    async def handle(self, one: Incoming) -> Sequence[Emit]:
        self.begun.append(one.offset)
        self.running += 1
        try:
            if one.value in self.gates:
                await self.gates[one.value].wait()
            if one.value == b"broken":
                raise ZeroDivisionError
            if one.value == b"stray":
                raise asyncio.CancelledError
            return [Emit("out", b"%d" % one.offset, self._padding)]
        finally:
            self.running -= 1

    async def close(self) -> None:
        pass


def outputs(hold: Hold) -> list[int]:
    return [int(emit.key) for emit in hold.emits if emit.topic == "out"]


async def test_results_come_out_in_the_order_of_their_records_whichever_is_done_first() -> None:
    stage, hold = Echo(), Hold(Log())
    async with working(stage, hold, slots=4) as worker:
        for offset in range(40):
            worker.buffer.add(record(offset, {0: b"one", 17: b"other"}.get(offset, b"x")))
        await turns()
        assert stage.begun == list(range(40))
        assert hold.positions == []  # the first one is not done
        stage.gates[b"one"].set()
        await position(hold, 17)
        await turns()
        assert hold.position == 17
        stage.gates[b"other"].set()
        await position(hold, 40)
    assert outputs(hold) == list(range(40))


async def test_a_lone_record_is_committed_without_waiting_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition._GATHER_S", 3600.0)
    monkeypatch.setattr("streams.partition._GATHER_SHARE", 1e12)
    hold = Hold(Log())
    async with working(Echo(), hold) as worker:
        for offset in range(3):
            worker.buffer.add(record(offset))
            await position(hold, offset + 1)
    assert hold.positions == [1, 2, 3]


async def test_results_wait_for_those_of_records_in_work_and_share_a_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.partition._GATHER_S", 3600.0)
    monkeypatch.setattr("streams.partition._GATHER_SHARE", 1e12)
    stage, hold = Echo(), Hold(Log())
    async with working(stage, hold, slots=4) as worker:
        for offset in range(20):
            worker.buffer.add(record(offset, b"one" if offset == 19 else b"x"))
        await turns()
        assert hold.positions == []
        stage.gates[b"one"].set()
        await position(hold, 20)
    assert hold.positions == [20]


async def test_results_wait_no_longer_than_a_share_of_their_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition._GATHER_S", 0.01)
    monkeypatch.setattr("streams.partition._GATHER_SHARE", 1e12)
    stage, hold = Echo(), Hold(Log())
    async with working(stage, hold, slots=4) as worker:
        for offset in range(20):
            worker.buffer.add(record(offset, b"one" if offset == 19 else b"x"))
        await position(hold, 19)  # the last one never ends
        monkeypatch.setattr("streams.partition._GATHER_S", 3600.0)
        monkeypatch.setattr("streams.partition._GATHER_SHARE", 0.0)
        worker.buffer.add(record(20, b"other"))
        worker.buffer.add(record(21, b"one"))
        stage.gates[b"other"].set()
        await turns()
        assert hold.position == 19
        stage.gates[b"one"].set()
        await position(hold, 22)
    assert outputs(hold) == list(range(22))


async def test_behind_a_slow_record_no_more_is_done_than_a_transaction_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition._WINDOW", 5)
    stage, hold = Echo(), Hold(Log())
    async with working(stage, hold, slots=4) as worker:
        for offset in range(40):
            worker.buffer.add(record(offset, b"x" if offset else b"one"))
        await turns()
        assert stage.begun == list(range(5))
        stage.gates[b"one"].set()
        await position(hold, 40)
    assert outputs(hold) == list(range(40))


async def test_behind_a_slow_record_others_are_held_by_their_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition._WINDOW_BYTES", 1000)
    stage, hold = Echo(), Hold(Log())
    async with working(stage, hold, slots=4) as worker:
        worker.buffer.add(record(0, b"one"))
        for offset in range(1, 40):
            worker.buffer.add(record(offset, bytes(300)))
        await turns()
        assert stage.begun == list(range(5))  # the fourth of 300 bytes is the one that reaches 1,000
        stage.gates[b"one"].set()
        await position(hold, 40)
    assert outputs(hold) == list(range(40))


async def test_behind_a_slow_record_results_are_held_by_their_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition._WINDOW_BYTES", 1000)
    stage, hold = Echo(size=300), Hold(Log())
    async with working(stage, hold, slots=4) as worker:
        for offset in range(40):  # little ones, taken all at once
            worker.buffer.add(record(offset, b"" if offset else b"one"))
        await turns()
        assert stage.begun == list(range(5))
        stage.gates[b"one"].set()
        await position(hold, 40)
    assert outputs(hold) == list(range(40))


async def test_a_result_as_large_as_a_whole_window_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition._WINDOW_BYTES", 1000)
    monkeypatch.setattr("streams.partition._COMMIT_BYTES", 500)
    hold = Hold(Log())
    async with working(Echo(size=5000), hold, slots=4) as worker:
        for offset in range(20):
            worker.buffer.add(record(offset, bytes(5000)))
        await position(hold, 20)
    assert hold.positions == list(range(1, 21))


@pytest.mark.parametrize("value", [b"broken", b"stray"], ids=["an exception", "a cancellation that nobody sent"])
async def test_a_record_that_breaks_its_stage_three_times_is_dead_lettered_in_its_place(value: bytes) -> None:
    stage, hold = Echo(), Hold(Log())
    async with working(stage, hold, slots=4) as worker:
        for offset in range(10):
            worker.buffer.add(record(offset, b"x" if offset % 5 else value))
        await position(hold, 10)
    assert hold.acquired == 1
    assert [emit.topic for emit in hold.emits] == [("out" if offset % 5 else "dead_letters") for offset in range(10)]
    letter = hold.emits[5]
    read = codec.decode(Incoming("dead_letters", "e", 2, 0, letter.key, letter.value, letter.headers), DeadLetter)
    assert (read.origin, read.value, read.attempt) == ("in:e1:2:5", value, 3)
    assert stage.begun.count(5) == 3


async def test_after_an_unknown_outcome_nothing_of_the_earlier_attempt_runs_on() -> None:
    stage, hold = Echo(), Hold(Log(), [UncertainError("unknown")])
    async with working(stage, hold, slots=4) as worker:
        for offset in range(10):
            worker.buffer.add(record(offset, b"one" if offset == 4 else b"x"))
        async with asyncio.timeout(20):
            while stage.begun.count(4) < 2:
                await asyncio.sleep(0)
        assert stage.running == 1
        stage.gates[b"one"].set()
        await position(hold, 10)
    assert outputs(hold) == list(range(10))


async def test_a_fold_that_breaks_three_times_on_a_record_dead_letters_it_and_goes_on() -> None:
    stage, hold = Collect(), Hold(Log())
    async with working(stage, hold) as worker:
        for offset, value in enumerate((b"one", b"broken", b"two")):
            worker.buffer.add(record(offset, value))
        await position(hold, 3)
    assert [emit.value for emit in hold.emits if emit.topic == "out"] == [b"one", b"two"]
    (letter,) = [emit for emit in hold.emits if emit.topic == "dead_letters"]
    read = codec.decode(Incoming("dead_letters", "e", 2, 0, letter.key, letter.value, letter.headers), DeadLetter)
    assert (read.origin, read.value, read.attempt) == ("in:e1:2:1", b"broken", 3)
    # Each time with a fold anew: one that broke in the middle of a record is of no use.
    assert stage.opened == 4


async def test_after_an_unknown_outcome_the_worker_acquires_again_and_feeds_itself() -> None:
    hold = Hold(Log(), [UncertainError("unknown")])
    async with working(Collect(), hold) as worker:
        for offset in range(3):
            worker.buffer.add(record(offset))
        await position(hold, 3)
    assert hold.acquired == 2
    assert len(hold.emits) == 3


async def test_a_fenced_worker_waits_until_the_group_says_the_partition_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, pauses = asyncio.sleep, list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    hold = Hold(Log(), [FencedError("toy")])
    monkeypatch.setattr("streams.partition.asyncio.sleep", sleep)
    async with working(Collect(), hold, ours=[False, False, True]) as worker:
        worker.buffer.add(record(0))
        async with asyncio.timeout(20):
            while hold.position < 1:
                await real(0)
    assert pauses.count(2) == 2
    assert hold.acquired == 2


async def test_a_broken_insert_is_tried_again_with_the_same_range() -> None:
    stage, hold = Table(failures=2), Hold(Log())
    async with working(stage, hold) as worker:
        hold.kafka.records = [pending(lo=0, hi=1, rows=2)]  # type: ignore[attr-defined]
        for offset in range(2):
            worker.buffer.add(record(offset))
        await position(hold, 2)
    assert stage.inserted == [(0, 1, [0, 1])]


async def test_a_pending_range_is_taken_exactly_and_what_lies_behind_it_later() -> None:
    """Retention took offset 6; 3 lies before the range because the group's offsets were forgotten."""
    stage, hold = Table(), Hold(Log([pending(lo=4, hi=6, rows=3)]))
    async with working(stage, hold) as worker:
        for offset in (3, 4, 5, 8):
            worker.buffer.add(record(offset))
        await position(hold, 9)
    assert stage.inserted == [(4, 6, [4, 5]), (8, 8, [8])]


@pytest.mark.parametrize("shape", ["fold", "range"])
async def test_a_state_that_a_newer_version_wrote_is_waited_for_and_never_passed_over(shape: str) -> None:
    newer = pending(lo=0, hi=1, rows=2)._replace(headers=((FINGERPRINT, b"8 bytes!"),))
    if shape == "fold":
        newer = newer._replace(topic="batch_state")
    hold = Hold(Log([newer]))
    async with working(Collect() if shape == "fold" else Table(), hold) as worker:
        worker.buffer.add(record(0))
        async with asyncio.timeout(20):
            while hold.acquired < 5:
                await asyncio.sleep(0)
        assert worker.life.waiting_on == "settings"
        assert hold.positions == []
        hold.kafka.records = []  # type: ignore[attr-defined]
        await position(hold, 1)  # here the newer version has done its work; else it takes over
        await turns()
        assert worker.life.waiting_on is None


class Durable(Hold):
    """A hold that remembers what was committed, and fails at one commit: before it counts, or after."""

    def __init__(self, fails_at: int, *, applied: bool) -> None:
        super().__init__(Log())
        self.fails_at, self.applied, self.committed = fails_at, applied, 0

    async def acquire(self) -> None:
        self.acquired += 1
        self.position = self.committed

    async def commit(self, emits: Sequence[Emit], position: int) -> None:
        self.fails_at -= 1
        if self.fails_at == -1 and not self.applied:
            raise UncertainError("lost on its way")
        for emit in emits:
            self.kafka.records.append(Incoming("sink_state", "e", 2, 0, emit.key, emit.value, emit.headers))  # type: ignore[attr-defined]
        self.committed = position
        if self.fails_at == -1:
            raise UncertainError("the answer was lost")
        await super().commit(emits, position)


@pytest.fixture
def catching_up(monkeypatch: pytest.MonkeyPatch) -> Table:
    """A store that would wait a minute for more, and a buffer that two records fill."""
    monkeypatch.setattr("streams.partition.BUFFER_RECORDS", 2)
    monkeypatch.setattr(Table, "linger_s", 60.0)
    return Table()


async def test_a_full_buffer_is_not_waited_over_and_one_transaction_ends_a_range_and_begins_the_next(
    catching_up: Table,
) -> None:
    hold = Hold(Log())
    async with working(catching_up, hold) as worker:
        for offset in range(6):
            worker.buffer.add(record(offset))
        await position(hold, 6)
    assert catching_up.inserted == [(0, 1, [0, 1]), (2, 3, [2, 3]), (4, 5, [4, 5])]
    assert hold.positions == [0, 2, 4, 6]


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("fails_at", range(4))
async def test_whichever_commit_fails_a_range_has_the_same_rows_each_time(
    catching_up: Table, fails_at: int, applied: bool
) -> None:
    hold = Durable(fails_at, applied=applied)
    async with working(catching_up, hold) as worker:
        for offset in range(6):
            worker.buffer.add(record(offset))
        await position(hold, 6)
    assert hold.acquired == 2
    rows = {(lo, hi): offsets for lo, hi, offsets in catching_up.inserted}
    assert all(rows[lo, hi] == offsets for lo, hi, offsets in catching_up.inserted)
    assert sorted(offset for offsets in rows.values() for offset in offsets) == list(range(6))
    said = [codec.decode_state(one, SinkState) for one in hold.kafka.records]  # type: ignore[attr-defined]
    assert rows.keys() == {(state.lo, state.hi) for state in said if state is not None}


class World:
    """What outlives a sink: the log, what is committed, the table. At one of its steps the sink dies."""

    def __init__(self, records: int, dies_at: int) -> None:
        self.log = [record(offset) for offset in range(records)]
        self.position = 0
        self.states: list[Incoming] = []
        self.tokens: dict[str, list[int]] = {}
        self.dies_at = dies_at
        self.died = asyncio.Event()

    async def step(self) -> None:
        """Where a kill can come between two things that last."""
        self.dies_at -= 1
        if self.dies_at == -1:
            self.died.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)


class Mortal(Hold, Table):
    """A sink's hold and its table, in a world that both share with their successors."""

    def __init__(self, world: World) -> None:
        Hold.__init__(self, Log())
        Table.__init__(self)
        self.world = world
        self.kafka.records = world.states  # type: ignore[attr-defined]

    async def acquire(self) -> None:
        await self.world.step()
        self.position = self.world.position

    async def commit(self, emits: Sequence[Emit], position: int) -> None:
        await self.world.step()
        self.world.position = position
        self.world.states += [Incoming("sink_state", "e", 2, 0, e.key, e.value, e.headers) for e in emits]
        await self.world.step()
        self.position = position

    async def insert(self, span: Range, records: Sequence[Incoming]) -> None:
        await self.world.step()
        rows = [one.offset for one in records]
        assert self.world.tokens.setdefault(span.token("t"), rows) == rows, "other rows under the same token"
        await self.world.step()


async def test_wherever_a_sink_is_killed_its_successor_inserts_the_same_ranges_and_every_row_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.partition.BUFFER_RECORDS", 2)
    killed_before_an_insert = 0
    for dies_at in range(100):
        world = World(records=8, dies_at=dies_at)
        first = Mortal(world)
        async with working(first, first) as worker:
            for one in world.log:
                worker.buffer.add(one)
            async with asyncio.timeout(20):
                while first.position < 8 and not world.died.is_set():
                    await asyncio.sleep(0)
        if not world.died.is_set():
            break
        said = [state for state in (codec.decode_state(one, SinkState) for one in world.states) if state is not None]
        killed_before_an_insert += len(said) > len(world.tokens) > 0
        second = Mortal(world)
        async with working(second, second) as worker:
            for one in world.log[world.position :]:
                worker.buffer.add(one)
            async with asyncio.timeout(20):
                while world.position < 8:
                    await asyncio.sleep(0)
        assert sorted(row for rows in world.tokens.values() for row in rows) == list(range(8))
    else:
        pytest.fail("it never came to its end")
    assert dies_at > 15
    assert killed_before_an_insert >= 6  # three chained commits, each with a moment after it and one in the insert


def pending(lo: int, hi: int, rows: int) -> Incoming:
    """A predecessor's word on the range that it may have inserted."""
    state = SinkState(topic="in", partition=2, epoch="e1", lo=lo, hi=hi, rows=rows)
    made = codec.emit("sink_state", state)
    return Incoming("sink_state", "e", 2, 0, made.key, made.value, made.headers)

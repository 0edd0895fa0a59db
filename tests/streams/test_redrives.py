"""Redriven records: one result however often, by whomever and with whatever kills between; no broker."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka import TopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import ids
from schemas.records import BatchState, DeadLetter, DeadLetterStatus
from streams import codec
from streams.delivery import Ownership
from streams.errors import UncertainError, UnprocessableError
from streams.kafka import Kafka, KafkaSettings
from streams.liveness import Liveness
from streams.messages import ATTEMPTS, REDRIVE, SOURCE, Emit, Incoming
from streams.partition import PartitionWorker
from streams.redrives import OPEN, RESOLVED, STATUS, Redrives, again, redriven
from streams.turns import Turns

TP = TopicPartition("in", 2)


def record(offset: int, value: bytes = b"x", headers: tuple[tuple[str, bytes], ...] = ()) -> Incoming:
    return Incoming("in", "e1", 2, offset, b"camera", value, headers)


def redrive_of(offset: int, at: int, value: bytes, attempts: int = 1) -> Incoming:
    place = ids.Place("in", "e1", 2, offset)
    emit, _ = again(place, attempts, key=b"camera", value=value, headers=(("h", b"1"),), by="test", at=1)
    return Incoming("in", "e1", 2, at, emit.key, emit.value, emit.headers)


@pytest.mark.parametrize(
    "name",
    ["in:e1:1:5", "other:e1:2:5", "in:e1:2", "in:e1:2:5:6", "in:e1:02:5", "in:e1:2:-5", "in", "", "in:e1:2:5\n"],
)
def test_what_names_no_record_of_its_own_partition_is_no_redrive(name: str) -> None:
    """What was made of a redriven record carries the header too; strangers write what they like."""
    one = record(9, headers=((REDRIVE, name.encode()), (ATTEMPTS, b"3")))
    assert (one.redriven, one.attempts, one.original_headers) == (None, 0, one.headers)


def test_a_redriven_record_is_the_original_with_two_headers_behind() -> None:
    one = redrive_of(5, 9, b"bytes", attempts=3)
    assert (one.redriven, one.attempts, one.original_headers) == ("in:e1:2:5", 3, (("h", b"1"),))
    assert (one.key, one.value) == (b"camera", b"bytes")
    marked = one._replace(headers=((REDRIVE, b"frames:e:0:1"), *one.headers))  # it was made of a redriven one before
    assert marked.original_headers == ((REDRIVE, b"frames:e:0:1"), ("h", b"1"))


@pytest.mark.parametrize("count", [b"", b"-1", b"1e3", b"9" * 30, "٣".encode()])
def test_a_count_of_attempts_that_is_none_counts_as_none(count: bytes) -> None:
    assert redrive_of(5, 9, b"x")._replace(headers=((REDRIVE, b"in:e1:2:5"), (ATTEMPTS, count))).attempts == 0


class Broker(Kafka):
    """The log as one partition's owners see it: what is committed stays, and some commits kill who sent them."""

    def __init__(self, records: Sequence[Incoming], faults: Sequence[str] = ()) -> None:
        super().__init__(KafkaSettings())
        self.records = records
        self.faults = list(faults)
        self.emits: list[Emit] = []
        self.position = 0
        self.next = 0
        self.reached = 0
        """The first offset that no committed transaction has seen; an open window holds the position back."""

    async def read(self, tps: Sequence[TopicPartition], **_: Any) -> list[Incoming]:
        await asyncio.sleep(0)
        return self.of(tps[0].topic)

    def of(self, topic: str) -> list[Incoming]:
        emits = [emit for emit in self.emits if emit.topic == topic]
        return [Incoming(topic, "s", 0, n, e.key, e.value, e.headers) for n, e in enumerate(emits)]

    def statuses(self) -> list[DeadLetterStatus]:
        return [codec.decode(one, DeadLetterStatus) for one in self.of(STATUS)]

    def letters(self) -> list[DeadLetter]:
        return [codec.decode(one, DeadLetter) for one in self.of("dead_letters")]


class Killed(BaseException):
    """SIGKILL, as a coroutine sees it: nothing of it runs on."""


class Owner(Ownership):
    """One process's hold."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker, "toy", TP, epoch=lambda: "e1", clock=lambda: 1.0)
        self.broker = broker

    async def acquire(self) -> None:
        self.position = self.broker.position

    async def commit(self, emits: Sequence[Emit], position: int) -> None:
        fault = self.broker.faults.pop(0) if self.broker.faults else ""
        if fault.endswith("before"):
            self._fail(fault)
        self.broker.emits += emits
        self.broker.position = position
        self.broker.reached = max(self.broker.reached, self.broker.next, position)
        if fault.endswith("after"):
            self._fail(fault)
        self.position = position

    def _fail(self, fault: str) -> None:
        raise Killed if fault.startswith("killed") else UncertainError(fault)

    async def release(self) -> None:
        pass


def fails(one: Incoming) -> bool:
    """`bad 2` fails until it was tried twice."""
    value = one.value or b""
    return value.startswith(b"bad") and one.attempts < int(value.split()[1])


class Echo:
    """One record in, one out."""

    name = "toy"
    inputs = ("in",)
    outputs = ("out",)
    concurrency = 3

    async def handle(self, one: Incoming) -> Sequence[Emit]:
        for _ in range(one.offset % 3):  # they are done in another order than they came
            await asyncio.sleep(0)
        if fails(one):
            raise UnprocessableError("bad")
        return [Emit("out", b"k", one.value)]

    async def close(self) -> None: ...


class Windows:
    """Three records a window. As batch does, it refuses a record once: fed with it again, it makes nothing of it."""

    name = "toy"
    inputs = ("in",)
    state_topic = "batch_state"
    tick_topic = "frames"
    open_windows = 0

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.window: list[Incoming] = []
        self.refused: set[bytes] = set()

    def open(self, _partition: int, _epoch: str, _states: Sequence[BatchState]) -> "Windows":
        self.window = []
        self.refused = {one.header(SOURCE) or b"" for one in self.broker.of("dead_letters")}
        return self

    def feed(self, one: Incoming) -> Sequence[Emit]:
        if fails(one):
            if one.origin.encode() in self.refused:
                return []
            raise UnprocessableError("bad")
        self.window.append(one)
        if len(self.window) < 3:
            return []
        window, self.window = self.window, []
        return [Emit("out", b"k", b",".join(member.value or b"" for member in window))]

    def position(self, next_offset: int) -> int:
        return self.window[0].offset if self.window else next_offset

    def moved(self, next_offset: int) -> Sequence[BatchState]:
        self.broker.next = next_offset
        return ()


async def run(broker: Broker, stage: str) -> None:
    """Processes one after another, each until it is killed, until everything is done."""
    for _ in range(20):  # more than there are faults
        worker = PartitionWorker(
            Echo() if stage == "map" else Windows(broker),
            Owner(broker),
            Liveness("toy").partition("in-2"),
            still_ours=lambda: asyncio.sleep(0, True),
            slots=Turns(3),
        )
        for one in broker.records:
            worker.buffer.add(one)
        task = asyncio.create_task(worker.run())
        with contextlib.suppress(TimeoutError, Killed):
            async with asyncio.timeout(5):
                while not task.done() and broker.reached <= broker.records[-1].offset:
                    await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Killed):
            await task
        if broker.reached > broker.records[-1].offset:
            return
        assert not broker.faults or task.done(), "it hangs"
    raise AssertionError("it came to no end")


FAULT = st.sampled_from(["", "", "killed before", "killed after", "unknown before", "unknown after"])


@st.composite
def logs(draw: st.DrawFn) -> list[Incoming]:
    """Good records, bad ones, and each bad one redriven any number of times, in any order of the redrives."""
    values: list[tuple[int | None, bytes, int]] = []
    bad: list[int] = []
    for offset in range(draw(st.integers(4, 24))):
        what = draw(st.sampled_from(["good", "bad", "redrive", "redrive"]))
        if what == "redrive" and bad:
            origin = draw(st.sampled_from(bad))
            values.append((origin, values[origin][1], draw(st.integers(1, 3))))
        elif what == "bad":
            bad.append(offset)
            values.append((None, b"bad %d %d" % (draw(st.integers(1, 3)), offset), 0))
        else:
            values.append((None, b"good %d" % offset, 0))
    good = [(None, b"good %d" % (len(values) + number), 0) for number in range(6)]  # so that windows close
    return [
        record(offset, value) if origin is None else redrive_of(origin, offset, value, attempts)
        for offset, (origin, value, attempts) in enumerate([*values, *good])
    ]


@pytest.mark.parametrize("stage", ["map", "fold"])
@settings(max_examples=40)
@given(records=logs(), faults=st.lists(FAULT, max_size=12), portion=st.integers(1, 5))
def test_redriven_any_number_of_times_with_kills_between_there_is_one_result(
    stage: str, records: list[Incoming], faults: list[str], portion: int
) -> None:
    quiet, broken = Broker(records), Broker(records, faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streams.partition._COMMIT_RECORDS", portion)
        asyncio.run(run(quiet, stage))
        asyncio.run(run(broken, stage))
    expected = {one.value for one in records if one.redriven is None and not fails(one)}
    for origin in {one.redriven for one in records} - {None}:
        tries = [one for one in records if one.redriven == origin]
        if not all(map(fails, tries)):
            expected.add(tries[0].value)
    for broker in (quiet, broken):
        made = Counter(value for one in broker.of("out") for value in (one.value or b"").split(b","))
        assert set(made.values()) <= {1}, "doubled"
        if stage == "map":
            assert set(made) == expected
        resolved = Counter(status.origin for status in broker.statuses() if status.status == RESOLVED)
        assert set(resolved.values()) <= {1}
        bad = [one for one in records if one.redriven is None and fails(one)]
        assert set(resolved) == {one.origin for one in bad if one.value in expected}
        letters = Counter(one.header(SOURCE) for one in broker.of("dead_letters"))
        assert set(letters.values()) <= {1}
    # Whoever is killed when: what closed is the same.
    assert [one.value for one in quiet.of("out")] == [one.value for one in broken.of("out")]
    assert [status.origin for status in quiet.statuses()] == [status.origin for status in broken.statuses()]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.partition.random.uniform", lambda *_: 0.0)


def done(records: list[Incoming], stage: str = "map") -> Broker:
    broker = Broker(records)
    asyncio.run(run(broker, stage))
    return broker


def test_what_fails_again_is_one_more_letter_of_the_same_origin_with_the_bytes_as_they_were() -> None:
    broker = done([record(5, b"bad 9"), redrive_of(5, 6, b"bad 9", 1), redrive_of(5, 7, b"bad 9", 2)])
    letters = broker.letters()
    assert [(letter.origin, letter.attempt) for letter in letters] == [("in:e1:2:5", n) for n in (1, 2, 3)]
    assert [(letter.key, letter.value) for letter in letters] == [(b"camera", b"bad 9")] * 3
    assert [letter.headers for letter in letters[1:]] == [{"h": b"1"}] * 2
    assert [(s.origin, s.status, s.by, s.record) for s in broker.statuses()] == [
        ("in:e1:2:5", OPEN, "toy", f"in:e1:2:{n}") for n in (6, 7)
    ]
    assert [one.header(SOURCE) for one in broker.of("dead_letters")] == [b"in:e1:2:%d" % n for n in (5, 6, 7)]
    assert [one.repeats for one in broker.of("dead_letters")] == [False, True, True]


def test_a_result_of_a_redriven_record_is_marked_and_commits_with_the_status() -> None:
    broker = done([record(5, b"bad 1"), redrive_of(5, 6, b"bad 1")])
    [result] = broker.of("out")
    assert (result.header(REDRIVE), result.header(SOURCE)) == (b"in:e1:2:5", b"in:e1:2:6")
    [status] = broker.statuses()
    assert (status.status, status.by, status.record) == (RESOLVED, "toy", "in:e1:2:6")


def test_what_others_say_resolves_nothing_here() -> None:
    """Another stage that reads the same topic has letters of the same origins; so has the command line its say."""
    broker = Broker([redrive_of(5, 6, b"bad 1")])
    said = DeadLetterStatus(origin="in:e1:2:5", status=RESOLVED, by="replay", at=1, record="in:e1:2:4")
    broker.emits = [codec.emit(STATUS, said, 0), redriven("in:e1:2:5", "cli", 1)]
    asyncio.run(run(broker, "map"))
    assert len(broker.of("out")) == 1


def test_after_the_topic_was_made_anew_an_open_letter_of_before_is_tried() -> None:
    broker = Broker([redrive_of(5, 6, b"bad 1")])
    said = DeadLetterStatus(origin="in:e1:2:5", status=OPEN, by="toy", at=1, record="in:e0:2:900")
    broker.emits = [codec.emit(STATUS, said, 0)]
    asyncio.run(run(broker, "map"))
    assert len(broker.of("out")) == 1


def test_what_failed_again_and_is_fed_again_behind_an_open_window_is_not_called_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The open window keeps the position before it: whoever takes over is fed it again, and refuses it silently."""
    monkeypatch.setattr("streams.partition._COMMIT_RECORDS", 3)
    records = [record(0, b"good 0"), record(1, b"bad 9"), redrive_of(1, 2, b"bad 9")]
    broker = Broker([*records, *(record(n, b"good %d" % n) for n in range(3, 6))], ["killed after"])
    asyncio.run(run(broker, "fold"))
    assert [(one.status, one.record) for one in broker.statuses()] == [(OPEN, "in:e1:2:2")]
    assert [one.header(SOURCE) for one in broker.of("dead_letters")] == [b"in:e1:2:1", b"in:e1:2:2"]
    assert [one.value for one in broker.of("out")] == [b"good 0,good 3,good 4"]


def test_what_was_resolved_stays_resolved_whatever_is_said_after_it() -> None:
    broker = Broker([redrive_of(5, 9, b"bad 1")])
    broker.emits = [
        codec.emit(STATUS, DeadLetterStatus(origin="in:e1:2:5", status=what, by="toy", at=1, record=record_), 0)
        for what, record_ in ((RESOLVED, "in:e1:2:6"), (OPEN, "in:e1:2:7"))
    ]
    asyncio.run(run(broker, "map"))
    assert broker.of("out") == []


async def test_what_is_redriven_on_another_stages_topic_is_that_stages_affair_alone() -> None:
    """Nothing is made of it here, and nothing is said of it: `dead_letter_status` has one owner."""
    beside = Redrives(Ownership(Kafka(KafkaSettings()), "beside", TP, epoch=lambda: "e1"), theirs=True)
    again_ = redrive_of(5, 9, b"bytes")
    assert await beside.is_done(again_)
    assert beside.settled(again_, [Emit("out", b"k", b"v")]) == []
    assert beside.settled(record(5), [Emit("out", b"k", b"v")]) == [Emit("out", b"k", b"v")]

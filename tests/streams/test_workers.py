"""The partitions of one process side by side: what they share, and what is left when they go; no broker."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError, OffsetOutOfRangeError, SaslAuthenticationFailed

from streams.delivery import Ownership
from streams.kafka import Kafka, KafkaSettings
from streams.messages import Emit, Incoming
from streams.workers import Workers

IN = [TopicPartition("in", partition) for partition in range(4)]


class Hold(Ownership):
    """An ownership whose broker takes everything."""

    def __init__(self, kafka: Kafka, stage: str, tp: TopicPartition, **_: Any) -> None:
        super().__init__(kafka, stage, tp, epoch=lambda: "e")

    async def acquire(self) -> None:
        await asyncio.sleep(0)

    async def commit(self, _emits: Sequence[Emit], position: int) -> None:
        await asyncio.sleep(0)
        self.position = position

    async def release(self) -> None:
        pass


class Reading:
    """A host whose group never moves."""

    async def still_ours(self, _tp: TopicPartition) -> bool:
        return True

    async def seek(self, _tp: TopicPartition, _offset: int) -> None:
        pass


class Busy:
    """A map stage that gives others a turn so often in each record, and counts what runs at once."""

    name = "busy"
    inputs = ("in",)
    outputs = ("out",)

    def __init__(self, concurrency: int, turns: int) -> None:
        self.concurrency = concurrency
        self.turns = turns
        self.running = 0
        self.most = 0
        self.begun: list[int] = []
        """Partitions, in the order of their records' beginnings."""

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        self.begun.append(record.partition)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self.turns):
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        return [Emit("out", b"k", b"v")]

    async def close(self) -> None:
        pass


class Deaf(Busy):
    """One that takes no notice of a first cancellation, as `asyncio.wait_for` of Python 3.11 can."""

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        try:
            await super().handle(record)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return []


@asynccontextmanager
async def sharing(stage: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workers]:
    monkeypatch.setattr("streams.workers.Hold", Hold)

    workers = Workers(Kafka(KafkaSettings()), stage, epochs=lambda _: "e", reader=Reading())
    try:
        yield workers
    finally:
        await workers.close()


def feed(workers: Workers, partition: int, count: int, since: int = 0) -> None:
    for offset in range(since, since + count):
        workers.feed(Incoming("in", "e", partition, offset, b"k", b"v", ()))


def position(workers: Workers, partition: int) -> int:
    return workers._running[IN[partition]][0].ownership.position


async def done(workers: Workers, partition: int, count: int) -> None:
    async with asyncio.timeout(20):
        while position(workers, partition) < count:
            await asyncio.sleep(0)


async def test_the_report_says_what_the_stage_tells_of_itself_at_the_time(tmp_path: Path) -> None:
    stage: Any = Busy(concurrency=1, turns=0)
    stage.details = {"detector": {"runtime": "torch-cpu"}}
    status = tmp_path / "busy.json"
    workers = Workers(Kafka(KafkaSettings()), stage, epochs=lambda _: "e", reader=Reading(), status=status)
    reporting = asyncio.create_task(workers.report())
    await asyncio.sleep(0)
    assert json.loads(status.read_text())["detector"] == {"runtime": "torch-cpu"}
    reporting.cancel()
    await asyncio.gather(reporting, return_exceptions=True)


async def test_the_report_says_that_the_broker_refuses_what_clients_try_again_without_a_word(tmp_path: Path) -> None:
    stage: Any = Busy(concurrency=1, turns=0)
    status = tmp_path / "busy.json"
    kafka = Kafka(KafkaSettings(bootstrap_servers="192.0.2.9:9092"))
    workers = Workers(kafka, stage, epochs=lambda _: "e", reader=Reading(), status=status)
    kafka.contact.failed(SaslAuthenticationFailed())
    reporting = asyncio.create_task(workers.report())
    await asyncio.sleep(0)
    assert json.loads(status.read_text())["waiting_on"] == ["broker (refuses the password)"]
    reporting.cancel()
    await asyncio.gather(reporting, return_exceptions=True)


async def test_all_partitions_together_have_as_many_records_in_work_as_the_stage_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Busy(concurrency=3, turns=5)
    async with sharing(stage, monkeypatch) as workers:
        for partition in range(4):
            feed(workers, partition, 100)
        for partition in range(4):
            await done(workers, partition, 100)
    assert stage.most == 3
    assert Counter(stage.begun) == dict.fromkeys(range(4), 100)


async def test_a_backlog_of_quick_records_leaves_other_partitions_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """They never wait, so nothing would come between them by itself."""
    monkeypatch.setattr("streams.partition._TURN", 5)
    stage = Busy(concurrency=4, turns=0)
    async with sharing(stage, monkeypatch) as workers:
        await begun(stage, workers)
        feed(workers, 0, 1000, since=1)
        feed(workers, 1, 1, since=1)
        await done(workers, 1, 2)
        assert stage.begun.index(1) < 100
        await done(workers, 0, 1001)


async def test_a_backlog_of_slow_records_leaves_other_partitions_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition queues for no more slots than there are."""
    stage = Busy(concurrency=4, turns=3)
    async with sharing(stage, monkeypatch) as workers:
        await begun(stage, workers)
        feed(workers, 0, 1000, since=1)
        async with asyncio.timeout(20):
            while len(stage.begun) < 100:
                await asyncio.sleep(0)
        feed(workers, 1, 1, since=1)
        await done(workers, 1, 2)
        assert stage.begun.index(1) < 120
        await done(workers, 0, 1001)


async def test_one_record_waits_a_round_and_not_for_all_that_flooded_partitions_queued_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One camera trickles beside three that flood: its frame is among the next few, however long their queues."""
    stage = Busy(concurrency=16, turns=50)
    async with sharing(stage, monkeypatch) as workers:
        for partition in range(4):
            feed(workers, partition, 1)
            await done(workers, partition, 1)
        stage.begun.clear()
        for partition in range(3):
            feed(workers, partition, 1000, since=1)
        async with asyncio.timeout(20):
            while len(stage.begun) < 100:
                await asyncio.sleep(0)
        before = len(stage.begun)
        feed(workers, 3, 1, since=1)
        await done(workers, 3, 2)
        # The flooded ones queue for 48 slots. Those that become free while the record is handed on, and a round.
        assert stage.begun.index(3) - before < 16 + 8


async def test_a_partition_that_goes_while_its_reader_looks_for_its_place_takes_records_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Busy(concurrency=2, turns=1)
    async with sharing(stage, monkeypatch) as workers:
        for steps in range(4):  # before its first step, and in the middle
            assert workers.unreadable(OffsetOutOfRangeError({IN[0]: 7})) == []
            assert workers.full(IN[0])
            for _ in range(steps):
                await asyncio.sleep(0)
            await workers.revoke([IN[0]])
            assert not workers.full(IN[0])
        feed(workers, 0, 3)
        await done(workers, 0, 3)


async def begun(stage: Busy, workers: Workers) -> None:
    """Two partitions have been at work, and are not now."""
    for partition in range(2):
        feed(workers, partition, 1)
        await done(workers, partition, 1)
    stage.begun.clear()


@pytest.mark.parametrize("kind", [Busy, Deaf])
async def test_what_is_revoked_in_the_middle_of_its_work_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, kind: type[Busy]
) -> None:
    before = asyncio.all_tasks()
    stage = kind(concurrency=3, turns=10**9)
    async with sharing(stage, monkeypatch) as workers:
        for partition in range(4):
            feed(workers, partition, 100)
        async with asyncio.timeout(20):
            while stage.running < 3:
                await asyncio.sleep(0)
        begun = len(stage.begun)
        async with asyncio.timeout(5):
            await workers.revoke(IN)
        assert stage.running == 0
        assert asyncio.all_tasks() == before
        # Whoever waited for a slot that came free in that moment may have got it; nobody went on to a second record.
        assert len(stage.begun) <= begun + 3


class Standing:
    """A consumer that stands at offset 4 of each partition, with nine records there, unless the broker is away."""

    def __init__(self) -> None:
        self.away = False
        self.asked = 0
        self._client = SimpleNamespace(_loop=asyncio.get_running_loop())

    def assignment(self) -> set[TopicPartition]:
        return set(IN)

    def partitions_for_topic(self, _topic: str) -> set[int]:
        return set(range(4))

    async def end_offsets(self, tps: set[TopicPartition]) -> dict[TopicPartition, int]:
        self.asked += 1
        if self.away:
            raise KafkaConnectionError
        return dict.fromkeys(tps, 9)


async def test_what_does_not_come_is_said_unless_the_broker_is_away_or_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.workers.LOOK_S", 0.02)
    monkeypatch.setattr("streams.hearing.DEAF_S", 0.05)
    monkeypatch.setattr("streams.workers.position", lambda _consumer, _tp: 4)
    async with sharing(Busy(concurrency=1, turns=1), monkeypatch) as workers:
        consumer: Any = Standing()
        workers.collector.consumer = consumer
        watching = asyncio.create_task(workers.watch())

        async def looked(times: int) -> None:
            upto = consumer.asked + times
            async with asyncio.timeout(20):
                while consumer.asked < upto:
                    await asyncio.sleep(0.005)

        async def said(deaf: bool) -> None:
            async with asyncio.timeout(20):
                while (workers.liveness.stall() is not None) is not deaf:
                    await asyncio.sleep(0.005)

        try:
            await asyncio.sleep(0.1)
            assert not consumer.asked, "it has not joined its group yet"
            workers.liveness.generation = 1
            await said(deaf=True)
            assert "ends at offset 9 and is not read on from 4" in str(workers.liveness.stall())
            consumer.away = True
            await said(deaf=False)
            await looked(5)
            assert workers.liveness.stall() is None
            consumer.away = False
            await said(deaf=True)
            monkeypatch.setattr(workers, "full", lambda _tp: True)
            await said(deaf=False)
            await looked(5)
            assert workers.liveness.stall() is None
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


class Two(Busy):
    """A stage of two topics: one is slow, and must not hold up the other."""

    inputs = ("in", "other")

    def __init__(self) -> None:
        super().__init__(concurrency=3, turns=0)
        self.slow = asyncio.Event()

    def at_once(self, topic: str) -> int:
        return 1 if topic == "in" else 2

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        if record.topic == "in":
            await self.slow.wait()
        return await super().handle(record)


async def test_what_is_slow_on_one_topic_of_a_stage_holds_up_nothing_on_another(monkeypatch) -> None:
    stage = Two()
    async with sharing(stage, monkeypatch) as workers:
        for offset in range(5):
            for partition in range(4):  # more than there are slots
                workers.feed(Incoming("in", "e", partition, offset, b"k", b"v", ()))
            workers.feed(Incoming("other", "e", 0, offset, b"k", b"v", ()))
        async with asyncio.timeout(20):
            while workers._running[TopicPartition("other", 0)][0].ownership.position < 5:
                await asyncio.sleep(0)
        assert [workers._running[tp][0].ownership.position for tp in IN] == [0] * 4
        assert workers._slots["in"].locked()
        stage.slow.set()
        for partition in range(4):
            await done(workers, partition, 5)


async def test_holds_on_partitions_of_one_number_and_two_topics_are_two() -> None:
    """Under one transactional id each would fence the other for ever."""
    one, two = Busy(1, 0), Two()
    for stage, several in ((one, False), (two, True)):
        workers = Workers(Kafka(KafkaSettings()), stage, epochs=lambda _: "e", reader=Reading())
        assert workers._hold(IN[0])._several is several

"""The partition workers of one stage in one process: what every host drives.

A host calls `feed` for each record, `revoke` when partitions go, and asks `full`; the rest is here.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError

from streams.admin import TopicsError
from streams.errors import FencedError, UncertainError
from streams.hearing import LOOK_S, Hearing, Place, position, wanted_by_group
from streams.kafka import Kafka
from streams.liveness import REPORT_EVERY_S, STALL_S, Liveness
from streams.lives import Lives
from streams.membership import Membership
from streams.messages import Incoming
from streams.metrics import MeteredOwnership, StageCollector, StageMetrics
from streams.partition import PartitionWorker
from streams.stages import FoldStage, MapStage, RangeStage, Stage
from streams.turns import Turns

log = structlog.get_logger(__name__)

T = TypeVar("T")

# The work does not happen in the poll loop, so a long poll interval hides nothing: Liveness watches instead.
MAX_POLL_INTERVAL_MS = 24 * 3_600_000

# How often the input topics are looked at, seconds.
_WATCH_S = 1.0

# What is in hand is finished before an overtaken reader goes on behind the gap; looked at so often, seconds.
_SETTLE_S = 0.2

# A range whose rest is gone never gets whole: after so long without an insert or a word the reader goes on, seconds.
_RANGE_S = 10.0


class Reader(Protocol):
    """What a host lends its workers."""

    async def still_ours(self, tp: TopicPartition) -> bool:
        """Ask the group whether the partition is still this member's."""

    async def seek(self, tp: TopicPartition, offset: int) -> None:
        """Read the partition from there on, if it is still this member's."""


class Hold(MeteredOwnership):
    """An ownership of one life of its topic: it takes none of another."""

    def __init__(self, *args: Any, life: str, alive: Callable[[], Awaitable[bool]], **options: Any) -> None:
        super().__init__(*args, epoch=lambda: life, **options)
        self._alive = alive

    async def acquire(self) -> None:
        """As `Ownership.acquire`, after a look whether the topic was made anew."""
        if not await self._alive():
            raise UncertainError(f"{self.tp.topic} was made anew: its first offset is next")
        await super().acquire()


class Workers:
    """The workers of a stage, one a partition, made at its first record."""

    def __init__(
        self,
        kafka: Kafka,
        stage: Stage,
        *,
        epochs: Callable[[str], str],
        reader: Reader,
        status: Path | None = None,
    ) -> None:
        """Make them; nothing runs yet.

        Args:
            kafka: the connection.
            stage: what they do.
            epochs: each topic's epoch; `Lives`, which can be asked again, or a plain look-up.
            reader: the host.
            status: where to report.
        """
        self.kafka = kafka
        self.stage = stage
        self.liveness = Liveness(stage.name)
        self.metrics = StageMetrics(stage)
        self.collector = StageCollector(stage, self.metrics, self.liveness)
        """What Prometheus is told of them."""
        self._epochs = epochs
        self._reader = reader
        self._status = status
        self._closed = False
        self._running: dict[TopicPartition, tuple[PartitionWorker, asyncio.Task[None]]] = {}
        # The life of each topic that is read. It changes here, not in `epochs`, so that nothing of two lives meets.
        self._lives: dict[str, str] = {}
        # Partitions whose reader looks for its place again, and those of them that take no records meanwhile.
        self._moving: dict[TopicPartition, asyncio.Task[None]] = {}
        self._shut: set[TopicPartition] = set()
        self._hearing = Hearing(self.liveness.now)
        # The last offsets of what a host fetched and hands on later, and of what came here.
        self._brought: dict[TopicPartition, int] = {}
        self._fed: dict[TopicPartition, int] = {}
        # Range stages do one insert a partition at a time; the store takes a few at once.
        slots = Turns(lambda: getattr(stage, "concurrency", 8))
        at_once = getattr(stage, "at_once", None)
        self._slots = {t: slots if at_once is None else Turns(partial(at_once, t)) for t in stage.inputs}

    def epoch(self, topic: str) -> str:
        """The epoch of the topic's life that is read."""
        if topic not in self._lives:
            self._lives[topic] = self._epochs(topic)
        return self._lives[topic]

    def look(self, assigned: Collection[TopicPartition]) -> None:
        """Notice topics that were made anew; a host calls it after a fetch, before it hands on what came."""
        for topic in self.stage.inputs:
            was, now = self.epoch(topic), self._epochs(topic)
            if was != now:
                log.warning("topic made anew", stage=self.stage.name, topic=topic, was=was, now=now)
                self._lives[topic] = now
                for tp in assigned:
                    if tp.topic == topic:
                        self._shut.add(tp)
                        self._move(tp, self._begin_anew(tp))

    def unreadable(self, error: KafkaError) -> list[TopicPartition]:
        """Take an error of a fetch without a reset policy: where there is no position, or nothing at it any more.

        Returns the partitions to be read from offset 0; the others find their place by themselves.
        """
        if isinstance(error, NoOffsetForPartitionError):
            return [error.args[0]]
        for tp, offset in error.args[0].items():
            if tp not in self._moving and not self._closed:
                log.warning("overtaken", stage=self.stage.name, topic=tp.topic, partition=tp.partition, offset=offset)
                self._move(tp, self._catch_up(tp))
        return []

    def brought(self, tp: TopicPartition, offset: int) -> None:
        """Everything up to the offset was fetched, and `feed` is to come; of a host that does not feed at once."""
        self._brought[tp] = offset

    def feed(self, record: Incoming) -> None:
        """Hand a record to its partition's worker; start one at the partition's first record."""
        tp = TopicPartition(record.topic, record.partition)
        self._fed[tp] = record.offset
        if self._closed or tp in self._shut or record.epoch != self.epoch(record.topic):
            return
        if tp not in self._running:
            self._running[tp] = self._start(tp)
        self.metrics.records.add(record.topic)
        self._running[tp][0].buffer.add(record)

    def full(self, tp: TopicPartition) -> bool:
        """Whether the host should stop fetching for the partition."""
        return tp in self._moving or (tp in self._running and self._running[tp][0].buffer.full)

    async def revoke(self, tps: Collection[TopicPartition]) -> None:
        """End these partitions' work: model calls are cancelled, a commit already sent is waited for, 5 s at most."""
        moving = [self._moving[tp] for tp in tps if tp in self._moving]
        for task in moving:
            task.cancel()
        await asyncio.gather(*moving, return_exceptions=True)
        await self._end(tps)
        for tp in tps:
            self._brought.pop(tp, None)
            self._fed.pop(tp, None)

    async def _end(self, tps: Collection[TopicPartition]) -> None:
        ending = [self._running.pop(tp)[1] for tp in tps if tp in self._running]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for tp in tps:
            self.liveness.forget(_name(tp))

    async def close(self) -> None:
        """End all work and the stage's own resources; write the last report."""
        self._closed = True
        await self.revoke([*self._running, *self._moving])
        close = getattr(self.stage, "close", None)
        if close is not None:
            await close()

    async def watch(self) -> None:
        """Keep an eye on the input topics, and on whether the consumer is brought what they hold, until cancelled."""
        await asyncio.gather(self._watch_topics(), self._listen())

    async def _listen(self) -> None:
        """Say so when what is there does not come, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            consumer = self.collector.consumer
            if consumer is None or self.liveness.generation < 0 or self._closed:
                continue
            generation = self.liveness.generation
            try:
                async with asyncio.timeout(LOOK_S):
                    deaf = await self._hear(consumer)
            except (KafkaError, TimeoutError, OSError) as error:  # the broker is away: there is nothing to hear
                log.debug("cannot look for the log's ends", stage=self.stage.name, error=repr(error))
                deaf = self._hearing.look({})
            except Exception:  # a question that fails is no answer, and no reason to stop watching
                log.exception("cannot look for the log's ends", stage=self.stage.name)
                deaf = self._hearing.look({})
            if self.liveness.generation != generation:
                deaf = self._hearing.look({})
            self.liveness.deaf = deaf

    async def _hear(self, consumer: AIOKafkaConsumer) -> str | None:
        assigned = consumer.assignment()
        if not assigned:
            return self._hearing.wanted(await wanted_by_group(self.kafka, self.kafka.group(self.stage.name), consumer))
        ends = await in_its_loop(consumer, consumer.end_offsets(assigned))
        # Asked for the place after the end: what was read meanwhile is not missing.
        return self._hearing.look(
            {
                tp: Place(end, position(consumer, tp), self._brought.get(tp), self._fed.get(tp))
                for tp, end in ends.items()
                if tp in consumer.assignment() and not self.full(tp)
            }
        )

    async def _watch_topics(self) -> None:
        """A topic that vanished comes back as a new life.

        aiokafka would look for it again after its metadata's age, and make it never.
        """
        while True:
            await asyncio.sleep(_WATCH_S)
            consumer = self.collector.consumer
            if consumer is None or self.liveness.generation < 0:  # it has not joined its group yet
                continue
            if not consumer.assignment():
                self.liveness.polled()  # there is nothing to poll
            missing = [topic for topic in self.stage.inputs if not consumer.partitions_for_topic(topic)]
            if not missing:
                continue
            log.warning("topics are gone", stage=self.stage.name, topics=missing)
            try:
                if isinstance(self._epochs, Lives):
                    await self._epochs.restore()
            except (KafkaError, TimeoutError, OSError, FencedError, UncertainError, TopicsError) as error:
                log.warning("topics cannot be made", stage=self.stage.name, error=str(error))
            client = consumer._client  # noqa: SLF001 (aiokafka is pinned below 0.15; Faust's lives in another thread)
            client._loop.call_soon_threadsafe(client.force_metadata_update)  # noqa: SLF001

    async def report(self) -> None:
        """Write the status file every second until cancelled."""
        if self._status is None:
            return
        try:
            while True:
                self.liveness.ticked()
                self.liveness.details = getattr(self.stage, "details", {})
                self.liveness.refused = self.kafka.waiting_on if self.kafka.contact.refusal else None
                self.liveness.write(self._status)
                await asyncio.sleep(REPORT_EVERY_S)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._status.unlink()

    def _start(self, tp: TopicPartition) -> tuple[PartitionWorker, asyncio.Task[None]]:
        worker = PartitionWorker(
            self.stage,
            self._hold(tp),
            self.liveness.partition(_name(tp), getattr(self.stage, "patience_s", STALL_S)),
            still_ours=lambda: self._reader.still_ours(tp),
            slots=self._slots[tp.topic],
            metrics=self.metrics,
        )
        task = asyncio.create_task(worker.run(), name=f"{self.stage.name} {_name(tp)}")
        task.add_done_callback(_log_failure)
        return worker, task

    def _hold(self, tp: TopicPartition) -> Hold:
        life = self.epoch(tp.topic)

        async def alive() -> bool:
            if isinstance(self._epochs, Lives):
                await self._epochs.refresh()
            return self._epochs(tp.topic) == life

        return Hold(
            self.kafka,
            self.stage.name,
            tp,
            life=life,
            alive=alive,
            outputs=self.stage.outputs if isinstance(self.stage, MapStage) else (),
            several=len(self.stage.inputs) > 1,
            metrics=self.metrics,
        )

    def _move(self, tp: TopicPartition, finding: Coroutine[Any, Any, None]) -> None:
        """Let a partition's reader find its place; an earlier search for it ends."""
        before = self._moving.get(tp)

        async def run() -> None:
            if before is not None:
                before.cancel()
                await asyncio.gather(before, return_exceptions=True)
            await finding

        def over(_: "asyncio.Task[None]") -> None:
            finding.close()  # one that was cancelled before its first step
            if self._moving.get(tp) is task:
                del self._moving[tp]
                self._shut.discard(tp)

        self._moving[tp] = task = asyncio.create_task(run(), name=f"{self.stage.name} {_name(tp)} finds its place")
        task.add_done_callback(over)
        task.add_done_callback(_log_failure)

    async def _begin_anew(self, tp: TopicPartition) -> None:
        """Read a new life from its first offset; what was in hand of the old one went with its topic."""
        await self._end([tp])
        await self._reader.seek(tp, 0)

    async def _catch_up(self, tp: TopicPartition) -> None:
        """Finish what is in hand; then an acquire records what is gone, and says where to go on."""
        if tp in self._running:
            await self._settled(*self._running[tp])
        self._shut.add(tp)
        await self._end([tp])
        await self._reader.seek(tp, await self._position(tp))

    async def _settled(self, worker: PartitionWorker, task: "asyncio.Task[None]") -> None:
        """Until nothing is in hand but what an open window keeps. Faust may have some on the way: look twice."""
        quiet = 0
        at, since = worker.life.advanced_at, time.monotonic()
        while quiet < 2 and not task.done():
            await asyncio.sleep(_SETTLE_S)
            if worker.life.advanced_at != at or worker.life.waiting_on is not None:
                at, since = worker.life.advanced_at, time.monotonic()
            stuck = isinstance(self.stage, RangeStage) and time.monotonic() - since > _RANGE_S
            kept = isinstance(self.stage, FoldStage) or stuck
            quiet = quiet + 1 if not worker.buffer.waiting and (kept or not len(worker.buffer)) else 0

    async def _position(self, tp: TopicPartition) -> int:
        """Where work goes on; an acquire records what lies before it and is gone."""
        life = self.liveness.partition(_name(tp))
        hold = self._hold(tp)
        try:
            while True:
                try:
                    await hold.acquire()
                except FencedError:
                    life.waiting_on = None if await self._reader.still_ours(tp) else "group"
                except (UncertainError, KafkaError, TimeoutError, OSError) as error:
                    life.waiting_on = self.kafka.waiting_on
                    log.warning("finding its place", topic=tp.topic, partition=tp.partition, error=str(error))
                else:
                    return hold.position
                await asyncio.sleep(1)
        finally:
            await hold.release()
            self.liveness.forget(_name(tp))


def _name(tp: TopicPartition) -> str:
    return f"{tp.topic}-{tp.partition}"


def _log_failure(task: "asyncio.Task[None]") -> None:
    """A worker never ends with an exception of its own; if it does, the log says why before the stall restarts it."""
    if not task.cancelled() and task.exception() is not None:
        log.error("worker died", worker=task.get_name(), exc_info=task.exception())


def group_consumer(kafka: Kafka, stage: Stage, member: str | None = None) -> tuple[AIOKafkaConsumer, Membership]:
    """The consumer of a stage's group, as every host wants it, and its place there; not started.

    `member`: its name in the group, by which it gets its partitions back after a kill; no two may have the same.
    """
    session = kafka.settings.session_timeout_ms
    consumer = kafka.consumer(
        group_id=kafka.group(stage.name),
        group_instance_id=member,
        session_timeout_ms=session,
        heartbeat_interval_ms=session // 4,
        max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
        max_poll_records=500,
        # How long members may take to rejoin: revoking waits 5 s at most for a commit already sent.
        rebalance_timeout_ms=max(session, 10_000),
        # A reader that retention overtook must not jump silently: the fetch fails, and `Workers` records the gap.
        auto_offset_reset="none",
    )
    return consumer, Membership(consumer)


async def in_its_loop(consumer: AIOKafkaConsumer, asking: Coroutine[Any, Any, T]) -> T:
    """Ask the consumer something, in the loop where it lives: Faust's has a thread of its own."""
    loop = consumer._client._loop  # noqa: SLF001 (aiokafka is pinned below 0.15)
    if loop is asyncio.get_running_loop():
        return await asking
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asking, loop))


async def still_member(consumer: AIOKafkaConsumer, tp: TopicPartition) -> bool:
    """Ask the group, by a heartbeat answered now, whether this member, generation and partition still hold.

    As long as nobody answers it asks again: a coordinator that is away says nothing of us.
    """
    coordinator = consumer._coordinator  # noqa: SLF001 (aiokafka is pinned below 0.15)
    while (generation := coordinator.generation) > 0:
        answered = False
        with contextlib.suppress(KafkaError):
            answered = await coordinator._do_heartbeat()  # noqa: SLF001
        if coordinator.generation != generation or tp not in consumer.assignment():
            return False
        if answered:
            return True
        await asyncio.sleep(1)
    return False


async def until_broker_answers(kafka: Kafka, liveness: Liveness, stop: asyncio.Event) -> bool:
    """Wait for the broker; False when `stop` came first."""
    said = ""
    while not stop.is_set():
        try:
            async with kafka.admin():
                liveness.polled()
                liveness.waiting_on = None
                return True
        except (KafkaError, OSError) as error:
            liveness.waiting_on = kafka.waiting_on
            if str(error) != said:
                said = str(error)
                log.warning("waiting", on="broker", why=kafka.away(error))
            await asyncio.sleep(1)
    return False

"""The partition workers of one stage in one process: what every host drives.

A host calls `feed` for each record, `revoke` when partitions go, and asks `full`; the rest is here.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from streams.kafka import Kafka
from streams.liveness import REPORT_EVERY_S, STALL_S, Liveness
from streams.messages import Incoming
from streams.metrics import MeteredOwnership, StageCollector, StageMetrics
from streams.partition import PartitionWorker
from streams.stages import MapStage, Stage

log = structlog.get_logger(__name__)

# The work does not happen in the poll loop, so a long poll interval hides nothing: Liveness watches instead.
MAX_POLL_INTERVAL_MS = 24 * 3_600_000


class Workers:
    """The workers of a stage, one a partition, made at its first record."""

    def __init__(
        self,
        kafka: Kafka,
        stage: Stage,
        *,
        epochs: Callable[[str], str],
        still_ours: Callable[[TopicPartition], Awaitable[bool]],
        status: Path | None = None,
    ) -> None:
        self.kafka = kafka
        self.stage = stage
        self.liveness = Liveness(stage.name)
        self.metrics = StageMetrics(stage)
        self.collector = StageCollector(stage, self.metrics, self.liveness)
        """What Prometheus is told of them."""
        self._epochs = epochs
        self._still_ours = still_ours
        self._status = status
        self._closed = False
        self._running: dict[TopicPartition, tuple[PartitionWorker, asyncio.Task[None]]] = {}
        # Range stages do one insert a partition at a time; the store takes a few at once.
        self._slots = asyncio.Semaphore(getattr(stage, "concurrency", 8))

    def epoch(self, topic: str) -> str:
        """The topic's epoch."""
        return self._epochs(topic)

    def feed(self, record: Incoming) -> None:
        """Hand a record to its partition's worker; start one at the partition's first record."""
        tp = TopicPartition(record.topic, record.partition)
        if self._closed:
            return
        if tp not in self._running:
            self._running[tp] = self._start(tp)
        self.metrics.records.add(record.topic)
        self._running[tp][0].buffer.add(record)

    def full(self, tp: TopicPartition) -> bool:
        """Whether the host should stop fetching for the partition."""
        return tp in self._running and self._running[tp][0].buffer.full

    async def revoke(self, tps: Collection[TopicPartition]) -> None:
        """End these partitions' work: model calls are cancelled, a commit already sent is waited for, 5 s at most."""
        ending = [self._running.pop(tp)[1] for tp in tps if tp in self._running]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for tp in tps:
            self.liveness.forget(f"{tp.topic}-{tp.partition}")

    async def close(self) -> None:
        """End all work and the stage's own resources; write the last report."""
        self._closed = True
        await self.revoke(list(self._running))
        close = getattr(self.stage, "close", None)
        if close is not None:
            await close()

    async def report(self) -> None:
        """Write the status file every second until cancelled."""
        if self._status is None:
            return
        try:
            while True:
                self.liveness.write(self._status)
                await asyncio.sleep(REPORT_EVERY_S)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._status.unlink()

    def _start(self, tp: TopicPartition) -> tuple[PartitionWorker, asyncio.Task[None]]:
        ownership = MeteredOwnership(
            self.kafka,
            self.stage.name,
            tp,
            epoch=lambda: self._epochs(tp.topic),
            outputs=self.stage.outputs if isinstance(self.stage, MapStage) else (),
            metrics=self.metrics,
        )
        worker = PartitionWorker(
            self.stage,
            ownership,
            self.liveness.partition(f"{tp.topic}-{tp.partition}", getattr(self.stage, "patience_s", STALL_S)),
            still_ours=lambda: self._still_ours(tp),
            slots=self._slots,
            metrics=self.metrics,
        )
        task = asyncio.create_task(worker.run(), name=f"{self.stage.name} {tp.topic}-{tp.partition}")
        task.add_done_callback(_log_failure)
        return worker, task


def _log_failure(task: "asyncio.Task[None]") -> None:
    """A worker never ends with an exception of its own; if it does, the log says why before the stall restarts it."""
    if not task.cancelled() and task.exception() is not None:
        log.error("worker died", worker=task.get_name(), exc_info=task.exception())


def group_consumer(kafka: Kafka, stage: Stage) -> AIOKafkaConsumer:
    """The consumer of a stage's group, as every host wants it; not started."""
    session = kafka.settings.session_timeout_ms
    return kafka.consumer(
        group_id=kafka.group(stage.name),
        session_timeout_ms=session,
        heartbeat_interval_ms=session // 4,
        max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
        max_poll_records=500,
        # How long members may take to rejoin: revoking waits 5 s at most for a commit already sent.
        rebalance_timeout_ms=max(session, 10_000),
    )


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
            liveness.waiting_on = "broker"
            if str(error) != said:
                said = str(error)
                log.warning("waiting", on="broker", why=said)
            await asyncio.sleep(1)
    return False

"""The raw host: one aiokafka consumer feeds the partition workers of a stage. For stages whose rate needs it.

Polling never waits for the work: records go into each partition's buffer, and a full buffer pauses its partition.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiokafka
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from streams.client import stop as stop_consumer
from streams.kafka import Kafka, incoming
from streams.stages import Stage
from streams.workers import Workers, group_consumer, still_member, until_broker_answers

log = structlog.get_logger(__name__)


class RawHost(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]
    """Runs one stage on a raw aiokafka loop."""

    def __init__(
        self,
        kafka: Kafka,
        stage: Stage,
        *,
        epochs: Callable[[str], str],
        status: Path | None = None,
        member: str | None = None,
    ) -> None:
        self._kafka = kafka
        self._stage = stage
        self.workers = Workers(kafka, stage, epochs=epochs, reader=self, status=status)
        self._consumer, self._membership = group_consumer(kafka, stage, member)
        self.workers.collector.consumer = self._consumer

    async def run(self, stop: asyncio.Event) -> None:
        """Feed the workers until `stop` is set, then let go in order."""
        reporting = asyncio.create_task(self.workers.report())
        watching = asyncio.create_task(self.workers.watch())
        self._consumer.subscribe(list(self._stage.inputs), listener=self)
        try:
            if await until_broker_answers(self._kafka, self.workers.liveness, stop):
                await self._consumer.start()
            while not stop.is_set():
                await self._poll()
        finally:
            try:
                await self.workers.close()
            finally:
                self._membership.give_up()
                await stop_consumer(self._consumer)
                for task in (reporting, watching):
                    task.cancel()
                await asyncio.gather(reporting, watching, return_exceptions=True)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Let go before the group goes on; the next owner repeats what was not committed."""
        await self.workers.revoke(revoked)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Nothing to prepare: it is no barrier before records flow, so workers begin at their first record."""
        self.workers.liveness.generation = self._consumer._coordinator.generation  # noqa: SLF001
        log.info("assigned", stage=self._stage.name, partitions=len(assigned))

    async def still_ours(self, tp: TopicPartition) -> bool:
        """Ask the group whether the partition is still this member's."""
        return await still_member(self._consumer, tp)

    async def seek(self, tp: TopicPartition, offset: int) -> None:
        """Read the partition from there on."""
        if tp in self._consumer.assignment():
            self._consumer.seek(tp, offset)

    async def _poll(self) -> None:
        batches: Mapping[TopicPartition, Sequence[Any]] = {}
        try:
            batches = await self._consumer.getmany(timeout_ms=200, max_records=500)
        except (NoOffsetForPartitionError, OffsetOutOfRangeError) as error:
            for tp in self.workers.unreadable(error):
                await self.seek(tp, 0)
        except KafkaError as error:  # aiokafka reports some broker errors here and goes on by itself
            log.warning("poll", stage=self._stage.name, error=repr(error))
            await asyncio.sleep(0.5)
            return
        self.workers.liveness.polled()
        assigned = self._consumer.assignment()
        self.workers.look(assigned)
        for tp, records in batches.items():
            if tp in assigned:
                for record in records:
                    self.workers.feed(incoming(record, self.workers.epoch(tp.topic)))
        paused = self._consumer.paused() & assigned
        self._consumer.pause(*(tp for tp in assigned - paused if self.workers.full(tp)))
        self._consumer.resume(*(tp for tp in paused if not self.workers.full(tp)))

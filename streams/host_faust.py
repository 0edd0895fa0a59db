"""The Faust host: a Faust app's agent feeds the partition workers of a stage. The default for stages.

Faust brings the records and the group; its acks, commits, tables, windows and producer stay unused, because
records that it drops, commits early or sends by itself would be lost or doubled (each was seen happening).
"""

import asyncio
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiokafka
import faust
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import NoOffsetForPartitionError, OffsetOutOfRangeError
from faust.transport.drivers import aiokafka as driver
from yarl import URL

from streams.kafka import Kafka, incoming
from streams.membership import Membership
from streams.stages import Stage
from streams.workers import Workers, group_consumer, in_its_loop, still_member, until_broker_answers

log = structlog.get_logger(__name__)

# How soon a partition whose buffer was full is looked at again, seconds.
_FULL_S = 0.1


class _ConsumerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """Makes our consumer instead of Faust's, which would read uncommitted records."""

    _membership: Membership | None = None

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:  # noqa: ARG002 (Faust's)
        host = self.app.host
        consumer, self._membership = group_consumer(host.kafka, host.stage, host.member)
        host.workers.collector.consumer = consumer
        return consumer

    async def on_thread_stop(self) -> None:
        """Leave the group as an ordinary member does."""
        if self._membership is not None:
            self._membership.give_up()
        await super().on_thread_stop()

    async def seek_to_committed(self) -> Mapping[Any, int]:
        """Faust drops what it fetched during a rebalance and comes here; a group without offsets would skip it."""
        committed: Mapping[Any, int] = await super().seek_to_committed()
        unread = [tp for tp, offset in committed.items() if not offset]
        if unread:
            await self.seek_to_beginning(*unread)
        return committed

    async def go_to(self, tp: TopicPartition, offset: int) -> None:
        """Read from there on; the consumer may be touched in its own thread alone."""
        await self.call_thread(self._go_to, tp, offset)

    async def _go_to(self, tp: TopicPartition, offset: int) -> None:
        consumer = self._ensure_consumer()
        if tp in consumer.assignment():
            consumer.seek(tp, offset)


class _Consumer(driver.Consumer):  # type: ignore[misc]
    """Fetches no partition whose buffer is full, and makes one message of all that a fetch brought of a partition.

    Faust spends more on a message, some 100 us, than most stages do on its record.
    """

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def _getmany(self, active_partitions: Iterable[Any] | None, timeout: float) -> Any:
        # Asked here each time instead of pausing: Faust drops the records of a partition paused in mid-batch. A
        # copy, since Faust empties its set in a rebalance, and to aiokafka an empty set means every partition.
        workers: Workers = self.app.host.workers
        workers.liveness.polled()
        active = list(active_partitions or ())
        wanted = frozenset(tp for tp in active if not workers.full(tp))
        if len(wanted) < len(active):
            timeout = _FULL_S
        if not wanted:
            workers.look(active)
            await self.sleep(timeout)
            return {}
        try:
            fetched = await super()._getmany(wanted, timeout)
        except (NoOffsetForPartitionError, OffsetOutOfRangeError) as error:
            for tp in workers.unreadable(error):
                await self.go_to(tp, 0)
            return {}
        workers.look(active)
        for tp, records in fetched.items():
            if records:
                workers.brought(tp, records[-1].offset)
        # It goes by the last record's offset, by which Faust knows what it has read; the buffer drops the rest.
        return {
            tp: [replace(records[-1], key=None, value=[incoming(r, workers.epoch(tp.topic)) for r in records])]
            for tp, records in fetched.items()
            if records
        }

    async def go_to(self, tp: TopicPartition, offset: int) -> None:
        """Read from there on; Faust drops what lies below the offset that it knows."""
        self._read_offset[tp] = offset or None
        await self._thread.go_to(tp, offset)

    def verify_event_path(self, now: float, tp: Any) -> None:
        """Faust would call a full partition a stall; Liveness watches instead."""


class _Transport(driver.Transport):  # type: ignore[misc]
    Consumer = _Consumer


class _App(faust.App):  # type: ignore[misc]
    host: "FaustHost"


class FaustHost:
    """Runs one stage on Faust."""

    def __init__(
        self,
        kafka: Kafka,
        stage: Stage,
        *,
        epochs: Callable[[str], str],
        status: Path | None = None,
        member: str | None = None,
    ) -> None:
        self.kafka = kafka
        self.stage = stage
        self.member = member
        self.workers = Workers(kafka, stage, epochs=epochs, reader=self, status=status)
        self._app: _App | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Feed the workers until `stop` is set, then let go in order."""
        reporting = asyncio.create_task(self.workers.report())
        watching = asyncio.create_task(self.workers.watch())
        stopping = asyncio.create_task(stop.wait())
        serving: asyncio.Task[None] | None = None
        try:
            if await until_broker_answers(self.kafka, self.workers.liveness, stop):
                with tempfile.TemporaryDirectory(prefix="rewatch-faust-") as datadir:
                    self._app = self._make_app(datadir)
                    serving = asyncio.create_task(self._serve(self._app))
                    try:
                        await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        await self.workers.close()
                        await self._app.stop()
                    if not stop.is_set():
                        await serving  # Faust ended by itself: say why
        finally:
            tasks = [task for task in (reporting, watching, stopping, serving) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _make_app(self, datadir: str) -> _App:
        servers = self.kafka.settings.bootstrap_servers.split(",")
        app = _App(
            self.kafka.group(self.stage.name),
            broker=[URL(f"kafka://{server}") for server in servers],
            datadir=datadir,
            autodiscover=False,
            web_enabled=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            stream_wait_empty=False,  # what is in hand belongs to the workers: there is nothing to wait for
        )
        app.host = self
        app.transport = _Transport(app.conf.broker, app)
        app.boot_strategy.enable_kafka_producer = False
        # Without acks Faust keeps no list of unacked records and of the gaps between offsets, which would grow
        # for ever because nothing is committed through it.
        topic = app.topic(
            *self.stage.inputs, key_serializer="raw", value_serializer="raw", allow_empty=True, acks=False
        )
        app.agent(topic, name=self.stage.name)(self._feed)
        app.on_partitions_revoked.connect(self._revoked)
        app.on_rebalance_complete.connect(self._assigned)
        return app

    async def _serve(self, app: _App) -> None:
        await app.start()
        await app.wait_until_stopped()
        raise app.crash_reason or RuntimeError("Faust stopped by itself")

    async def _feed(self, stream: Any) -> None:
        app = self._app
        assert app is not None, "an agent runs in a started app"
        async for event in stream.noack().events():
            message = event.message
            # Records of an earlier generation are read again, by whoever has their partition now.
            if message.generation_id == app.consumer_generation_id and app.flow_control.is_active():
                for record in message.value:
                    self.workers.feed(record)

    async def _revoked(self, _app: _App, revoked: Collection[Any], **_: Any) -> None:
        await self.workers.revoke([TopicPartition(tp.topic, tp.partition) for tp in revoked])

    async def _assigned(self, app: _App, **_: Any) -> None:
        self.workers.liveness.generation = app.consumer_generation_id
        log.info("assigned", stage=self.stage.name, partitions=len(app.consumer.assignment()))

    async def still_ours(self, tp: TopicPartition) -> bool:
        """Ask the group whether the partition is still this member's."""
        assert self._app is not None, "a partition is fed by a started app"
        consumer = self.workers.collector.consumer
        assert consumer is not None, "a started app has made its consumer"
        return await in_its_loop(consumer, still_member(consumer, tp))

    async def seek(self, tp: TopicPartition, offset: int) -> None:
        """Read the partition from there on."""
        assert self._app is not None, "a partition is fed by a started app"
        await self._app.consumer.go_to(tp, offset)

"""A new broker's partitions filled so that each record has the offset that it had.

Offsets are given by the broker, one after another, and cannot be chosen. But they can be spent: a transaction's end
takes one, and records of a transaction that is aborted take theirs and are seen by nobody. So a hole of one offset
behind a record is that record's own commit, as it was at first; a longer one is an aborted transaction. What the log
had forgotten before its first record is filled with records that are deleted after.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete

from streams.delivery import let_go
from streams.kafka import Kafka
from streams.messages import Incoming

log = structlog.get_logger(__name__)

_RUN_RECORDS = 500
_RUN_BYTES = 2 * 1024 * 1024
"""One transaction's worth, as stages have it."""

_FILLERS = 100_000
"""Empty records in a batch: 8 bytes each, below what a broker takes."""


_TRANSACTION_MS = 10 * 60 * 1000
"""Nobody reads yet, so an open one holds nobody up, and a busy broker may take its time. Brokers allow 15 minutes."""

_MARK_S = 120.0
"""A mark takes milliseconds; a broker that is busy with much else, seconds."""


class RefillError(Exception):
    """A record got another offset than it had: somebody else appends to the topics."""


class Run(NamedTuple):
    """Records that follow one another, and how many offsets behind them nobody sees."""

    records: list[Incoming]
    hole: int


def runs(records: Iterable[Incoming]) -> Iterator[Run]:
    """Records of one partition, in order, as runs; each fits one transaction. The last has no hole."""
    run: list[Incoming] = []
    size = 0
    for record in records:
        if run:
            hole = record.offset - run[-1].offset - 1
            assert hole >= 0, "in offset order, each once"
            if hole or len(run) >= _RUN_RECORDS or size >= _RUN_BYTES:
                yield Run(run, hole)
                run, size = [], 0
        run.append(record)
        size += record.size
    if run:
        yield Run(run, 0)


class Refill:
    """Fills partitions, one after another. Nobody else may append to them meanwhile."""

    def __init__(self, kafka: Kafka, number: int) -> None:
        """Nothing is opened yet; `number` tells side by side ones apart."""
        self._kafka = kafka
        self._id = kafka.transactional_id("restore", number)
        self._plain: AIOKafkaProducer | None = None
        self._fenced: AIOKafkaProducer | None = None
        self._reader: AIOKafkaConsumer | None = None

    async def __aenter__(self) -> Self:
        self._plain = self._kafka.producer()
        await self._plain.start()
        self._reader = self._kafka.consumer(isolation_level="read_uncommitted")
        await self._reader.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for producer in (self._plain, self._fenced):
            if producer is not None:
                await let_go(producer)
        if self._reader is not None:
            await self._reader.stop()

    async def skip(self, tp: TopicPartition, upto: int) -> None:
        """Begin an empty partition at an offset: everything below it is gone, as it was."""
        done = 0
        while done < upto:
            count = min(_FILLERS, upto - done)
            await self._send(self._open, tp, [_EMPTY] * count, done)
            done += count
        if upto:
            async with self._kafka.admin() as admin:
                await admin.delete_records({tp: RecordsToDelete(before_offset=upto)})

    async def fill(self, tp: TopicPartition, run: Run) -> None:
        """Append a run where the partition ends now, and spend the offsets behind it.

        Raises:
            RefillError: the partition does not end where the run begins.
            KafkaError or TimeoutError: the broker is away; begin the partition anew.
        """
        first = run.records[0].offset
        if run.hole == 1:
            fenced = await self._transactional()
            await fenced.begin_transaction()
            await self._send(fenced, tp, run.records, first)
            await fenced.commit_transaction()
            await self._ended(tp, run.records[-1].offset + 2)
            return
        await self._send(self._open, tp, run.records, first)
        behind = run.records[-1].offset + 1
        if run.hole:
            fenced = await self._transactional()
            await fenced.begin_transaction()
            at, todo = behind, run.hole - 1  # the abort's own mark takes one
            while todo:
                count = min(_FILLERS, todo)
                await self._send(fenced, tp, [_EMPTY] * count, at)
                at, todo = at + count, todo - count
            await fenced.abort_transaction()
            await self._ended(tp, behind + run.hole)

    @property
    def _open(self) -> AIOKafkaProducer:
        assert self._plain is not None, "entered before it is used"
        return self._plain

    async def _transactional(self) -> AIOKafkaProducer:
        if self._fenced is None:
            self._fenced = self._kafka.producer(transactional_id=self._id, transaction_timeout_ms=_TRANSACTION_MS)
            await self._fenced.start()
        return self._fenced

    async def _ended(self, tp: TopicPartition, expected: int) -> None:
        """Wait for a transaction's mark: the coordinator answers before it lies in the partition."""
        assert self._reader is not None, "entered before it is used"
        pause = 0.001
        async with asyncio.timeout(_MARK_S):
            while True:
                end = (await self._reader.end_offsets([tp]))[tp]
                if end == expected:
                    return
                if end > expected:
                    raise _not_alone(tp, expected, end)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.1)

    async def _send(
        self, producer: AIOKafkaProducer, tp: TopicPartition, records: Sequence[Incoming], first: int
    ) -> None:
        """Whole batches, each awaited: the next must not overtake it."""
        at = 0
        while at < len(records):
            builder = producer.create_batch()
            began = at
            while at < len(records):
                one = records[at]
                # Stamped with now: the broker's retention begins anew, and their times mean nothing to anyone.
                if not builder.append(timestamp=None, key=one.key, value=one.value, headers=list(one.headers)):
                    break
                at += 1
            sent = await (await producer.send_batch(builder, tp.topic, partition=tp.partition))
            if sent.offset != first + began:
                raise _not_alone(tp, first + began, sent.offset)


def _not_alone(tp: TopicPartition, wanted: int, got: int) -> RefillError:
    return RefillError(
        f"{tp.topic}-{tp.partition}: offset {wanted} was to come and {got} did: somebody else appends; "
        "stop every stage, and run the restore again"
    )


_EMPTY = Incoming("", "", 0, 0, b"", None, ())

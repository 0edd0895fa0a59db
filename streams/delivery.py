"""The delivery core: who owns a partition, from where it goes on, and how results appear exactly once.

For each input partition that a stage owns it has one producer with one transactional id. Opening it *fences*
every predecessor and ends its open transaction; *then* position and state are read; *then* work begins, and
records below the position are dropped. Outputs, dead letters, state and the position commit in one transaction,
begun only when the results are in hand. Measured against kills, zombies and delayed produce requests: nothing
lost, nothing doubled. Nothing here knows which host feeds it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import IllegalOperation, KafkaConnectionError, KafkaError, ProducerFenced
from aiokafka.structs import OffsetAndMetadata, RecordMetadata

from schemas import ids
from schemas.records import DeadLetter
from streams import codec
from streams.errors import FencedError, UncertainError, UnprocessableError
from streams.kafka import MAX_RECORD_BYTES, TRANSACTION_TIMEOUT_MS, Kafka
from streams.messages import REDRIVE, SOURCE, Emit, Incoming, size_of

log = structlog.get_logger(__name__)

# A commit is a handful of round trips (p99 40 ms measured). One that takes longer than the coordinator would
# keep its transaction open is of unknown outcome anyway.
_COMMIT_TIMEOUT_S = TRANSACTION_TIMEOUT_MS / 1000 + 5

# How far back the first look at an output's tail goes when a group's offsets were forgotten, records.
_TAIL = 1000

DEAD_LETTER_INLINE = 256 * 1024
"""Largest original record kept inside its dead letter, bytes."""

# What else a dead letter says is somebody's text, and may be of any length: cut to this, in characters, a dead letter
# has 1.3 MB at most. One that did not fit the topic would stop its partition for ever.
_MESSAGE = 4_000
_DETAIL = 250_000
_NAME = 255


async def let_go(producer: AIOKafkaProducer) -> None:
    """Close a producer in bounded time, without flushing.

    aiokafka's stop() flushes first, and with the broker away or a broken transaction that waits for ever.
    """
    for step in (producer._sender.close, producer.stop):  # noqa: SLF001 (aiokafka is pinned below 0.15)
        with contextlib.suppress(KafkaError, TimeoutError, asyncio.CancelledError, OSError):
            async with asyncio.timeout(5):
                await step()
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError  # it was meant for the caller, not for the producer's own tasks


class _Batch(NamedTuple):
    """Records of one partition on their way to the broker."""

    appended: "asyncio.Future[RecordMetadata]"
    indexes: list[int]
    """Which of the records they are."""


class FencedProducer:
    """One transactional producer; opening it fences every predecessor of its transactional id."""

    def __init__(self, kafka: Kafka, transactional_id: str) -> None:
        self.transactional_id = transactional_id
        self._kafka = kafka
        self._made: AIOKafkaProducer | None = None
        """aiokafka's, from `open` on: one that was made must be closed, also where it never started."""

    @property
    def _producer(self) -> AIOKafkaProducer:
        assert self._made is not None, "opened before it is used"
        return self._made

    async def open(self) -> None:
        """Fence: when this returns, no predecessor can commit any more, and its open transaction has ended.

        Raises:
            FencedError: another one was opened meanwhile.
            KafkaError or TimeoutError: the broker is away.
        """
        self._made = self._kafka.producer(
            transactional_id=self.transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_S):
                await self._producer.start()
                # An empty transaction sends nothing but waits for the producer id: that request is the fence.
                async with self._producer.transaction():
                    pass
        except ProducerFenced as error:
            await self.close()
            raise FencedError(self.transactional_id) from error
        except AssertionError as error:  # aiokafka, of a broker that is back and names no brokers yet
            await self.close()
            raise KafkaConnectionError(str(error)) from error
        except BaseException:
            await self.close()
            raise

    async def transact(
        self,
        emits: Sequence[Emit],
        *,
        offsets: tuple[str, dict[TopicPartition, OffsetAndMetadata]] | None = None,
    ) -> list[int]:
        """Append the records (each with its partition) and commit a group's offsets, all or nothing.

        Returns the offsets of the appended records, in order.

        Raises:
            FencedError: this producer is no longer the owner, or its transaction was timed out.
            UncertainError: what became of it is unknown. Either way close this producer and open another.
        """
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_S):
                await self._producer.begin_transaction()
                batches = await self._append(emits)
                await asyncio.gather(*(batch.appended for batch in batches))
                if offsets is not None:
                    # Not while records are on their way: a transaction that changes makes the broker refuse them.
                    group, positions = offsets
                    await self._producer.send_offsets_to_transaction(positions, group)
                await self._producer.commit_transaction()
        except ProducerFenced as error:
            raise FencedError(self.transactional_id) from error
        except (KafkaError, IllegalOperation, TimeoutError, OSError) as error:
            raise UncertainError(f"{self.transactional_id}: {type(error).__name__}: {error}") from error
        offsets_of = {
            index: batch.appended.result().offset + number
            for batch in batches
            for number, index in enumerate(batch.indexes)
        }
        return [offsets_of[index] for index in range(len(emits))]

    async def _append(self, emits: Sequence[Emit]) -> list[_Batch]:
        """Hand the records to the producer, whole batches of a partition: one by one costs five times the CPU."""
        by_partition: dict[tuple[str, int | None], list[int]] = {}
        for index, emit in enumerate(emits):
            by_partition.setdefault((emit.topic, emit.partition), []).append(index)
        batches: list[_Batch] = []
        for (topic, partition), indexes in by_partition.items():
            at = 0
            while at < len(indexes):
                builder = self._producer.create_batch()
                began = at
                while at < len(indexes):
                    emit = emits[indexes[at]]
                    # None: it is full. The first record always fits.
                    if not builder.append(timestamp=None, key=emit.key, value=emit.value, headers=list(emit.headers)):
                        break
                    at += 1
                appended = await self._producer.send_batch(builder, topic, partition=partition)
                batches.append(_Batch(appended, indexes[began:at]))
        return batches

    async def close(self) -> None:
        """Let go without flushing: whatever was not committed is the successor's to repeat."""
        if self._made is not None:
            await let_go(self._made)


class Ownership:
    """One stage's hold on one input partition: fence, position, commit."""

    def __init__(
        self,
        kafka: Kafka,
        stage: str,
        tp: TopicPartition,
        *,
        epoch: Callable[[], str],
        outputs: Sequence[str] = (),
        several: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is taken yet; `several`: the stage reads several topics, so a partition's number names no hold."""
        self.kafka = kafka
        self.stage = stage
        self.tp = tp
        self._epoch = epoch
        self._outputs = outputs
        self._several = several
        self._clock = clock
        self._group = kafka.group(stage)
        self._producer: FencedProducer | None = None
        self.position = 0
        """The committed position: records below it are done."""
        self.host_began_right = True
        """Whether the group's committed offset, where hosts begin to read, is of this life of the topic."""

    @property
    def epoch(self) -> str:
        """The input topic's epoch."""
        return self._epoch()

    async def acquire(self) -> None:
        """Fence the predecessor, then read the position.

        Raises:
            KafkaError, TimeoutError, UncertainError or FencedError: not now; try again.
        """
        await self.release()
        parts = (self.tp.topic, self.tp.partition) if self._several else (self.tp.partition,)
        producer = FencedProducer(self.kafka, self.kafka.transactional_id(self.stage, *parts))
        await producer.open()
        self._producer = producer
        committed = await self.kafka.committed(self._group, self.tp)
        start, end = (await self.kafka.bounds([self.tp]))[self.tp]
        self.host_began_right = committed is not None and committed[1] == self.epoch
        if committed is None:
            self.position = await self._position_by_outputs()
            # Of a group that never was, nothing is lost: it begins where the log begins.
            if 0 < self.position < start:
                await self.skip_gap(self.position, start)
            self.position = max(start, self.position)
        elif committed[1] != self.epoch:
            log.warning("new epoch", stage=self.stage, topic=self.tp.topic, was=committed[1], now=self.epoch)
            self.position = start
        else:
            self.position = committed[0]
            if not start <= self.position <= end:
                await self.skip_gap(self.position, start if self.position < start else end)

    async def skip_gap(self, lost_from: int, resume_at: int) -> None:
        """Record that offsets of the input are gone (retention, or a truncated log), and go on behind them."""
        detail = f'{{"from": {lost_from}, "resume_at": {resume_at}}}'
        log.error("gap", stage=self.stage, topic=self.tp.topic, partition=self.tp.partition, detail=detail)
        letter = DeadLetter(
            origin=ids.origin(self.tp.topic, self.epoch, self.tp.partition, lost_from),
            camera_id="",
            stage=self.stage,
            kind="gap",
            error="Gap",
            message=f"{self.tp.topic}-{self.tp.partition}: offsets {lost_from} to {resume_at} cannot be read any more",
            attempt=1,
            headers={},
            detail=detail,
            failed_at=self.now_ms(),
        )
        await self.commit([codec.emit("dead_letters", letter)], resume_at)

    async def commit(self, emits: Sequence[Emit], position: int) -> None:
        """Results and position in one transaction. Cancelling it waits for what was sent, 5 s at most.

        Raises:
            FencedError or UncertainError: acquire again, if the partition is still ours.
        """
        assert self._producer is not None, "commit before acquire"
        partition = self.tp.partition
        placed = [e if e.partition is not None else e._replace(partition=partition) for e in emits]
        offsets = {self.tp: OffsetAndMetadata(position, self.epoch)}
        sending = asyncio.ensure_future(self._producer.transact(placed, offsets=(self._group, offsets)))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # whatever became of it, the successor reads the position
                await asyncio.wait_for(sending, 5)
            raise
        self.position = position

    async def release(self) -> None:
        """Let go of the partition; the next owner repeats what was not committed."""
        if self._producer is not None:
            producer, self._producer = self._producer, None
            await producer.close()

    def dead_letter(self, record: Incoming, error: BaseException, attempt: int) -> Emit:
        """The dead letter of a record that this stage cannot process.

        Of a redriven record it is one more of the same origin, with the bytes and headers as they first were.
        """
        known = error if isinstance(error, UnprocessableError) else None
        headers = record.original_headers
        inline = record.size + size_of(headers) <= DEAD_LETTER_INLINE
        detail = known.detail if known else ""
        letter = DeadLetter(
            origin=record.redriven or record.origin,
            camera_id=_text((known.camera_id if known else "") or _camera_of(record), _NAME),
            stage=self.stage,
            kind=known.kind if known else "error",
            error=type(error.__cause__ or error).__name__,
            message=_text(str(error), _MESSAGE),
            attempt=record.attempts + attempt,
            # Who asked for the record knows it by its key: that stays, cut where it is no name any more.
            key=record.key if inline or record.key is None else record.key[:_NAME],
            value=record.value if inline else None,
            # Above the limit the log itself is the claim: it names where the record lies, last.
            claim=None if inline else f"log:{record.origin}",
            headers=dict(headers) if inline else {},
            detail=_text(detail, _DETAIL) if len(detail) <= _DETAIL else "",
            failed_at=self.now_ms(),
        )
        return self.derived(codec.emit("dead_letters", letter), record)

    def derived(self, emit: Emit, record: Incoming) -> Emit:
        """Mark what a result was made from, unless it says so itself.

        Raises:
            UnprocessableError: the result is larger than the broker takes, or for a topic that is none of the outputs.
        """
        if self._outputs and emit.topic not in self._outputs and emit.topic != "dead_letters":
            raise UnprocessableError(f"{self.stage} may not append to {emit.topic}, only to {', '.join(self._outputs)}")
        if emit.size > MAX_RECORD_BYTES - 65_536:
            raise UnprocessableError(f"its result for {emit.topic} has {emit.size} bytes: more than a record holds")
        says = any(name == SOURCE for name, _ in emit.headers)
        headers = emit.headers if says else (*emit.headers, (SOURCE, record.origin.encode()))
        redrive = record.header(REDRIVE)
        if redrive is not None and len(redrive) <= _NAME:  # it names an origin; what is longer names none
            headers = (*headers, (REDRIVE, redrive))
        return emit._replace(headers=headers)

    def now_ms(self) -> int:
        """Wall time, milliseconds since the Unix epoch."""
        return int(self._clock() * 1000)

    async def _position_by_outputs(self) -> int:
        """The next offset after the newest one that an output or dead letter says it was made from; else 0.

        A group that was off for longer than the broker remembers offsets would else do everything again.
        """
        source = f"{self.tp.topic}:{self.epoch}:{self.tp.partition}:".encode()
        newest = -1
        for topic in (*self._outputs, *(("dead_letters",) if self._outputs else ())):
            tp = TopicPartition(topic, self.tp.partition)
            start, end = (await self.kafka.bounds([tp]))[tp]
            since = end
            found = -1
            tail = _TAIL
            while since > start and found < 0:
                since = max(start, end - tail)
                tail *= 4  # a long tail without a word of ours is read a third more than once
                for record in await self.kafka.read([tp], since={tp: since}):
                    header = record.header(SOURCE) or b""
                    if header.startswith(source) and self._is_ours(record):
                        found = max(found, int(header[len(source) :]))
            newest = max(newest, found)
        return newest + 1

    def _is_ours(self, record: Incoming) -> bool:
        """Whether this stage made it; of dead letters of one record another that reads the topic may have."""
        if record.topic != "dead_letters":
            return True
        letter = codec.decode_state(record, DeadLetter)
        return letter is not None and letter.stage == self.stage


def _camera_of(record: Incoming) -> str:
    """Data topics are keyed by camera; a key that is no text names none."""
    try:
        return (record.key or b"").decode()
    except UnicodeDecodeError:
        return ""


def _text(text: str, limit: int) -> str:
    """Somebody's text as a record can hold it: of bounded length, and without the half characters of JSON escapes."""
    return text[:limit].encode("utf-8", "replace").decode()

"""The work on one input partition: a buffer that can be rewound, and one worker for each shape of stage.

A worker runs from assignment to revocation. It acquires its partition at the first record, works, commits, and
after an error of unknown outcome acquires again and re-feeds itself from its buffer: no host has to seek.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from schemas.records import BatchState, SinkState
from streams import codec
from streams.delivery import Ownership, let_go
from streams.errors import FencedError, UnavailableError, UncertainError, UnprocessableError
from streams.kafka import Kafka
from streams.liveness import PartitionLife
from streams.messages import Emit, Incoming, Tick
from streams.metrics import StageMetrics
from streams.redrives import Redrives
from streams.stages import Fold, FoldStage, MapStage, Range, RangeStage, Stage
from streams.turns import Turns

log = structlog.get_logger(__name__)

# A partition stops fetching at either: what waits of 16 partitions of a stage then has at most 128 MB.
BUFFER_RECORDS = 1000
BUFFER_BYTES = 8 * 1024 * 1024

# One transaction's worth: a few hundred amortise its 8-35 ms (measured), and a repeat stays small.
_COMMIT_RECORDS = 500
_COMMIT_BYTES = 2 * 1024 * 1024

# Records of a partition that a map stage has taken at once, a transaction's worth. It works on `concurrency` of them.
_WINDOW = _COMMIT_RECORDS

# Bytes of them and of their results: behind one slow record all the others may be done. A buffer's worth is 128 frames
# of 64 KB. It begins no other record when the results alone are as large.
_WINDOW_BYTES = BUFFER_BYTES

# Results may wait for those of other records in work, a tenth longer than they took: a backlog's transactions then are
# fewer and larger, and a lone record's never waits. With a model that is quick (80 ms), a transaction for each result
# would cost a fifth of the machine.
_GATHER_SHARE = 0.1
_GATHER_S = 0.25

# Records that a task does before others get their turn: some milliseconds of a stage that never waits.
_TURN = 50

# An unexpected exception may be the world's fault; the third time it is the record's.
_ATTEMPTS = 3

TICK_EVERY_S = 5.0
TICK_SLOW_EVERY_S = 60.0
TICKS_UNANSWERED = 100
"""Ticks that have not come back before they slow down: detect is far behind, and more would only queue up."""


class Buffer:
    """Records of one partition from the committed position on; a cursor divides taken from waiting."""

    def __init__(self) -> None:
        self._records: deque[Incoming] = deque()
        self._cursor = 0
        self._waiting_bytes = 0
        self._floor = 0
        self.wake = asyncio.Event()
        """Set when something was added, or when a worker wants itself looked at."""

    def add(self, record: Incoming) -> None:
        """Append the next record as it was read. One that is here already, or done, is dropped.

        A host may begin below the position, and may read again what it has read.
        """
        if record.offset < self._floor or (self._records and record.offset <= self._records[-1].offset):
            return
        self._records.append(record)
        self._waiting_bytes += record.size
        self.wake.set()

    def prepend(self, records: Sequence[Incoming]) -> None:
        """Put earlier records in front; before `rewind`."""
        self._records.extendleft(reversed(records))

    @property
    def first_offset(self) -> int:
        """Offset of the first record; it must not be empty."""
        return self._records[0].offset

    def take(self, upto: int | None = None) -> Incoming | None:
        """The next waiting record, or None; with `upto` none of a higher offset."""
        if self._cursor >= len(self._records):
            return None
        record = self._records[self._cursor]
        if upto is not None and record.offset > upto:
            return None
        self._cursor += 1
        self._waiting_bytes -= record.size
        return record

    def committed(self, position: int) -> None:
        """Forget what lies below the position, and take no more of it."""
        self._floor = position
        while self._records and self._records[0].offset < position:
            record = self._records.popleft()
            if self._cursor:
                self._cursor -= 1
            else:
                self._waiting_bytes -= record.size

    def rewind(self, position: int) -> None:
        """Forget what lies below the position; everything else waits again."""
        self._cursor = 0
        self._waiting_bytes = sum(record.size for record in self._records)
        self.committed(position)

    @property
    def waiting(self) -> int:
        """Records not taken yet."""
        return len(self._records) - self._cursor

    @property
    def full(self) -> bool:
        """Whether the host should stop fetching for this partition."""
        return self.waiting >= BUFFER_RECORDS or self._waiting_bytes >= BUFFER_BYTES

    def __len__(self) -> int:
        return len(self._records)


class PartitionWorker:
    """Runs one stage on one partition until it is cancelled: acquire, work, and again after an error."""

    def __init__(
        self,
        stage: Stage,
        ownership: Ownership,
        life: PartitionLife,
        *,
        still_ours: Callable[[], Awaitable[bool]],
        slots: Turns,
        metrics: StageMetrics | None = None,
    ) -> None:
        self.stage = stage
        self.metrics = metrics or StageMetrics(stage)
        self.ownership = ownership
        self.redrives = Redrives(ownership, theirs=ownership.tp.topic in getattr(stage, "beside", ()))
        self.buffer = Buffer()
        self.life = life
        self.still_ours = still_ours
        self.slots = slots
        self.failures: dict[int, int] = {}
        """How often a record, by offset, ended a fold with an unexpected exception."""

    @property
    def partition(self) -> int:
        """The partition number."""
        return int(self.ownership.tp.partition)

    @property
    def where(self) -> dict[str, Any]:
        """What a log line about this partition carries."""
        return {"stage": self.stage.name, "topic": self.ownership.tp.topic, "partition": self.partition}

    async def run(self) -> None:
        """Work until cancelled."""
        failures = 0
        try:
            while True:
                while not len(self.buffer):
                    await self._wait()
                began = time.monotonic()
                self.life.hold(len(self.buffer))
                try:
                    await self.ownership.acquire()
                    self.redrives.forget()
                    self.life.waiting_on = None
                    await self._fill_front()
                    self.buffer.rewind(self.ownership.position)
                    await _work(self, self.stage)
                except FencedError:
                    self.metrics.fenced.add()
                    # Two causes: another owner, or the coordinator timed our transaction out. A zombie that
                    # re-opened would fence the rightful owner, so ask the group first.
                    await self._until_ours()
                except (UncertainError, KafkaError, TimeoutError, OSError) as error:
                    self.life.waiting_on = self.ownership.kafka.waiting_on
                    log.warning("acquiring again", **self.where, error=str(error))
                except codec.UnknownSchemaError as error:  # state: going on without it would do its work again
                    self.life.waiting_on = "settings"
                    log.error("waiting", **self.where, on="settings", why=str(error))  # noqa: TRY400
                except Exception:  # try again from the position; if that helps nothing, Liveness reports a stall
                    log.exception("unexpected", **self.where)
                failures = 1 if time.monotonic() - began > 60 else failures + 1
                await asyncio.sleep(random.uniform(0.1, 0.3) * min(2**failures, 20))
        finally:
            await self.ownership.release()

    async def _until_ours(self) -> None:
        """Wait while the partition is someone else's: until revoked, or until the group says that it is ours."""
        while not await self.still_ours():
            self.life.waiting_on = "group"
            log.warning("fenced by another owner", **self.where)
            await asyncio.sleep(2)

    async def _fill_front(self) -> None:
        """Read what lies between the position and what the host fed, where the host began too late.

        Hosts begin at the group's committed offset. Where that belongs to an earlier life of the topic, or
        was forgotten, the position is another one, and may lie before it.
        """
        if self.ownership.host_began_right:
            return
        tp, first = self.ownership.tp, self.buffer.first_offset
        if first > self.ownership.position:
            missing = await self.ownership.kafka.read(
                [tp], since={tp: self.ownership.position}, until={tp: first}, epoch=self.ownership.epoch
            )
            self.buffer.prepend(missing)

    async def commit(self, emits: Sequence[Emit], position: int) -> None:
        """Commit, forget what is done, and say so."""
        await self.ownership.commit(emits, position)
        self.buffer.committed(position)
        self.life.advanced(position, len(self.buffer))

    async def _wait(self, seconds: float | None = None) -> None:
        """Until there is something to do, or for so long; doing nothing for lack of records is progress too."""
        if not len(self.buffer):
            self.life.idle()
        self.buffer.wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.buffer.wake.wait()


async def _work(worker: PartitionWorker, stage: Stage) -> None:
    if isinstance(stage, MapStage):
        await _map(worker, stage)
    elif isinstance(stage, FoldStage):
        await _fold(worker, stage)
    else:
        await _range(worker, stage)


async def _map(worker: PartitionWorker, stage: MapStage) -> None:
    """Records in hand at once, results emitted in offset order."""
    running: deque[_InHand] = deque()
    hands = _Hands(worker, stage)
    next_offset = worker.ownership.position
    due: float | None = None
    try:
        while True:
            while len(running) < _WINDOW and not hands.full and (record := worker.buffer.take()) is not None:
                running.append(_InHand(record, hands.give(record), time.monotonic()))
            worker.life.hold(len(worker.buffer))
            if not running or not running[0].results.done():
                await worker._wait()  # noqa: SLF001 (one module)
                continue
            now = time.monotonic()
            due = due or now + min(_GATHER_S, _GATHER_SHARE * (now - running[0].taken_at))
            if now < due and not running[-1].results.done():
                await worker._wait(due - now)  # noqa: SLF001 (one module)
                continue
            due = None
            emits: list[Emit] = []
            done = taken = made = 0
            while running and running[0].results.done() and done < _COMMIT_RECORDS and made < _COMMIT_BYTES:
                record, results, _ = running.popleft()
                emits += worker.redrives.settled(record, results.result())
                made += _size(results.result())
                taken += record.size
                next_offset = record.offset + 1
                done += 1
            await worker.commit(emits, next_offset)
            hands.free(taken, made)
    finally:
        await hands.let_go()


class _InHand(NamedTuple):
    """A record that a map stage works on."""

    record: Incoming
    results: "asyncio.Future[list[Emit]]"
    taken_at: float
    """Seconds, monotonic."""


class _Hands:
    """The tasks that work on a partition's records: as many as are needed, `concurrency` at most.

    A task for each record would cost more than what most stages do with one. A task takes the next record when it is
    done with one, and calls for another task before it begins, in case it must wait: a stage that never waits has
    one more each turn. More tasks than slots would only queue up there, before those of other partitions.
    """

    def __init__(self, worker: PartitionWorker, stage: MapStage) -> None:
        self._worker = worker
        self._stage = stage
        self._todo: deque[tuple[Incoming, asyncio.Future[list[Emit]]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._called = False
        self._taken = 0
        self._made = 0

    @property
    def full(self) -> bool:
        """Whether records and results together are as large as they may become."""
        return self._taken + self._made >= _WINDOW_BYTES

    def give(self, record: Incoming) -> "asyncio.Future[list[Emit]]":
        """Work on the record; the future has its results."""
        results: asyncio.Future[list[Emit]] = asyncio.get_running_loop().create_future()
        self._todo.append((record, results))
        self._taken += record.size
        self._call()
        return results

    def free(self, taken: int, made: int) -> None:
        """So many bytes of records, and of their results, are out of hand."""
        self._taken -= taken
        self._made -= made
        self._call()

    async def let_go(self) -> None:
        """Cancel what runs, and wait for its end; whoever swallows that is told again, and gets no other record."""
        self._todo.clear()
        while running := [task for task in self._tasks if not task.done()]:
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=1)

    @property
    def _more(self) -> bool:
        """Whether to begin another record. The first in order has been begun when there are results."""
        return bool(self._todo) and self._made < _WINDOW_BYTES

    def _call(self) -> None:
        """One task more, unless one is on its way, or there are enough."""
        if self._more and not self._called and len(self._tasks) < self._worker.slots.slots:
            self._called = True
            self._tasks.add(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        self._called = False
        done = 0
        try:
            while self._more:
                record, results = self._todo.popleft()
                self._call()
                try:
                    made = await _handle(self._worker, self._stage, record)
                    self._made += _size(made)
                    results.set_result(made)
                except Exception as error:  # noqa: BLE001 (whoever takes the results gets it)
                    results.set_exception(error)
                self._worker.buffer.wake.set()
                done += 1
                if done % _TURN == 0:
                    await asyncio.sleep(0)
        finally:
            task = asyncio.current_task()
            assert task is not None, "this is a task"
            self._tasks.discard(task)


async def _handle(worker: PartitionWorker, stage: MapStage, record: Incoming) -> list[Emit]:
    """The record's results, or its dead letter."""
    if record.redriven is not None and await worker.redrives.is_done(record):
        return []
    attempt = 0
    pause = 0.2
    while True:
        try:
            async with worker.life.slot(worker.slots):
                began = time.perf_counter()
                results = await stage.handle(record)
                worker.metrics.handle_seconds.observe(time.perf_counter() - began)
            worker.life.waiting_on = None
            return [worker.ownership.derived(emit, record) for emit in results]
        except UnprocessableError as error:
            worker.life.waiting_on = None
            return [worker.ownership.dead_letter(record, error, attempt + 1)]
        except UnavailableError as error:
            worker.life.waiting_on = error.waiting_on
            log.warning("waiting", **worker.where, offset=record.offset, on=error.waiting_on, why=str(error))
        # An unknown failure is kept as a dead letter, never lost. A cancellation that nobody sent us is one too: a
        # library's own, which escaped it.
        except (Exception, asyncio.CancelledError) as error:
            if _told_to_end():
                raise
            attempt += 1
            log.exception("unexpected", **worker.where, offset=record.offset, origin=record.origin, attempt=attempt)
            if attempt >= _ATTEMPTS:
                worker.life.waiting_on = None
                return [worker.ownership.dead_letter(record, error, attempt)]
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(pause * 2, 10.0)


def _told_to_end() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _size(emits: Sequence[Emit]) -> int:
    """Bytes of the values."""
    return sum([len(emit.value or b"") for emit in emits])


async def _fold(worker: PartitionWorker, stage: FoldStage) -> None:
    """Records one after another into windows; snapshots commit with what closed."""
    ownership = worker.ownership
    states = await read_states(ownership.kafka, stage.state_topic, worker.partition, ownership.epoch)
    fold = stage.open(worker.partition, ownership.epoch, states)
    next_offset = ownership.position
    pulse = _Pulse(worker, stage, fold)
    ticker = asyncio.create_task(pulse.run())
    try:
        while True:
            emits: list[Emit] = []
            taken = 0
            while taken < _COMMIT_RECORDS and (record := worker.buffer.take()) is not None:
                taken += 1
                next_offset = record.offset + 1
                if Tick.of(record) is not None:
                    pulse.unanswered = 0
                if record.redriven is not None and await worker.redrives.is_done(record):
                    continue
                emits += worker.redrives.settled(record, _feed(worker, fold, record))
            if taken:
                emits += [codec.emit(stage.state_topic, state) for state in fold.moved(next_offset)]
                await worker.commit(emits, fold.position(next_offset))
                # An open window holds the position back; the records it keeps are no sign of a stall.
                worker.life.hold(worker.buffer.waiting)
            else:
                worker.buffer.wake.clear()
                worker.life.idle()
                await worker.buffer.wake.wait()
    finally:
        ticker.cancel()
        await asyncio.gather(ticker, return_exceptions=True)


def _feed(worker: PartitionWorker, fold: Fold, record: Incoming) -> list[Emit]:
    """What closed by the record, or its dead letter. After an unexpected exception the fold is of no use."""
    failures = worker.failures.pop(record.offset, 0)
    if failures >= _ATTEMPTS:
        error = UnprocessableError(f"failed {failures} times, see the log")
        return [worker.ownership.dead_letter(record, error, failures)]
    try:
        began = time.perf_counter()
        results = fold.feed(record)
        worker.metrics.handle_seconds.observe(time.perf_counter() - began)
        return [worker.ownership.derived(emit, record) for emit in results]
    except UnprocessableError as error:
        return [worker.ownership.dead_letter(record, error, failures + 1)]
    except Exception:
        worker.failures[record.offset] = failures + 1
        raise


class _Pulse:
    """Wall time as an event, while a window of the partition is open: at takeover, then every 5 s.

    It enters at the head of the road, so that ticks come down in order behind the frames before them. Doubled
    or old ticks are harmless, so a plain idempotent producer outside any transaction does.
    """

    def __init__(self, worker: PartitionWorker, stage: FoldStage, fold: Fold) -> None:
        self._worker = worker
        self._stage = stage
        self._fold = fold
        self.unanswered = 0
        """Ticks sent since one came back."""

    async def run(self) -> None:
        """Tick until cancelled; a broker that is away is the worker's affair, not the pulse's."""
        while True:
            try:
                await self._run()
            except Exception as error:  # noqa: BLE001 (without ticks windows would close only when frames come)
                log.warning("tick not sent", partition=self._worker.partition, error=repr(error))
                await asyncio.sleep(TICK_EVERY_S)

    async def _run(self) -> None:
        producer: AIOKafkaProducer | None = None
        try:
            while True:
                if self._fold.open_windows:
                    if producer is None:
                        producer = self._worker.ownership.kafka.producer()
                        await producer.start()
                    tick = Tick(self._worker.ownership.now_ms()).emit(self._stage.tick_topic, self._worker.partition)
                    await producer.send_and_wait(
                        tick.topic,
                        key=tick.key,
                        value=None,
                        headers=list(tick.headers),
                        partition=tick.partition,
                    )
                    self.unanswered += 1
                await asyncio.sleep(TICK_EVERY_S if self.unanswered < TICKS_UNANSWERED else TICK_SLOW_EVERY_S)
        finally:
            if producer is not None:
                await let_go(producer)


async def _range(worker: PartitionWorker, stage: RangeStage) -> None:
    """Commit a range, insert exactly it, commit the progress; a pending range of a predecessor comes first."""
    ownership, buffer = worker.ownership, worker.buffer
    pending = await _pending(worker, stage)
    records = [] if pending is None else await _retake(worker, pending)
    while True:
        if pending is None:
            await _gather(worker, stage)
            pending, records = _cut(worker, stage)
            await ownership.commit([codec.emit(stage.state_topic, pending)], ownership.position)
        span = Range(pending.topic, pending.epoch, pending.partition, pending.lo, pending.hi)
        await _insert(worker, stage, span, records)
        done = pending.hi + 1
        if buffer.full:  # catching up: one transaction ends this range and begins the next
            pending, records = _cut(worker, stage)
            await worker.commit([codec.emit(stage.state_topic, pending)], done)
        else:
            await worker.commit([], done)
            pending = None


async def _gather(worker: PartitionWorker, stage: RangeStage) -> None:
    """Until there is a range's worth, or `linger_s` after there was something."""
    buffer = worker.buffer
    while not buffer.waiting:
        await worker._wait()  # noqa: SLF001 (one module)
    worker.life.hold(len(buffer))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(stage.linger_s):
            while not buffer.full and buffer.waiting < stage.max_records:
                buffer.wake.clear()
                await buffer.wake.wait()


def _cut(worker: PartitionWorker, stage: RangeStage) -> tuple[SinkState, list[Incoming]]:
    """The next range, and its records; something must be waiting."""
    tp = worker.ownership.tp
    records = _take_range(worker.buffer, stage.max_records)
    lo, hi = records[0].offset, records[-1].offset
    state = SinkState(
        topic=tp.topic, partition=tp.partition, epoch=worker.ownership.epoch, lo=lo, hi=hi, rows=len(records)
    )
    return state, records


async def _pending(worker: PartitionWorker, stage: RangeStage) -> SinkState | None:
    """The range that a predecessor committed itself to and may or may not have inserted."""
    ownership = worker.ownership
    found: SinkState | None = None
    key = f"{ownership.tp.topic}-{ownership.tp.partition}".encode()
    for record in await ownership.kafka.read([TopicPartition(stage.state_topic, worker.partition)]):
        if record.key == key:
            found = codec.decode_state(record, SinkState) or found
    if found is None or found.epoch != ownership.epoch or found.hi < ownership.position:
        return None
    return found


def _take_range(buffer: Buffer, limit: int) -> list[Incoming]:
    records: list[Incoming] = []
    size = 0
    while len(records) < limit and size < BUFFER_BYTES and (record := buffer.take()) is not None:
        records.append(record)
        size += record.size
    return records


async def _retake(worker: PartitionWorker, pending: SinkState) -> list[Incoming]:
    """Exactly the records of the pending range, as they come in again."""
    buffer = worker.buffer
    records: list[Incoming] = []
    # A waiting record that `upto` holds back lies behind the range: what is missing of it is gone.
    while not records or records[-1].offset < pending.hi:
        record = buffer.take(upto=pending.hi)
        if record is not None:
            if record.offset >= pending.lo:
                records.append(record)
        elif buffer.waiting:
            break
        else:
            buffer.wake.clear()
            await buffer.wake.wait()
    if len(records) != pending.rows:
        # Retention removed a part of it meanwhile. If the whole was inserted before, the token drops the rest.
        log.error(
            "range changed", topic=pending.topic, partition=pending.partition, rows=len(records), was=pending.rows
        )
    return records


async def _insert(worker: PartitionWorker, stage: RangeStage, span: Range, records: Sequence[Incoming]) -> None:
    pause = 0.2
    while True:
        try:
            async with worker.life.slot(worker.slots):
                began = time.perf_counter()
                await stage.insert(span, records)
                worker.metrics.handle_seconds.observe(time.perf_counter() - began)
        except UnavailableError as error:
            worker.life.waiting_on = error.waiting_on
            log.warning("waiting", **worker.where, offset=span.lo, on=error.waiting_on, why=str(error))
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 10.0)
        else:
            worker.life.waiting_on = None
            return


async def read_states(kafka: Kafka, topic: str, partition: int, epoch: str) -> list[BatchState]:
    """The newest snapshot of each camera of a partition; those of another epoch are empty, so left out."""
    newest: dict[str, BatchState] = {}
    for record in await kafka.read([TopicPartition(topic, partition)]):
        state = codec.decode_state(record, BatchState)
        if state is not None:
            newest[state.camera_id] = state
    return [state for state in newest.values() if state.epoch == epoch]

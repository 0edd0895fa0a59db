"""What a stage is to its host: one of three shapes, each with its own way of making results from records.

`MapStage`     one record in, its results out, any number at once, emitted in order (detect, enrich, analyze)
`FoldStage`    records of a partition fold, one after another, into windows and a state (batch)
`RangeStage`   ranges of records are written to a store that deduplicates by token (sink)

A stage never sees Kafka: it is given records and gives back records. Each `processors/<stage>/stage.py` has a
function `build(...)` that makes one.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from schemas.records import BatchState
from streams.messages import Emit, Incoming


@runtime_checkable
class MapStage(Protocol):
    """One record in, its results out.

    One that reads several topics may have `at_once(topic)`, which divides `concurrency` among them, so that what is
    slow on one topic holds up nothing on another; and `beside`, those of its inputs that belong to another stage: what
    is redriven there is that stage's affair alone.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """What it may append to, besides `dead_letters`. Their tails tell the position when the group's offsets were
    forgotten."""

    @property
    def concurrency(self) -> int:
        """Records in hand at once, in the whole process. It may change: it is asked for each."""

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        """The record's results. It may be cancelled at any await, and called again for the same record.

        Raises:
            UnprocessableError: it becomes a dead letter.
            UnavailableError: it is tried again, without limit; `waiting_on` says why nothing moves.
        """

    async def close(self) -> None:
        """Let go of models, clients and threads."""


class Fold(Protocol):
    """The state of one partition of a `FoldStage`. Pure: time comes in as ticks."""

    def feed(self, record: Incoming) -> Sequence[Emit]:
        """Take the next record, in offset order; return what closed by it.

        Raises:
            UnprocessableError: it becomes a dead letter; the state is as before.
        """

    def position(self, next_offset: int) -> int:
        """The offset from which a successor must be fed, when `next_offset` is the next unread one."""

    def moved(self, next_offset: int) -> Sequence[BatchState]:
        """The snapshots that changed since the last call, to be committed with the results."""

    @property
    def open_windows(self) -> int:
        """How many windows are open: while there are any, the host sends ticks."""


@runtime_checkable
class FoldStage(Protocol):
    """Records of a partition fold, one after another, into windows."""

    name: str
    inputs: tuple[str, ...]
    state_topic: str
    tick_topic: str
    """Where the host's ticks enter: the head of the road, so that they come down in order with the records."""

    def open(self, partition: int, epoch: str, states: Sequence[BatchState]) -> Fold:
        """The fold of one partition, from its cameras' snapshots: one each, the newest, of this epoch."""


class Range(NamedTuple):
    """A committed range of one partition: what a sink may insert, under exactly this token."""

    topic: str
    epoch: str
    partition: int
    lo: int
    hi: int

    def token(self, table: str) -> str:
        """ClickHouse's `insert_deduplication_token` for this range and table."""
        return f"v1:{table}:{self.topic}:{self.epoch}:{self.partition}:{self.lo}-{self.hi}"


@runtime_checkable
class RangeStage(Protocol):
    """Ranges of records are written to a store that deduplicates by token."""

    name: str
    inputs: tuple[str, ...]
    state_topic: str
    linger_s: float
    """How long to gather a range, seconds: fewer, larger inserts against fresher tables."""
    max_records: int
    """The longest range, records."""

    async def insert(self, span: Range, records: Sequence[Incoming]) -> None:
        """Insert exactly these rows under the span's tokens; a repetition changes nothing.

        Raises:
            UnavailableError: the store is away; the same range is tried again, without limit.
        """

    async def close(self) -> None:
        """Let go of the client."""


Stage = MapStage | FoldStage | RangeStage

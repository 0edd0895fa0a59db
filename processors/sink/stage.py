"""The sink as a stage: each range goes to `log`, to its topic's typed table, and then to `sink_progress`."""

import time
from collections.abc import Callable, Sequence

import structlog

from processors.sink import core
from processors.sink.core import Block
from processors.sink.metrics import SinkMetrics
from processors.sink.store import ClickHouseStore, Store
from processors.store.connection import RefusedError
from processors.store.settings import ClickHouseSettings
from streams.messages import Incoming
from streams.stages import Range
from streams.topics import STORED

log = structlog.get_logger(__name__)

# Half a second keeps tables fresh enough to watch; each insert is a part on disk that has to be merged.
LINGER_S = 0.5

# The host's buffer holds 1,000 records of a partition; this bounds what one insert can become, should it grow.
MAX_RECORDS = 5000


class SinkStage:
    """A `RangeStage`. A range that was inserted before, wholly or in part, changes nothing the second time."""

    name = "sink"
    inputs = STORED
    state_topic = "sink_state"
    linger_s = LINGER_S
    max_records = MAX_RECORDS

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self.metrics = SinkMetrics()

    async def insert(self, span: Range, records: Sequence[Incoming]) -> None:
        """Insert the range's rows under its tokens.

        Rows that the typed table refuses stay in `log`, with the reason in `decode_error`.

        Raises:
            UnavailableError: the store is away; the same range may be inserted again.
        """
        rows = core.rows(span, records)
        await self._insert(rows.log, span.token("log"))
        refused = await self.typed(rows.typed, span.token(rows.typed.table))
        progress = rows.progress
        if refused:
            self.metrics.refused.add(rows.typed.table, by=len(refused))
            log.error("refused", topic=span.topic, partition=span.partition, offsets=sorted(refused))
            kept = [record for record in records if record.offset in refused]
            # `log` keeps the newest of two rows of one position.
            await self._insert(
                core.log_rows(kept, [refused[record.offset] for record in kept], [False] * len(kept)),
                span.token("log.refused"),
            )
            progress.columns["undecodable"][0] += len(refused)
        await self._insert(progress, span.token("sink_progress"))

    async def _insert(self, block: Block, token: str) -> None:
        began = time.perf_counter()
        await self._store.insert(block, token)
        self.metrics.insert_seconds.observe(time.perf_counter() - began)
        self.metrics.rows.add(block.table, by=len(block))
        # The rule of columns makes these of what a result's age counts from: see `Emit.since`.
        since = block.columns.get("arrived_at") or block.columns.get("ended_at")
        if since:
            self.metrics.oldest_row_seconds.observe_age(min(since), self._clock())

    async def typed(self, block: Block, token: str) -> dict[int, str]:
        """Insert typed rows; the reason by offset for those that are refused, found by halving."""
        if not len(block):
            return {}
        try:
            await self._insert(block, token)
        except RefusedError as error:
            if len(block) == 1:
                return {block.columns["offset"][0]: f"refused by table {block.table}: {error}"}
            middle = len(block) // 2
            # Halves have tokens of their own: the whole may be refused again, or taken, when it is repeated.
            halves = {"a": block.part(0, middle), "b": block.part(middle, len(block))}
            return {
                offset: reason
                for name, half in halves.items()
                for offset, reason in (await self.typed(half, f"{token}{name}")).items()
            }
        return {}

    async def close(self) -> None:
        """Let go of the store."""
        await self._store.close()


def build(settings: ClickHouseSettings) -> SinkStage:
    """The stage over the ClickHouse of the settings."""
    return SinkStage(ClickHouseStore(settings))

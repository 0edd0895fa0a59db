"""New windows of recorded detections: what other window settings would have made of the history.

No detector takes part: everything that it saw with a score of 0.10 or more is on record, and the ticks that closed
windows are, too. They are folded as live work folds them (`folding.py`), so under the settings that were in force the
cut makes the very windows that were recorded.

*Where it begins.* A window depends on what came before it: on boxes that have stood still, on the window that was open,
on the last fast close, on the camera's event time. So a scope with a beginning is read from an hour before it on, or
from a day before, or from the start: until each of its cameras has settled before the scope begins. A camera's event
time is asked of ClickHouse. Once nothing that matters was seen for longer than a window stays open and the fast path
rests, and five records have gone by, the camera makes the same windows as if everything had been read.

*Where it ends.* At the bound of the plan; with `until`, when each window that began before is closed. What is still
open at the bound is no window yet: it is counted.

*Each window once.* Frames that were taken in again by another life of the log make the same window, by its id, in
each of them: it is given where it comes first.
"""

import asyncio
import heapq
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

import msgspec

from processors.enrich.stage import context
from processors.replay.folding import Folding, Taken, UnsettledError
from processors.replay.history import Skips
from processors.replay.plan import Bound, Plan, PlanError, offsets
from processors.replay.recording import CHUNK, InForce, Recording, Start
from processors.store.queries import Queries
from schemas import avro_schemas
from schemas.records import Batch, BatchState, Camera, Context, Detections, WindowSettings
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import FINGERPRINT, Incoming, Tick

T = TypeVar("T")

# A driveway is quiet for two minutes within most hours, and within nearly every day.
_BACK_MS = (3_600_000, 86_400_000)

# Records folded before others of the process get their turn: some 15 ms.
_TURN = 500

# Windows asked after at once: their ids go in the query's address, which is short.
_PAGE = 200


class Cut:
    """The windows that a plan's change makes of recorded detections, or of `remade` ones.

    `skipped`, `open` and `records` are complete when the last window was given.
    """

    def __init__(
        self, store: Queries, plan: Plan, default: WindowSettings, remade: Mapping[str, bytes] | None = None
    ) -> None:
        """Prepare.

        Args:
            store: where the history is.
            plan: its scope, change and bounds.
            default: the window settings of cameras that have none of their own.
            remade: by frame id, framed `Detections` to take instead of the recorded ones, in their places; a frame
                that has none is left out.

        Raises:
            PlanError: the scope chooses by a condition on events, and windows that are made anew have none.
        """
        if plan.scope.where.strip():
            raise PlanError(
                "--where chooses among recorded events, and this replay makes windows anew, which have none: "
                "choose by --since, --until and --camera"
            )
        self.skipped = Skips()
        """Records that could not be read, and windows that cannot be told of."""
        self.open: list[str] = []
        """Cameras with a window of the scope that is open where the history ends."""
        self.records = 0
        """Records and ticks that were folded."""
        self._recording = Recording(store)
        self._plan = plan
        self._default = default
        self._remade = remade
        self._cameras: dict[str, list[Camera]] | None = None

    async def windows(self) -> AsyncGenerator[Context, None]:
        """The windows, each partition's in the order in which they closed; partitions take turns. Always the same.

        Each comes once, whichever lives of the log hold its frames. To know that, all their ids are kept, some 150
        bytes each.

        Raises:
            UnavailableError: ClickHouse is away.
        """
        sample = self._plan.scope.sample
        chosen = await self._drawn(sample) if sample is not None else None
        async with aclosing(self._all()) as made:
            async for window in made:
                if chosen is None or window.batch_id in chosen:
                    yield window

    async def _drawn(self, count: int) -> frozenset[str]:
        """The ids of a sample: which they are, only all windows tell."""
        best: list[tuple[int, str]] = []
        async with aclosing(self._all()) as made:
            batches = [window.batch_id async for window in made]
        for page in _pages(batches):
            draws = await self._recording.draws(page)
            best = heapq.nsmallest(count, [*best, *zip(draws, page, strict=True)])
        return frozenset(batch for _, batch in best)

    async def _all(self) -> AsyncGenerator[Context, None]:
        self.open, self.records = [], 0
        if self._cameras is None:
            self._cameras = await self._recording.cameras()
        given: set[str] = set()
        partitions = [self._partition(bound, given) for bound in offsets(self._plan.upto, "detections")]
        try:
            while partitions:
                for partition in tuple(partitions):
                    try:
                        yield await anext(partition)
                    except StopAsyncIteration:
                        partitions.remove(partition)
        finally:
            for partition in partitions:
                await partition.aclose()

    async def _partition(self, bound: Bound, given: set[str]) -> AsyncGenerator[Context, None]:
        """The windows of one partition that no partition has `given`."""
        in_force = await self._recording.in_force(bound, self._cameras or {})
        for back_ms in self._backs():
            try:
                async with aclosing(self._from(bound, in_force, back_ms)) as made:
                    async for window in made:
                        if window.batch_id not in given:
                            given.add(window.batch_id)
                            yield window
            except UnsettledError:
                continue
            return

    def _backs(self) -> Sequence[int | None]:
        """How far before the scope to begin, milliseconds; None is from the start."""
        if self._plan.scope.since is None:
            return (None,)
        return (*_BACK_MS, None)

    async def _from(self, bound: Bound, in_force: InForce, back_ms: int | None) -> AsyncGenerator[Context, None]:
        """The windows of one partition, read from so long before the scope on.

        Raises:
            UnsettledError: that is not long enough.
        """
        scope, recording = self._plan.scope, self._recording
        starts: dict[str, Start] = {}
        if scope.since is not None:
            starts = await recording.starts(bound, scope.since, scope.cameras, back_ms or 0)
        lo, taken = await self._beginning(bound, starts) if back_ms is not None else (0, [])
        ends = await recording.starts(bound, scope.until, scope.cameras) if scope.until is not None else {}
        last = max((end.last if end.first is None else end.first for end in ends.values()), default=None)
        folding = Folding(bound, self._plan, self._default, in_force, lo=lo, taken=taken)
        skipped, records = Skips(), 0
        complete = scope.since is not None and all(start.first is None for start in starts.values())
        while not complete:
            chunk = await recording.records(bound, lo, scope.cameras, CHUNK)
            closed: list[Batch] = []
            for index, record in enumerate(self._looked_again(chunk)):
                closed += folding.feed(record)
                if index % _TURN == _TURN - 1:
                    await asyncio.sleep(0)
            async with aclosing(self._told(closed, in_force, skipped)) as made:
                async for window in made:
                    yield window
            if not chunk:
                self.open += [state.camera_id for state in folding.open() if self._is_due(state, starts, ends)]
                break
            records += len(chunk)
            lo = chunk[-1].offset + 1
            complete = last is not None and folding.position(lo) > last
        for name, why in (folding.rejected | skipped.named).items():
            self.skipped.add(name, why)
        self.records += records

    async def _beginning(self, bound: Bound, starts: Mapping[str, Start]) -> tuple[int, list[Taken]]:
        """The first offset to read, and the cameras as they are taken up there."""
        begins = {camera: start.begin for camera, start in starts.items() if start.first is not None}
        before = await self._recording.event_times(bound, begins)
        taken = [
            Taken(
                BatchState(
                    camera_id=camera,
                    epoch=bound.epoch,
                    resume_offset=begins[camera],
                    event_at=event_at,
                    fast_closed_at=None,
                    recent=(),
                    settings=None,
                ),
                starts[camera].first if self._remade is None else None,
            )
            for camera, event_at in before.items()
        ]
        return min(begins.values(), default=0), taken

    def _looked_again(self, records: Sequence[Incoming]) -> Iterator[Incoming]:
        """The records with what another detector saw, where one looked."""
        if self._remade is None:
            yield from records
            return
        fingerprint = avro_schemas.fingerprint("detections")
        for record in records:
            if Tick.of(record) is not None:
                yield record
                continue
            try:
                frame = codec.decode(record, Detections).frame_id
            except codec.DecodeError:
                continue  # whoever looked again has named it
            value = self._remade.get(frame)
            if value is not None:
                yield record._replace(value=value, headers=((FINGERPRINT, fingerprint),))

    async def _told(self, batches: Sequence[Batch], in_force: InForce, skipped: Skips) -> AsyncGenerator[Context, None]:
        """The windows with what enrich says of them: what it said, where it met them, else what it would have."""
        for page in _pages(batches):
            told = await self._recording.told(self._plan.upto, [batch.batch_id for batch in page])
            for batch in page:
                said = told.get(batch.batch_id)
                try:
                    if said is not None:
                        yield msgspec.structs.replace(context(batch, None), **said._asdict())
                    else:
                        yield context(batch, in_force.at(batch.camera_id, batch.closed_at_offset))
                except UnprocessableError as error:
                    skipped.add(batch.batch_id, str(error))

    def _is_due(self, state: BatchState, starts: Mapping[str, Start], ends: Mapping[str, Start]) -> bool:
        """Whether an open window is the scope's."""
        start, end = starts.get(state.camera_id), ends.get(state.camera_id)
        began = self._plan.scope.since is None or (
            start is not None and start.first is not None and state.resume_offset >= start.first
        )
        return began and (end is None or end.first is None or state.resume_offset < end.first)


def _pages(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + _PAGE] for start in range(0, len(items), _PAGE))

"""Recorded frames before another detector, and the windows that its detections make.

Each frame that was ever detected is looked at again by detect's own stage, and what was seen is kept as a unit of kind
`detect` on the frame's partition. So a replay that was killed has not to look again. Then the windows are cut as they
would be from the recorded detections, with the new ones in their places and the ticks where they were.

A frame whose bytes are gone or corrupt is left out, counted and named. Before a scope that has a beginning as many
frames are looked at as the longest window and the fast path reach back, and none more: what stood still before that
is not remembered.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from itertools import chain
from typing import NamedTuple

import structlog

from processors.detect.stage import DetectStage
from processors.replay.cut import Cut
from processors.replay.desk import Log
from processors.replay.folding import quiet_ms
from processors.replay.history import MadeWindows, Skips, Window
from processors.replay.plan import Bound, Plan, Unit, offsets
from processors.replay.recording import CHUNK, Recording
from processors.replay.replaced import own_time
from processors.store.queries import Queries
from schemas.records import Camera, Detections, ReplayUnit, WindowSettings
from streams import codec
from streams.errors import UnavailableError, UnprocessableError
from streams.messages import Emit, Incoming, Tick

log = structlog.get_logger(__name__)

PAGE = 64
"""Frames read, looked at and appended at once: 4 MB of images at most, a transaction for some seconds of a CPU."""


class Chunk(NamedTuple):
    """Units of frames of one partition."""

    partition: int
    units: list[ReplayUnit]


class Redetection:
    """Looks again at the frames of a plan. `looked` and `skipped` grow as it does."""

    def __init__(
        self,
        store: Queries,
        plan: Plan,
        default: WindowSettings,
        open_stage: Callable[[], Awaitable[DetectStage]],
        *,
        replay_id: str,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        """Prepare.

        Args:
            store: where the history is.
            plan: its scope and bounds.
            default: the window settings of cameras that have none of their own.
            open_stage: makes detect with the other detector, when there is a frame to look at; it is closed here.
            replay_id: the replay that the units are of.
            wall: milliseconds since the Unix epoch.
        """
        self.skipped = Skips()
        self.looked = 0
        """Frames that were looked at."""
        self._recording = Recording(store)
        self._plan = plan
        self._default = default
        self._open_stage = open_stage
        self._id = replay_id
        self._wall = wall

    async def chunks(self, known: Callable[[str], bool]) -> AsyncGenerator[Chunk, None]:
        """What it sees in frames whose id is not known yet, in the order in which they were recorded.

        Each is looked at once, also where several records of it are there: another life of the log took it in again,
        or its record was redriven.

        Raises:
            UnavailableError: ClickHouse, the image store or the detector's service is away.
        """
        stage: DetectStage | None = None
        try:
            async with aclosing(self._pages(known)) as pages:
                async for partition, page in pages:
                    stage = stage or await self._open_stage()
                    units = await self._look(stage, page)
                    if units:
                        yield Chunk(partition, units)
        finally:
            if stage is not None:
                await stage.close()

    async def _pages(self, known: Callable[[str], bool]) -> AsyncGenerator[tuple[int, list[Detections]], None]:
        """Recorded detections of frames that are not known, by partition."""
        reach = _reach_ms(self._plan, self._default, await self._recording.cameras())
        met: set[str] = set()
        for bound in offsets(self._plan.upto, "detections"):
            async with aclosing(self._recorded(bound, reach)) as pages:
                async for seen in pages:
                    todo = list(_first_met(seen, known, met))
                    for start in range(0, len(todo), PAGE):
                        yield bound.partition, todo[start : start + PAGE]

    async def _recorded(self, bound: Bound, reach_ms: int) -> AsyncGenerator[list[Detections], None]:
        """The detections that were recorded of the scope's frames."""
        scope = self._plan.scope
        since = None if scope.since is None else scope.since - reach_ms
        until = None if scope.until is None else scope.until + reach_ms
        lo, last = 0, bound.offset
        if since is not None:
            starts = await self._recording.starts(bound, since, scope.cameras)
            lo = min((start.first for start in starts.values() if start.first is not None), default=bound.offset)
        if until is not None:
            ends = await self._recording.starts(bound, until, scope.cameras)
            last = max((end.last if end.first is None else end.first for end in ends.values()), default=0)
        while lo <= last and (records := await self._recording.records(bound, lo, scope.cameras, CHUNK)):
            lo = records[-1].offset + 1
            yield [
                seen
                for seen in self._decoded(records)
                if (since is None or own_time(seen) >= since) and (until is None or own_time(seen) < until)
            ]

    def _decoded(self, records: Sequence[Incoming]) -> Iterator[Detections]:
        for record in records:
            if Tick.of(record) is None:
                try:
                    yield codec.decode(record, Detections)
                except codec.DecodeError as error:
                    self.skipped.add(record.origin, f"cannot be read: {error}")

    async def _look(self, stage: DetectStage, seen: Sequence[Detections]) -> list[ReplayUnit]:
        frames = await self._recording.frames([(one.camera_id, one.frame_id) for one in seen])
        found: list[tuple[Detections, Incoming]] = []
        for one in seen:
            frame = frames.get(one.frame_id)
            if frame is None:
                self.skipped.add(one.frame_id, "its record is not in ClickHouse any more (table `log`)")
            else:
                found.append((one, frame))
        results = await asyncio.gather(*(stage.handle(frame) for _, frame in found), return_exceptions=True)
        units, unexpected = [], []
        for (one, _), result in zip(found, results, strict=True):
            if isinstance(result, UnprocessableError):
                self.skipped.add(one.frame_id, str(result))
            elif isinstance(result, UnavailableError) or not isinstance(result, Exception | Sequence):
                raise result
            elif isinstance(result, Exception):
                unexpected.append(result)
                self.skipped.add(one.frame_id, f"the detector failed on it: {result!r}")
            else:
                units.append(self._unit(one, result[0]))
        if unexpected and not units:
            raise unexpected[0]  # all of them: it is not the pictures' fault
        self.looked += len(units)
        return units

    def _unit(self, seen: Detections, made: Emit) -> ReplayUnit:
        return ReplayUnit(
            unit_id=str(Unit(self._id, seen.frame_id)),
            replay_id=self._id,
            camera_id=seen.camera_id,
            kind="detect",
            payload=made.value or b"",
            created_at=self._wall(),
        )


class RemadeLog:
    """A replay's log, whose units of kind `detect` are kept here and shown to nobody else.

    A frame takes some 0.5 KB of memory: a million of them, half a GB.
    """

    def __init__(self, inner: Log, replay_id: str) -> None:
        self.made: dict[str, bytes] = {}
        """Framed `Detections` by frame id."""
        self.forgotten = False
        """Whether the beginning of the replay is gone: frames of then are looked at again."""
        self._inner = inner
        self._mark = f"{replay_id}:".encode()

    async def open(self) -> None:
        """As `Log.open`."""
        self.made.clear()
        await self._inner.open()
        self.forgotten = self._inner.forgotten

    async def history(self) -> AsyncIterator[list[Incoming]]:
        """What is there, without what was seen in frames."""
        async for records in self._inner.history():
            yield self._take(records)

    async def news(self, wait_s: float) -> list[Incoming]:
        """What has come since, without what was seen in frames."""
        return self._take(await self._inner.news(wait_s))

    async def append(self, emits: Sequence[Emit]) -> None:
        """As `Log.append`."""
        await self._inner.append(emits)

    async def close(self) -> None:
        """As `Log.close`."""
        await self._inner.close()

    def _take(self, records: Sequence[Incoming]) -> list[Incoming]:
        return [record for record in records if not self._is_seen(record)]

    def _is_seen(self, record: Incoming) -> bool:
        if record.topic != "replay_units" or not (record.key or b"").startswith(self._mark):
            return False
        try:
            unit = codec.decode(record, ReplayUnit)
        except codec.DecodeError:
            return False  # whoever reads it says so
        if unit.kind != "detect":
            return False
        self.made.setdefault(unit.unit_id.removeprefix(self._mark.decode()), unit.payload)
        return True


class RemadeWindows:
    """The windows of a replay with another detector: first it looks, then they are cut. A planner's `Windows`."""

    def __init__(
        self, store: Queries, plan: Plan, default: WindowSettings, redetection: Redetection, kept: RemadeLog
    ) -> None:
        self._redetection = redetection
        self._kept = kept
        self._store = store
        self._cut = Cut(store, plan, default, kept.made)
        self._cut.skipped = redetection.skipped

    @property
    def skipped(self) -> Skips:
        """Frames and records that were left out."""
        return self._redetection.skipped

    async def count(self) -> int | None:
        """Only looking tells."""
        return None

    async def pages(self, known: Callable[[str], bool]) -> AsyncIterator[list[Window]]:
        """Empty ones while it looks, so that its caller can stop it; then the windows.

        Raises:
            UnavailableError: ClickHouse, the image store or the detector's service is away.
            FencedError, UncertainError: as `Log.append`.
        """
        kept = self._kept
        async with aclosing(self._redetection.chunks(kept.made.__contains__)) as chunks:
            async for partition, units in chunks:
                await kept.append([codec.emit("replay_units", unit, partition) for unit in units])
                kept.made.update((unit.unit_id.partition(":")[2], unit.payload) for unit in units)
                yield []
        async for page in MadeWindows(self._store, self._cut).pages(known):
            yield page


def _first_met(seen: Sequence[Detections], known: Callable[[str], bool], met: set[str]) -> Iterator[Detections]:
    """Those of frames that are not known and were not met before; they join `met`."""
    for one in seen:
        if one.frame_id not in met and not known(one.frame_id):
            met.add(one.frame_id)
            yield one


def _reach_ms(plan: Plan, default: WindowSettings, cameras: dict[str, list[Camera]]) -> int:
    """How far from the scope a frame can be and still decide on one of its windows, but for what stood still."""
    windows = [default, *(camera.window for camera in chain.from_iterable(cameras.values()))]
    return max(window.max_ms + quiet_ms(window) for window in map(plan.change.window, windows))

"""One partition's recorded detections and ticks, folded anew into windows of the scope. Pure.

The fold is the batch stage's own. What is added is what a replay knows and live work does not: how each camera was set
at each offset, which windows belong to the scope, and whether a camera has *settled*, so that its windows no longer
depend on where the reading began.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from processors.batch.core import REMEMBERED
from processors.batch.stage import PARTITION, BatchStage
from processors.replay.plan import Bound, Plan
from processors.replay.recording import InForce
from schemas import ids
from schemas.records import Batch, BatchState, WindowSettings
from streams.errors import UnprocessableError
from streams.messages import Incoming


class UnsettledError(Exception):
    """The windows of the scope may depend on records before those that were read."""


class Taken(NamedTuple):
    """A camera that is taken up inside its history."""

    state: BatchState
    """Where, and with which event time; it remembers nothing else."""
    due: int | None
    """Offset of its first record of the scope: by then it must have settled. None: it has none."""


def quiet_ms(settings: WindowSettings) -> int:
    """After so long without anything that matters no window is open, and the fast path is free."""
    return max(settings.idle_ms, settings.fast_cooldown_ms)


class Folding:
    """Feed it the records and ticks of a partition, in offset order, from an offset on."""

    def __init__(
        self,
        bound: Bound,
        plan: Plan,
        default: WindowSettings,
        in_force: InForce,
        *,
        lo: int = 0,
        taken: Sequence[Taken] = (),
    ) -> None:
        """Begin.

        Args:
            bound: the partition.
            plan: its scope, and its change of settings.
            default: the window settings of cameras that have none of their own.
            in_force: how each camera was set, by offset.
            lo: the first offset that will be fed.
            taken: cameras whose history began earlier.
        """
        self.rejected: dict[str, str] = {}
        """Records of which nothing could be made, by origin, and why."""
        self._states: dict[str, BatchState] = {}
        self._lo = lo
        self._epoch = bound.epoch
        self._scope = plan.scope
        self._in_force = in_force
        self._at = lo
        self._changed = cache(plan.change.window)
        self._default = self._changed(default)
        stage = BatchStage(self._default, self._settings)
        self._fold = stage.open(bound.partition, bound.epoch, [one.state for one in taken])
        self._unsettled = {one.state.camera_id.encode(): one.due for one in taken if one.due is not None}
        self._quiet: dict[str, tuple[int, int]] = {}
        """By camera: since which event time nothing mattered, and how many records went by since."""

    def feed(self, record: Incoming) -> list[Batch]:
        """Take the next one; return the windows of the scope that closed by it.

        Raises:
            UnsettledError: the record is the scope's, and its camera has not settled: begin earlier.
        """
        due = self._unsettled.get(record.key or b"") if self._unsettled else None
        if due is not None and record.offset >= due:
            raise UnsettledError
        origin = record.redriven
        if origin is not None and self._is_repeated(origin):
            return []
        self._at = record.offset
        try:
            closed = self._fold.take(record)
        except UnprocessableError as error:
            self.rejected[origin or record.origin] = str(error)
            return []
        if origin is not None:
            self.rejected.pop(origin, None)
        if self._unsettled:
            self._settle(closed)
        return [batch for batch in closed if self._is_in_scope(batch.started_at)]

    def position(self, next_offset: int) -> int:
        """The first offset of the oldest open window, else the next one to read."""
        return self._fold.position(next_offset)

    def open(self) -> list[BatchState]:
        """The open windows."""
        self._moved()
        return [state for state in self._states.values() if state.settings is not None]

    def _settings(self, camera_id: str) -> WindowSettings | None:
        camera = self._in_force.at(camera_id, self._at)
        return self._changed(camera.window) if camera is not None else None

    def _is_in_scope(self, started_at: int) -> bool:
        since, until = self._scope.since, self._scope.until
        return (since is None or started_at >= since) and (until is None or started_at < until)

    def _is_repeated(self, origin: str) -> bool:
        """Whether a redriven record stands where it first was, read and not refused: live work made it once as well."""
        place = ids.place(origin)
        return (
            place is not None
            and place.epoch == self._epoch
            and place.offset >= self._lo
            and origin not in self.rejected
        )

    def _moved(self) -> Sequence[BatchState]:
        moved = [state for state in self._fold.moved(self._at + 1) if state.camera_id != PARTITION]
        self._states.update((state.camera_id, state) for state in moved)
        return moved

    def _settle(self, closed: Sequence[Batch]) -> None:
        """Note which cameras have been quiet long enough.

        With fewer records remembered than there were, more boxes are news, never fewer. So where nothing mattered here,
        nothing did when it was recorded.
        """
        for batch in closed:
            self._quiet[batch.camera_id] = (batch.ended_at, 0)
        for state in self._moved():
            name = state.camera_id.encode()
            if name not in self._unsettled or state.settings is not None or state.event_at is None:
                continue
            since, records = self._quiet.get(state.camera_id, (state.event_at, 0))
            self._quiet[state.camera_id] = (since, records + 1)
            if records >= REMEMBERED and state.event_at - since > self._longest(state.camera_id):
                del self._unsettled[name]

    def _longest(self, camera_id: str) -> int:
        """The longest that any of the camera's settings keeps a window open, or the fast path at rest."""
        windows = [self._changed(camera.window) for camera in self._in_force.versions(camera_id)]
        if self._in_force.at(camera_id, 0) is None:
            windows.append(self._default)
        return max(map(quiet_ms, windows))

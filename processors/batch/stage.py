"""batch as a fold stage: the windows of every camera of a partition, fed with bytes, kept as snapshots."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import structlog

from processors.batch.core import CameraWindows, Resume, refusal
from processors.batch.metrics import BatchMetrics
from processors.batch.settings import MOST_FRAMES
from schemas import ids
from schemas.records import Batch, BatchState, Detections, WindowSettings
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import Emit, Incoming, Tick
from streams.stages import FoldStage

log = structlog.get_logger(__name__)

CameraSettings = Callable[[str], WindowSettings | None]
"""The window settings in force for a camera, or None where the default serves."""

PARTITION = ""
"""The camera_id of a partition's own snapshot: below its resume offset, what cannot be read is in `dead_letters`."""


def build(default: WindowSettings, camera_settings: CameraSettings) -> FoldStage:
    """Make the stage.

    Args:
        default: The settings of cameras that have none of their own.
        camera_settings: Looked up at each record, so that a change takes effect at the first unread offset.
    """
    return BatchStage(default, camera_settings)


class BatchStage:
    """Detections and ticks in, batches out."""

    name = "batch"
    inputs: tuple[str, ...] = ("detections",)
    state_topic = "batch_state"
    tick_topic = "frames"

    def __init__(self, default: WindowSettings, camera_settings: CameraSettings) -> None:
        self._default = default
        self._camera_settings = camera_settings
        self.metrics = BatchMetrics()

    def open(self, partition: int, epoch: str, states: Sequence[BatchState]) -> "BatchFold":
        """The fold of one partition, as the snapshots left it."""
        return BatchFold(partition, epoch, states, self._settings, on_close=self._closed)

    def _closed(self, batch: Batch) -> None:
        self.metrics.closed(batch.closed_by, len(batch.frames))
        log.info(
            "window closed",
            _event=ids.event_id(batch.batch_id),
            batch=batch.batch_id,
            camera=batch.camera_id,
            frames=len(batch.frames),
            closed_by=batch.closed_by,
        )

    def _settings(self, camera_id: str) -> WindowSettings:
        """What is in force for the camera."""
        own = self._camera_settings(camera_id)
        return own if own is not None and _usable(camera_id, own) else self._default


@lru_cache(maxsize=1024)
def _usable(camera_id: str, settings: WindowSettings) -> bool:
    """Whether windows come to an end by these settings, in a record's bounds; said once where they do not."""
    numbers = (settings.threshold, settings.fast_score, settings.stationary_iou)
    times = (settings.idle_ms, settings.max_ms, settings.fast_cooldown_ms)
    if 1 <= settings.max_frames <= MOST_FRAMES and all(map(math.isfinite, numbers)) and min(times) >= 0:
        return True
    log.error("window settings cannot be used, the default serves", camera=camera_id, settings=settings)
    return False


class BatchFold:
    """The windows of one partition's cameras.

    An open window holds the partition's position back, so a successor sees records again that other cameras
    are done with: each camera's resume offset drops them.
    """

    def __init__(
        self,
        partition: int,
        epoch: str,
        states: Iterable[BatchState],
        settings: Callable[[str], WindowSettings],
        on_close: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        self._partition = partition
        self._epoch = epoch
        self._settings = settings
        self._on_close = on_close
        self._cameras = {state.camera_id: CameraWindows.restore(state, partition) for state in states}
        own = self._cameras.pop(PARTITION, None)
        self._rejected_below = own.resume.offset if own is not None else 0
        self._open: dict[str, CameraWindows] = {}
        self._moved: dict[str, CameraWindows] = {}
        """Cameras whose snapshot changed since it was last asked for."""

    def feed(self, record: Incoming) -> list[Emit]:
        """Take the next record or tick, in offset order; return the batches that closed by it.

        Raises:
            UnprocessableError: the record cannot be read, and no predecessor said so; no window has changed.
        """
        closed = self.take(record)
        for batch in closed:
            self._on_close(batch)
        return [codec.emit("batches", batch) for batch in closed]

    def take(self, record: Incoming) -> list[Batch]:
        """As `feed`, but the batches themselves: what a replay cuts is no news, and need not be written."""
        tick = Tick.of(record)
        if tick is None:
            return self._take(record)
        if tick.camera_id is None:
            return self._tick(record.offset, tick.wall_at)
        return self._end_of_stream(record.offset, tick.camera_id)

    def position(self, next_offset: int) -> int:
        """The first offset of the oldest open window, else the next unread one."""
        return min((windows.resume.offset for windows in self._open.values()), default=next_offset)

    def moved(self, next_offset: int) -> list[BatchState]:  # noqa: ARG002 (a camera's own next offset serves)
        """The snapshots that changed since the last call."""
        moved, self._moved = self._moved, {}
        return [windows.snapshot() for windows in moved.values()]

    @property
    def open_windows(self) -> int:
        """How many windows are open."""
        return len(self._open)

    def _take(self, record: Incoming) -> list[Batch]:
        try:
            seen = codec.decode(record, Detections)
        except codec.DecodeError as error:
            return self._reject(record.offset, str(error))
        if seen.camera_id == PARTITION:
            return self._reject(record.offset, "detections without a camera")
        why = refusal(seen)
        if why is not None:
            return self._reject(record.offset, why)
        windows = self._camera(seen.camera_id)
        before = windows.resume
        closed = windows.feed(record.offset, seen, self._settings(seen.camera_id))
        self._note(windows, changed=windows.resume is not before)
        return closed

    def _tick(self, offset: int, wall_at: int) -> list[Batch]:
        closed: list[Batch] = []
        # In the order in which they opened, which a successor finds again.
        for windows in sorted(self._open.values(), key=lambda windows: windows.resume.offset):
            batch = windows.tick(offset, wall_at)
            if batch is not None:
                self._note(windows, changed=True)
                closed.append(batch)
        return closed

    def _end_of_stream(self, offset: int, camera_id: str) -> list[Batch]:
        windows = self._open.get(camera_id)
        batch = windows.end_of_stream(offset) if windows is not None else None
        if windows is None or batch is None:
            return []
        self._note(windows, changed=True)
        return [batch]

    def _reject(self, offset: int, why: str) -> list[Batch]:
        """Refuse a record, once: a predecessor's refusal is in `dead_letters`, committed with `_rejected_below`."""
        if offset < self._rejected_below:
            return []
        self._rejected_below = offset + 1
        own = CameraWindows(PARTITION, self._partition, self._epoch, Resume(offset + 1))
        self._moved[PARTITION] = own
        raise UnprocessableError(why)

    def _camera(self, camera_id: str) -> CameraWindows:
        windows = self._cameras.get(camera_id)
        if windows is None:
            windows = self._cameras[camera_id] = CameraWindows(camera_id, self._partition, self._epoch)
        return windows

    def _note(self, windows: CameraWindows, *, changed: bool) -> None:
        if changed:
            self._moved[windows.camera_id] = windows
        if windows.is_open:
            self._open[windows.camera_id] = windows
        else:
            self._open.pop(windows.camera_id, None)

"""The windows of one camera, as a pure machine: records, ticks and settings come in, closed windows go out.

    matters   a box of a class in `open_on`, of at least the threshold, that has not stood still
    opens     with the first frame that matters
    closes    by the record beyond 30 s since the last frame that matters (`idle`) or beyond 90 s of length
              (`length`), at once at its 50th frame (`frames`) or at a sure person (`fast_path`), by wall time
              while no record comes (`tick`), or at the end of the footage (`end_of_stream`)

A gap or length of exactly the limit still joins. The figures are the defaults of `settings.py`. Nothing here
reads a clock: time is each record's own event time, and wall time is an event too.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple, Self

import msgspec

from schemas import ids
from schemas.records import (
    Batch,
    BatchFrame,
    BatchState,
    Box,
    Detections,
    RecentRecord,
    SeenBox,
    WindowSettings,
)

Reason = Literal["idle", "length", "frames", "fast_path", "tick", "end_of_stream"]

# A box that the detector misses, or that someone walks past, for four records running is still the same parked
# car; and what stood still ten seconds ago is news again when it comes back.
REMEMBERED = 5
"""How many of a camera's previous records tell whether a box has stood still."""


MOST_BOXES = 100
"""Boxes of one record: the detector's own bound (COCO's maxDets)."""

LONGEST_NAME = 255
"""Characters of a camera's, frame's or class's name. A frame's own is 120: its camera's 63, a hash, and a time."""

LAST_MS = 253_402_300_799_999
"""The last millisecond of the year 9999: beyond it no later stage can tell a time."""


class Memory(NamedTuple):
    """What a camera's next record is judged by, besides itself. Immutable: to keep a copy is to keep it."""

    event_at: int | None = None
    """Event time so far, milliseconds since the Unix epoch; None before the first record."""
    fast_closed_at: int | None = None
    """Event time of the last fast close."""
    recent: tuple[RecentRecord, ...] = ()
    """The previous records' boxes of at least the threshold, oldest first."""


class Resume(NamedTuple):
    """Where a successor takes a camera up, and with what: all that must outlive the process."""

    offset: int = 0
    """First offset of the open window, else the next one of this camera that was not read."""
    memory: Memory = Memory()
    """As it stood just before that offset."""
    settings: WindowSettings | None = None
    """The open window's; None where none is open, and the next record takes what is in force then."""


START = Resume()
"""Where a camera that was never seen begins."""


def refusal(seen: Detections) -> str | None:
    """Why a record, though it can be read, is no detections of any detector; None where nothing is wrong with it.

    Its boxes stay in the camera's memory and its time becomes the camera's: what is taken here holds for all that
    follows.
    """
    if len(seen.boxes) > MOST_BOXES:
        return f"{len(seen.boxes):,} boxes: a frame has {MOST_BOXES} at most"
    longest = max(map(len, (seen.camera_id, seen.frame_id, *(box.label for box in seen.boxes))))
    if longest > LONGEST_NAME:
        return f"a name of {longest:,} characters: camera, frame and class have {LONGEST_NAME} at most"
    for box in seen.boxes:
        if not 0 <= box.score <= 1:
            return f"a box of score {box.score}: scores are from 0 to 1"
        if not all(map(math.isfinite, (box.x, box.y, box.width, box.height))) or box.width < 0 or box.height < 0:
            return f"a box at {box.x}, {box.y} of {box.width} x {box.height} pixels"
    for name, time in (("arrived_at", seen.arrived_at), ("captured_at", seen.captured_at)):
        if time is not None and not 0 <= time <= LAST_MS:
            return f"{name} {time} is outside the years 1970 to 9999"
    return None


class CameraWindows:
    """One camera's windows: at most one is open.

    Feed records and ticks in offset order. After each call `resume` says from where, and with what, another
    machine would make the same windows; it is a new object exactly when that changed.
    """

    def __init__(self, camera_id: str, partition: int, epoch: str, resume: Resume = START) -> None:
        self.camera_id = camera_id
        self.resume = resume
        self._partition = partition
        self._epoch = epoch
        self._memory = resume.memory
        self._window: _Window | None = None

    @classmethod
    def restore(cls, state: BatchState, partition: int) -> Self:
        """Take up where a snapshot says. Feed it everything from its resume offset on; what is older is dropped."""
        memory = Memory(state.event_at, state.fast_closed_at, state.recent)
        return cls(
            state.camera_id,
            partition,
            state.epoch,
            Resume(state.resume_offset, memory, state.settings),
        )

    def snapshot(self) -> BatchState:
        """`resume` as a record, to be committed with what closed."""
        offset, memory, settings = self.resume
        return BatchState(
            camera_id=self.camera_id,
            epoch=self._epoch,
            resume_offset=offset,
            event_at=memory.event_at,
            fast_closed_at=memory.fast_closed_at,
            recent=memory.recent,
            settings=settings,
        )

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._window is not None

    def feed(self, offset: int, seen: Detections, settings: WindowSettings) -> list[Batch]:
        """Take the next record; return what it closed: the window that it lies beyond, its own, both or none.

        Args:
            offset: Its offset on `detections`. Below the resume offset it was done before, and is dropped.
            seen: What the detector saw.
            settings: What is in force now. An open window keeps the settings that it opened with.
        """
        if offset < self.resume.offset:
            return []
        before = self._memory
        at, late = _event_time(seen, before.event_at)
        closed: list[Batch] = []
        if self._window is not None and (reason := self._window.expired(at)) is not None:
            closed.append(self._close(reason, offset))

        if self._window is not None:
            settings = self._window.settings
        elif offset == self.resume.offset and self.resume.settings is not None:
            # A predecessor opened a window here, with these: whatever was set since, it is the same window.
            settings = self.resume.settings

        boxes = tuple(box for box in seen.boxes if box.score >= settings.threshold)
        judged = tuple(_judge(box, before.recent, settings) for box in boxes)
        frame = BatchFrame(
            frame_id=seen.frame_id,
            offset=offset,
            event_at=at,
            width=seen.width,
            height=seen.height,
            matters=any(_matters(box, settings) for box in judged),
            late=late,
            boxes=judged,
        )
        recent = (*before.recent, RecentRecord(boxes=boxes))[-REMEMBERED:]
        self._memory = Memory(at, before.fast_closed_at, recent)

        if self._window is None and frame.matters:
            self._window = _Window(settings)
            self.resume = Resume(offset, before, settings)
        if self._window is not None:
            self._window.add(frame, seen.arrived_at)
            if _is_sure(frame, settings) and _is_over(before.fast_closed_at, at, settings.fast_cooldown_ms):
                self._memory = self._memory._replace(fast_closed_at=at)
                closed.append(self._close("fast_path", offset))
            elif len(self._window.frames) >= settings.max_frames:
                closed.append(self._close("frames", offset))
        if self._window is None:
            self.resume = Resume(offset + 1, self._memory)
        return closed

    def tick(self, offset: int, wall_at: int) -> Batch | None:
        """Wall time went on: close the window whose last frame that matters *arrived* longer ago than the limit.

        Capture time tells nothing here: footage may be months old, a camera's clock a year ahead.
        """
        window = self._window
        if window is None or wall_at - window.last_arrived_at <= window.settings.idle_ms:
            return None
        return self._close_by_tick("tick", offset)

    def end_of_stream(self, offset: int) -> Batch | None:
        """No more footage comes: close the window, if one is open."""
        return self._close_by_tick("end_of_stream", offset) if self._window is not None else None

    def _close_by_tick(self, reason: Reason, offset: int) -> Batch:
        batch = self._close(reason, offset)
        self.resume = Resume(offset + 1, self._memory)
        return batch

    def _close(self, reason: Reason, offset: int) -> Batch:
        assert self._window is not None, "no window is open"
        window, self._window = self._window, None
        frames = tuple(window.frames[: window.upto])  # trailing silence is no part of it
        return Batch(
            batch_id=ids.batch_id(self.camera_id, (frame.frame_id for frame in frames)),
            camera_id=self.camera_id,
            started_at=frames[0].event_at,
            ended_at=frames[-1].event_at,
            frames=frames,
            closed_by=reason,
            closed_at_offset=offset,
            partition=self._partition,
            epoch=self._epoch,
            settings_digest=settings_digest(window.settings),
        )


class _Window:
    """An open window: every frame since it opened, those after the last that matters too, while they may join."""

    def __init__(self, settings: WindowSettings) -> None:
        self.settings = settings
        self.frames: list[BatchFrame] = []
        self.upto = 0
        """How many frames there are up to the last that matters."""
        self.last_arrived_at = 0
        """When the last frame that matters arrived."""

    def add(self, frame: BatchFrame, arrived_at: int) -> None:
        self.frames.append(frame)
        if frame.matters:
            self.upto = len(self.frames)
            self.last_arrived_at = arrived_at

    def expired(self, at: int) -> Reason | None:
        """Which limit a record of this event time lies beyond: the one that came first, if any."""
        idle_end = self.frames[self.upto - 1].event_at + self.settings.idle_ms
        length_end = self.frames[0].event_at + self.settings.max_ms
        if at <= min(idle_end, length_end):
            return None
        return "idle" if idle_end <= length_end else "length"


def _event_time(seen: Detections, previous: int | None) -> tuple[int, bool]:
    """A record's event time, and whether it is late: lifted to the camera's event time so far.

    A clock ahead of ours is held to the arrival, one that was set back to what came before.
    """
    own = seen.arrived_at if seen.captured_at is None else min(seen.captured_at, seen.arrived_at)
    if previous is not None and own < previous:
        return previous, True
    return own, False


def _judge(box: Box, recent: tuple[RecentRecord, ...], settings: WindowSettings) -> SeenBox:
    """The box, and whether any of the recent records, the newest first, has one of its class in its place."""
    stationary = any(
        box.label == other.label and iou(box, other) >= settings.stationary_iou
        for record in reversed(recent)
        for other in record.boxes
    )
    return SeenBox(
        label=box.label,
        score=box.score,
        x=box.x,
        y=box.y,
        width=box.width,
        height=box.height,
        stationary=stationary,
    )


def _matters(box: SeenBox, settings: WindowSettings) -> bool:
    return box.label in settings.open_on and not box.stationary


def _is_sure(frame: BatchFrame, settings: WindowSettings) -> bool:
    """Whether the frame's own news is a sure sighting; a mannequin that stands there all day is none."""
    return any(
        box.label == settings.fast_label and box.score >= settings.fast_score and _matters(box, settings)
        for box in frame.boxes
    )


def _is_over(since: int | None, at: int, cooldown_ms: int) -> bool:
    return since is None or at - since >= cooldown_ms


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1; boxes without area overlap nothing."""
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    union = a.width * a.height + b.width * b.height - common
    return common / union if union > 0 else 0.0  # coordinates beyond 2^53 round, and may leave none


@lru_cache(maxsize=1024)
def settings_digest(settings: WindowSettings) -> str:
    """Name window settings by their content."""
    return ids.json_digest(msgspec.to_builtins(settings))

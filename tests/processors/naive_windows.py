"""The windows rule by rule, from the whole history of one camera every time: slow, and plain enough to believe.

Nothing is remembered but the batches made so far. What the core carries along (event time, the last frame that
matters, the cooldown, the previous boxes) is looked up in the history again at every question.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import msgspec

from schemas import ids
from schemas.records import Batch, BatchFrame, Box, Detections, SeenBox, WindowSettings


class Event(NamedTuple):
    """One offset of the log: a record, or a tick (of this camera's end of stream, or of the partition)."""

    offset: int
    seen: Detections | None = None
    wall_at: int = 0
    ends: str | None = None


class History:
    """Everything that was ever read of one camera, with the settings in force at each offset."""

    def __init__(self, camera_id: str, events: list[Event], in_force: Callable[[int], WindowSettings]) -> None:
        self.camera_id = camera_id
        self.events = [e for e in events if e.seen is None or e.seen.camera_id == camera_id]
        self.events = [e for e in self.events if e.ends in (None, camera_id)]
        self.records = [e for e in self.events if e.seen is not None]
        self.in_force = in_force
        self.judged_by: dict[int, WindowSettings] = {}

    def own_time(self, e: Event) -> int:
        captured = e.seen.captured_at
        return min(e.seen.arrived_at if captured is None else captured, e.seen.arrived_at)

    def before(self, e: Event) -> list[Event]:
        return [r for r in self.records if r.offset < e.offset]

    def event_at(self, e: Event) -> int:
        return max(self.own_time(r) for r in [*self.before(e), e])

    def late(self, e: Event) -> bool:
        return any(self.own_time(r) > self.own_time(e) for r in self.before(e))

    def boxes(self, e: Event) -> list[Box]:
        return [b for b in e.seen.boxes if b.score >= self.judged_by[e.offset].threshold]

    def stationary(self, e: Event, box: Box) -> bool:
        earlier = [b for r in self.before(e)[-5:] for b in self.boxes(r)]
        least = Fraction(self.judged_by[e.offset].stationary_iou)
        return any(b.label == box.label and overlap(b, box) >= least for b in earlier)

    def news(self, e: Event) -> list[Box]:
        classes = self.judged_by[e.offset].open_on
        return [b for b in self.boxes(e) if b.label in classes and not self.stationary(e, b)]

    def matters(self, e: Event) -> bool:
        return bool(self.news(e))

    def frame(self, e: Event) -> BatchFrame:
        return BatchFrame(
            frame_id=e.seen.frame_id,
            offset=e.offset,
            event_at=self.event_at(e),
            width=e.seen.width,
            height=e.seen.height,
            matters=self.matters(e),
            late=self.late(e),
            boxes=tuple(SeenBox(**msgspec.structs.asdict(b), stationary=self.stationary(e, b)) for b in self.boxes(e)),
        )


def overlap(a: Box, b: Box) -> Fraction:
    """Intersection over union, exact."""
    ax, ay, aw, ah = (Fraction(v) for v in (a.x, a.y, a.width, a.height))
    bx, by, bw, bh = (Fraction(v) for v in (b.x, b.y, b.width, b.height))
    wide = max(Fraction(0), min(ax + aw, bx + bw) - max(ax, bx))
    high = max(Fraction(0), min(ay + ah, by + bh) - max(ay, by))
    return wide * high / (aw * ah + bw * bh - wide * high)


def windows(
    camera_id: str, events: list[Event], in_force: Callable[[int], WindowSettings], source: tuple[int, str]
) -> list[Batch]:
    """Every batch of the camera that closed within the events of one source: (partition, epoch)."""
    history = History(camera_id, events, in_force)
    batches: list[Batch] = []
    todo = history.events
    while todo:
        e, *rest = todo
        if e.seen is not None:
            history.judged_by[e.offset] = in_force(e.offset)
            if history.matters(e):
                used = _one(history, e, rest, batches, source)
                todo = todo[used:]
                continue
        todo = rest
    return batches


def _one(history: History, first: Event, later: list[Event], batches: list[Batch], source: tuple[int, str]) -> int:
    """Make the batch that opens with `first`, if it closes; return how many events it used up."""
    settings = history.judged_by[first.offset]
    inside = [first]

    def close(reason: str, at: Event, used: int) -> int:
        upto = max(i for i, e in enumerate(inside) if history.matters(e))
        frames = tuple(history.frame(e) for e in inside[: upto + 1])
        batches.append(
            Batch(
                batch_id=ids.batch_id(history.camera_id, [f.frame_id for f in frames]),
                camera_id=history.camera_id,
                started_at=frames[0].event_at,
                ended_at=frames[-1].event_at,
                frames=frames,
                closed_by=reason,
                closed_at_offset=at.offset,
                partition=source[0],
                epoch=source[1],
                settings_digest=ids.json_digest(msgspec.to_builtins(settings)),
            )
        )
        return used

    for used, e in enumerate([first, *later]):
        last = [r for r in inside if history.matters(r)][-1]
        if e.seen is None:
            if e.ends is not None:
                return close("end_of_stream", e, used + 1)
            if e.wall_at > last.seen.arrived_at + settings.idle_ms:
                return close("tick", e, used + 1)
            continue
        if e is not first:
            idle = history.event_at(e) - history.event_at(last) > settings.idle_ms
            length = history.event_at(e) - history.event_at(first) > settings.max_ms
            if idle or length:
                idle_first = history.event_at(last) + settings.idle_ms <= history.event_at(first) + settings.max_ms
                return close("idle" if idle_first else "length", e, used)
            history.judged_by[e.offset] = settings
            inside.append(e)
        sure = any(b.label == settings.fast_label and b.score >= settings.fast_score for b in history.news(e))
        fast = [b.ended_at for b in batches if b.closed_by == "fast_path"]
        if sure and all(history.event_at(e) - at >= settings.fast_cooldown_ms for at in fast):
            return close("fast_path", e, used + 1)
        if len(inside) == settings.max_frames:
            return close("frames", e, used + 1)
    return 1 + len(later)

"""Where things stand in the pages' drawings, as SVG takes it: boxes over a frame, a camera's day.

Positions are SVG attributes, never style attributes: the pages' content security policy refuses those.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

from processors.gateway.models import Box, EventSummary, FrameView, Gap, Label, Level, Timeline
from processors.gateway.words import zone

# A pill's monospaced letters are 0.6 em wide at 12 px, and it has 5 px of air on either side.
_LETTER_PX, _AIR_PX, _PILL_PX = 7.2, 5.0, 18.0

# Frames are shown at 360 px and more: a box that begins right of here has its pill drawn to the left.
_RIGHT = 0.62
# A pill is about as high as this share of a small frame: boxes above it get theirs inside.
_TOP = 0.1

# Bars are drawn up from the bottom of a band this high; app.css gives the drawing's height.
BARS_PX = 72


class DrawnBox(NamedTuple):
    """One box over a frame: percentages, and its pill in pixels from the box's corner."""

    box: Box
    x: str
    y: str
    width: str
    height: str
    pill_at: str
    """Where the pill hangs: the box's left or right edge."""
    pill_x: float
    pill_y: float
    pill_width: float
    text: str


class Bar(NamedTuple):
    """One hour's frames."""

    x: str
    width: str
    y: float
    height: float
    title: str


class Mark(NamedTuple):
    """One event on the timeline."""

    x: str
    event: EventSummary


class Span(NamedTuple):
    """Something that lasts: a gap, or a label."""

    x: str
    width: str
    title: str
    kind: str


class Tick(NamedTuple):
    """One hour's name below the timeline; the coarse ones are shown on phones too."""

    x: str
    text: str
    coarse: bool


class Drawing(NamedTuple):
    """A camera's day."""

    bars: tuple[Bar, ...]
    marks: dict[Level, tuple[Mark, ...]]
    gaps: tuple[Span, ...]
    labels: tuple[Span, ...]
    ticks: tuple[Tick, ...]
    now: str | None
    """Where the present is, if it is on the drawing."""
    most: int
    """Frames of the busiest hour: the height of the drawing."""


def boxes(frame: FrameView) -> Iterator[DrawnBox]:
    """The frame's boxes; those that matter last, so that they lie on top. None where the frame's size is unknown."""
    if not frame.width or not frame.height:
        return
    for box in sorted(frame.boxes, key=lambda box: (box.matters, box.score)):
        # A detector's boxes may stick out of the frame.
        x0, y0 = max(0.0, box.x / frame.width), max(0.0, box.y / frame.height)
        x1, y1 = min(1.0, (box.x + box.width) / frame.width), min(1.0, (box.y + box.height) / frame.height)
        if x1 <= x0 or y1 <= y0:
            continue
        text = f"{box.label} {box.score:.2f}"
        wide = len(text) * _LETTER_PX + 2 * _AIR_PX
        left = x0 <= _RIGHT
        yield DrawnBox(
            box,
            _percent(x0),
            _percent(y0),
            _percent(x1 - x0),
            _percent(y1 - y0),
            pill_at=_percent(x0 if left else x1),
            pill_x=0.0 if left else -round(wide, 1),
            pill_y=0.0 if y0 < _TOP else -_PILL_PX,
            pill_width=round(wide, 1),
            text=text,
        )


def timeline(day: Timeline, now: datetime) -> Drawing:
    """A camera's day (or another span) as a drawing."""
    length = (day.until - day.since) / timedelta(seconds=1)
    clock = zone(day.camera.time_zone)

    def share(at: datetime) -> float:
        return min(1.0, max(0.0, (at - day.since) / timedelta(seconds=1) / length))

    def span(started_at: datetime, ended_at: datetime, title: str, kind: str) -> Span:
        x0, x1 = share(started_at), share(ended_at)
        # What lasts seconds of a day would not be seen.
        return Span(_percent(x0), _percent(max(x1 - x0, 0.004)), title, kind)

    most = max((hour.frames for hour in day.hours), default=0)
    hour_wide = 3600 / length
    marks: dict[Level, list[Mark]] = {"critical": [], "high": [], "medium": [], "low": []}
    for event in reversed(day.events):
        marks[event.risk_level].append(Mark(_percent(share(event.started_at)), event))
    bars = []
    for hour in day.hours:
        if not hour.frames:
            continue
        # A single frame is to be seen beside a thousand.
        tall = max(2.0, BARS_PX * hour.frames / most)
        title = f"{hour.hour.astimezone(clock):%H:%M}: {hour.frames:,} frames, {hour.events} events"
        bars.append(
            Bar(_percent(share(hour.hour)), _percent(hour_wide * 0.86), round(BARS_PX - tall, 1), round(tall, 1), title)
        )
    ticks = []
    for hour in day.hours:
        local = hour.hour.astimezone(clock)
        if local.hour % 3 == 0 and local.minute == 0:
            ticks.append(Tick(_percent(share(hour.hour)), f"{local:%H}", coarse=local.hour % 6 == 0))
    return Drawing(
        tuple(bars),
        {level: tuple(found) for level, found in marks.items()},
        tuple(span(gap.started_at, gap.ended_at or now, _gap_title(gap, day), "gap") for gap in day.gaps),
        tuple(span(label.started_at, label.ended_at, _label_title(label, day), label.verdict) for label in day.labels),
        tuple(ticks),
        _percent(share(now)) if day.since <= now < day.until else None,
        most,
    )


def _gap_title(gap: Gap, day: Timeline) -> str:
    clock = zone(day.camera.time_zone)
    until = f"{gap.ended_at.astimezone(clock):%H:%M}" if gap.ended_at else "now"
    return f"no frames from {gap.started_at.astimezone(clock):%H:%M} to {until}"


def _label_title(label: Label, day: Timeline) -> str:
    clock = zone(day.camera.time_zone)
    when = f"{label.started_at.astimezone(clock):%H:%M} to {label.ended_at.astimezone(clock):%H:%M}"
    return f"{label.verdict.replace('_', ' ')}, {when}" + (f": {label.note}" if label.note else "")


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"

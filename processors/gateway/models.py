"""What the gateway shows, as the JSON API answers it and as the pages render it: one shape for both.

Times are aware, in UTC; boxes are pixels of the frame as it is stored.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from streams.labels import MAX_AUTHOR, MAX_NOTE

Level = Literal["low", "medium", "high", "critical"]
Verdict = Literal["true_alarm", "false_alarm", "missed"]
CameraId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]

_ISO = re.compile(
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,6})?)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])?)?"
)


def _moment(value: Any) -> Any:
    """A time as a person or a program writes it. Numbers are none: nobody can tell seconds from milliseconds."""
    if value is None or isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not _ISO.fullmatch(value):
        raise ValueError("not a time: write ISO 8601, as 2026-11-02, 2026-11-02T18:00 or 2026-11-02T18:00:00+01:00")
    at = datetime.fromisoformat(value)
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


Moment = Annotated[
    datetime, BeforeValidator(_moment), WithJsonSchema({"type": "string", "pattern": f"^{_ISO.pattern}$"})
]
"""A time that is given to us: ISO 8601; without an offset it is UTC, without a time of day it is midnight."""


class Model(BaseModel):
    """Answers are never changed once made."""

    model_config = ConfigDict(frozen=True)


class Label(Model):
    """A person's verdict on a span of a camera's time."""

    label_id: str
    camera_id: str
    started_at: datetime
    ended_at: datetime
    verdict: Verdict
    event_id: str | None = None
    author: str = ""
    note: str = ""
    labelled_at: datetime


class NewLabel(BaseModel):
    """A label as a person gives it: on an event, or on a span of a camera's time in which one was missed."""

    model_config = ConfigDict(extra="forbid")

    verdict: Verdict
    event_id: str | None = Field(None, max_length=300, description="The event it is given on; names camera and span.")
    camera_id: CameraId | None = Field(None, description="With `missed`: where. Otherwise the event says it.")
    started_at: Moment | None = Field(None, description="With `missed`: from when; without an offset it is UTC.")
    ended_at: Moment | None = Field(None, description="With `missed`: until when; without an offset it is UTC.")
    author: str = Field("", max_length=MAX_AUTHOR)
    note: str = Field("", max_length=MAX_NOTE)


class EventSummary(Model):
    """One verdict in a list."""

    event_id: str
    camera_id: str
    camera_name: str
    time_zone: str
    """IANA zone of the camera."""
    started_at: datetime
    ended_at: datetime
    judged_at: datetime
    risk_score: int
    risk_level: Level
    summary: str
    recommended_action: str
    frames: int
    """Frames in the window."""
    model: str
    cover: str | None = None
    """Address of a picture that stands for the event: the frame with the surest detection that matters."""
    label: Verdict | None = None
    """The newest label given on it."""


class EventList(Model):
    """A page of events, newest first."""

    events: tuple[EventSummary, ...]
    next: str | None = None
    """Give it as `before` for the next page; null at the end."""


class Box(Model):
    """One detection: pixels, left upper corner and size."""

    label: str
    score: float
    x: float
    y: float
    width: float
    height: float
    matters: bool
    """At or above the camera's threshold, of a class that opens windows, and not standing still: news."""


class FrameView(Model):
    """One frame of a window, with what was seen in it."""

    frame_id: str
    n: int
    """Its place in the window, from 1."""
    at: datetime
    """Event time."""
    matters: bool
    width: int | None
    """Pixels; null where the frame's record is not kept any more."""
    height: int | None
    image: str | None
    """Address of the JPEG; null where the frame's record is not kept any more."""
    sha256: str
    source: str
    source_name: str
    captured_at: datetime | None
    arrived_at: datetime | None
    position: str
    """`topic-partition@offset` of the frame's record; empty where it is not kept any more."""
    detector: str
    detector_digest: str
    boxes: tuple[Box, ...]


class Section(Model):
    """One part of what the LLM was told."""

    name: str
    text: str


class Step(Model):
    """One node of the lineage: a record on the log, what made it, and what it was made from."""

    topic: str
    title: str
    """For people: `verdict`, `context`, `window`, `frame 3`."""
    record_id: str
    position: str
    """`topic-partition@offset`, with the epoch's first characters behind it where there is more than one."""
    made_by: str
    """Model, prompt version or settings digest that made it."""
    facts: dict[str, str]
    """What else is worth showing, in order."""
    made_from: tuple["Step", ...] = ()


class EventDetail(EventSummary):
    """One verdict whole: why, by what, from what."""

    reasoning: str
    risk_factors: tuple[str, ...]
    entities: tuple[str, ...]
    batch_id: str
    closed_by: str
    """Why the window closed: idle, length, frames, fast_path, tick or end_of_stream."""
    prompt_digest: str
    prompt_name: str
    verdict_digest: str
    model_digest: str
    toy: bool = False
    """Judged by the demo's model, told by its weights."""
    parameters: dict[str, Any]
    conditions: dict[str, str]
    rendered_prompt: str
    raw_completion: str
    sections_dropped: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    duration_ms: int
    """How long the LLM took."""
    context: tuple[Section, ...]
    frame_views: tuple[FrameView, ...]
    lineage: Step
    labels: tuple[Label, ...]
    """Those given on it, and those on its camera that cover at least half of its time; newest first."""


class CameraName(Model):
    """A camera, as it is named to choose from."""

    camera_id: str
    name: str
    time_zone: str


class CameraCard(CameraName):
    """A camera in the list of cameras."""

    last_frame_at: datetime | None
    """Arrival of its newest frame."""
    last_taken_at: datetime | None = None
    """When the newest of its pictures was taken: long before, where a recording or an archive was played in."""
    last_image: str | None
    frames_24h: int
    events_24h: int
    top_level_24h: Level | None
    silent: bool
    """Nothing for ten times its usual pause between frames, and for at least five minutes."""


class Hour(Model):
    """What one camera did in one hour."""

    hour: datetime
    frames: int
    detections: dict[str, int]
    """Boxes by class, at or above the camera's threshold."""
    windows: int
    events: int
    top_level: Level | None


class Gap(Model):
    """A span without a frame, long for this camera."""

    started_at: datetime
    ended_at: datetime | None
    """Null: until now."""


class Timeline(Model):
    """A camera's day (or another span): hours, events, gaps, labels."""

    camera: CameraCard
    since: datetime
    until: datetime
    hours: tuple[Hour, ...]
    """Every hour of the span, in order, those without frames too."""
    events: tuple[EventSummary, ...]
    """Newest first, 500 at most."""
    gaps: tuple[Gap, ...]
    labels: tuple[Label, ...]


class TopicHealth(Model):
    """One topic, on the log and in ClickHouse."""

    topic: str
    records: int | None
    exact: bool
    """False: estimated, because the topic is too long to be counted by reading."""
    in_clickhouse: int | None
    last_at: datetime | None
    """When ClickHouse last took some of it."""


class StageHealth(Model):
    """One stage, over all of its processes."""

    stage: str
    lag: int | None
    """Records before it; null while the broker is away."""
    exact: bool
    caught_up: bool | None
    waiting_on: tuple[str, ...]
    workers: int
    """Processes seen on this machine."""
    stall: str | None
    latency_p50_ms: float | None
    """From a frame's arrival to this stage's record, newest hour; null where unknown."""
    latency_p95_ms: float | None


class DeadLetterCount(Model):
    """Open dead letters of one stage and kind."""

    stage: str
    kind: str
    count: int


class Problem(Model):
    """Something that is wrong, and the fix."""

    service: str
    message: str


class Health(Model):
    """How the whole pipeline is."""

    at: datetime
    status: Literal["ok", "waiting", "degraded"]
    """`waiting`: a stage waits on something that it names; `degraded`: the broker, ClickHouse or a stage is away."""
    system: str
    detector: str
    """The model in force, as the newest detection names it."""
    analyst: str
    """The model in force, as the newest event names it."""
    toys: tuple[Literal["detector", "analyst"], ...] = ()
    """Which of the two are the demo's, told by their weights."""
    stages: tuple[StageHealth, ...]
    topics: tuple[TopicHealth, ...]
    dead_letters: tuple[DeadLetterCount, ...]
    problems: tuple[Problem, ...]

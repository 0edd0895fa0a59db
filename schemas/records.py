"""Every record on the log as a frozen typed struct.

The truth is `schemas/avro/*.avsc`; a test holds each class equal to its schema, field by field. What a field
means, and its unit, is documented there. Times are integers, milliseconds since the Unix epoch, UTC.
"""

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What all records are: immutable, made by keyword, compared by value."""


class Frame(Record, frozen=True, kw_only=True):
    """One captured image."""

    frame_id: str
    camera_id: str
    sha256: str
    size: int
    width: int
    height: int
    captured_at: int | None = None
    captured_from: str
    file_at: int | None = None
    arrived_at: int
    image: bytes | None = None
    claim: str | None = None
    source: str
    source_name: str


class Box(Record, frozen=True, kw_only=True):
    """One object that the detector saw in one frame."""

    label: str
    score: float
    x: float
    y: float
    width: float
    height: float


class Detections(Record, frozen=True, kw_only=True):
    """Everything the detector saw in one frame, also when it saw nothing."""

    frame_id: str
    camera_id: str
    captured_at: int | None = None
    arrived_at: int
    width: int
    height: int
    boxes: tuple[Box, ...]
    model: str
    model_digest: str
    runtime: str
    inference_ms: float
    detected_at: int


class SeenBox(Record, frozen=True, kw_only=True):
    """A box of at least the camera's threshold, as the window judged it."""

    label: str
    score: float
    x: float
    y: float
    width: float
    height: float
    stationary: bool


class BatchFrame(Record, frozen=True, kw_only=True):
    """One frame of a window."""

    frame_id: str
    offset: int
    event_at: int
    width: int
    height: int
    matters: bool
    late: bool
    boxes: tuple[SeenBox, ...]


class Batch(Record, frozen=True, kw_only=True):
    """One closed window of one camera."""

    batch_id: str
    camera_id: str
    started_at: int
    ended_at: int
    frames: tuple[BatchFrame, ...]
    closed_by: str
    closed_at_offset: int
    partition: int
    epoch: str
    settings_digest: str


class ContextSection(Record, frozen=True, kw_only=True):
    """One thing more that the LLM will be told."""

    name: str
    text: str
    priority: int
    made_by: str


class Context(Record, frozen=True, kw_only=True):
    """A batch and everything else the LLM will be told."""

    batch_id: str
    camera_id: str
    batch: Batch
    camera_name: str
    time_zone: str
    sections: tuple[ContextSection, ...]


class RiskEvent(Record, frozen=True, kw_only=True):
    """A verdict on one batch, with the lineage of its making."""

    event_id: str
    batch_id: str
    camera_id: str
    run: str
    started_at: int
    ended_at: int
    frame_ids: tuple[str, ...]
    risk_score: int
    risk_level: str
    summary: str
    reasoning: str
    risk_factors: tuple[str, ...]
    entities: tuple[str, ...]
    recommended_action: str
    verdict_digest: str
    prompt_digest: str
    model: str
    model_digest: str
    parameters: str
    conditions: dict[str, str]
    rendered_prompt: str
    raw_completion: str
    dropped_sections: tuple[str, ...]
    repaired: bool
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_ms: float
    inference_ms: float
    judged_at: int


class Label(Record, frozen=True, kw_only=True):
    """A person's verdict on a span of a camera's time."""

    label_id: str
    camera_id: str
    started_at: int
    ended_at: int
    verdict: str
    event_id: str | None = None
    author: str
    note: str
    labelled_at: int
    selection: str = ""
    chance: float = 0.0


class Alert(Record, frozen=True, kw_only=True):
    """One notification decided: sent, or suppressed and why."""

    alert_id: str
    event_id: str
    camera_id: str
    rule: str
    channel: str
    decision: str
    reason: str
    decided_at: int


class PromptRecord(Record, frozen=True, kw_only=True):
    """An immutable prompt version, or a pointer to one."""

    kind: str
    digest: str
    scope: str
    name: str
    template: str
    output_schema: str
    parameters: str
    comment: str
    created_at: int
    evidence: str = ""


class Zone(Record, frozen=True, kw_only=True):
    """A named part of the picture."""

    name: str
    polygon: tuple[float, ...]


class WindowSettings(Record, frozen=True, kw_only=True):
    """What opens and closes a camera's windows."""

    open_on: tuple[str, ...]
    threshold: float
    idle_ms: int
    max_ms: int
    max_frames: int
    fast_label: str
    fast_score: float
    fast_cooldown_ms: int
    stationary_iou: float


class Camera(Record, frozen=True, kw_only=True):
    """What is set for one camera."""

    camera_id: str
    name: str
    time_zone: str
    zones: tuple[Zone, ...]
    window: WindowSettings
    partition: int | None = None
    updated_at: int


class Replay(Record, frozen=True, kw_only=True):
    """One step in a replay's life."""

    replay_id: str
    name: str
    state: str
    plan: str
    updated_at: int
    detail: str = ""


class ReplayUnit(Record, frozen=True, kw_only=True):
    """One unit of a replay's work."""

    unit_id: str
    replay_id: str
    camera_id: str
    kind: str
    payload: bytes
    created_at: int
    prompt_digest: str = ""


class ReplayEvent(Record, frozen=True, kw_only=True):
    """What a re-run said of one window."""

    replay_id: str
    unit_id: str
    event_id: str
    camera_id: str
    reused: bool
    event: RiskEvent


class GpuProcess(Record, frozen=True, kw_only=True):
    """One process with memory on a GPU."""

    pid: int
    name: str | None = None
    memory: int | None = None


class GpuMetrics(Record, frozen=True, kw_only=True):
    """One reading of one device by NVML."""

    host: str
    device: int
    name: str
    utilization: float
    memory_used: int
    memory_total: int
    temperature: float
    power: float
    read_at: int
    uuid: str | None = None
    driver: str | None = None
    cuda: str | None = None
    memory_utilization: float | None = None
    power_limit: float | None = None
    clock_sm: int | None = None
    clock_memory: int | None = None
    ecc_volatile: int | None = None
    ecc_aggregate: int | None = None
    throttled: bool | None = None
    throttle_reasons: tuple[str, ...] = ()
    process_count: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    error: str | None = None


class DeadLetter(Record, frozen=True, kw_only=True):
    """A record that could not be processed."""

    origin: str
    camera_id: str
    stage: str
    kind: str
    error: str
    message: str
    attempt: int
    key: bytes | None = None
    value: bytes | None = None
    claim: str | None = None
    headers: dict[str, bytes]
    detail: str
    failed_at: int


class DeadLetterStatus(Record, frozen=True, kw_only=True):
    """What became of a dead letter."""

    origin: str
    status: str
    by: str
    at: int
    record: str | None = None


class Hold(Record, frozen=True, kw_only=True):
    """A person's word that an event stays, or that it need not any more."""

    event_id: str
    batch_id: str
    camera_id: str
    state: str
    why: str
    author: str
    at: int


class IngestState(Record, frozen=True, kw_only=True):
    """What ingest remembers of one camera."""

    camera_id: str
    digests: bytes
    frames: int
    unchanged: int


class RecentRecord(Record, frozen=True, kw_only=True):
    """Boxes of one earlier record."""

    boxes: tuple[Box, ...]


class BatchState(Record, frozen=True, kw_only=True):
    """A camera's windows as they stood just before the resume offset."""

    camera_id: str
    epoch: str
    resume_offset: int
    event_at: int | None = None
    fast_closed_at: int | None = None
    recent: tuple[RecentRecord, ...]
    settings: WindowSettings | None = None


class SinkState(Record, frozen=True, kw_only=True):
    """The range that a sink committed itself to insert."""

    topic: str
    partition: int
    epoch: str
    lo: int
    hi: int
    rows: int


class TopicMeta(Record, frozen=True, kw_only=True):
    """A topic's identity."""

    topic: str
    epoch: str
    status: str
    partitions: int
    created_at: int

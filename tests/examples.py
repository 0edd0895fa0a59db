"""One valid record of every topic, made from one another as the pipeline makes them.

`RECORDS[topic]` is the topic's record; `incoming` gives it as a stage reads it, `tick` a tick.
"""

import hashlib

import msgspec

from schemas import ids
from schemas.records import (
    Alert,
    Batch,
    BatchFrame,
    BatchState,
    Box,
    Camera,
    Context,
    ContextSection,
    DeadLetter,
    DeadLetterStatus,
    Detections,
    Frame,
    GpuMetrics,
    GpuProcess,
    Hold,
    IngestState,
    Label,
    PromptRecord,
    RecentRecord,
    Record,
    Replay,
    ReplayEvent,
    ReplayUnit,
    RiskEvent,
    SeenBox,
    SinkState,
    TopicMeta,
    WindowSettings,
    Zone,
)
from streams import codec
from streams.messages import SOURCE, Headers, Incoming, Tick

CAMERA = "front-door"
EPOCH = "e1"
PARTITION = 3
AT = 1_780_000_000_000  # 2026-05-28 20:26:40 UTC: an evening in Berlin, 22:26:40 there
IMAGE = b"\xff\xd8\xff\xe0 not really a picture \xff\xd9"
SHA256 = hashlib.sha256(IMAGE).hexdigest()

frame = Frame(
    frame_id=ids.frame_id(CAMERA, SHA256, AT),
    camera_id=CAMERA,
    sha256=SHA256,
    size=len(IMAGE),
    width=640,
    height=360,
    captured_at=AT,
    captured_from="filename",
    file_at=AT + 100,
    arrived_at=AT + 500,
    image=IMAGE,
    claim=None,
    source="folder",
    source_name="20260528_202640.jpg",
)
box = Box(label="person", score=0.93, x=10.5, y=20.0, width=80.0, height=160.25)
detections = Detections(
    frame_id=frame.frame_id,
    camera_id=CAMERA,
    captured_at=AT,
    arrived_at=frame.arrived_at,
    width=640,
    height=360,
    boxes=(box, Box(label="dog", score=0.12, x=1.0, y=2.0, width=3.0, height=4.0)),
    model="rtdetr_v2_r18vd",
    model_digest="d" * 64,
    runtime="torch-cpu",
    inference_ms=41.5,
    detected_at=AT + 900,
)
window = WindowSettings(
    open_on=("person", "car"),
    threshold=0.5,
    idle_ms=30_000,
    max_ms=90_000,
    max_frames=50,
    fast_label="person",
    fast_score=0.9,
    fast_cooldown_ms=90_000,
    stationary_iou=0.85,
)
batch = Batch(
    batch_id=ids.batch_id(CAMERA, [frame.frame_id]),
    camera_id=CAMERA,
    started_at=AT,
    ended_at=AT,
    frames=(
        BatchFrame(
            frame_id=frame.frame_id,
            offset=0,
            event_at=AT,
            width=640,
            height=360,
            matters=True,
            late=False,
            boxes=(
                SeenBox(
                    label=box.label,
                    score=box.score,
                    x=box.x,
                    y=box.y,
                    width=box.width,
                    height=box.height,
                    stationary=False,
                ),
            ),
        ),
    ),
    closed_by="fast_path",
    closed_at_offset=0,
    partition=PARTITION,
    epoch=EPOCH,
    settings_digest="5" * 32,
)
context = Context(
    batch_id=batch.batch_id,
    camera_id=CAMERA,
    batch=batch,
    camera_name="Front door",
    time_zone="Europe/Berlin",
    sections=(ContextSection(name="zones", text="The person stands on the porch.", priority=5, made_by="zones 1"),),
)
prompt = PromptRecord(
    kind="version",
    digest="a" * 32,
    scope="",
    name="plain",
    template='{"system": "Judge."}',
    output_schema='{"type": "object"}',
    parameters='{"temperature": 0}',
    comment="the first",
    created_at=AT - 1_000_000,
    evidence="r1",
)
risk_event = RiskEvent(
    event_id=ids.event_id(batch.batch_id),
    batch_id=batch.batch_id,
    camera_id=CAMERA,
    run=ids.LIVE,
    started_at=batch.started_at,
    ended_at=batch.ended_at,
    frame_ids=(frame.frame_id,),
    risk_score=72,
    risk_level="high",
    summary="A person waits at the front door at night.",
    reasoning="Nobody is expected; the face is turned away from the camera.",
    risk_factors=("night", "loitering"),
    entities=("one person",),
    recommended_action="review",
    verdict_digest="b" * 32,
    prompt_digest=prompt.digest,
    model="nemotron-demo",
    model_digest="c" * 64,
    parameters=prompt.parameters,
    conditions={"slots": "1", "seed": "7"},
    rendered_prompt='[{"role": "system", "content": "Judge."}]',
    raw_completion='{"risk_score": 72}',
    dropped_sections=(),
    repaired=False,
    prompt_tokens=512,
    completion_tokens=96,
    cached_tokens=128,
    queued_ms=3.5,
    inference_ms=850.0,
    judged_at=AT + 2_500,
)
label = Label(
    label_id="l" * 32,
    camera_id=CAMERA,
    started_at=AT,
    ended_at=AT + 1_000,
    verdict="true_alarm",
    event_id=risk_event.event_id,
    author="",
    note="that was the post",
    labelled_at=AT + 60_000,
    selection="near_threshold",
    chance=0.25,
)
alert = Alert(
    alert_id="f" * 32,
    event_id=risk_event.event_id,
    camera_id=CAMERA,
    rule="high at night",
    channel="mail",
    decision="suppressed",
    reason="cooldown",
    decided_at=AT + 3_000,
)
camera = Camera(
    camera_id=CAMERA,
    name="Front door",
    time_zone="Europe/Berlin",
    zones=(Zone(name="porch", polygon=(0.0, 0.5, 1.0, 0.5, 1.0, 1.0)),),
    window=window,
    partition=None,
    updated_at=AT - 2_000_000,
)
replay = Replay(
    replay_id="r1",
    name="stricter",
    state="running",
    plan='{"kind": "baseline"}',
    updated_at=AT + 100_000,
    detail="by hand",
)
replay_unit = ReplayUnit(
    unit_id="r1:" + batch.batch_id,
    replay_id="r1",
    camera_id=CAMERA,
    kind="judge",
    payload=codec.encode("contexts", context)[0],
    created_at=AT + 100_000,
    prompt_digest="a" * 32,
)
_replayed = ids.event_id(batch.batch_id, "r1")
replay_event = ReplayEvent(
    replay_id="r1",
    unit_id=replay_unit.unit_id,
    event_id=_replayed,
    camera_id=CAMERA,
    reused=False,
    event=msgspec.structs.replace(risk_event, run="r1", event_id=_replayed),
)
gpu_metrics = GpuMetrics(
    host="tower",
    device=0,
    name="NVIDIA RTX A2000",
    utilization=0.4,
    memory_used=3 * 2**30,
    memory_total=12 * 2**30,
    temperature=61.0,
    power=55.5,
    read_at=AT,
    uuid="GPU-8f6d9a1c-5a3b-2f10-9c77-0a1b2c3d4e5f",
    driver="570.86.15",
    cuda="12.8",
    memory_utilization=0.1,
    power_limit=70.0,
    clock_sm=1_200,
    clock_memory=6_000,
    throttled=True,
    throttle_reasons=("power cap",),
    process_count=1,
    processes=(GpuProcess(pid=4_711, name="llama-server", memory=2 * 2**30),),
)
dead_letter = DeadLetter(
    origin=ids.origin("frames", EPOCH, PARTITION, 17),
    camera_id=CAMERA,
    stage="detect",
    kind="error",
    error="UnidentifiedImageError",
    message="cannot identify image file",
    attempt=1,
    key=CAMERA.encode(),
    value=b"\x00\xfe",
    claim=None,
    headers={"fp": b"\x00\xff"},
    detail="",
    failed_at=AT + 1_000,
)
dead_letter_status = DeadLetterStatus(origin=dead_letter.origin, status="resolved", by="cli", at=AT + 9_000)
hold = Hold(
    event_id=risk_event.event_id,
    batch_id=risk_event.batch_id,
    camera_id=CAMERA,
    state="held",
    why="the insurance asks",
    author="maria",
    at=AT + 10_000,
)
ingest_state = IngestState(camera_id=CAMERA, digests=b"12345678", frames=1, unchanged=0)
batch_state = BatchState(
    camera_id=CAMERA,
    epoch=EPOCH,
    resume_offset=1,
    event_at=AT,
    fast_closed_at=AT,
    recent=(RecentRecord(boxes=(box,)),),
    settings=window,
)
sink_state = SinkState(topic="frames", partition=PARTITION, epoch=EPOCH, lo=0, hi=9, rows=8)
meta = TopicMeta(topic="frames", epoch=EPOCH, status="ready", partitions=16, created_at=AT - 3_000_000)

RECORDS: dict[str, Record] = {
    "frames": frame,
    "detections": detections,
    "batches": batch,
    "contexts": context,
    "risk_events": risk_event,
    "labels": label,
    "alerts": alert,
    "prompts": prompt,
    "cameras": camera,
    "replays": replay,
    "replay_units": replay_unit,
    "replay_events": replay_event,
    "gpu_metrics": gpu_metrics,
    "dead_letters": dead_letter,
    "dead_letter_status": dead_letter_status,
    "holds": hold,
    "ingest_state": ingest_state,
    "batch_state": batch_state,
    "sink_state": sink_state,
    "meta": meta,
}
"""The record of each topic."""


def incoming(
    topic: str,
    record: Record | None = None,
    *,
    offset: int = 0,
    partition: int = PARTITION,
    epoch: str = EPOCH,
    headers: Headers = ((SOURCE, b"somewhere:e1:3:9"),),
) -> Incoming:
    """A record, the topic's example if none is given, as a stage reads it."""
    made = codec.emit(topic, record or RECORDS[topic])
    return Incoming(topic, epoch, partition, offset, made.key, made.value, made.headers + headers)


def tick(topic: str = "frames", *, offset: int = 0, wall_at: int = AT, partition: int = PARTITION) -> Incoming:
    """A tick as a stage reads it."""
    made = Tick(wall_at).emit(topic)
    return Incoming(topic, EPOCH, partition, offset, made.key, made.value, made.headers)

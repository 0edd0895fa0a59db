"""The topic catalogue: which topics there are, what keys them, how long they are kept, who may see them.

Data topics share one partition count, so a camera has one partition number all the way; see `partition_of`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from aiokafka.partitioner import murmur2

from schemas import records
from schemas.records import Record

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS
FOREVER = -1
"""Kafka's `retention.ms` for no limit."""


class Topic(NamedTuple):
    """One topic of the catalogue."""

    name: str
    record: type[Record]
    key: Callable[[Any], str]
    """The record's key; data topics are keyed by camera."""
    retention_ms: int = 7 * _DAY_MS
    """How long the broker keeps it; ClickHouse keeps it longer."""
    compacted: bool = False
    single: bool = False
    """One partition whatever the installation's count: small topics that are read whole."""
    stored: bool = True
    """Whether ClickHouse keeps it."""


def _camera(record: Any) -> str:
    return str(record.camera_id)


def _prompt(record: records.PromptRecord) -> str:
    return f"version/{record.digest}" if record.kind == "version" else f"active/{record.scope}"


def _origin(record: Any) -> str:
    return str(record.origin)


TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        Topic("frames", records.Frame, _camera),
        Topic("detections", records.Detections, _camera),
        Topic("batches", records.Batch, _camera),
        Topic("contexts", records.Context, _camera),
        Topic("risk_events", records.RiskEvent, _camera, retention_ms=90 * _DAY_MS),
        Topic("labels", records.Label, _camera, retention_ms=FOREVER),
        Topic("alerts", records.Alert, _camera, retention_ms=90 * _DAY_MS),
        Topic("prompts", records.PromptRecord, _prompt, retention_ms=FOREVER, single=True),
        Topic("cameras", records.Camera, _camera, retention_ms=FOREVER, single=True),
        Topic("replays", records.Replay, lambda r: r.replay_id, retention_ms=FOREVER, single=True),
        # As long as their results: who takes a replay over asks both what was done.
        Topic("replay_units", records.ReplayUnit, lambda r: r.unit_id, retention_ms=90 * _DAY_MS),
        Topic("replay_events", records.ReplayEvent, _camera, retention_ms=90 * _DAY_MS),
        Topic("gpu_metrics", records.GpuMetrics, lambda r: r.host),
        Topic("dead_letters", records.DeadLetter, _origin, retention_ms=90 * _DAY_MS),
        Topic("dead_letter_status", records.DeadLetterStatus, _origin, retention_ms=FOREVER, single=True),
        Topic("holds", records.Hold, lambda r: r.event_id, retention_ms=FOREVER, single=True),
        Topic("ingest_state", records.IngestState, _camera, FOREVER, compacted=True, stored=False),
        Topic("batch_state", records.BatchState, _camera, FOREVER, compacted=True, stored=False),
        Topic(
            "sink_state",
            records.SinkState,
            lambda r: f"{r.topic}-{r.partition}",
            FOREVER,
            compacted=True,
            stored=False,
        ),
        Topic("meta", records.TopicMeta, lambda r: r.topic, FOREVER, compacted=True, single=True, stored=False),
    )
}

STORED = tuple(name for name, topic in TOPICS.items() if topic.stored)
"""The topics that ClickHouse keeps."""


def partition_of(camera_id: str, partitions: int, pin: int | None = None) -> int:
    """The partition of a camera: its pin, else murmur2 of its id, as Kafka's own default partitioner has it."""
    if pin is not None:
        return pin
    return int(murmur2(camera_id.encode()) & 0x7FFFFFFF) % partitions

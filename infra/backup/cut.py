"""Which moment a backup shows, taken while everything goes on. Pure.

A stage's results and its position commit together, but they cannot be read together. So positions are read first, the
sink's and the last stages' before the first ones', then the state, then the records: whatever was committed by a
position's time is then in sight, and what came since can be told by its own words and left out. A result names the
record that it was made of: at or beyond the position of its stage, it is left out, and made again after a restore. A
window that begins at or beyond its camera's resume offset likewise. So each transaction is in the backup whole or not
at all.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from aiokafka import TopicPartition

from schemas import ids
from schemas.records import Batch, BatchState, DeadLetter, DeadLetterStatus, Record, TopicMeta
from streams import codec
from streams.messages import SOURCE, Incoming
from streams.survey import READS

R = TypeVar("R", bound=Record)

LAST_FIRST = ("sink", "replay", "analyze", "enrich", "batch", "detect")
"""Stages in the order in which their positions are read; a stage that reads what another made stands before it."""

_MAKER = {"detections": "detect", "batches": "batch", "contexts": "enrich", "risk_events": "analyze"} | {
    "replay_events": "replay"
}

_OWN = ""
"""The camera_id of a partition's own snapshot: below its resume offset, what batch cannot read is in `dead_letters`."""


class TornError(Exception):
    """What was read does not fit together: a position was seen before what it stands for. Look again."""


class Look(NamedTuple):
    """Where everybody stood."""

    metas: Mapping[str, TopicMeta]
    positions: Mapping[str, Mapping[TopicPartition, int]]
    """By stage; those of an earlier life of a topic are left out."""
    resumes: Mapping[int, Mapping[str, int]]
    """Resume offsets on `detections`, by partition and camera."""

    def reached(self, stage: str, topic: str, partition: int) -> int | None:
        """The stage's position; None where it never committed."""
        return self.positions[stage].get(TopicPartition(topic, partition))


def resumes_of(states: Mapping[TopicPartition, Mapping[str, BatchState]], epoch: str) -> dict[int, dict[str, int]]:
    """Resume offsets by partition and camera, of one life of `detections`."""
    return {
        tp.partition: {camera: state.resume_offset for camera, state in cameras.items() if state.epoch == epoch}
        for tp, cameras in states.items()
    }


def read_as(record: Incoming, kind: type[R]) -> R | None:
    """The record; None where it is none that this version can read. Those are kept as they are."""
    try:
        return codec.decode(record, kind)
    except codec.DecodeError:
        return None


def belongs(look: Look, record: Incoming) -> bool:
    """Whether a record of the log belongs to the moment: it was made of what its stage was done with."""
    topic = record.topic
    if topic == "batches":
        return _window(look, record)
    stage, source = _MAKER.get(topic, ""), _source(record)
    if topic == "dead_letters":
        letter = read_as(record, DeadLetter)
        if letter is not None and letter.kind != "gap":
            stage, source = letter.stage, source or ids.place(letter.origin)
    elif topic == "dead_letter_status":
        status = read_as(record, DeadLetterStatus)
        if status is not None:
            stage, source = status.by, ids.place(status.record or "")
    return stage not in READS or source is None or _done(look, stage, source)


def check(look: Look, left_out: Incoming) -> None:
    """Whether nobody had passed a record that is left out.

    Raises:
        TornError: somebody had: the broker showed a result before the position that goes with it.
    """
    tp = TopicPartition(left_out.topic, left_out.partition)
    for stage, positions in look.positions.items():
        if positions.get(tp, 0) > left_out.offset:
            raise TornError(f"{stage} has passed {left_out.origin}")
    if left_out.topic == "detections" and any(
        resume > left_out.offset for resume in look.resumes.get(left_out.partition, {}).values()
    ):
        raise TornError(f"batch has passed {left_out.origin}")


def _source(record: Incoming) -> ids.Place | None:
    return ids.place((record.header(SOURCE) or b"").decode(errors="replace"))


def _done(look: Look, stage: str, source: ids.Place) -> bool:
    """Whether the stage was done with the record."""
    meta = look.metas.get(source.topic)
    if meta is None or meta.epoch != source.epoch:
        return True
    position = look.reached(stage, source.topic, source.partition)
    if position is None:
        return True  # the broker forgot it, or others made the records: nothing is known, all is kept
    if stage == "batch":
        # It goes back to the beginning of an open window, and refuses nothing twice that it refused before.
        position = max(position, look.resumes.get(source.partition, {}).get(_OWN, 0))
    return source.offset < position


def _window(look: Look, record: Incoming) -> bool:
    """Whether a closed window is behind its camera's resume offset: else the camera's snapshot makes it again."""
    batch = read_as(record, Batch)
    meta = look.metas.get("detections")
    if batch is None or not batch.frames or meta is None or meta.epoch != batch.epoch:
        return True
    if look.reached("batch", "detections", batch.partition) is None:
        return True
    return batch.frames[0].offset < look.resumes.get(batch.partition, {}).get(batch.camera_id, 0)

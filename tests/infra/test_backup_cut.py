"""The moment of a backup: whatever is read when, each transaction is in it whole or not at all. Stages on paper."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from aiokafka import TopicPartition

from infra.backup.cut import LAST_FIRST, Look, belongs, check
from processors.batch.stage import build
from schemas.records import BatchState, DeadLetter, TopicMeta
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import SOURCE, Emit, Incoming, Tick
from streams.survey import READS
from streams.topics import STORED, TOPICS
from tests.processors.batch_kit import DEFAULT, T0, box, seen

EPOCH = "e1"
METAS = {topic: TopicMeta(topic=topic, epoch=EPOCH, status="ready", partitions=1, created_at=0) for topic in TOPICS}


class Log:
    """A broker on paper: records of partition 0 of each topic, each with the moment at which it was committed."""

    def __init__(self) -> None:
        self.now = 0
        self.records: dict[str, list[tuple[int, Incoming]]] = {topic: [] for topic in TOPICS}
        self.positions: dict[str, list[tuple[int, int]]] = {stage: [] for stage in READS}

    def commit(self, emits: Sequence[Emit], stage: str = "", position: int = 0) -> None:
        """One transaction, and a moment more."""
        self.now += 1
        for emit in emits:
            offset = self.end(emit.topic)
            record = Incoming(emit.topic, EPOCH, 0, offset, emit.key, emit.value, emit.headers)
            self.records[emit.topic].append((self.now, record))
        if stage:
            self.positions[stage].append((self.now, position))

    def end(self, topic: str) -> int:
        """Where a marker has taken an offset, too."""
        found = self.records[topic]
        return found[-1][1].offset + 1 + (found[-1][0] != self.now) if found else 0

    def read(self, topic: str, at: int) -> list[Incoming]:
        return [record for when, record in self.records[topic] if when <= at]

    def position(self, stage: str, at: int) -> int | None:
        return next((position for when, position in reversed(self.positions[stage]) if when <= at), None)


def of(record: Incoming, emit: Emit) -> Emit:
    """A result with what it was made from."""
    return emit._replace(headers=(*emit.headers, (SOURCE, record.origin.encode())))


def letter(record: Incoming, stage: str) -> Emit:
    made = DeadLetter(
        origin=record.origin,
        camera_id="gate",
        stage=stage,
        kind="error",
        error="E",
        message="m",
        attempt=1,
        headers={},
        detail="",
        failed_at=0,
    )
    return of(record, codec.emit("dead_letters", made, 0))


class Stages:
    """detect and batch, as their hosts run them: some records a transaction, results with the position."""

    def __init__(self, log: Log, states: Sequence[BatchState] = (), frames: int = 0, detections: int = 0) -> None:
        self.log = log
        self.frames, self.detections = frames, detections
        self._fold = build(DEFAULT, lambda _: None).open(0, EPOCH, list(states))
        self._fed = detections

    def detect(self, count: int) -> None:
        todo = [record for _, record in self.log.records["frames"] if record.offset >= self.frames][:count]
        if not todo:
            return
        emits = []
        for record in todo:
            if Tick.of(record) is not None:
                emits.append(of(record, record_of(record, "detections")))
            elif record.value == b"bad":
                emits.append(letter(record, "detect"))
            else:
                emits.append(of(record, record_of(record, "detections")))
        self.frames = todo[-1].offset + 1
        self.log.commit(emits, "detect", self.frames)

    def batch(self, count: int) -> None:
        todo = [record for _, record in self.log.records["detections"] if record.offset >= self._fed][:count]
        if not todo:
            return
        emits: list[Emit] = []
        for record in todo:
            try:
                emits += [of(record, emit) for emit in self._fold.feed(record)]
            except UnprocessableError:
                emits.append(letter(record, "batch"))
        self._fed = todo[-1].offset + 1
        emits += [codec.emit("batch_state", state, 0) for state in self._fold.moved(self._fed)]
        self.detections = self._fold.position(self._fed)
        self.log.commit(emits, "batch", self.detections)

    def done(self) -> bool:
        return self.frames >= self.log.end("frames") - 1 and self._fed >= self.log.end("detections") - 1


def record_of(record: Incoming, topic: str) -> Emit:
    """The bytes of a frame of these tests are the detections that come of it."""
    return Emit(topic, record.key, record.value, record.headers)


def road(seed: int) -> list[Emit]:
    """Frames of two cameras: people who come and go, what detect cannot read, what batch cannot read, ticks."""
    rng = random.Random(seed)
    emits: list[Emit] = []
    at = T0
    for number in range(120):
        camera = rng.choice(["gate", "yard"])
        at += rng.choice([1000, 1000, 2000, 40_000])
        if rng.random() < 0.2:
            emits.append(Emit("frames", camera.encode(), rng.choice([b"bad", b"odd"]), ()))
        elif rng.random() < 0.1:
            emits.append(Tick(at).emit("frames"))
        boxes = [box(rng.randrange(0, 500, 50), score=rng.choice([0.3, 0.6, 0.95]))] if rng.random() < 0.7 else []
        made = codec.emit("detections", seen(number, at, *boxes, camera=camera))
        emits.append(Emit("frames", made.key, made.value, made.headers))
    return emits


class Cut(NamedTuple):
    """What a backup read."""

    look: Look
    log: Log
    states: list[BatchState]


def backed_up(log: Log, moments: Sequence[int]) -> Cut:
    """Read as a backup reads: each at a later moment; what is left out is checked."""
    at = iter(moments)
    positions = {}
    states: dict[str, BatchState] = {}
    for stage in LAST_FIRST:
        position = log.position(stage, next(at))
        topics = READS[stage][:1]
        positions[stage] = {TopicPartition(topics[0], 0): position} if position is not None else {}
        if stage == "batch":
            for record in log.read("batch_state", next(at)):
                state = codec.decode(record, BatchState)
                states[state.camera_id] = state
    look = Look(METAS, positions, {0: {camera: state.resume_offset for camera, state in states.items()}})
    kept = Log()
    last = next(at)
    for topic in STORED:
        for record in log.read(topic, last):
            if belongs(look, record):
                kept.records[topic].append((0, record))
            else:
                check(look, record)
    return Cut(look, kept, list(states.values()))


def names(log: Log) -> list[tuple[str, str]]:
    """Every result by its name; offsets may be others after a restore, but not what lies in a window."""
    found = []
    for topic, name in (("detections", "frame_id"), ("batches", "batch_id"), ("dead_letters", "stage")):
        for _, record in log.records[topic]:
            if record.value == b"odd":
                found.append((topic, "odd"))
            elif Tick.of(record) is None:
                found.append((topic, str(getattr(codec.decode(record, TOPICS[topic].record), name))))
    return sorted(found)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_restored_goes_on_to_the_very_same_results_whenever_it_was_read(seed: int) -> None:
    rng = random.Random(seed)
    frames = road(seed)
    whole = Log()
    stages = Stages(whole)
    for at in range(0, len(frames), 3):
        whole.commit(frames[at : at + 3])
        for _ in range(rng.randrange(3)):
            rng.choice([stages.detect, stages.batch])(rng.randrange(1, 12))
    while not stages.done():
        stages.detect(10)
        stages.batch(10)
    first = rng.randrange(1, whole.now)
    spread = rng.choice([1, 5, 40])
    moments = [first]
    for _ in range(len(LAST_FIRST) + 2):
        moments.append(min(whole.now, moments[-1] + rng.randrange(spread)))
    cut = backed_up(whole, moments)
    # Whatever was put on the road since comes again, as cameras send what was not taken.
    there = {record.offset for _, record in cut.log.records["frames"]}
    cut.log.records["frames"] += [(0, record) for _, record in whole.records["frames"] if record.offset not in there]
    after = Stages(
        cut.log,
        cut.states,
        cut.look.reached("detect", "frames", 0) or 0,
        cut.look.reached("batch", "detections", 0) or 0,
    )
    while not after.done():
        after.detect(rng.randrange(1, 12))
        after.batch(rng.randrange(1, 12))
    assert names(cut.log) == names(whole)

"""The audit from outside: what is on the log by ids, what ClickHouse says by SQL, and what must hold of both."""

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from aiokafka import TopicPartition

from infra.config import Settings
from processors.batch.core import REMEMBERED, iou
from schemas import ids
from schemas.records import Batch, Context, DeadLetter, Detections, Frame
from streams import codec
from streams.admin import read_meta
from streams.claims import ClaimStore
from streams.kafka import incoming
from streams.messages import SOURCE, Incoming, Tick
from streams.topics import STORED, TOPICS
from tests.chaos.llm_proxy import question
from tests.e2e.installation import PARTITIONS, Audit

# A partition of a long campaign has 100 MB of frames.
_READ_S = 300.0

_LETTERS = "dead_letters"


class Made(NamedTuple):
    """One record of a stage's output."""

    at: int
    """When it was appended, ms since the Unix epoch; it was committed within milliseconds."""
    since: int
    """When the record that it was made from was appended; 0 where it names none."""


class CampaignAudit(Audit):
    """The log and ClickHouse after a campaign. Images are checked while they are read, and let go."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._claims = ClaimStore(settings.images_root)
        self._appended: dict[tuple[str, int, int], int] = {}
        self._misnamed: list[str] = []
        self._epochs: dict[str, str] = {}
        self._sunk: list[int] = []
        self.explained = 0
        """Dead letters of windows that the LLM was made to answer badly."""

    async def read(self) -> None:
        """Read every topic whole, as a read_committed reader sees it; ticks and images left out."""
        self._epochs = {topic: meta.epoch for topic, meta in (await read_meta(self._kafka)).items()}
        for topic in (*STORED, "sink_state"):
            records: list[Incoming] = []
            for number in range(1 if TOPICS[topic].single else PARTITIONS):
                records += [record async for record in self._partition(TopicPartition(topic, number))]
            if topic == "sink_state":
                self._sunk = sorted(self._appended[topic, r.partition, r.offset] for r in records)
            else:
                self.records[topic] = records

    async def _partition(self, tp: TopicPartition) -> Any:
        """A partition's records, frames without their images."""
        ((start, end),) = (await self._kafka.bounds([tp])).values()
        if start == end:  # aiokafka's consumer cannot be stopped before it has waited for anything
            return
        async with self._kafka.reading() as consumer, asyncio.timeout(_READ_S):
            consumer.assign([tp])
            consumer.seek(tp, start)
            while await consumer.position(tp) < end:
                for found in (await consumer.getmany(tp, timeout_ms=200)).get(tp, []):
                    record = incoming(found, self._epochs.get(tp.topic, ""))
                    if Tick.of(record) is None:
                        self._appended[tp.topic, tp.partition, found.offset] = found.timestamp
                        yield await self._without_image(record) if tp.topic == "frames" else record

    async def _without_image(self, record: Incoming) -> Incoming:
        frame = codec.decode(record, Frame)
        image = frame.image if frame.image is not None else await self._claims.get(frame.claim or "", frame.sha256)
        digest = hashlib.sha256(image).hexdigest()
        if digest != frame.sha256 or frame.frame_id != ids.frame_id(frame.camera_id, digest, frame.captured_at):
            self._misnamed.append(f"frame {frame.frame_id} is misnamed")
        return record._replace(value=codec.emit("frames", msgspec.structs.replace(frame, image=b"")).value)

    def check(self, accepted: Mapping[str, str], spoiled: Mapping[str, int]) -> list[str]:
        """What does not hold on the log, a line each.

        `accepted`: cameras by frame. `spoiled`: how often the LLM was made to answer each question badly.
        """
        contexts = {record.origin: codec.decode(record, Context) for record in self.records["contexts"]}
        letters: list[DeadLetter] = self.decoded(_LETTERS)
        explained: list[str] = []
        found = list(self._misnamed)
        for letter in letters:
            context = contexts.get(letter.origin)
            if context is not None and _explained(letter, spoiled):
                explained.append(context.batch_id)
            else:
                found.append(f"unexplained dead letter {letter.stage} {letter.origin}: {letter.message[:200]}")
        found += [f"dead letter of {name} is there {n} times" for name, n in Counter(explained).items() if n > 1]
        self.explained = len(set(explained))
        found += self.violations(dict(accepted), explained)
        found += self._unbatched()
        found += self._order_of_verdicts()
        return found

    def _unbatched(self) -> Iterator[str]:
        """Detections that matter, looked at one by one, and the batches that they are in."""
        window = self._settings.windows.record()
        placed = Counter(frame.frame_id for batch in self._batches() for frame in batch.frames)
        recent: dict[str, list[Detections]] = defaultdict(list)
        for seen in self.decoded("detections"):
            before = [box for record in recent[seen.camera_id][-REMEMBERED:] for box in record.boxes]
            news = [
                box
                for box in seen.boxes
                if box.score >= window.threshold
                and box.label in window.open_on
                and not any(
                    other.label == box.label
                    and other.score >= window.threshold
                    and iou(box, other) >= window.stationary_iou
                    for other in before
                )
            ]
            recent[seen.camera_id].append(seen)
            if news and placed[seen.frame_id] != 1:
                count = placed[seen.frame_id]
                yield f"detection {seen.frame_id} matters and " + (f"is there {count} times" if count else "is lost")

    def _order_of_verdicts(self) -> Iterator[str]:
        """Each camera's contexts, and its events as far as there are any, stand in the order of its batches."""
        order = {batch.batch_id: number for number, batch in enumerate(self._batches())}
        for topic in ("contexts", "risk_events"):
            last: dict[str, int] = {}
            for record in self.decoded(topic):
                place = order.get(record.batch_id, -1)
                if place < last.get(record.camera_id, -1):
                    yield f"{topic}: {record.batch_id} out of order"
                last[record.camera_id] = place

    def _batches(self) -> list[Batch]:
        return self.decoded("batches")

    def made(self) -> dict[str, list[Made]]:
        """What each stage appended and when, by stage, oldest first."""
        topics = {"ingest": "frames", "detect": "detections", "batch": "batches", "enrich": "contexts",
                  "analyze": "risk_events"}  # fmt: skip
        found = {stage: sorted(map(self._made, self.records[topic])) for stage, topic in topics.items()}
        return {**found, "sink": [Made(at, 0) for at in self._sunk]}

    def _made(self, record: Incoming) -> Made:
        topic, _, partition, offset = (record.header(SOURCE) or b"::0:0").decode().split(":")
        since = self._appended.get((topic, int(partition), int(offset)), 0)
        return Made(self._appended[record.topic, record.partition, record.offset], since)


def _explained(letter: DeadLetter, spoiled: Mapping[str, int]) -> bool:
    """Whether each attempt that is held against the window was one that the LLM was made to answer badly."""
    if letter.stage != "analyze" or not letter.detail:
        return False
    told = json.loads(letter.detail)
    return len(told["attempts"]) <= spoiled.get(question(json.loads(told["rendered_prompt"])), 0)

"""The audit from outside: what is on the log by ids, what ClickHouse says by SQL, and what must hold of both."""

import asyncio
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import clickhouse_connect
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

# "is there 2 times", or a frame "is in 2 batches".
_DOUBLED = re.compile(r" is (there \d+ times|in \d+ batches)$")


class Made(NamedTuple):
    """One record of a stage's output."""

    at: int
    """When it was appended, ms since the Unix epoch; it was committed within milliseconds."""
    since: int
    """When the record that it was made from was appended; 0 where it names none."""


class Counts(NamedTuple):
    """How many lines of an audit say what."""

    lost: int
    duplicates: int
    unexplained: int


def counted(lines: Iterable[str]) -> Counts:
    """What the audit from outside found, by what it means."""
    every = list(lines)
    return Counts(
        sum(line.endswith(" is lost") for line in every),
        sum(_DOUBLED.search(line) is not None for line in every),
        sum(line.startswith("unexplained dead letter") for line in every),
    )


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

    def check(
        self, accepted: Mapping[str, str], spoiled: Mapping[str, int], poisoned: Collection[str] = ()
    ) -> list[str]:
        """What does not hold on the log, a line each.

        `accepted`: cameras by frame. `spoiled`: how often the LLM was made to answer each question badly.
        `poisoned`: questions that it never answered well, so that their windows can have no event.
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
        asked = {_question(letter) for letter in letters if letter.stage == "analyze"}
        found += [f"a window has no dead letter, and was never judged: {one[-300:]}" for one in set(poisoned) - asked]
        found += self.violations(dict(accepted), explained)
        found += self._unbatched()
        found += self._order_of_verdicts()
        found += self._places()
        found += self._copies()
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

    def _places(self) -> Iterator[str]:
        """Each camera's records lie in one partition, and each window begins behind the end of the one before it."""
        for topic in ("frames", "detections", "batches", "contexts", "risk_events"):
            at: dict[bytes | None, int] = {}
            for record in self.records[topic]:
                if at.setdefault(record.key, record.partition) != record.partition:
                    yield f"{topic}: {record.origin} is in another partition than its camera"
        ends: dict[str, int] = {}
        for batch in self._batches():
            if batch.frames[0].offset <= ends.get(batch.camera_id, -1):
                yield f"batches: {batch.batch_id} out of order"
            ends[batch.camera_id] = batch.frames[-1].offset

    def _copies(self) -> Iterator[str]:
        """What results repeat of what they were made of is the same there."""
        batches = {batch.batch_id: batch for batch in self._batches()}
        for context in self.decoded("contexts"):
            if context.batch_id in batches and context.batch != batches[context.batch_id]:
                yield f"context {context.batch_id} has another batch in it"
        for event in self.decoded("risk_events"):
            batch = batches.get(event.batch_id)
            if batch is not None and (event.camera_id, event.frame_ids) != (
                batch.camera_id,
                tuple(frame.frame_id for frame in batch.frames),
            ):
                yield f"event {event.event_id} names another camera or other frames than its batch"

    def violations_in_clickhouse(self) -> list[str]:
        """As the parent has it; and the bytes that `log` has are those of the log (frames are kept without images)."""
        found = super().violations_in_clickhouse()
        client = clickhouse_connect.get_client(
            dsn=self._settings.clickhouse.url, database=self._settings.clickhouse.database
        )
        for topic in sorted(set(self.records) - {"frames"}):
            rows = client.query(
                "SELECT partition, offset, hex(MD5(assumeNotNull(value))) FROM log FINAL "
                "WHERE topic = {topic:String} AND NOT tick",
                {"topic": topic},
            ).result_rows
            kept = {(partition, offset): digest for partition, offset, digest in rows}
            for record in self.records[topic]:
                there = kept.get((record.partition, record.offset))
                digest = hashlib.md5(record.value or b"", usedforsecurity=False).hexdigest().upper()
                if there is not None and there != digest:
                    found.append(f"{topic} in log: {record.origin} has other bytes")
        client.close()
        return found

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
    return len(json.loads(letter.detail)["attempts"]) <= spoiled.get(_question(letter), 0)


def _question(letter: DeadLetter) -> str:
    """What the LLM was asked before the letter was written; nothing where it does not say."""
    if not letter.detail:
        return ""
    return question(json.loads(json.loads(letter.detail)["rendered_prompt"]))

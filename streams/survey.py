"""What is on the log, and how far each stage has come: counted by reading, because offsets have holes.

Transactions leave markers, so an end minus a position says nothing. A topic too long to be read is estimated,
and says so.
"""

import asyncio
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiokafka
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)
from aiokafka.structs import OffsetAndMetadata

from schemas.records import TopicMeta
from streams.admin import read_meta
from streams.kafka import Kafka, incoming
from streams.messages import KIND, REDRIVE, TICK, Tick
from streams.topics import STORED

READS: dict[str, tuple[str, ...]] = {
    "detect": ("frames",),
    "batch": ("detections",),
    "enrich": ("batches",),
    "analyze": ("contexts",),
    "sink": STORED,
    "replay": ("replay_units", "contexts"),
}
"""What each stage reads, without building it: that would load its model."""

# 20,000 records of 600 bytes and 5,000 of 20 KB took 0.6 s (measured on 2 cores): at these bounds a topic takes two.
COUNT_OFFSETS = 50_000
# Frames can be 64 KB each.
COUNT_BYTES = 256 * 1024 * 1024
# Between two looks at the bound.
FETCH_RECORDS = 5_000


class Count(NamedTuple):
    """How many records, and whether each was seen; an estimate counts markers and ticks too, so it is too high."""

    records: int
    exact: bool


class Position(NamedTuple):
    """How far one stage has come in one partition."""

    partition: TopicPartition
    committed: int | None
    """The next offset to be done; None where the stage never committed in this life of the topic."""
    start: int
    """The log's first offset."""
    end: int
    """The end that a read_committed reader sees."""
    behind: Count
    """Visible records from the position to the end, ticks too: the stage has to pass them on."""


class Survey(NamedTuple):
    """One look at the log."""

    metas: dict[str, TopicMeta]
    records: dict[str, Count]
    """By topic; ticks, and what a redrive put there for another time, left out."""
    positions: dict[str, list[Position]]
    """By stage, in the order of the road."""


class _Seen(NamedTuple):
    offsets: "array[int]"
    ticks: "array[int]"
    """And what else is no record of its own: redriven ones, dead letters of the same origin."""
    since: int
    """Offsets from here on were read ..."""
    upto: int
    """... to here, exclusive."""

    def behind(self, position: int, end: int) -> Count:
        """Visible records from the position to the end."""
        if position >= end:
            return Count(0, exact=True)
        if position < self.since or self.upto < end:
            return Count(end - position, exact=False)
        return Count(len(self.offsets) - bisect_left(self.offsets, position), exact=True)

    def between(self, since: int, upto: int) -> "_Seen":
        """What was seen of a part of it."""
        offsets, ticks = (
            seen[bisect_left(seen, since) : bisect_left(seen, upto)] for seen in (self.offsets, self.ticks)
        )
        return _Seen(offsets, ticks, since, upto)


Memory = dict[tuple[TopicPartition, str], _Seen]
"""What earlier surveys saw, by partition and epoch: offsets alone, 16 bytes a record, within the bounds above."""


async def survey(kafka: Kafka, *, count: bool = True, memory: Memory | None = None) -> Survey:
    """Look at every topic that ClickHouse keeps, and at every stage.

    With `count` false only what lies beyond the positions is read, and `records` is empty. What `memory` holds is not
    read again, and what is read is put there: for whoever looks again and again.

    Raises:
        KafkaError, TimeoutError or OSError: the broker is away.
    """
    metas = await read_meta(kafka)
    tps = [TopicPartition(t, p) for t in STORED if t in metas for p in range(metas[t].partitions)]
    if not tps:
        return Survey(metas, {}, {stage: [] for stage in READS})
    committed = await _committed(kafka, metas)
    async with kafka.reading() as consumer:
        # The topics' leaders, all at once: they are else asked for one by one, 0.1 s each.
        await consumer._client.set_topics({tp.topic for tp in tps})  # noqa: SLF001 (aiokafka is pinned below 0.15)
        starts = await consumer.beginning_offsets(tps)
        ends = await consumer.end_offsets(tps)
    at = {
        (stage, tp): max(starts[tp], committed[stage].get(tp, starts[tp]))
        for stage, topics in READS.items()
        for tp in tps
        if tp.topic in topics
    }
    since = _since(tps, starts, ends, at, count=count)
    lives: Mapping[str, str] = {topic: meta.epoch for topic, meta in metas.items()}
    seen = await _read(kafka, since, ends, {} if memory is None else memory, lives)
    return Survey(
        metas,
        {topic: _count(topic, tps, starts, ends, seen) for topic in STORED if topic in metas} if count else {},
        {
            stage: [
                Position(
                    tp,
                    committed[stage].get(tp),
                    starts[tp],
                    ends[tp],
                    seen[tp].behind(at[stage, tp], ends[tp]),
                )
                for tp in tps
                if tp.topic in topics
            ]
            for stage, topics in READS.items()
        },
    )


async def _committed(kafka: Kafka, metas: Mapping[str, TopicMeta]) -> dict[str, dict[TopicPartition, int]]:
    """Each stage's positions; those of an earlier life of a topic are worth nothing."""
    async with kafka.admin() as admin:
        found = await asyncio.gather(*(group_offsets(admin, kafka.group(stage)) for stage in READS))
    return {
        stage: {
            tp: entry.offset
            for tp, entry in offsets.items()
            if entry.offset >= 0 and tp.topic in metas and entry.metadata == metas[tp.topic].epoch
        }
        for stage, offsets in zip(READS, found, strict=True)
    }


async def group_offsets(admin: AIOKafkaAdminClient, group: str) -> dict[TopicPartition, OffsetAndMetadata]:
    """The group's committed offsets. The first question about any group makes a new broker's topic for them."""
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        try:
            return dict(await admin.list_consumer_group_offsets(group))
        except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError, GroupLoadInProgressError):
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.25)


def _since(
    tps: Sequence[TopicPartition],
    starts: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    at: Mapping[tuple[str, TopicPartition], int],
    *,
    count: bool,
) -> dict[TopicPartition, int]:
    """Where to begin to read: the log's start, or where the last stage stands, within the bound."""
    spans: dict[str, int] = {}
    for tp in tps:
        spans[tp.topic] = spans.get(tp.topic, 0) + ends[tp] - starts[tp]
    last = {tp: min(at[stage, tp] for stage in READS if (stage, tp) in at) for tp in tps}
    behind: dict[str, int] = {}
    for tp in tps:
        behind[tp.topic] = behind.get(tp.topic, 0) + max(0, ends[tp] - last[tp])
    since: dict[TopicPartition, int] = {}
    for tp in tps:
        if count and spans[tp.topic] <= COUNT_OFFSETS:
            since[tp] = starts[tp]
        elif behind[tp.topic] <= COUNT_OFFSETS:
            since[tp] = last[tp]
        else:
            since[tp] = ends[tp]
    return since


async def _read(
    kafka: Kafka,
    since: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    memory: Memory,
    epochs: Mapping[str, str],
) -> dict[TopicPartition, _Seen]:
    """The offsets of the visible records of each partition, and which of them are ticks. Values are let go at once."""
    seen = {tp: _remembered(memory.get((tp, epochs[tp.topic])), since[tp], ends[tp]) for tp in since}
    reached = {tp: seen[tp].upto for tp in since}
    size: dict[str, int] = {}
    todo = {tp for tp in since if reached[tp] < ends[tp]}
    try:
        if todo:
            async with kafka.reading() as consumer, asyncio.timeout(60):
                consumer.assign(list(todo))
                for tp in todo:  # no await between assign and seek: aiokafka's own reset would win
                    consumer.seek(tp, reached[tp])
                while todo:
                    batches = await consumer.getmany(*todo, timeout_ms=100, max_records=FETCH_RECORDS)
                    for tp, batch in batches.items():
                        for record in batch:
                            if record.offset >= ends[tp]:
                                break
                            size[tp.topic] = size.get(tp.topic, 0) + max(0, record.serialized_value_size)
                            seen[tp].offsets.append(record.offset)
                            if record.headers and _counts_not(record):
                                seen[tp].ticks.append(record.offset)
                    for tp in list(todo):
                        reached[tp] = await consumer.position(tp)
                        if reached[tp] >= ends[tp] or size.get(tp.topic, 0) > COUNT_BYTES:
                            todo.discard(tp)
    finally:  # who gives up in the middle goes on from there
        found = {tp: seen[tp].between(since[tp], min(reached[tp], ends[tp])) for tp in since}
        memory.update({(tp, epochs[tp.topic]): part for tp, part in found.items()})
    return found


def _counts_not(record: "aiokafka.ConsumerRecord[Any, Any]") -> bool:
    """Whether it is a tick, or stands there for another time. Most have neither header and need no closer look."""
    for name, value in record.headers:
        if name == REDRIVE or (name == KIND and value == TICK):
            whole = incoming(record, "")
            return Tick.of(whole) is not None or whole.repeats
    return False


def _remembered(seen: _Seen | None, since: int, end: int) -> _Seen:
    """What is known of a partition from an offset on; nothing where it was not seen from there."""
    if seen is None or not seen.since <= since <= seen.upto <= end:
        return _Seen(array("q"), array("q"), since, since)
    return seen.between(since, seen.upto)


def _count(
    topic: str,
    tps: Sequence[TopicPartition],
    starts: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    seen: Mapping[TopicPartition, _Seen],
) -> Count:
    parts = [tp for tp in tps if tp.topic == topic]
    if all(seen[tp].since == starts[tp] and seen[tp].upto >= ends[tp] for tp in parts):
        return Count(sum(len(seen[tp].offsets) - len(seen[tp].ticks) for tp in parts), exact=True)
    return Count(sum(ends[tp] - starts[tp] for tp in parts), exact=False)

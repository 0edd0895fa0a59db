"""Reading the broker for a backup: where everybody stands, in the order that `cut` asks for, and what lies behind."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from aiokafka import TopicPartition

from infra.backup.cut import LAST_FIRST, Look, resumes_of
from infra.backup.packs import Kept
from schemas.records import BatchState, TopicMeta
from streams import codec
from streams.admin import read_meta
from streams.kafka import Kafka, incoming
from streams.survey import READS, group_offsets

if TYPE_CHECKING:
    from streams.messages import Incoming

# A reader that sees nothing new for so long: behind a transaction that stays open, the broker ends it after 10 s.
_STILL_S = 60.0

_PAGE_RECORDS = 2_000

# A replay that is cut appends every few hundred milliseconds for as long as it lasts, then nothing more.
_LOOKS = 10
_PAUSE_S = 0.5


class Seen(NamedTuple):
    """One look at the broker."""

    look: Look
    states: Sequence[Kept]
    """The newest record of each key of what batch and ingest remember."""
    before: Mapping[TopicPartition, int]
    """Ends of `frames` and `dead_letters` before it was read what ingest remembers."""


async def see(kafka: Kafka) -> Seen:
    """Positions, last stages first; then what stages remember.

    Raises:
        KafkaError, TimeoutError or OSError: the broker is away.
    """
    metas = await read_meta(kafka)
    positions: dict[str, dict[TopicPartition, int]] = {}
    states: list[Kept] = []
    resumes: dict[int, dict[str, int]] = {}
    for stage in LAST_FIRST:
        positions[stage] = await _positions(kafka, stage, metas)
        if stage == "batch" and "batch_state" in metas:
            newest = await _newest(kafka, metas["batch_state"])
            states += newest
            decoded: dict[TopicPartition, dict[str, BatchState]] = {}
            for kept in newest:
                state = codec.decode_state(kept.record, BatchState)
                if state is not None:
                    tp = TopicPartition("batch_state", kept.record.partition)
                    decoded.setdefault(tp, {})[state.camera_id] = state
            resumes = resumes_of(decoded, metas["detections"].epoch)
    tps = [tp for topic in ("frames", "dead_letters") for tp in partitions(metas, topic)]
    before = {tp: end for tp, (_, end) in (await kafka.bounds(tps)).items()} if tps else {}
    if "ingest_state" in metas:
        states += await _newest(kafka, metas["ingest_state"])
    return Seen(Look(metas, positions, resumes), states, before)


def partitions(metas: Mapping[str, TopicMeta], topic: str) -> list[TopicPartition]:
    """The partitions of a topic; none where it is not there."""
    return [TopicPartition(topic, part) for part in range(metas[topic].partitions)] if topic in metas else []


async def beyond(
    kafka: Kafka, look: Look, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]
) -> AsyncIterator[list[Kept]]:
    """What lies between two offsets of each partition, some of one partition at a time, in its order.

    It waits for transactions that are open where they began before an end.

    Raises:
        TimeoutError: nothing came for a minute, though there is more.
    """
    todo = {tp for tp in ends if starts[tp] < ends[tp]}
    if not todo:
        return
    async with kafka.reading() as consumer:
        consumer.assign(list(todo))
        for tp in todo:  # no await between assign and seek: aiokafka's own reset would win
            consumer.seek(tp, starts[tp])
        reached = dict(starts)
        deadline = asyncio.timeout(_STILL_S)
        async with deadline:
            while todo:
                batches = await consumer.getmany(*todo, timeout_ms=100, max_records=_PAGE_RECORDS)
                for tp, batch in batches.items():
                    epoch = look.metas[tp.topic].epoch
                    page = [Kept(incoming(one, epoch), one.timestamp) for one in batch if one.offset < ends[tp]]
                    if page:
                        yield page
                moved = False
                for tp in list(todo):
                    at = await consumer.position(tp)
                    moved |= at > reached[tp]
                    reached[tp] = at
                    if at >= ends[tp]:
                        todo.discard(tp)
                if moved:
                    deadline.reschedule(asyncio.get_running_loop().time() + _STILL_S)


async def quiet_ends(kafka: Kafka, tps: Sequence[TopicPartition]) -> tuple[dict[TopicPartition, int], bool]:
    """Ends of partitions at a moment when nobody appends; after ten tries as they are, and False.

    One transaction spans all of them, and has to be in sight everywhere or nowhere.
    """
    ends = {tp: end for tp, (_, end) in (await kafka.bounds(tps)).items()}
    for _ in range(_LOOKS):
        await asyncio.sleep(_PAUSE_S)
        again = {tp: end for tp, (_, end) in (await kafka.bounds(tps)).items()}
        if again == ends:
            return ends, True
        ends = again
    return ends, False


async def _positions(kafka: Kafka, stage: str, metas: Mapping[str, TopicMeta]) -> dict[TopicPartition, int]:
    async with kafka.admin() as admin:
        found = await group_offsets(admin, kafka.group(stage))
    return {
        tp: entry.offset
        for tp, entry in found.items()
        if entry.offset >= 0
        and tp.topic in READS[stage]
        and tp.topic in metas
        and entry.metadata == metas[tp.topic].epoch
    }


async def _newest(kafka: Kafka, meta: TopicMeta) -> list[Kept]:
    """The newest record of each key of a compacted topic; one without a value says that there is none."""
    newest: dict[tuple[int, bytes | None], Incoming] = {}
    for record in await kafka.read(
        [TopicPartition(meta.topic, part) for part in range(meta.partitions)], epoch=meta.epoch
    ):
        newest[record.partition, record.key] = record
    found = [record for record in newest.values() if record.value is not None]
    return [Kept(record) for record in sorted(found, key=lambda record: (record.partition, record.offset))]

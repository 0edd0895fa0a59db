"""Topics are made here and nowhere else: each with a random epoch, written to `meta` before and after.

Positions are worth nothing across a recreation, so every position names the epoch that it belongs to. A topic
that the broker lacks although `meta` calls it ready is a new life: it is made again, with a new epoch.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from schemas.records import TopicMeta
from streams import codec
from streams.delivery import FencedProducer
from streams.errors import FencedError, UncertainError
from streams.kafka import MAX_RECORD_BYTES, Kafka
from streams.topics import TOPICS, Topic

log = structlog.get_logger(__name__)


class TopicsError(RuntimeError):
    """The topics on the broker are not what the settings say; the message names the setting and the fix."""


async def ensure_topics(kafka: Kafka) -> dict[str, TopicMeta]:
    """Create what is missing and return each topic's meta record. Safe to call from many processes at once.

    Raises:
        TopicsError: a topic has another partition count than `kafka.partitions`.
        KafkaError: the broker is away.
    """
    turns = 0
    async with kafka.admin() as admin:
        metas, missing = await _look(admin, kafka)
        while missing:
            turns += 1
            try:
                await _create_missing(admin, kafka)
            except (FencedError, UncertainError) as error:  # another creator came after us: its work is read next
                log.info("creating topics again", why=str(error))
                # Ever longer: on a slow machine each turn lasts longer, and whoever tries too soon spoils another's.
                await asyncio.sleep(random.uniform(0.2, 1.0 * turns))
            metas, missing = await _look(admin, kafka)
    return metas


async def revive_topics(kafka: Kafka, lives: Sequence[TopicMeta]) -> None:
    """Make topics with the epochs that they had, for records that will have the offsets that they had.

    No topic may be there. One that this version has and `lives` does not name is a new life.

    Raises:
        TopicsError: as `ensure_topics`.
        FencedError or UncertainError: another creator was in the way.
        KafkaError: the broker is away.
    """
    async with kafka.admin() as admin:
        await _create(admin, kafka, [TOPICS["meta"]])
    producer = FencedProducer(kafka, kafka.transactional_id("topics"))
    try:
        await producer.open()
        # As if whoever made them had ended before they were there: `ensure_topics` goes on with the epoch it finds.
        begun = [msgspec.structs.replace(meta, status="creating") for meta in lives]
        await producer.transact([codec.emit("meta", meta, 0) for meta in begun])
    finally:
        await producer.close()
    await ensure_topics(kafka)


async def _look(admin: AIOKafkaAdminClient, kafka: Kafka) -> tuple[dict[str, TopicMeta], list[Topic]]:
    """Each topic's meta record, and the topics that are not there and ready."""
    existing = await _partition_counts(admin)
    for name, count in existing.items():
        if count != _count(kafka, TOPICS[name]):
            raise TopicsError(
                f"topic {name} has {count} partitions, kafka.partitions says {_count(kafka, TOPICS[name])}: "
                "the count is fixed at creation, because it decides where a camera lives; set it back",
            )
    metas = await read_meta(kafka) if "meta" in existing else {}
    ready = {name for name, meta in metas.items() if meta.status == "ready" and name in existing}
    return metas, [topic for topic in TOPICS.values() if topic.name not in ready]


async def _create_missing(admin: AIOKafkaAdminClient, kafka: Kafka) -> None:
    """Write each epoch down before its topic is made, and that it is ready after."""
    await _create(admin, kafka, [TOPICS["meta"]])
    # The fence makes creators take turns; what the one before us wrote is read after it.
    producer = FencedProducer(kafka, kafka.transactional_id("topics"))
    try:
        await producer.open()
        metas, missing = await _look(admin, kafka)
        new: list[TopicMeta] = []
        for topic in missing:
            meta = metas.get(topic.name)
            if meta is None or meta.status == "ready":  # never made, or vanished since: a new life
                meta = TopicMeta(
                    topic=topic.name,
                    epoch=secrets.token_hex(4),
                    status="creating",
                    partitions=_count(kafka, topic),
                    created_at=int(time.time() * 1000),
                )
            new.append(meta)
        await producer.transact([codec.emit("meta", meta, 0) for meta in new])
        await _create(admin, kafka, missing)
        ready = [msgspec.structs.replace(meta, status="ready") for meta in new]
        await producer.transact([codec.emit("meta", meta, 0) for meta in ready])
        for meta in ready:
            log.info("topic ready", topic=meta.topic, epoch=meta.epoch, partitions=meta.partitions)
    finally:
        await producer.close()


async def read_meta(kafka: Kafka) -> dict[str, TopicMeta]:
    """Every topic's meta record."""
    records = await kafka.read([TopicPartition("meta", 0)])
    metas = [codec.decode_state(record, TopicMeta) for record in records]
    return {meta.topic: meta for meta in metas if meta is not None}


def epochs_of(metas: dict[str, TopicMeta]) -> Callable[[str], str]:
    """A look-up of topic epochs, as hosts take it."""
    return lambda topic: metas[topic].epoch


def _count(kafka: Kafka, topic: Topic) -> int:
    return 1 if topic.single else kafka.settings.partitions


async def _partition_counts(admin: AIOKafkaAdminClient) -> dict[str, int]:
    names = [name for name in await admin.list_topics() if name in TOPICS]
    return {found["topic"]: len(found["partitions"]) for found in await admin.describe_topics(names)} if names else {}


async def _create(admin: AIOKafkaAdminClient, kafka: Kafka, topics: Sequence[Topic]) -> None:
    response = await admin.create_topics([_new(kafka, topic) for topic in topics])
    for name, code, *_ in response.topic_errors:
        error = for_code(code)
        if code and error is not TopicAlreadyExistsError:
            raise KafkaError(f"cannot create topic {name}: {error.__name__}")


def _new(kafka: Kafka, topic: Topic) -> NewTopic:
    configs = {
        "cleanup.policy": "compact" if topic.compacted else "delete",
        "retention.ms": str(topic.retention_ms),
        "max.message.bytes": str(MAX_RECORD_BYTES),
    }
    if topic.compacted:
        # The segment that is written to is never compacted, and an owner reads its state whole at each takeover:
        # with the default of 1 GB that would be a long read.
        configs |= {"segment.bytes": str(16 * 1024 * 1024), "min.cleanable.dirty.ratio": "0.1"}
    return NewTopic(topic.name, _count(kafka, topic), kafka.settings.replication_factor, topic_configs=configs)

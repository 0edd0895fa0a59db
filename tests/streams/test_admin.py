"""Topics and their epochs, on the real broker."""

import asyncio
import secrets
import time

import pytest

from schemas.records import Frame, TopicMeta
from streams import admin, codec
from streams.admin import TopicsError, ensure_topics, epochs_of, read_meta
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.topics import TOPICS, Topic

pytestmark = pytest.mark.real


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """A catalogue of one topic that the broker has never seen."""
    name = f"made-{secrets.token_hex(4)}"
    made = Topic(name, Frame, lambda record: str(record.camera_id))
    monkeypatch.setattr(admin, "TOPICS", {"meta": TOPICS["meta"], name: made})
    return name


async def test_three_creators_at_once_make_one_epoch(kafka: Kafka, name: str) -> None:
    found = await asyncio.gather(*(ensure_topics(kafka) for _ in range(3)))
    assert len({metas[name].epoch for metas in found}) == 1
    assert (await read_meta(kafka))[name].status == "ready"
    assert epochs_of(found[0])(name) == found[0][name].epoch


async def test_topics_that_are_there_keep_their_epoch(kafka: Kafka, name: str) -> None:
    assert (await ensure_topics(kafka))[name] == (await ensure_topics(kafka))[name]


async def test_another_partition_count_is_refused(kafka: Kafka, name: str) -> None:
    await ensure_topics(kafka)
    more = Kafka(kafka.settings.model_copy(update={"partitions": 5}))
    with pytest.raises(TopicsError, match=rf"{name} has 4 partitions, kafka\.partitions says 5.*set it back"):
        await ensure_topics(more)


async def test_a_creator_that_died_halfway_is_followed_by_one_that_keeps_its_epoch(kafka: Kafka, name: str) -> None:
    await ensure_topics(kafka)
    begun = TopicMeta(topic=name, epoch="begun", status="creating", partitions=4, created_at=int(time.time() * 1000))
    producer = FencedProducer(kafka, kafka.transactional_id("topics"))
    await producer.open()
    await producer.transact([codec.emit("meta", begun, 0)])
    await producer.close()
    assert (await ensure_topics(kafka))[name].epoch == "begun"


async def test_a_topic_that_vanished_is_a_new_life(kafka: Kafka, name: str) -> None:
    before = (await ensure_topics(kafka))[name].epoch
    async with kafka.admin() as client:
        await client.delete_topics([name])
    after = (await ensure_topics(kafka))[name]
    assert after.epoch != before
    assert after.status == "ready"

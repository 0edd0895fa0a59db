"""Epochs that are known while topics come and go."""

import asyncio

import pytest

from schemas.records import TopicMeta
from streams import codec
from streams.admin import read_meta
from streams.kafka import Kafka
from streams.lives import Lives
from tests.streams.conformance.harness import until

pytestmark = pytest.mark.real


async def test_a_topic_that_vanished_is_made_again_as_another_life_and_every_follower_knows(kafka: Kafka) -> None:
    async with Lives(kafka).following() as lives, Lives(kafka).following() as others:
        before = lives("gpu_metrics")
        assert before == (await read_meta(kafka))["gpu_metrics"].epoch == others("gpu_metrics")
        async with kafka.admin() as admin:
            await admin.delete_topics(["gpu_metrics"])

            async def gone() -> bool:
                return "gpu_metrics" not in await admin.list_topics()

            await until(gone)
        await lives.restore()
        after = lives("gpu_metrics")
        assert after != before

        async def known() -> bool:
            return others("gpu_metrics") == after

        await until(known, within=5)
        assert (await read_meta(kafka))["gpu_metrics"].status == "ready"


async def test_a_refresh_knows_what_was_written_before_it_and_those_who_wait_share_one(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    read = Kafka.read

    async def counted(*args: object, **options: object) -> object:
        nonlocal reads
        reads += 1
        return await read(*args, **options)  # type: ignore[arg-type]

    lives = Lives(kafka)
    with pytest.raises(KeyError):
        lives("toy")
    meta = TopicMeta(topic="toy", epoch="e1", status="creating", partitions=1, created_at=0)
    emit = codec.emit("meta", meta)
    producer = kafka.producer()
    await producer.start()
    await producer.send_and_wait("meta", emit.value, key=emit.key, headers=list(emit.headers), partition=0)
    await producer.stop()
    monkeypatch.setattr(Kafka, "read", counted)
    await asyncio.gather(*(lives.refresh() for _ in range(16)))
    assert lives("toy") == "e1"
    assert reads <= 2

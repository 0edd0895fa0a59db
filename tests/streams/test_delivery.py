"""The fence and the transaction, on the real broker."""

import asyncio
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from streams.delivery import FencedProducer, let_go
from streams.errors import FencedError
from streams.kafka import Kafka
from streams.messages import Emit
from tests.streams.conformance.harness import road

pytestmark = pytest.mark.real


async def test_a_successor_ends_the_transaction_that_its_predecessor_left_open(kafka: Kafka, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        name = kafka.transactional_id("toy", 0)
        first, second = FencedProducer(kafka, name), FencedProducer(kafka, name)
        await first.open()
        await first._producer.begin_transaction()
        await first._producer.send_and_wait(on.target, b"left open", partition=0)
        await second.open()
        # Else a reader would wait for it, up to the transaction's timeout.
        async with asyncio.timeout(5):
            assert await on.output() == []
        await first.close()
        await second.close()


async def test_a_fenced_predecessor_can_commit_nothing(kafka: Kafka, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        name = kafka.transactional_id("toy", 0)
        first, second = FencedProducer(kafka, name), FencedProducer(kafka, name)
        await first.open()
        await first.transact([Emit(on.target, b"", b"owner", partition=0)])
        await second.open()
        with pytest.raises(FencedError):
            await first.transact([Emit(on.target, b"", b"zombie", partition=p) for p in range(4)])
        assert await second.transact([Emit(on.target, b"", b"successor", partition=0)]) == [2]
        assert [record.value for record in await on.output()] == [b"owner", b"successor"]
        await first.close()
        await second.close()


async def test_results_and_position_commit_together(kafka: Kafka, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        one, other = (TopicPartition(on.source, partition) for partition in (1, 2))
        group = kafka.group("toy")
        producer = FencedProducer(kafka, kafka.transactional_id("toy", 1))
        await producer.open()
        await producer.transact(
            [Emit(on.target, b"", b"result", partition=1)], offsets=(group, {one: OffsetAndMetadata(7, "epoch")})
        )
        assert await kafka.committed(group, one) == (7, "epoch")
        assert await kafka.committed(group, other) is None
        await producer.close()


async def test_closing_in_the_middle_of_a_transaction_takes_no_time(kafka: Kafka, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        producer = FencedProducer(kafka, kafka.transactional_id("toy", 2))
        await producer.open()
        await producer._producer.begin_transaction()
        await producer._producer.send(on.target, b"never", partition=2)
        async with asyncio.timeout(2):
            await producer.close()


async def test_a_cancellation_while_letting_go_reaches_the_caller() -> None:
    class Deaf:
        class _sender:  # noqa: N801 (aiokafka's name)
            @staticmethod
            async def close() -> None:
                await asyncio.sleep(3600)

        @staticmethod
        async def stop() -> None:
            pass

    task = asyncio.create_task(let_go(Deaf()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

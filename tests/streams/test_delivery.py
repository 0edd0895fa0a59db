"""The fence and the transaction, on the real broker."""

import asyncio
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from schemas.records import DeadLetter
from streams import codec
from streams.delivery import DEAD_LETTER_INLINE, FencedProducer, Ownership, let_go
from streams.errors import FencedError, UnprocessableError
from streams.kafka import MAX_RECORD_BYTES, Kafka, KafkaSettings
from streams.messages import REDRIVE, Emit, Incoming
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


HUGE = 3_900_000


@pytest.mark.parametrize(
    "record",
    [
        Incoming("in", "e", 0, 7, b"k", bytes(HUGE), ()),
        Incoming("in", "e", 0, 7, b"k" * HUGE, b"", ()),
        Incoming("in", "e", 0, 7, b"k", b"", (("x", bytes(HUGE)),)),
        Incoming("in", "e", 0, 7, b"k", b"", ((REDRIVE, bytes(HUGE)),)),
        Incoming("in", "e", 0, 7, b"k", bytes(DEAD_LETTER_INLINE - 200), ()),
    ],
    ids=["value", "key", "header", "redrive", "at the limit"],
)
def test_a_dead_letter_fits_its_topic_whatever_is_in_the_record(kafka_free: Ownership, record: Incoming) -> None:
    """One that did not could never be committed, and its partition would stand still."""
    error = UnprocessableError("m" * HUGE + "\ud83d", camera_id="c" * HUGE, detail="d" * HUGE)
    emit = kafka_free.dead_letter(record, error, 1)
    assert emit.size < 2_000_000
    letter = codec.decode(Incoming(emit.topic, "e", 0, 0, emit.key, emit.value, emit.headers), DeadLetter)
    assert letter.origin == "in:e:0:7"
    assert letter.message.startswith("mmm")
    if record.size < DEAD_LETTER_INLINE and not record.headers:
        assert (letter.key, letter.value, letter.claim) == (record.key, record.value, None)
    else:
        assert (letter.key, letter.value, letter.headers, letter.claim) == (None, None, {}, "log:in:e:0:7")


def test_half_a_character_in_an_error_does_not_keep_its_dead_letter_out(kafka_free: Ownership) -> None:
    """JSON can escape half of a surrogate pair, and what an LLM says comes as JSON."""
    record = Incoming("in", "e", 0, 7, b"k", b"", ())
    emit = kafka_free.dead_letter(record, UnprocessableError("said \ud83d", detail='{"raw": "\ud83d"}'), 1)
    letter = codec.decode(Incoming(emit.topic, "e", 0, 0, emit.key, emit.value, emit.headers), DeadLetter)
    assert (letter.message, letter.detail) == ("said ?", '{"raw": "?"}')


def test_a_result_too_large_for_its_topic_is_the_record_s_fault(kafka_free: Ownership) -> None:
    record = Incoming("in", "e", 0, 7, b"k", b"", ())
    half = MAX_RECORD_BYTES // 2
    with pytest.raises(UnprocessableError, match="more than a record holds"):
        kafka_free.derived(Emit("out", bytes(half), bytes(half)), record)


@pytest.fixture
def kafka_free() -> Ownership:
    """A hold on a partition that never speaks to a broker."""
    return Ownership(Kafka(KafkaSettings()), "toy", TopicPartition("in", 0), epoch=lambda: "e")

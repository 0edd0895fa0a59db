"""The fence and the transaction, on the real broker."""

import asyncio
import gc
import hashlib
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaConnectionError
from aiokafka.structs import OffsetAndMetadata

from schemas.records import DeadLetter
from streams import codec
from streams.delivery import DEAD_LETTER_INLINE, FencedProducer, Ownership, let_go
from streams.errors import FencedError, UncertainError, UnprocessableError
from streams.kafka import MAX_RECORD_BYTES, Kafka, KafkaSettings
from streams.messages import REDRIVE, SOURCE, Emit, Incoming
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


async def test_a_transaction_larger_than_a_batch_is_split_and_tells_each_record_s_offset(
    kafka: Kafka, tmp_path: Path
) -> None:
    """Topics and partitions mixed, as a stage emits them; one record is as large as a record may be."""
    async with road(kafka, tmp_path) as on:
        most = MAX_RECORD_BYTES - 65_536
        sizes = [10, 700_000, 700_000, 10, most, 10, 0, *[200_000] * 20]
        emits = [
            Emit(topic, b"k", b"%03d" % number + bytes(size), (("n", b"%d" % number),), partition)
            for number, size in enumerate(sizes)
            for topic, partition in ((on.target, 0), (on.source, 0), (on.target, 1))
        ]
        producer = FencedProducer(kafka, kafka.transactional_id("toy", 3))
        await producer.open()
        tp = TopicPartition(on.source, 3)
        for again in range(2):  # the second goes on behind the first and its marker
            offsets = await producer.transact(emits, offsets=(kafka.group("toy"), {tp: OffsetAndMetadata(again, "e")}))
            since = again * (len(sizes) + 1)
            assert offsets == [since + number for number in range(len(sizes)) for _ in range(3)]
        assert await kafka.committed(kafka.group("toy"), tp) == (1, "e")
        await producer.close()
        for one in (TopicPartition(on.target, 0), TopicPartition(on.source, 0), TopicPartition(on.target, 1)):
            found = await kafka.read([one])
            mine = [emit for emit in emits if (emit.topic, emit.partition) == one]
            assert list(map(gist, found)) == list(map(gist, (*mine, *mine)))


async def test_a_transaction_that_fails_leaves_none_of_its_batches(kafka: Kafka, tmp_path: Path) -> None:
    """Its last record is more than a broker takes; batches before it were appended by then."""
    async with road(kafka, tmp_path) as on:
        name = kafka.transactional_id("toy", 4)
        first, second = FencedProducer(kafka, name), FencedProducer(kafka, name)
        await first.open()
        sizes = [700_000] * 5 + [MAX_RECORD_BYTES + 1]
        with pytest.raises(UncertainError, match="MessageSizeTooLarge"):
            await first.transact([Emit(on.target, b"k", bytes(size), partition=0) for size in sizes])
        await second.open()
        await second.transact([Emit(on.target, b"k", b"successor", partition=0)])
        assert [record.value or b"" for record in await on.output() if len(record.value or b"") < 100] == [b"successor"]
        assert len(await on.output()) == 1
        await first.close()
        await second.close()


async def test_closing_in_the_middle_of_a_transaction_takes_no_time(kafka: Kafka, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        producer = FencedProducer(kafka, kafka.transactional_id("toy", 2))
        await producer.open()
        await producer._producer.begin_transaction()
        await producer._producer.send(on.target, b"never", partition=2)
        async with asyncio.timeout(2):
            await producer.close()


async def test_a_broker_that_is_back_and_names_no_brokers_yet_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_self: AIOKafkaProducer) -> None:
        raise AssertionError("Did we not perform bootstrap?")  # what aiokafka 0.14 says in that moment

    monkeypatch.setattr(AIOKafkaProducer, "start", start)
    with pytest.raises(KafkaConnectionError):
        await FencedProducer(Kafka(KafkaSettings(bootstrap_servers="127.0.0.1:1")), "t-stage-0").open()


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


def gist(one: Emit | Incoming) -> tuple[bytes | None, int, bytes, object]:
    """All of it, short enough to be shown."""
    value = one.value or b""
    return one.key, len(value), hashlib.sha256(value).digest(), one.headers


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
        assert (letter.value, letter.headers, letter.claim) == (None, {}, "log:in:e:0:7")
        assert letter.key == (record.key or b"")[:255], "a replay knows its failed unit by it"


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


def test_a_stage_appends_to_its_outputs_and_to_dead_letters_alone() -> None:
    record = Incoming("in", "e", 0, 7, b"k", b"", ())
    hold = Ownership(Kafka(KafkaSettings()), "toy", TopicPartition("in", 0), epoch=lambda: "e", outputs=("out",))
    assert hold.derived(Emit("out", b"k", b"v"), record).topic == "out"
    assert hold.derived(Emit("dead_letters", b"k", b"v"), record).topic == "dead_letters"
    with pytest.raises(UnprocessableError, match="toy may not append to risk_events, only to out"):
        hold.derived(Emit("risk_events", b"k", b"v"), record)


def test_a_result_names_the_record_that_it_was_made_from_unless_it_says_so_itself(kafka_free: Ownership) -> None:
    record = Incoming("in", "e", 0, 7, b"k", b"", ())
    assert kafka_free.derived(Emit("out", b"k", b"v"), record).headers == ((SOURCE, b"in:e:0:7"),)
    own = ((SOURCE, b"something else"),)
    assert kafka_free.derived(Emit("out", b"k", b"v", own), record).headers == own


def test_a_dead_letter_tells_the_position_of_the_stage_alone_that_made_it(kafka_free: Ownership) -> None:
    """Two stages can read one topic: what one gave up the other has not done."""
    record = Incoming("in", "e", 0, 7, b"k", b"", ())
    letter = kafka_free.dead_letter(record, ValueError("bad"), 1)
    read = Incoming("dead_letters", "e", 0, 0, letter.key, letter.value, letter.headers)
    other = Ownership(Kafka(KafkaSettings()), "other", TopicPartition("in", 0), epoch=lambda: "e")
    assert kafka_free._is_ours(read)
    assert not other._is_ours(read)


@pytest.fixture
def kafka_free() -> Ownership:
    """A hold on a partition that never speaks to a broker."""
    return Ownership(Kafka(KafkaSettings()), "toy", TopicPartition("in", 0), epoch=lambda: "e")


async def test_one_that_was_never_opened_leaves_nothing_to_close() -> None:
    FencedProducer(Kafka(KafkaSettings(bootstrap_servers="127.0.0.1:1")), "t-stage-0")
    gc.collect()  # aiokafka warns of each producer that was made and not closed, and a warning fails a test

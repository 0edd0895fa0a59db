"""Labels on the real broker: each on the log once, whoever writes at the same time and whatever the broker answers."""

import asyncio
from collections.abc import Iterator

import msgspec
import pytest
from aiokafka import TopicPartition

from processors.batch.settings import WindowsSettings
from schemas.records import Label
from streams.control import Cameras
from streams.delivery import FencedProducer
from streams.errors import UnavailableError, UncertainError
from streams.kafka import Kafka
from streams.labels import LabelLog
from streams.messages import Emit
from streams.topics import partition_of
from tests import examples
from tests.conftest import PARTITIONS

pytestmark = pytest.mark.real


def labels(kafka: Kafka, clock: Iterator[float] | None = None) -> LabelLog:
    cameras = Cameras(kafka, WindowsSettings().record(), "UTC")
    return LabelLog(kafka, cameras) if clock is None else LabelLog(kafka, cameras, clock.__next__)


@pytest.fixture
def label(kafka: Kafka) -> Label:
    """A label on a camera that only this test has."""
    return msgspec.structs.replace(examples.label, camera_id=f"cam-{kafka.settings.system}", label_id="", labelled_at=0)


async def on_log(kafka: Kafka, camera_id: str) -> list[Label]:
    return [found for found in await labels(kafka).read() if found.camera_id == camera_id]


async def test_a_label_is_on_the_log_as_it_was_given_in_its_camera_s_partition(kafka: Kafka, label: Label) -> None:
    chosen = msgspec.structs.replace(label, selection="rare", chance=0.25, note="the post")
    given = await labels(kafka, iter([12.3456])).append(chosen)
    assert given == msgspec.structs.replace(chosen, label_id=given.label_id, labelled_at=12_345)
    assert await on_log(kafka, label.camera_id) == [given]
    found = await kafka.read([TopicPartition("labels", partition_of(label.camera_id, PARTITIONS))])
    assert sum(record.key == label.camera_id.encode() for record in found) == 1


async def test_said_twice_within_ten_seconds_is_one_and_another_verdict_between_makes_it_new(
    kafka: Kafka, label: Label
) -> None:
    log = labels(kafka, iter([100.0, 105.0, 106.0, 107.0, 117.5, 118.0]))
    other = msgspec.structs.replace(label, verdict="false_alarm")
    first = await log.append(label)
    assert await log.append(label) == first
    second = await log.append(other)
    # What was said before does not hold any more: it is said again.
    third = await log.append(label)
    fourth = await log.append(label)
    assert len({first.label_id, second.label_id, third.label_id, fourth.label_id}) == 4
    # Of another thing it is another label, at the same time, too.
    assert (await log.append(msgspec.structs.replace(label, event_id="another"))).label_id != fourth.label_id
    assert len(await on_log(kafka, label.camera_id)) == 5


@pytest.mark.parametrize("committed", [True, False])
async def test_a_label_whose_fate_was_unknown_is_on_the_log_once(
    kafka: Kafka, label: Label, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    tries = 0

    class Unsure(FencedProducer):
        async def transact(self, emits, **options):
            nonlocal tries
            tries += 1
            if tries > 1:
                return await super().transact(emits, **options)
            if committed:
                await super().transact(emits, **options)
            raise UncertainError("no answer")

    monkeypatch.setattr("streams.labels.FencedProducer", Unsure)
    given = await labels(kafka).append(label)
    assert await on_log(kafka, label.camera_id) == [given]
    assert tries == (1 if committed else 2)


async def test_labels_of_several_writers_at_once_are_all_there_once(kafka: Kafka, label: Label) -> None:
    writers = {"page": labels(kafka), "command": labels(kafka)}
    given = await asyncio.gather(
        *(
            log.append(msgspec.structs.replace(label, author=author, note=str(n)))
            for n in range(4)
            for author, log in writers.items()
        )
    )
    assert sorted(found.label_id for found in await on_log(kafka, label.camera_id)) == sorted(
        found.label_id for found in given
    )


async def test_a_label_of_a_pinned_camera_is_where_the_camera_is(kafka: Kafka, label: Label) -> None:
    pin = (partition_of(label.camera_id, PARTITIONS) + 1) % PARTITIONS
    cameras = Cameras(kafka, WindowsSettings().record(), "UTC")
    await cameras.table.append(msgspec.structs.replace(examples.camera, camera_id=label.camera_id, partition=pin))
    await labels(kafka).append(label)
    found = await kafka.read([TopicPartition("labels", pin)])
    assert [record.key for record in found if record.key == label.camera_id.encode()] == [label.camera_id.encode()]


async def test_a_record_that_is_no_label_is_left_out(kafka: Kafka, label: Label) -> None:
    producer = FencedProducer(kafka, kafka.transactional_id("stranger"))
    await producer.open()
    await producer.transact([Emit("labels", label.camera_id.encode(), b"garbage", (), 0)])
    await producer.close()
    given = await labels(kafka).append(label)
    assert await on_log(kafka, label.camera_id) == [given]


async def test_without_a_broker_it_says_that_the_label_is_not_there_and_the_setting(kafka: Kafka, label: Label) -> None:
    nobody = Kafka(kafka.settings.model_copy(update={"bootstrap_servers": "127.0.0.1:9"}))
    with pytest.raises(UnavailableError, match=r"cannot be put on the log.*kafka\.bootstrap_servers") as raised:
        await labels(nobody).append(label)
    assert raised.value.waiting_on == "broker"

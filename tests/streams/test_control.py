"""Control topics on the real broker: folded to the latest, followed, written by many at once, bad records skipped."""

import asyncio

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from msgspec import structs

from processors.batch.settings import WindowsSettings
from streams.control import Cameras
from streams.kafka import Kafka

pytestmark = pytest.mark.real


def cameras(kafka: Kafka) -> Cameras:
    return Cameras(kafka, WindowsSettings().record(), "Europe/Berlin", clock=lambda: 1.0)


async def eventually(holds) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.05)


async def test_a_camera_is_made_once_with_the_defaults(kafka: Kafka) -> None:
    here, there = cameras(kafka), cameras(kafka)
    name = f"cam-{kafka.settings.system}"
    made = await here.ensure(name)
    assert (made.time_zone, made.window) == ("Europe/Berlin", WindowsSettings().record())
    assert await there.ensure(name) == made
    records = await kafka.read([TopicPartition("cameras", 0)])
    assert sum(record.key == name.encode() for record in records) == 1


async def test_followers_see_what_others_write(kafka: Kafka) -> None:
    here, there = cameras(kafka), cameras(kafka)
    name = f"cam-{kafka.settings.system}"
    async with here.table.following():
        assert here.get(name) is None
        await there.ensure(name)
        await eventually(lambda: here.get(name) is not None)


async def test_a_broker_that_goes_away_during_the_first_load_is_waited_for(kafka: Kafka, monkeypatch) -> None:
    here = cameras(kafka)
    name = f"cam-{kafka.settings.system}"
    await cameras(kafka).ensure(name)
    read, errors = kafka.read, [KafkaConnectionError("away"), TimeoutError()]

    async def away_at_first(*arguments, **options):
        if errors:
            raise errors.pop()
        return await read(*arguments, **options)

    monkeypatch.setattr(kafka, "read", away_at_first)
    async with here.table.following():
        assert here.get(name) is not None


async def test_writers_at_once_fence_one_another_and_all_get_through(kafka: Kafka) -> None:
    names = [f"cam-{kafka.settings.system}-{number}" for number in range(5)]
    await asyncio.gather(*(cameras(kafka).ensure(name) for name in names))
    reader = cameras(kafka)
    await reader.table.load()
    assert all(reader.get(name) is not None for name in names)


async def test_making_a_camera_does_not_undo_what_is_set_at_that_moment(kafka: Kafka, monkeypatch) -> None:
    here, there = cameras(kafka), cameras(kafka)
    name = f"cam-{kafka.settings.system}"
    append = here.table.append

    async def append_too_late(record, **options):
        await there.table.append(structs.replace(record, name="Front door"))  # a person is faster by a blink
        await append(record, **options)

    monkeypatch.setattr(here.table, "append", append_too_late)
    assert (await here.ensure(name)).name == "Front door"
    await there.table.load()
    assert there.get(name).name == "Front door"


async def test_a_record_that_cannot_be_read_is_skipped_and_counted(kafka: Kafka) -> None:
    producer = kafka.producer()
    await producer.start()
    await producer.send_and_wait("cameras", key=b"bad", value=b"garbage", partition=0)
    await producer.stop()
    reader = cameras(kafka)
    await reader.table.load()
    assert reader.table.skipped >= 1


async def test_a_pin_to_no_partition_is_skipped_and_what_held_before_holds_on(kafka: Kafka) -> None:
    here = cameras(kafka)
    made = await here.ensure(f"cam-{kafka.settings.system}")
    for partition in (-1, kafka.settings.partitions, 2**31 - 1):
        await here.table.append(structs.replace(made, partition=partition))
    assert here.get(made.camera_id) == made
    await here.table.append(structs.replace(made, partition=0))
    assert here.get(made.camera_id) == structs.replace(made, partition=0)

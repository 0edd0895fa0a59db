"""Control topics on the real broker: folded to the latest, followed, written by many at once, bad records skipped."""

import asyncio

import pytest
from aiokafka import TopicPartition
from msgspec import structs

from processors.batch.settings import WindowsSettings
from schemas import prompts
from schemas.prompts import PromptVersion
from streams.control import Cameras, Prompts
from streams.errors import UnavailableError
from streams.kafka import Kafka

pytestmark = pytest.mark.real


def cameras(kafka: Kafka) -> Cameras:
    return Cameras(kafka, WindowsSettings().record(), "Europe/Berlin", clock=lambda: 1.0)


def other_prompt() -> PromptVersion:
    now = prompts.default()
    return PromptVersion(
        template=now.template.replace("You judge", "You weigh"),
        output_schema=now.output_schema,
        parameters=now.parameters,
    )


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


async def test_without_a_pointer_the_version_in_the_tree_judges(kafka: Kafka) -> None:
    assert Prompts(kafka).of("door") == prompts.default()


async def test_registering_chooses_only_where_nobody_has_chosen(kafka: Kafka) -> None:
    writer, reader = Prompts(kafka), Prompts(kafka)
    await writer.register(prompts.default(), "first")
    await writer.register(other_prompt(), "second")
    await reader.table.load()
    assert reader.of("door") == prompts.default()
    assert reader.table.get(f"version/{other_prompt().digest}") is not None


async def test_a_camera_has_its_own_prompt_and_a_missing_version_is_waited_for(kafka: Kafka) -> None:
    table = Prompts(kafka)
    await table.register(prompts.default(), "first")
    pointer = table.table.get("active/default")
    assert pointer is not None
    own = type(pointer)(
        **{name: getattr(pointer, name) for name in pointer.__struct_fields__} | {"scope": "door", "digest": "0" * 32}
    )
    await table.table.append(own)
    assert table.of("yard") == prompts.default()
    with pytest.raises(UnavailableError, match="0000") as waits:
        table.of("door")
    assert waits.value.waiting_on == "settings"


async def test_a_pin_to_no_partition_is_skipped_and_what_held_before_holds_on(kafka: Kafka) -> None:
    here = cameras(kafka)
    made = await here.ensure(f"cam-{kafka.settings.system}")
    for partition in (-1, kafka.settings.partitions, 2**31 - 1):
        await here.table.append(structs.replace(made, partition=partition))
    assert here.get(made.camera_id) == made
    await here.table.append(structs.replace(made, partition=0))
    assert here.get(made.camera_id) == structs.replace(made, partition=0)

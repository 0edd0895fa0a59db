"""What lies before a reader goes away while it reads: retention, and topics that are made anew."""

from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete

from streams.kafka import Kafka
from streams.messages import SOURCE
from tests.conftest import PARTITIONS
from tests.streams.conformance.harness import Road, hosting, road, until
from tests.streams.conformance.test_reading import echo
from tests.streams.conformance.toys import TableStage
from tests.streams.conformance.worker import HOSTS

pytestmark = pytest.mark.real


async def test_a_live_reader_that_retention_overtakes_finishes_what_it_has_and_records_the_rest(
    kafka: Kafka, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.partition.BUFFER_RECORDS", 20)
    (tmp_path / "hang").touch()
    async with road(kafka, tmp_path) as on:
        running, _ = echo(host, on)
        async with hosting(running.run):
            end = await _overtake(on, running)
            (tmp_path / "hang").unlink()
            lost_from, resume_at = await _gap(on)  # although nothing is left to be read
            await on.send(5, partition=1)
            on.sent[lost_from:resume_at] = []
            await on.until_echoed(60)
        assert 20 <= lost_from < resume_at == end
        assert _gaps_counted(running) == 1


async def test_a_sink_that_retention_overtakes_inserts_what_it_has_and_records_the_rest(
    kafka: Kafka, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.partition.BUFFER_RECORDS", 20)
    (tmp_path / "away").touch()
    async with road(kafka, tmp_path) as on:
        stage = TableStage(on.source, tmp_path / "table.sqlite", tmp_path)
        running = HOSTS[host](kafka, stage, epochs=lambda _: on.epoch)
        async with hosting(running.run):
            end = await _overtake(on, running)
            (tmp_path / "away").unlink()
            lost_from, resume_at = await _gap(on)
            await on.send(5, partition=1)
            on.sent[lost_from:resume_at] = []

            async def all_there() -> bool:
                return len(stage.ids()) >= len(on.sent)

            await until(all_there, within=60)
        assert 20 <= lost_from < resume_at == end
        assert sorted(stage.ids()) == on.sent
        assert _gaps_counted(running) == 1


@pytest.mark.parametrize("new", [1, 20], ids=["shorter than the old", "longer than the old"])
async def test_a_topic_made_anew_under_a_live_reader_is_read_from_its_first_offset(
    kafka: Kafka, host: str, tmp_path: Path, new: int
) -> None:
    async with road(kafka, tmp_path) as on:
        await on.send(10 * PARTITIONS)
        running, stage = echo(host, on)
        async with hosting(running.run):
            await on.until_echoed(60)
            async with kafka.admin() as admin:
                await admin.delete_topics([on.source])
                on.epoch = "another"  # `meta` has it before the topic is there
                await until(lambda: _made(admin, on.source), within=60)
            await on.send(new * PARTITIONS)
            await on.until_echoed(60)
            await on.send(PARTITIONS)
            await on.until_echoed(60)
        assert [record.offset for record in stage.seen if record.partition == 0] == [*range(10), *range(new + 1)]
        sources = [record.header(SOURCE) for record in await on.output() if record.partition == 0]
        assert sources[10:] == [f"{on.source}:another:0:{offset}".encode() for offset in range(new + 1)]
        assert await on.dead_letters() == []


async def _overtake(on: Road, running: Any) -> int:
    """Fill the buffer of a reader that makes no progress, then remove all of its partition; return the log's start."""
    await on.send(20, partition=1)

    async def full() -> bool:
        return any(worker.buffer._records for worker, _ in running.workers._running.values())

    await until(full)
    for _ in range(3):  # the first of them may be fetched already, and more with it
        await on.send(10, partition=1)
    tp = on.partitions(on.source)[1]
    end: int = (await on.kafka.bounds([tp]))[tp][1]
    async with on.kafka.admin() as admin:
        await admin.delete_records({tp: RecordsToDelete(before_offset=end)})
    return end


async def _gap(on: Road) -> tuple[int, int]:
    """Wait for the gap's dead letter; the range that it names."""

    async def recorded() -> bool:
        return bool(await on.dead_letters())

    await until(recorded, within=60)
    (letter,) = await on.dead_letters()
    assert letter.kind == "gap"
    found = dict(pair.split(": ") for pair in letter.detail.strip("{}").replace('"', "").split(", "))
    assert letter.origin == f"{on.source}:{on.epoch}:1:{found['from']}"
    return int(found["from"]), int(found["resume_at"])


def _gaps_counted(running: Any) -> float:
    family = running.workers.metrics.dead_letters.family()
    return sum(sample.value for sample in family.samples if sample.labels["kind"] == "gap")


async def _made(admin: AIOKafkaAdminClient, topic: str) -> bool:
    """The deletion takes a moment."""
    answer = await admin.create_topics([NewTopic(topic, PARTITIONS, 1)])
    return all(code == 0 for _, code, *_ in answer.topic_errors)

"""What a host reads, and from where it goes on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import RecordsToDelete
from aiokafka.protocol.admin import DeleteGroupsRequest

from streams.kafka import MAX_RECORD_BYTES, Kafka
from streams.messages import SOURCE, Tick
from tests.streams.conformance.harness import Road, hosting, road, until
from tests.streams.conformance.toys import EchoStage
from tests.streams.conformance.worker import HOSTS

pytestmark = pytest.mark.real


def echo(host: str, on: Road, **more: Any) -> tuple[Any, EchoStage]:
    """A host of the echo stage in this process."""
    stage = EchoStage(on.source, on.target, on.control, **more)
    return HOSTS[host](on.kafka, stage, epochs=lambda _: on.epoch, status=on.control / "status.json"), stage


async def test_every_record_comes_out_once_in_order_on_its_own_partition(
    kafka: Kafka, host: str, tmp_path: Path
) -> None:
    async with road(kafka, tmp_path) as on:
        running, _ = echo(host, on)
        async with hosting(running.run):
            await on.send(1000)
            await on.until_echoed()
        output = await on.output()
        assert all((r.value or b"").decode().startswith(f"{r.partition}/") for r in output)
        assert output[0].header(SOURCE) == f"{on.source}:{on.epoch}:{output[0].partition}:0".encode()
        assert (tmp_path / "closed").exists()


async def test_records_as_large_as_they_may_be_come_out_whole(kafka: Kafka, host: str, tmp_path: Path) -> None:
    """Each is a fetch, a window and a transaction of its own; small ones stand before and behind it."""
    async with road(kafka, tmp_path) as on:
        # What a result carries besides: its key, and where it came from.
        large = [b"%d" % number + bytes(MAX_RECORD_BYTES - 70_000) for number in range(5)]
        for value in large:
            await on.send(1, partition=1)
            await on.producer.send_and_wait(on.source, value, key=b"camera-1", partition=1)
            await on.send(1, partition=1)
        running, _ = echo(host, on)
        async with hosting(running.run):
            await until(lambda: _echoed(on, 15))
        values = [record.value or b"" for record in await on.output()]
        assert all(value == sent for value, sent in zip(values[1::3], large, strict=True))
        assert [value.decode() for value in values if len(value) < 100] == on.sent


async def test_records_of_an_aborted_transaction_never_reach_the_stage(kafka: Kafka, host: str, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        running, stage = echo(host, on)
        writer = kafka.producer(transactional_id=kafka.transactional_id("writer"))
        await writer.start()
        await writer.begin_transaction()
        await writer.send_and_wait(on.source, b"aborted", partition=1)
        await on.send(4)
        await writer.abort_transaction()
        await writer.stop()
        async with hosting(running.run):
            await on.until_echoed()
        assert b"aborted" not in {record.value for record in stage.seen}


async def test_an_item_longer_than_the_poll_interval_makes_no_rebalance(
    kafka: Kafka, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half of the proportions that were seen to rebalance for ever: 20 s of work under a poll interval of 10 s.
    monkeypatch.setattr("streams.workers.MAX_POLL_INTERVAL_MS", 2500)
    async with road(kafka, tmp_path) as on:
        running, stage = echo(host, on)
        async with hosting(running.run):
            await on.send(1)
            await on.until_echoed()
            generation = running.workers.liveness.generation
            on.sent.append("slow 5")
            await on.producer.send_and_wait(on.source, b"slow 5", key=b"camera-0", partition=0)
            await on.send(20, partition=0)
            await until(lambda: _echoed(on, len(on.sent)))
        assert running.workers.liveness.generation == generation
        assert [record.value for record in stage.seen].count(b"slow 5") == 1


async def test_a_topic_made_anew_is_read_from_its_first_offset(kafka: Kafka, host: str, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        await on.send(40)
        running, _ = echo(host, on)
        async with hosting(running.run):
            await on.until_echoed()
        on.epoch = "another"  # what the group remembers belongs to an earlier life of the topic
        running, stage = echo(host, on)
        async with hosting(running.run):
            await on.send(4)
            await until(lambda: _echoed(on, 40 + 44))
        assert [record.offset for record in stage.seen if record.partition == 0] == list(range(11))


async def test_forgotten_offsets_are_found_in_the_tail_of_the_output(
    kafka: Kafka, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The host begins at the first offset and is still feeding old records when the position is found.
    monkeypatch.setattr("streams.partition.BUFFER_RECORDS", 50)
    async with road(kafka, tmp_path) as on:
        await on.send(3000)
        await on.send(4, value=b"bad")
        running, _ = echo(host, on)
        async with hosting(running.run):
            await until(lambda: _echoed(on, 3000))
            await until(lambda: _dead(on, 4))
        await _forget(kafka)
        running, stage = echo(host, on)
        async with hosting(running.run):
            await on.send(400)
            await until(lambda: _echoed(on, 3400))
        # The dead letter counts as a result, so nothing is done again: not the last echo, not the bad record.
        assert len(stage.seen) == 400
        assert len(await on.dead_letters()) == 4


async def test_what_retention_took_is_recorded_as_a_gap(kafka: Kafka, host: str, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        await on.send(40)
        running, _ = echo(host, on)
        async with hosting(running.run):
            await on.until_echoed()
        await on.send(20, partition=1)
        lost = on.sent[-20:-5]
        async with kafka.admin() as admin:
            await admin.delete_records({on.partitions(on.source)[1]: RecordsToDelete(before_offset=25)})
        running, _ = echo(host, on)
        async with hosting(running.run):
            await until(lambda: _echoed(on, 45))
        on.sent = [one for one in on.sent if one not in lost]
        await on.check_echoed()
        (letter,) = await on.dead_letters()
        assert (letter.kind, letter.origin) == ("gap", f"{on.source}:{on.epoch}:1:10")
        assert letter.detail == '{"from": 10, "resume_at": 25}'


async def test_what_retention_took_while_the_offsets_were_forgotten_is_recorded_as_a_gap(
    kafka: Kafka, host: str, tmp_path: Path
) -> None:
    async with road(kafka, tmp_path) as on:
        await on.send(40)
        running, _ = echo(host, on)
        async with hosting(running.run):
            await on.until_echoed()
        await _forget(kafka)
        await on.send(20, partition=1)
        lost = on.sent[-20:-5]
        async with kafka.admin() as admin:
            await admin.delete_records({on.partitions(on.source)[1]: RecordsToDelete(before_offset=25)})
        running, _ = echo(host, on)
        async with hosting(running.run):
            await until(lambda: _echoed(on, 45))
        on.sent = [one for one in on.sent if one not in lost]
        await on.check_echoed()
        (letter,) = await on.dead_letters()
        assert (letter.kind, letter.origin) == ("gap", f"{on.source}:{on.epoch}:1:10")
        assert letter.detail == '{"from": 10, "resume_at": 25}'


async def test_a_slow_stage_holds_no_more_than_its_buffer(
    kafka: Kafka, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.partition.BUFFER_RECORDS", 200)
    (tmp_path / "hang").touch()
    async with road(kafka, tmp_path) as on:
        await on.send(8000)
        running, _ = echo(host, on)
        most = 0

        async def measured() -> bool:
            nonlocal most
            held = [worker.buffer.waiting for worker, _ in running.workers._running.values()]
            most = max(most, *held, 0)
            return all(count > 100 for count in held) and len(held) == 4

        async with hosting(running.run):
            await until(measured)
            for _ in range(30):
                await measured()
                await asyncio.sleep(0.05)
            (tmp_path / "hang").unlink()
            await on.until_echoed()
            await measured()
        # A fetch of 500 that had begun while there was room may come on top.
        assert most <= 200 + 500


async def test_an_unprocessable_record_becomes_a_dead_letter_with_its_bytes_and_origin(
    kafka: Kafka, host: str, tmp_path: Path
) -> None:
    async with road(kafka, tmp_path) as on:
        await on.producer.send_and_wait(on.source, b"bad \xff", key=b"camera-2", partition=2, headers=[("fp", b"\x01")])
        await on.send(8)
        running, _ = echo(host, on)
        async with hosting(running.run):
            await on.until_echoed()
        (letter,) = await on.dead_letters()
        assert letter.origin == f"{on.source}:{on.epoch}:2:0"
        assert (letter.key, letter.value, letter.headers) == (b"camera-2", b"bad \xff", {"fp": b"\x01"})
        assert (letter.stage, letter.camera_id, letter.attempt) == ("echo", "camera-2", 1)


async def test_a_tick_which_has_no_value_reaches_the_stage(kafka: Kafka, host: str, tmp_path: Path) -> None:
    async with road(kafka, tmp_path) as on:
        await on.producer.send_and_wait(
            on.source, None, key=b"tick", partition=3, headers=[("kind", b"tick"), ("wall", b"7")]
        )
        running, stage = echo(host, on)
        async with hosting(running.run):
            await until(lambda: _echoed(on, 1))
        assert Tick.of(stage.seen[0]) == Tick(7)


async def test_a_stage_whose_model_is_away_waits_and_says_so(kafka: Kafka, host: str, tmp_path: Path) -> None:
    (tmp_path / "away").touch()
    async with road(kafka, tmp_path) as on:
        await on.send(8)
        running, _ = echo(host, on)

        async def says_so() -> bool:
            status = tmp_path / "status.json"
            return status.exists() and json.loads(status.read_text())["waiting_on"] == ["llm"]

        async with hosting(running.run):
            await until(says_so)
            assert await on.output() == []
            (tmp_path / "away").unlink()
            await on.until_echoed()
        assert await on.dead_letters() == []


async def _forget(kafka: Kafka) -> None:
    """The echo stage's group loses its offsets, as one does that was off for too long."""
    async with kafka.admin() as admin:
        group = kafka.group("echo")
        answer = await admin._send_request(DeleteGroupsRequest([group]), await admin.find_coordinator(group))
        assert answer.results == [(group, 0)]


async def _echoed(on: Road, count: int) -> bool:
    return len(await on.output()) >= count


async def _dead(on: Road, count: int) -> bool:
    return len(await on.dead_letters()) >= count

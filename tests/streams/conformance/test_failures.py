"""Processes killed, stopped and cut off, brokers lost: nothing is lost, nothing doubled, everything resumes."""

import asyncio
import os
import secrets
import signal
from pathlib import Path

import pytest

from infra.local.broker import Broker
from streams.admin import ensure_topics
from streams.kafka import Kafka, KafkaSettings
from tests.conftest import PARTITIONS
from tests.streams.conformance.harness import Road, Worker, road, until, until_file, worker
from tests.streams.conformance.proxy import DelayingProxy
from tests.streams.conformance.toys import WINDOW, TableStage
from tests.streams.conftest import SESSION_MS

pytestmark = [pytest.mark.real, pytest.mark.chaos]


async def test_killed_three_times_under_load(kafka: Kafka, host: str, tmp_path: Path) -> None:
    """All three shapes read the same input; each is killed while it works, three times."""
    async with road(kafka, tmp_path) as on, road(kafka, tmp_path) as windows:
        settings = [
            on.settings(host, "echo"),
            {**on.settings(host, "window"), "target": windows.target},
            on.settings(host, "table"),
        ]
        async with on.load():
            for seconds in (0.5, 1.0, 1.5):
                async with worker(settings[0]) as echo, worker(settings[1]) as window, worker(settings[2]) as table:
                    await until(lambda: _committed([echo, window, table]))
                    await asyncio.sleep(seconds)
        async with worker(settings[0]), worker(settings[1]), worker(settings[2]):
            await on.send(-len(on.sent) % (WINDOW * PARTITIONS))  # so that every window closes
            await on.until_echoed()
            stage = TableStage(on.source, tmp_path / "table.sqlite", tmp_path)
            await until(lambda: _rows(stage, len(on.sent)))
            await until(lambda: _windowed(windows, len(on.sent)))
        assert sorted(stage.ids()) == sorted(on.sent)
        await _check_windows(on, windows)
        assert await on.dead_letters() == []


async def test_a_zombie_that_comes_back_changes_nothing(kafka: Kafka, host: str, tmp_path: Path) -> None:
    async with (
        road(kafka, tmp_path) as on,
        worker(on.settings(host, "echo")) as first,
        worker(on.settings(host, "echo")) as second,
    ):
        async with on.load():
            await until(lambda: _committed([first, second]))
            first.signal(signal.SIGSTOP)
            await until(lambda: _owns(second, PARTITIONS))  # the session of the first ran out
            await asyncio.sleep(0.5)
            first.signal(signal.SIGCONT)
            await until(lambda: _generation_of_two(first, second))
            await until(lambda: _committed([first, second]))
        await on.until_echoed()


async def test_members_that_come_and_go_under_load_change_nothing(kafka: Kafka, host: str, tmp_path: Path) -> None:
    """Each time the group moves, what a host has fetched and not handed on is read again, in other portions."""
    async with road(kafka, tmp_path) as on, worker(on.settings(host, "echo")) as first:
        async with on.load(2000):
            await until(lambda: _committed([first]))
            for _ in range(2):
                async with worker(on.settings(host, "echo")) as second:
                    await until(lambda: _committed([second]))
                    await second.terminate(within=10)
                await until(lambda: _owns(first, PARTITIONS))
        await on.until_echoed()


async def test_produce_requests_that_arrive_after_their_process_died(kafka: Kafka, host: str, tmp_path: Path) -> None:
    broker = int(kafka.settings.bootstrap_servers.rpartition(":")[2])
    async with DelayingProxy(broker).running() as proxy, road(kafka, tmp_path) as on:
        async with on.load(), worker(on.settings(host, "echo", via=proxy.port)) as first:
            await until(lambda: _committed([first]))
            proxy.delay = SESSION_MS / 1000 + 4  # they arrive when the successor is at work
            await until(lambda: _delayed(proxy))
            await asyncio.sleep(0.3)
        async with worker(on.settings(host, "echo")) as second:
            async with on.load():
                await until(lambda: _owns(second, PARTITIONS))
                await until(lambda: _arrived(proxy))
            await on.until_echoed()


async def test_a_lost_broker_comes_back_soon_and_later_than_a_transaction_lives(tmp_path: Path) -> None:
    """Both hosts at once, since a broker takes longer to start than they do."""
    broker = Broker(tmp_path / "kafka", port=0)
    await broker.start()
    try:
        settings = KafkaSettings(
            bootstrap_servers=broker.bootstrap_servers, partitions=PARTITIONS, session_timeout_ms=SESSION_MS
        )
        await ensure_topics(Kafka(settings))
        roads = [Kafka(settings.model_copy(update={"system": f"t{secrets.token_hex(4)}"})) for _ in range(2)]
        (tmp_path / "raw").mkdir()
        (tmp_path / "faust").mkdir()
        async with road(roads[0], tmp_path / "raw") as raw, road(roads[1], tmp_path / "faust") as faust:
            short = {"transaction_timeout_ms": 3000}
            async with (
                worker(raw.settings("raw", "echo", **short)) as one,
                worker(faust.settings("faust", "echo", **short)) as two,
            ):
                for away in (0.0, 6.0):
                    async with raw.load(200), faust.load(200):
                        await until(lambda: _committed([one, two]))
                        await asyncio.sleep(1)
                        await _lose(broker, away)
                        await asyncio.sleep(1)
                    await asyncio.gather(raw.until_echoed(60), faust.until_echoed(60))
    finally:
        await broker.stop()


async def test_a_member_joins_while_the_model_hangs_and_another_gets_sigterm(
    kafka: Kafka, host: str, tmp_path: Path
) -> None:
    (tmp_path / "hang").touch()
    async with road(kafka, tmp_path) as on, worker(on.settings(host, "echo")) as first:
        await on.send(40)  # nothing is committed yet: a host that drops what it fetched must begin again
        await until_file(tmp_path / "entered")
        async with worker(on.settings(host, "echo")) as second:
            async with asyncio.timeout(10):
                await until(lambda: _generation_of_two(first, second))
            await first.terminate(within=10)
            async with asyncio.timeout(10):
                await until(lambda: _owns(second, PARTITIONS))
            (tmp_path / "hang").unlink()
            await on.until_echoed()


async def _committed(workers: list[Worker]) -> bool:
    return all(any(p["position"] > 0 for p in one.status().get("partitions", {}).values()) for one in workers)


async def _owns(one: Worker, count: int) -> bool:
    return len(one.status().get("partitions", {})) == count


async def _generation_of_two(first: Worker, second: Worker) -> bool:
    return bool(0 < first.status().get("generation", -1) == second.status().get("generation", -1))


async def _delayed(proxy: DelayingProxy) -> bool:
    return proxy.delayed > 0


async def _arrived(proxy: DelayingProxy) -> bool:
    return proxy.arrived == proxy.delayed


async def _rows(stage: TableStage, count: int) -> bool:
    return len(stage.ids()) >= count


async def _windowed(windows: Road, count: int) -> bool:
    return len(await windows.output()) >= count // WINDOW


async def _check_windows(on: Road, windows: Road) -> None:
    """Numbers count up from one without a hole, and the windows' members are the input, in order."""
    output = await windows.output()
    for partition in range(PARTITIONS):
        mine = [(r.value or b"").decode().split(":") for r in output if r.partition == partition]
        assert [int(number) for number, _ in mine] == list(range(1, len(mine) + 1))
        members = [one for _, ids in mine for one in ids.split(",")]
        assert members == [one for one in on.sent if one.startswith(f"{partition}/")]


async def _lose(broker: Broker, away: float) -> None:
    """SIGKILL, and a new start after so many seconds."""
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGKILL)
    await asyncio.sleep(away + 0.5)
    await broker.stop()
    await broker.start()

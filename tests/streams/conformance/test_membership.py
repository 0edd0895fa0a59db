"""Named members: back at once after a kill, never two in each other's way, and gone at once when asked to go."""

import asyncio
import time
from pathlib import Path

import pytest

from streams.kafka import Kafka
from tests.conftest import PARTITIONS
from tests.streams.conformance.harness import Worker, road, until, worker

pytestmark = [pytest.mark.real, pytest.mark.chaos]

# Far longer than a start on a busy machine: whoever waits for a dead member's session is seen to wait.
_SESSION_MS = 40_000


@pytest.fixture
def patient(kafka: Kafka) -> Kafka:
    """The broker, which takes nobody for dead during these tests."""
    return Kafka(kafka.settings.model_copy(update={"session_timeout_ms": _SESSION_MS}))


async def test_a_killed_member_is_back_without_waiting_for_its_session_and_without_a_rebalance(
    patient: Kafka, host: str, tmp_path: Path
) -> None:
    async with road(patient, tmp_path) as on, worker(on.settings(host, "echo", member="a")) as other:
        killed = on.settings(host, "echo", member="b")
        async with worker(killed) as first:
            await until(lambda: _share([first, other]))
            generation = other.status()["generation"]
            await on.send(40)
            await on.until_echoed()
        Path(killed["status"]).unlink()
        began = time.monotonic()
        async with worker(killed) as again:
            await on.send(40)
            await on.until_echoed()
            assert time.monotonic() - began < _SESSION_MS / 1000 / 2
            await until(lambda: _joined(again))
            assert again.status()["generation"] == other.status()["generation"] == generation


async def test_two_of_one_name_share_the_work_and_do_not_take_turns(kafka: Kafka, host: str, tmp_path: Path) -> None:
    """The one that was there first is told at its next heartbeat, and goes on as an ordinary member."""
    async with road(kafka, tmp_path) as on, worker(on.settings(host, "echo", member="a")) as first:
        async with on.load():
            await until(lambda: _owns(first, PARTITIONS))
            async with worker(on.settings(host, "echo", member="a")) as second:
                await until(lambda: _share([first, second]))
                generation = second.status()["generation"]
                await asyncio.sleep(kafka.settings.session_timeout_ms / 1000)  # four heartbeats: nobody is thrown out
                assert first.status()["generation"] == second.status()["generation"] == generation
        await on.until_echoed()
    assert "another process has this member's name" in (tmp_path / "workers.log").read_text()


async def test_a_member_that_is_asked_to_stop_leaves_its_partitions_to_the_others_at_once(
    patient: Kafka, host: str, tmp_path: Path
) -> None:
    async with road(patient, tmp_path) as on, worker(on.settings(host, "echo", member="a")) as stays:
        async with worker(on.settings(host, "echo", member="b")) as goes:
            await until(lambda: _share([stays, goes]))
            await goes.terminate(within=10)
        began = time.monotonic()
        await on.send(40)
        await on.until_echoed()
        assert time.monotonic() - began < _SESSION_MS / 1000 / 2


async def _joined(one: Worker) -> bool:
    """Whether its report, written once a second, says so."""
    return bool(one.status()["generation"] >= 0)


async def _share(workers: list[Worker]) -> bool:
    generations = {one.status().get("generation", -1) for one in workers}
    return len(generations) == 1 and -1 not in generations and max(generations) >= len(workers)


async def _owns(one: Worker, count: int) -> bool:
    return sum(p["position"] > 0 for p in one.status().get("partitions", {}).values()) == count

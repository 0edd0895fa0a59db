"""Who is restarted for being silent: nobody while the LLM hangs; a worker whose consumer stopped, within a minute.

`HANG_S=300 pytest tests/e2e/test_silences.py -s`: the LLM hangs for five minutes, and every limit is the product's.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.config import Settings
from infra.installation import Installation
from infra.local.process import ProcessSpec
from infra.local.supervisor import WATCH_SECONDS, Supervisor
from infra.watchdog import Watchdog
from streams import liveness
from streams.kafka import Kafka
from streams.liveness import read_report
from tests.chaos.llm_proxy import LlmProxy, Manner
from tests.e2e.installation import CAMERAS, Audit, Feeder, pictures, settings_for
from tests.e2e.test_kills import drained
from tests.streams.conformance.harness import Road, road

pytestmark = [pytest.mark.real, pytest.mark.chaos]

FOR_REAL = "HANG_S" in os.environ

# Shortened, the limits leave the same 15 s of the minute to all the rest.
STALL_S = liveness.STALL_S if FOR_REAL else 15.0

# A window may honestly take six deadlines: the suite's short one keeps that within the limit of a stall.
DEADLINE_S = 300.0 if FOR_REAL else 2.0

# Beyond every limit of a stall, and the supervisor has looked twice since.
HANG_S = float(os.environ.get("HANG_S", STALL_S + 3 * WATCH_SECONDS))

RESTARTED_WITHIN_S = 60.0

# Of a camera: three windows of four frames.
FRAMES = 12
STORY_S = 4.0

SILENT = [(host, how) for host in ("faust", "raw") for how in ("stops", "deaf", "ends", "SIGSTOP")]
SILENT.remove(("raw", "ends"))  # it fetches and feeds in one place

# What it asks is away, and it says so.
WAITING = [("faust", "away"), ("raw", "away")]


def quiet(spec: ProcessSpec, file: Path) -> ProcessSpec:
    """The same worker, which falls silent when the file is there."""
    python, _, module, *arguments = spec.argv
    argv = [python, "-m", "tests.e2e.quiet_worker", str(file), str(STALL_S), module, *arguments]
    return replace(spec, argv=argv, env={**spec.env, "PYTHONPATH": str(Path(__file__).parents[2])})


class Hanging(LlmProxy):
    """A server that says what it is, and whose answers may hang."""

    def _manner(self, asked: str) -> Manner | None:
        return super()._manner(asked) if asked else None


class Quiet(Installation):
    """An installation whose stages can be made to fall silent, by a file each."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        super().__init__(settings)
        self.directory = directory

    def _spec(self, stage: str, index: int, count: int) -> ProcessSpec:
        spec = super()._spec(stage, index, count)
        return quiet(spec, self.directory / spec.name)

    @property
    def restarts(self) -> dict[str, int]:
        """How often each process was started again; those that never were are left out."""
        return restarts(self.stack.supervisor)

    def says(self, stage: str) -> dict[str, Any]:
        """What the stage says of itself."""
        return read_report(self.settings.data_dir / "status" / f"{stage}.json") or {}


def unrestarted(found: Mapping[str, int], silent: Collection[str]) -> bool:
    """Whether analyze was left alone; with the product's limits also everyone else, and the silent after one restart.

    A shortened limit can be less than a rebalance takes on a machine that is busy with much else.
    """
    return found == dict.fromkeys(silent, 1) if FOR_REAL else "analyze" not in found


def restarts(supervisor: Supervisor) -> dict[str, int]:
    """How often each process was started again; those that never were are left out."""
    processes = supervisor.state()["processes"]
    return {name: process["restarts"] for name, process in processes.items() if process["restarts"]}


async def until(condition: Callable[[], object], within: float) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.05)


async def back(supervisor: Supervisor, name: str, how: str, file: Path) -> float:
    """Make a process fall silent; the seconds until it has been started again, in order once more."""
    before, since = supervisor.pid(name), time.monotonic()
    assert before is not None
    if how == "SIGSTOP":
        os.kill(before, signal.SIGSTOP)
    else:
        file.write_text(how)
    await until(lambda: supervisor.pid(name) not in {None, before}, 240)
    file.unlink(missing_ok=True)
    return time.monotonic() - since


@pytest.mark.timeout(600 + HANG_S)
async def test_an_llm_that_hangs_restarts_nobody_and_those_who_fall_silent_meanwhile_are_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.watchdog.STALL_S", STALL_S)
    settings = settings_for(tmp_path, monkeypatch, LLM__DEADLINE_S=str(DEADLINE_S))
    async with Hanging(settings.local.llama_port, CAMERAS).running() as llm:
        # The children's way; this process's own settings still name the server, so that it is started here.
        monkeypatch.setenv("REWATCH_LLM__URL", llm.url)
        async with Quiet(settings, tmp_path) as house:
            feeder = Feeder(settings, await asyncio.to_thread(pictures))
            llm.manner = "hangs"
            for camera in CAMERAS[:2]:
                await feeder.upload(camera, FRAMES, story_s=STORY_S)
            await until(lambda: llm.spoiled, 300)
            since = time.monotonic()
            waited_on: set[str] = set()
            while time.monotonic() - since < HANG_S:
                waited_on.update(house.says("analyze").get("waiting_on", ()))
                assert unrestarted(house.restarts, {}), house.restarts
                await asyncio.sleep(0.5)
            assert waited_on >= ({"llm"} if DEADLINE_S < HANG_S / 2 else set())
            print(f"\nhung for {HANG_S:g} s: restarts {house.restarts}")
            supervisor = house.stack.supervisor
            silent = {"batch": "stops", "sink": "deaf", "enrich": "SIGSTOP"}
            feeding = asyncio.create_task(feeder.upload(CAMERAS[2], FRAMES, story_s=STORY_S))
            took = await asyncio.gather(*(back(supervisor, name, how, tmp_path / name) for name, how in silent.items()))
            print({f"{name} {how}": round(s, 1) for (name, how), s in zip(silent.items(), took, strict=True)})
            await feeding
            assert max(took) <= RESTARTED_WITHIN_S
            assert unrestarted(house.restarts, silent), "analyze waits for its LLM all the while"
            llm.manner, since = None, time.monotonic()
            await feeder.end(CAMERAS)
            await drained(settings)
            print(f"all was judged {time.monotonic() - since:.1f} s after the LLM was back")
            audit = Audit(settings)
            await audit.read()
            assert len(feeder.accepted) == len(CAMERAS) * FRAMES
            assert audit.violations(feeder.accepted) == []
            assert await asyncio.to_thread(audit.violations_in_clickhouse) == []
            # A gap after each four frames makes a window of them at least: the first may have closed at once.
            assert len(audit.records["risk_events"]) >= len(CAMERAS) * FRAMES / STORY_S
            assert unrestarted(house.restarts, silent)


def spec_of(way: Road, host: str, how: str) -> ProcessSpec:
    """A toy worker on the host, supervised as every stage is."""
    name = f"{host}-{how.lower()}"
    settings = way.settings(host, "echo", member=f"{way.kafka.settings.system}-{name}")
    status = Path(settings["status"])

    async def ready() -> bool:
        report = read_report(status)
        return report is not None and report["generation"] >= 0 and psutil.pid_exists(report["pid"])

    argv = [sys.executable, "-m", "tests.streams.conformance.worker", json.dumps(settings)]
    spec = ProcessSpec(name, argv, ready=ready, stalled=Watchdog(status).stalled, ready_timeout=240)
    return quiet(spec, way.control / name)


@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_scope="session")
async def test_whoever_falls_silent_on_either_host_is_restarted_within_a_minute_and_who_says_what_it_waits_on_is_not(
    kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.watchdog.STALL_S", STALL_S)
    async with AsyncExitStack() as stack:
        ways: dict[tuple[str, str], Road] = {}
        for host, how in SILENT + WAITING:
            # A group of its own for each.
            system = f"{kafka.settings.system}-{host}-{how.lower()}"
            alone = Kafka(kafka.settings.model_copy(update={"system": system}))
            directory = tmp_path / f"{host}-{how.lower()}"
            directory.mkdir()
            ways[host, how] = await stack.enter_async_context(road(alone, directory))
        specs = {(host, how): spec_of(way, host, how) for (host, how), way in ways.items()}
        supervisor = await stack.enter_async_context(Supervisor(tmp_path, specs.values()))
        await asyncio.gather(*(way.send(40) for way in ways.values()))
        await asyncio.gather(*(way.until_echoed(120) for way in ways.values()))
        assert restarts(supervisor) == {}
        for waiting in WAITING:
            (ways[waiting].control / "away").touch()
            await ways[waiting].send(20)
        since = time.monotonic()

        async def fall_silent(host: str, how: str) -> float:
            way, name = ways[host, how], specs[host, how].name
            falling = asyncio.create_task(back(supervisor, name, how, way.control / name))
            for _ in range(5):
                await asyncio.sleep(0.3)
                await way.send(20)
            return await falling

        took = await asyncio.gather(*(fall_silent(host, how) for host, how in SILENT))
        print("\n", {f"{host} {how}": round(s, 1) for (host, how), s in zip(SILENT, took, strict=True)})
        await asyncio.sleep(since + STALL_S + 3 * WATCH_SECONDS - time.monotonic())
        # Once each: but a shortened limit can be less than a rebalance takes on a machine that is busy with much else.
        assert {specs[silent].name for silent in SILENT} == set(restarts(supervisor)), "not who says what it waits on"
        for waiting in WAITING:
            (ways[waiting].control / "away").unlink()
        await asyncio.gather(*(way.until_echoed(120) for way in ways.values()))
        assert set(restarts(supervisor).values()) == {1} or not FOR_REAL
        assert max(took) <= RESTARTED_WITHIN_S

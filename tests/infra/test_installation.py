"""What the installation asks of its stages: who has fallen silent, whatever the wall clock does."""

import json
import os
from pathlib import Path

import psutil

from infra import topology
from infra.config import load
from infra.installation import Watchdog
from streams.liveness import STALL_S


class Clock:
    """A monotonic clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def report(status: Path, *, at: float, stall: str | None = None) -> None:
    status.write_text(json.dumps({"stall": stall}))
    os.utime(status, (at, at))


async def test_a_stage_that_stops_reporting_is_stalled(tmp_path: Path) -> None:
    status, clock = tmp_path / "detect.json", Clock()
    watchdog = Watchdog(status, clock)
    assert await watchdog.stalled() is None  # it has not begun
    report(status, at=5_000)
    assert await watchdog.stalled() is None
    clock.now += STALL_S + 1
    assert "has not ticked for 46 s" in (await watchdog.stalled() or "")
    report(status, at=5_001)
    assert await watchdog.stalled() is None


async def test_a_wall_clock_that_jumps_is_no_silence(tmp_path: Path) -> None:
    status, clock = tmp_path / "detect.json", Clock()
    watchdog = Watchdog(status, clock)
    for at in (5_000, 5_000 + 86_400, 5_000 - 86_400):
        report(status, at=at)
        assert await watchdog.stalled() is None
        clock.now += 1


async def test_a_stage_that_says_that_it_is_stalled_is_believed(tmp_path: Path) -> None:
    status = tmp_path / "detect.json"
    report(status, at=5_000, stall="frames-0 has not advanced")
    assert await Watchdog(status, Clock()).stalled() == "frames-0 has not advanced"


def test_what_should_be_at_work_here_is_what_has_been_started(tmp_path: Path) -> None:
    settings = load().model_copy(update={"data_dir": tmp_path})
    assert topology.expected(settings) == {}, "nobody runs here"
    states = {
        "kafka": "ready",
        "ingest": "ready",
        "gateway": "ready",
        "detect-1": "ready",
        "detect-2": "starting",
        "batch": "backing off",
        "enrich": "waiting",
        "analyze": "starting",
        "sink": "failed",
    }
    run = {
        "pid": os.getpid(),
        "create_time": psutil.Process().create_time(),
        "processes": {name: {"state": state, "restarts": 0, "log": f"{name}.log"} for name, state in states.items()},
    }
    run["processes"]["analyze"]["restarts"] = 1
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert set(topology.expected(settings)) == {"ingest", "detect", "batch", "analyze", "sink"}
    assert topology.expected(settings)["batch"] == "batch.log"

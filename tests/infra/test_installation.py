"""What the installation asks of its stages: who has fallen silent, whatever the wall clock does."""

import json
import os
from pathlib import Path

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

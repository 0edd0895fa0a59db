"""Who has fallen silent: whatever the wall clock does, and not for want of CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.local.cpu import Turn, turn
from infra.local.supervisor import BACKOFF_FIRST_SECONDS, STALLED_STOP_SECONDS, WATCH_SECONDS
from infra.watchdog import Watchdog, either
from streams.hearing import DEAF_S, LOOK_S
from streams.liveness import REPORT_EVERY_S, STALL_S


class Clock:
    """A monotonic clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scheduler:
    """What a scheduler says of one process."""

    turn: Turn | None = Turn(ran_s=5, waited_s=3, ready=False)

    def __call__(self, _pid: int) -> Turn | None:
        return self.turn


def report(status: Path, *, at: float, stall: str | None = None) -> None:
    status.write_text(json.dumps({"stall": stall, "pid": 1}))
    os.utime(status, (at, at))


async def silent_until(watchdog: Watchdog, clock: Clock, seconds: float, scheduler: Scheduler, **each: float) -> float:
    """Look as the supervisor does; the seconds after which it would restart, or those given if it would not.

    `each`: how much the process runs and waits of each second; `ready` 1 where it always is.
    """
    began = clock.now
    while clock.now - began < seconds:
        clock.now += WATCH_SECONDS
        last = scheduler.turn
        if last is not None:
            scheduler.turn = Turn(
                last.ran_s + each.get("runs", 0) * WATCH_SECONDS,
                last.waited_s + each.get("waits", 0) * WATCH_SECONDS,
                ready=bool(each.get("ready")),
            )
        if await watchdog.stalled():
            return clock.now - began
    return seconds


async def heard(tmp_path: Path) -> tuple[Watchdog, Clock, Scheduler]:
    """One whose process has just reported."""
    status, clock, scheduler = tmp_path / "detect.json", Clock(), Scheduler()
    watchdog = Watchdog(status, clock, scheduler)
    assert await watchdog.stalled() is None  # it has not begun
    report(status, at=5_000)
    assert await watchdog.stalled() is None
    return watchdog, clock, scheduler


async def test_a_stage_that_stops_reporting_is_stalled(tmp_path: Path) -> None:
    watchdog, clock, _ = await heard(tmp_path)
    clock.now += STALL_S + 1
    assert await watchdog.stalled() == "its loop has not ticked for 46 s"
    report(tmp_path / "detect.json", at=5_001)
    assert await watchdog.stalled() is None


async def test_a_wall_clock_that_jumps_is_no_silence(tmp_path: Path) -> None:
    watchdog, clock, _ = await heard(tmp_path)
    for at in (5_000, 5_000 + 86_400, 5_000 - 86_400):
        report(tmp_path / "detect.json", at=at)
        assert await watchdog.stalled() is None
        clock.now += 1


async def test_a_stage_that_says_that_it_is_stalled_is_believed(tmp_path: Path) -> None:
    watchdog, _, _ = await heard(tmp_path)
    report(tmp_path / "detect.json", at=5_000, stall="frames-0 has not advanced")
    assert await watchdog.stalled() == "frames-0 has not advanced"


async def test_one_that_stands_in_line_for_the_cpu_is_not_restarted_for_it(tmp_path: Path) -> None:
    watchdog, clock, scheduler = await heard(tmp_path)
    # Seen on a machine that others had: a twentieth of a second in each.
    assert await silent_until(watchdog, clock, 200, scheduler, runs=0.05, waits=0.95, ready=1) == 200
    # Not let run at all: a wait is counted once it ends.
    assert await silent_until(watchdog, clock, 200, scheduler, ready=1) == 200


async def test_one_that_sleeps_or_is_stopped_for_good_is_restarted_though_others_have_the_cpu(tmp_path: Path) -> None:
    watchdog, clock, scheduler = await heard(tmp_path)
    await silent_until(watchdog, clock, 20, scheduler, runs=0.05, waits=0.95, ready=1)
    assert STALL_S < await silent_until(watchdog, clock, 200, scheduler) <= STALL_S + 2 * WATCH_SECONDS


async def test_one_that_goes_round_in_itself_is_restarted_also_with_a_third_of_a_cpu(tmp_path: Path) -> None:
    watchdog, clock, scheduler = await heard(tmp_path)
    took = await silent_until(watchdog, clock, 200, scheduler, runs=0.35, waits=0.65, ready=1)
    assert STALL_S < took <= STALL_S + 2 * WATCH_SECONDS


def test_the_limits_together_keep_the_promise_of_a_minute() -> None:
    # Reported, seen by the supervisor (which may just have looked when the last report came), stopped, started again.
    rest = REPORT_EVERY_S + 2 * WATCH_SECONDS + STALLED_STOP_SECONDS + BACKOFF_FIRST_SECONDS
    assert STALL_S + rest <= 55
    # What comes right after a look is missed from the next one on.
    assert LOOK_S + DEAF_S + rest <= 55


async def test_without_a_word_of_the_scheduler_silence_is_silence(tmp_path: Path) -> None:
    watchdog, clock, scheduler = await heard(tmp_path)
    scheduler.turn = None
    assert STALL_S < await silent_until(watchdog, clock, 200, scheduler) <= STALL_S + 2 * WATCH_SECONDS


@pytest.mark.skipif(turn(os.getpid()) is None, reason="this system does not say how long a process waits")
def test_the_kernel_tells_who_runs_from_who_is_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            process = psutil.Process(busy.pid)
            while process.cpu_times().user < 0.05:
                pass
            ran = turn(busy.pid)
            assert ran is not None
            assert ran.ready
            assert ran.ran_s > 0.04
            busy.send_signal(signal.SIGSTOP)
            while process.status() != psutil.STATUS_STOPPED:
                pass
            stopped = turn(busy.pid)
            assert stopped is not None
            assert not stopped.ready
        finally:
            busy.kill()
    assert turn(busy.pid) is None


async def test_of_a_process_with_two_reports_either_says_that_it_stalled(tmp_path: Path) -> None:
    clock = Clock()
    paths = [tmp_path / "analyze.json", tmp_path / "analyze+replay.json"]
    stalled = either(*(Watchdog(path, clock, Scheduler()) for path in paths))
    report(paths[0], at=1)
    assert await stalled() is None, "the second has not begun yet"
    report(paths[1], at=1, stall="replay_units-0 has not advanced")
    assert await stalled() == "replay_units-0 has not advanced"
    for path in paths:
        report(path, at=2)
    assert await stalled() is None
    clock.now += STALL_S + 1
    report(paths[0], at=3)
    assert "has not ticked" in str(await stalled()), "the second fell silent"

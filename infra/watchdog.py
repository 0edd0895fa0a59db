"""Why the supervisor should restart a worker: it says so itself, or has stopped saying anything."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from infra.local.cpu import Turn, turn
from streams.liveness import STALL_S, read_report

# A loop reports each second. One that had so much of the CPU since its last report goes round in itself, seconds.
_SPINS_S = 15.0


class Watchdog:
    """Looks at the report of one process, now and then.

    Silence is measured by the monotonic clock: when the wall clock is set, or a laptop wakes, nobody has been silent.
    And it is measured in time that the process could have used: one that stands in line for the CPU is not hung, and a
    restart, seconds of work, would only make the line longer.
    """

    def __init__(
        self,
        status: Path,
        clock: Callable[[], float] = time.monotonic,
        turn: Callable[[int], Turn | None] = turn,
    ) -> None:
        self._status = status
        self._clock = clock
        self._turn = turn
        self._touched = 0
        self._heard_at = self._looked_at = clock()
        self._silent = 0.0
        self._ran = 0.0
        self._last: Turn | None = None

    async def stalled(self) -> str | None:
        """The reason, or None while it lives or says what it waits on."""
        report = read_report(self._status)
        if report is None:
            return None
        touched = self._status.stat().st_mtime_ns  # also where the disk has no room for a report
        now = self._clock()
        passed, self._looked_at = now - self._looked_at, now
        last, self._last = self._last, self._turn(int(report["pid"]))
        if touched != self._touched:
            self._touched, self._heard_at = touched, now
            self._silent = self._ran = 0.0
        else:
            ran, in_line = _since(last, self._last, passed)
            self._ran += ran
            self._silent += max(0.0, passed - in_line)
        for_s = now - self._heard_at
        if for_s > STALL_S and self._ran > _SPINS_S:
            return f"its loop has not ticked for {for_s:.0f} s, and it ran for {self._ran:.0f} s of them"
        if self._silent > STALL_S:
            return f"its loop has not ticked for {for_s:.0f} s"
        return report["stall"] if isinstance(report["stall"], str) else None


def either(*watchdogs: Watchdog) -> Callable[[], Awaitable[str | None]]:
    """Of a process that writes several reports: why one of them says that it should be restarted, or None."""

    async def stalled() -> str | None:
        reasons = [await watchdog.stalled() for watchdog in watchdogs]
        return next((reason for reason in reasons if reason is not None), None)

    return stalled


def _since(last: Turn | None, now: Turn | None, passed: float) -> tuple[float, float]:
    """Seconds that it ran, and stood in line, of those that passed between two looks."""
    if last is None or now is None:
        return 0.0, 0.0
    ran, waited = now.ran_s - last.ran_s, now.waited_s - last.waited_s
    # A wait is counted once it ends: whoever is ready and has not moved has stood in line all the time.
    return ran, passed if now.ready and not ran else waited

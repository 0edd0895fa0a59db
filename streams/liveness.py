"""Is this worker alive: what its loop did last, what it waits on, and a status file that says so.

A worker is alive while its loop ticks, its consumer polls and is brought what is there (`Hearing`), and each of its
partitions advances, is caught up, or waits on something that it names. Only an unexplained stall is a reason to restart
it. Time in which the process did not run (no CPU left for it, SIGSTOP) is no time in which it did nothing.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog

from streams.turns import Turns

log = structlog.get_logger(__name__)

REPORT_EVERY_S = 1.0
"""How often a process says how it is, seconds."""

# Longer than any usual pause of a healthy worker: a rebalance takes up to 10 s, an acquire about a second.
STALL_S = 45.0

# A loop that comes to its report later than this was not let run, or was held up by itself, which shows from outside.
_LATE_S = 2 * REPORT_EVERY_S


def read_report(path: Path) -> dict[str, Any] | None:
    """What a process said of itself last; None where it says nothing any more."""
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError):  # it ended just now
        return None


class PartitionLife:
    """What one partition's work did last."""

    def __init__(self, clock: Callable[[], float], patience_s: float = STALL_S) -> None:
        self._clock = clock
        self._waiting_on: str | None = None
        self._patience_s = patience_s
        self.in_hand = 0
        """Records read and not yet committed."""
        self.position = 0
        self.advanced_at = clock()
        self._queued = 0
        self._running = 0

    @property
    def waiting_on(self) -> str | None:
        """settings, llm, live (work that comes first), store, images, disk, broker or group; None: nothing."""
        return self._waiting_on

    @waiting_on.setter
    def waiting_on(self, what: str | None) -> None:
        if what is None and self._waiting_on is not None:
            self.advanced_at = self._clock()  # the time of waiting was no stall
        self._waiting_on = what

    def hold(self, in_hand: int) -> None:
        """So many records are in hand now."""
        if not self.in_hand:
            self.advanced_at = self._clock()  # having nothing to do was no stall
        self.in_hand = in_hand

    def advanced(self, position: int, in_hand: int) -> None:
        """Something was committed."""
        self.position = position
        self.in_hand = in_hand
        self.advanced_at = self._clock()

    def idle(self) -> None:
        """Nothing is in hand: being idle is progress."""
        self.in_hand = 0
        self.advanced_at = self._clock()

    @asynccontextmanager
    async def slot(self, slots: Turns) -> AsyncIterator[None]:
        """Hold one of the worker's slots. Waiting for it behind other partitions is no stall of this one."""
        self._queued += 1
        try:
            await slots.acquire(self)
        finally:
            self._queued -= 1
        if not self._running:
            self.advanced_at = self._clock()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            slots.release()

    def stalled_for(self) -> float | None:
        """Seconds without progress, where that is more than can be explained."""
        since = self._clock() - self.advanced_at
        if self._queued and not self._running:
            return None
        return since if self.in_hand and self._waiting_on is None and since > self._patience_s else None


class Liveness:
    """One worker process's signs of life."""

    def __init__(self, stage: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage = stage
        self._clock = clock
        self._ticked_at = clock()
        self._lost = 0.0
        self.partitions: dict[str, PartitionLife] = {}
        self.polled_at = clock()
        self.deaf: str | None = None
        """What the consumer should have been brought and was not; `Hearing` says so."""
        self.waiting_on: str | None = None
        """What the whole worker waits on: its broker, its model."""
        self.refused: str | None = None
        """Who takes none of its connections, and why: clients that it waits for try again, and say nothing."""
        self.generation = -1
        self.metrics: str | None = None
        """Where this process's metrics are served, a URL."""
        self.details: dict[str, Any] = {}
        """What a process tells besides, JSON-able; it stands in the report."""

    def partition(self, name: str, patience_s: float = STALL_S) -> PartitionLife:
        """The life of a partition, from now on; `patience_s`: how long one record may honestly take."""
        life = PartitionLife(self.now, patience_s)
        self.partitions[name] = life
        return life

    def forget(self, name: str) -> None:
        """The partition is someone else's now."""
        self.partitions.pop(name, None)

    def now(self) -> float:
        """Seconds, monotonic, of the time in which the loop ran."""
        return self._clock() - self._lost

    def ticked(self) -> None:
        """The loop came to its report, each second; time that it lost since the last is no time of a stall."""
        now = self._clock()
        self._lost += max(0.0, now - self._ticked_at - _LATE_S)
        self._ticked_at = now

    def polled(self) -> None:
        """The consumer polled (and so the loop ticked)."""
        self.polled_at = self.now()

    def stall(self) -> str | None:
        """Why this worker should be restarted; None while it lives or says what it waits on."""
        now = self.now()
        if self.waiting_on is None and now - self.polled_at > STALL_S:
            return f"the consumer has not polled for {now - self.polled_at:.0f} s"
        if self.deaf is not None:
            return self.deaf
        for name, life in self.partitions.items():
            if (stalled := life.stalled_for()) is not None:
                return f"{name} has {life.in_hand} records in hand and has not advanced for {stalled:.0f} s"
        return None

    def report(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        waits = {life.waiting_on for life in self.partitions.values()} | {self.waiting_on, self.refused}
        return {
            "stage": self.stage,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "written_at": time.time(),
            "generation": self.generation,
            "metrics": self.metrics,
            "stall": self.stall(),
            "waiting_on": sorted(w for w in waits if w is not None),
            "partitions": {
                name: {"position": life.position, "in_hand": life.in_hand, "waiting_on": life.waiting_on}
                for name, life in sorted(self.partitions.items())
            },
            **self.details,
        }

    def write(self, path: Path) -> None:
        """Put the report where `rewatch status` and the supervisor read it; readers never see half of one.

        A full disk ends no work: the old report is touched then, which needs no space, and says: alive.
        """
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.report()))
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.utime(path)
            log.warning("status not written", path=str(path), error=str(error))

    async def tell(self, path: Path | None, stop: asyncio.Event, waiting_on: Callable[[], list[str]] = list) -> None:
        """Of a process without partitions: look what it waits on and write the report, until the stop."""
        while not stop.is_set():
            self.ticked()
            self.polled()
            self.waiting_on = ", ".join(waiting_on()) or None
            if path is not None:
                self.write(path)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), REPORT_EVERY_S)

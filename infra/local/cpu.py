"""How a process was treated by the scheduler: what tells one that hangs from one that is not let run.

Linux says of each thread how long it ran and how long it stood in line, ready to run (`/proc/PID/schedstat`, of the
main thread, where every worker has its loop; Documentation/scheduler/sched-stats.rst).
"""

from pathlib import Path
from typing import NamedTuple

_NS = 1e9


class Turn(NamedTuple):
    """A main thread's share of the CPU since its start, seconds."""

    ran_s: float
    waited_s: float
    """Ready to run, and not let; of a wait that still lasts nothing yet."""
    ready: bool
    """It runs, or is ready to: it neither sleeps nor is stopped."""


def turn(pid: int) -> Turn | None:
    """The process's share until now; None where it is gone, or the system does not say."""
    place = Path(f"/proc/{pid}")
    try:
        ran, waited, _ = (place / "schedstat").read_text().split()
        # The program's name stands in brackets and may hold anything.
        state = (place / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return None
    return Turn(int(ran) / _NS, int(waited) / _NS, state == "R")

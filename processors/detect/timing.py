"""How long each runtime takes, measured on a machine that may have other work: what is found is remembered for long.

They take turns, so that what disturbs the machine for a while disturbs all of them. A take counts by the clock if this
process hardly waited for a core in it. Where some runtime never had such a take, all are compared by the time that they
spent on cores, which the work of others hardly lengthens: who needs less of them gets more done in the same share.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

# At least so many turns each: the first ones still fill caches.
_LEAST = 3

# At most so many, and none begins after so long: on a machine that is never quiet, more of them would not help.
_MOST, _MOST_S = 12, 10.0

# Of a take, how long all threads together may have waited for a core. On an idle machine it is below a hundredth.
_WAITED = 0.1

_TASKS = Path("/proc/self/task")


class Take(NamedTuple):
    """What one call cost, seconds."""

    wall: float
    cpu: float
    """On cores, of all threads."""
    waited: float
    """For a core, of all threads; 0 where the system does not tell."""


class Timing(NamedTuple):
    """How the candidates compare."""

    ms: dict[str, float]
    by: Literal["wall", "cpu"]


def take(work: Callable[[], object]) -> Take:
    """Call it once."""
    wall, cpu, waited = time.perf_counter(), time.process_time(), _waited()
    work()
    return Take(time.perf_counter() - wall, time.process_time() - cpu, _waited() - waited)


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    taking: Callable[[Callable[[], object]], Take] = take,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """The least that each took, milliseconds a call."""
    takes: dict[str, list[Take]] = {name: [] for name in candidates}
    began = clock()
    for turn in range(_MOST):
        if turn >= _LEAST and (_all_quiet(takes) or clock() - began > _MOST_S):
            break
        for name, work in candidates.items():
            takes[name].append(taking(work))
    if _all_quiet(takes):
        return Timing({name: _ms(min(one.wall for one in mine if _quiet(one))) for name, mine in takes.items()}, "wall")
    return Timing({name: _ms(min(one.cpu for one in mine)) for name, mine in takes.items()}, "cpu")


def _all_quiet(takes: Mapping[str, list[Take]]) -> bool:
    return all(any(map(_quiet, mine)) for mine in takes.values())


def _quiet(one: Take) -> bool:
    return one.waited <= _WAITED * one.wall


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _waited() -> float:
    """Linux's own account: the second field is how long the thread waited on a run queue, ns."""
    waited = 0
    for task in _TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # the thread has just ended; or it is kept otherwise
            waited += int(task.read_text().split()[1])
    return waited / 1e9

"""How long each stage was silent after a fault: from the fault's end to the stage's next committed record.

Read from the log afterwards: Kafka's timestamps are taken when a record is appended, within milliseconds of its commit.
A stage whose next result was made from a record that came later was not silent but idle until then.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.chaos.audit import Made
from tests.chaos.schedule import PROCESSES

# What recovers from a fault goes on to disturb others for as long.
_WAKE_MS = 15_000

_ROAD = ("ingest", "detect", "batch", "enrich", "analyze")
_STORES = {"kafka": (*_ROAD, "sink"), "clickhouse": ("sink",), "llama": ("analyze",)}


class Happened(NamedTuple):
    """One fault as it was."""

    number: int
    kind: str
    target: str
    began_at: int
    """Milliseconds since the Unix epoch."""
    ended_at: int
    note: str = ""
    inflicted: bool = True
    """Whether it was what it is called: else it was tried, or was less, and `note` says why."""


class Stall(NamedTuple):
    """One stage's silence after one fault."""

    fault: Happened
    stage: str
    seconds: float
    alone: bool
    """Whether no other fault stood before this stage meanwhile."""


def stalls(happened: Sequence[Happened], made: Mapping[str, Sequence[Made]]) -> list[Stall]:
    """The silences after every fault, of every stage that it stood before; not of what nothing came after.

    What was not inflicted has none, but may have disturbed others.
    """
    found = []
    for fault in happened:
        if not fault.inflicted:
            continue
        for stage in _hit(fault):
            times = made.get(stage, ())
            at = bisect_right(times, fault.ended_at, key=lambda record: record.at)
            if at == len(times):
                continue
            after = times[at]
            seconds = (after.at - max(fault.ended_at, after.since)) / 1000
            others = (other for other in happened if other is not fault and stage in _disturbed(other))
            alone = not any(
                other.began_at <= after.at and fault.ended_at <= other.ended_at + _WAKE_MS for other in others
            )
            found.append(Stall(fault, stage, max(0.0, seconds), alone))
    return found


def _hit(fault: Happened) -> tuple[str, ...]:
    """The stages whose own work the fault stops."""
    name = fault.target.removesuffix("-more")
    return (name,) if name in PROCESSES else _STORES[name]


def _disturbed(fault: Happened) -> tuple[str, ...]:
    """The stages that have less to do, or stand still, while it lasts."""
    name = fault.target.removesuffix("-more")
    if name in _ROAD:
        return (*_ROAD[_ROAD.index(name) :], "sink")
    return (name,) if name in PROCESSES else _STORES[name]


def single(found: Sequence[Stall]) -> list[Stall]:
    """Those after a fault of one process, with no other fault in the way."""
    return [stall for stall in found if stall.alone and stall.fault.target.removesuffix("-more") in PROCESSES]


def longest(found: Sequence[Stall]) -> Stall | None:
    """The longest of `single`."""
    return max(single(found), key=lambda stall: stall.seconds, default=None)


def by_kind(found: Sequence[Stall], *, alone: bool) -> dict[str, float]:
    """The longest by kind of fault, seconds."""
    worst: dict[str, float] = {}
    for stall in found:
        if stall.alone is alone:
            worst[stall.fault.kind] = max(worst.get(stall.fault.kind, 0.0), round(stall.seconds, 2))
    return dict(sorted(worst.items()))

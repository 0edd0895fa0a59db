"""How an installation is now: the log, the store's counts, this machine's workers; what is away is a problem in it.

`look` is behind the gateway's page, `rewatch status` and `rewatch doctor`. It never raises.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from aiokafka.errors import KafkaError

from streams import survey as surveys
from streams.errors import UnavailableError
from streams.kafka import Kafka
from streams.liveness import read_report
from streams.survey import Memory, Position, Survey

# A worker writes its report every second; one that is older than this by far is not at work.
FRESH_S = 10.0

Report = Mapping[str, Any]
"""What a worker says of itself; see `streams.liveness`."""

Letters = list[dict[str, Any]]
"""Open dead letters: rows of `stage`, `kind` and `count`."""


class Problem(NamedTuple):
    """Something that is wrong, and the fix."""

    service: str
    message: str


class Look(NamedTuple):
    """One look at everything; None is what could not be asked."""

    log: Survey | None
    stored: Mapping[str, int] | None
    """Records in the store by topic."""
    letters: Letters | None
    reports: list[Report]
    problems: list[Problem]

    def on_log(self, topic: str) -> tuple[int | None, bool]:
        """How many records of a topic are on the log, and whether each was seen."""
        if self.log is None:
            return None, True
        count = self.log.records.get(topic)
        return (count.records, count.exact) if count is not None else (0, True)

    def stage(self, name: str) -> "Stage":
        """How far a stage has come."""
        return stage_of(name, self.log.positions[name] if self.log is not None else None, self.reports)


class Stage(NamedTuple):
    """How far one stage has come, over all of its partitions and processes."""

    lag: int | None
    exact: bool
    caught_up: bool | None
    waiting_on: tuple[str, ...]
    reports: list[Report]


async def look(
    kafka: Kafka,
    stored: Callable[[], Awaitable[tuple[Mapping[str, int], Letters]]],
    data_dir: Path,
    *,
    memory: Memory | None = None,
    fixes: Mapping[str, str] | None = None,
) -> Look:
    """Look at the log, the store and this machine's workers at once.

    Args:
        kafka: the broker.
        stored: asks the store for records by topic and open dead letters; raises `UnavailableError`.
        data_dir: where workers of this machine say how they are.
        memory: for whoever looks again and again; see `streams.survey`.
        fixes: what to do when a service (`broker`, `clickhouse`) is away, in this installation.
    """
    problems: list[Problem] = []
    fixes = fixes or {}

    async def log() -> Survey | None:
        try:
            return await surveys.survey(kafka, memory=memory)
        except (KafkaError, TimeoutError, OSError) as error:
            problems.append(Problem("broker", kafka.away(error, fixes.get("broker", ""))))
            return None

    async def store() -> tuple[Mapping[str, int] | None, Letters | None]:
        try:
            return await stored()
        except UnavailableError as error:
            problems.append(Problem("clickhouse", f"{error}{fixes.get('clickhouse', '')}"))
            return None, None

    found, (counts, letters), reports = await asyncio.gather(log(), store(), asyncio.to_thread(workers, data_dir))
    return Look(found, counts, letters, reports, problems)


def stage_of(name: str, positions: Sequence[Position] | None, reports: Sequence[Report]) -> Stage:
    """One stage, from its positions on the log (None while the broker is away) and its workers' reports."""
    ours = [report for report in reports if report["stage"] == name]
    return Stage(
        None if positions is None else sum(p.behind.records for p in positions),
        positions is None or all(p.behind.exact for p in positions),
        None if positions is None else all(p.behind == (0, True) for p in positions),
        tuple(sorted({what for report in ours for what in report["waiting_on"]})),
        ours,
    )


def workers(data_dir: Path) -> list[Report]:
    """What the live workers on this data directory say of themselves."""
    reports: list[Report] = []
    here = socket.gethostname()
    for path in sorted((data_dir / "status").glob("*.json")):
        report = read_report(path)
        # Containers share a data directory, but no process ids.
        # A report from the future is older than a clock that was set back: whoever is at work writes another at once.
        if (
            report is not None
            and (report.get("host", here) != here or psutil.pid_exists(report["pid"]))
            and abs(time.time() - report["written_at"]) < FRESH_S
        ):
            reports.append(report)
    return reports

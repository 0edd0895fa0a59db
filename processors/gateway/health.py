"""How the pipeline is, as the page shows it: a look of `streams.health` and what ClickHouse knows besides."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from processors.gateway import models
from processors.gateway.models import DeadLetterCount, Health, StageHealth, TopicHealth
from processors.store.queries import Model, Queries, Row
from streams.health import Look, Problem, Report, look, workers
from streams.kafka import Kafka
from streams.survey import READS, Memory
from streams.topics import STORED

# What a page waits for at most, seconds: the broker's own limits add up to a minute when its host does not answer.
_PATIENCE_S = 10.0
# How old what is shown may be, seconds.
_OLD_S = 2.0
# The stages whose latency ClickHouse can tell, by the topic that they write.
_WRITES = {"detect": "detections", "analyze": "risk_events"}


class Pulse:
    """The page's view of it, at most two seconds old; whoever asks meanwhile gets the same answer.

    Args:
        kafka: the broker.
        queries: the way to ClickHouse.
        data_dir: where workers of this machine say how they are.
        fixes: as for `look`.
        expected: the stages that should be at work on this machine, and the log of each.
        toys: SHA-256 of the demo models' weights.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        kafka: Kafka,
        queries: Queries,
        data_dir: Path,
        *,
        fixes: Mapping[str, str] | None = None,
        expected: Callable[[], Mapping[str, str]] = dict,
        toys: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kafka = kafka
        self._queries = queries
        self._data_dir = data_dir
        self._fixes = fixes
        self._expected = expected
        self._toys = toys
        self._clock = clock
        self._memory: Memory = {}
        self._last: tuple[float, Health] | None = None
        self._running: asyncio.Task[Health] | None = None

    async def health(self) -> Health:
        """How the pipeline is; it never raises."""
        if self._last is not None and self._clock() - self._last[0] < _OLD_S:
            return self._last[1]
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._ask(), name="health")
        return await asyncio.shield(self._running)

    async def _ask(self) -> Health:
        began = self._clock()
        facts = _Facts({}, {}, {})

        async def stored() -> tuple[Mapping[str, int], list[Row]]:
            nonlocal facts
            flow, latency, models, letters = await asyncio.gather(
                self._queries.flow(),
                self._queries.latency(),
                self._queries.models(),
                self._queries.dead_letter_counts(),
            )
            facts = _Facts(flow, latency, models)
            return {topic: row["records"] for topic, row in flow.items()}, letters

        try:
            async with asyncio.timeout(_PATIENCE_S):
                seen = await look(self._kafka, stored, self._data_dir, memory=self._memory, fixes=self._fixes)
        except TimeoutError:
            reports = await asyncio.to_thread(workers, self._data_dir)
            slow = Problem(
                "gateway",
                f"the broker or ClickHouse took longer than {_PATIENCE_S:g} s to say how they are; "
                "look at their load, and at kafka.bootstrap_servers and clickhouse.url",
            )
            seen = Look(None, None, None, reports, [slow])
        seen.problems.extend(absent(await asyncio.to_thread(self._expected), seen.reports))
        health = _health(seen, facts, self._kafka.settings.system, self._toys)
        self._last = (max(began, self._clock() - _OLD_S / 2), health)
        return health


def absent(expected: Mapping[str, str], reports: Sequence[Report]) -> list[Problem]:
    """The stages that should be at work on this machine and of which no process says a word."""
    there = {report["stage"] for report in reports}
    return [
        Problem(stage, f"no process of it is at work here, though `rewatch up` runs it; look at {log}")
        for stage, log in expected.items()
        if stage not in there
    ]


class _Facts(NamedTuple):
    """What ClickHouse knows besides counts."""

    flow: Mapping[str, Row]
    latency: Mapping[str, Row]
    models: Mapping[str, Model]


def _health(seen: Look, facts: _Facts, system: str, toys: Collection[str]) -> Health:
    detector, analyst = (facts.models.get(role, Model("", "")) for role in ("detector", "analyst"))
    stages = tuple(_stage(name, seen, facts) for name in READS)
    waits = any(set(stage.waiting_on) - {"live"} for stage in stages)  # to give way to live windows is as it should be
    stalled = any(stage.stall for stage in stages)
    return Health(
        at=datetime.now(UTC),
        status="degraded" if seen.problems or stalled else "waiting" if waits else "ok",
        system=system,
        detector=detector.name,
        analyst=analyst.name,
        toys=tuple(role for role, model in (("detector", detector), ("analyst", analyst)) if model.digest in toys),
        stages=stages,
        topics=tuple(_topic(topic, seen, facts) for topic in STORED),
        dead_letters=tuple(
            DeadLetterCount(stage=row["stage"], kind=row["kind"], count=row["count"]) for row in seen.letters or ()
        ),
        problems=tuple(models.Problem(**problem._asdict()) for problem in seen.problems),
    )


def _topic(topic: str, seen: Look, facts: _Facts) -> TopicHealth:
    records, exact = seen.on_log(topic)
    return TopicHealth(
        topic=topic,
        records=records,
        exact=exact,
        in_clickhouse=None if seen.stored is None else seen.stored.get(topic, 0),
        last_at=facts.flow.get(topic, {}).get("last_at"),
    )


def _stage(name: str, seen: Look, facts: _Facts) -> StageHealth:
    stage = seen.stage(name)
    latency = facts.latency.get(_WRITES.get(name, ""), {})
    return StageHealth(
        stage=name,
        lag=stage.lag,
        exact=stage.exact,
        caught_up=stage.caught_up,
        waiting_on=stage.waiting_on,
        workers=len(stage.reports),
        stall=next((report["stall"] for report in stage.reports if report["stall"]), None),
        latency_p50_ms=_ms(latency.get("p50_s")),
        latency_p95_ms=_ms(latency.get("p95_s")),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)

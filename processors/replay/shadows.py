"""Shadows as people ask for them: which there are, and what each said so far against the live verdicts."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from processors.replay.plan import Plan, PlanError
from processors.store.queries import Queries, Row
from schemas.records import Replay

_SAID = """
    SELECT r.replay_id AS replay_id, count() AS verdicts, countIf(l.risk_level != '') AS compared,
        countIf(l.risk_level != '' AND l.risk_level != r.risk_level) AS flips,
        countIf(l.risk_level IN ('low', 'medium') AND r.risk_level IN ('high', 'critical')) AS alarms_new,
        countIf(l.risk_level IN ('high', 'critical') AND r.risk_level IN ('low', 'medium')) AS alarms_lost
    FROM
    (
        SELECT replay_id, camera_id, batch_id, risk_level FROM replay_events FINAL
        WHERE replay_id IN {shadows:Array(String)}
    ) AS r
    LEFT JOIN (SELECT camera_id, batch_id, risk_level FROM risk_events FINAL WHERE run = 'live') AS l
    ON l.camera_id = r.camera_id AND l.batch_id = r.batch_id
    GROUP BY r.replay_id
"""
_FAILED = """
    SELECT splitByChar(':', origin)[1] AS replay_id, uniqExact(origin) AS failed FROM dead_letters
    WHERE stage = 'replay' AND replay_id IN {shadows:Array(String)}
    GROUP BY replay_id
"""
_NOTHING = {"verdicts": 0, "compared": 0, "flips": 0, "alarms_new": 0, "alarms_lost": 0, "failed": 0}


class Shadow(NamedTuple):
    """One shadow, as its newest record has it."""

    record: Replay
    plan: Plan

    @property
    def replay_id(self) -> str:
        """Its id."""
        return self.record.replay_id

    @property
    def name(self) -> str:
        """Its name."""
        return self.record.name

    @property
    def running(self) -> bool:
        """Whether it judges live windows."""
        return self.record.state == "running"

    @property
    def prompt(self) -> str:
        """Digest of the version that it judges with."""
        return self.plan.change.prompt

    @property
    def at(self) -> int:
        """When it began, or ended if it has: milliseconds since the Unix epoch."""
        return self.record.updated_at


def shadows(records: Iterable[Replay]) -> list[Shadow]:
    """Those of the records that are shadows: who runs first, then the newest. What cannot be read is none."""
    found = []
    for record in records:
        try:
            plan = Plan.decode(record.plan)
        except PlanError:
            continue
        if plan.kind == "shadow":
            found.append(Shadow(record, plan))
    return sorted(found, key=lambda one: (not one.running, -one.at))


async def said(store: Queries, names: Sequence[str]) -> dict[str, Row]:
    """What each shadow said, by its id.

    `verdicts`; those `compared` with a live one, with `flips` of level, `alarms_new` that live does not raise and
    `alarms_lost` that it does; and windows that `failed`.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    found: dict[str, Row] = {name: dict(_NOTHING) for name in names}
    for query in (_SAID, _FAILED) if names else ():
        for row in await store.rows(query, shadows=list(names)):
            found[row["replay_id"]].update({key: value for key, value in row.items() if key != "replay_id"})
    return found

"""What a prompt version is promoted on the strength of: a replay or a shadow that judged with it. Pure."""

from collections.abc import Iterable

from processors.replay.plan import Plan, PlanError
from schemas.records import Replay


def tried(records: Iterable[Replay], digest: str) -> list[Replay]:
    """Replays that are done and shadows that began, which judged with this version, the newest first."""
    return sorted((record for record in records if _tried(record, digest)), key=lambda record: -record.updated_at)


def _tried(record: Replay, digest: str) -> bool:
    try:
        plan = Plan.decode(record.plan)
    except PlanError:
        return False
    if plan.change.prompt != digest:
        return False
    return record.state == "done" or (plan.kind == "shadow" and record.state == "running")

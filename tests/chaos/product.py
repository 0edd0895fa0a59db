"""The product's own audit (`rewatch audit`) of the campaign's data, and whether the audit from outside agrees."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

from infra.cli.audit import ASK_S
from infra.config import Settings
from processors.store import audit as accounting
from processors.store.audit import Report
from processors.store.queries import Queries
from streams.kafka import Kafka
from tests.chaos.audit import Counts

SAYS = "rewatch audit: "
"""What lines begin with that the product's audit found."""

# Ticks of the last windows may still be on their way to the sink.
_LOOKS = 10


async def report_of(settings: Settings, told: Callable[[str], None] = lambda _: None) -> Report:
    """What `rewatch audit --wait` says of everything."""
    patient = settings.clickhouse.model_copy(update={"read_timeout_s": ASK_S})
    async with aclosing(Queries(patient)) as queries:
        for _ in range(_LOOKS):
            report = await accounting.audit(queries, Kafka(settings.kafka), settings.windows.record(), told=told)
            if not any(report.in_flight.values()):
                break
            await asyncio.sleep(1)
        return report


def violations(report: Report, accepted: int, own: Counts, letters: int) -> list[str]:
    """What the product's audit found, and where it and the audit from outside disagree; a line each.

    Args:
        report: the product's.
        accepted: frames that were answered with 200.
        own: what the audit from outside found.
        letters: dead letters on the log.
    """
    found = [f"{SAYS}{one.kind} {one.id}: {one.detail}" for one in report.violations]
    unnamed = sum(report.counts.values()) - len(report.violations)
    found += [f"{SAYS}{unnamed} more"] if unnamed else []
    found += [
        f"{SAYS}{count} in flight before {stage} after the drain" for stage, count in report.in_flight.items() if count
    ]
    pairs: Sequence[tuple[str, int, int]] = (
        ("accepted", accepted, report.accepted),
        ("dead letters", letters, sum(row["count"] for row in report.dead_letters)),
        ("sent again", 0, report.repeated),
        # One missing record counts differently where its results miss too: whether there is any must agree.
        ("lost", min(own.lost, 1), min(report.lost, 1)),
        ("duplicates", min(own.duplicates, 1), min(report.duplicates, 1)),
    )
    return found + [
        f"{SAYS}{what}: {theirs}, and {ours} from outside" for what, ours, theirs in pairs if ours != theirs
    ]

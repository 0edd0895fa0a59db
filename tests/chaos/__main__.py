"""`make chaos`: a campaign on an installation of its own, a line while it runs, and `chaos.json` at the end."""

import argparse
import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import structlog
from rich.console import Console
from rich.table import Table

from infra.local import broker
from tests.bench.__main__ import _cpu_model
from tests.chaos import campaign
from tests.chaos.campaign import Outcome, Progress
from tests.chaos.schedule import GAP_S, KINDS, Planned, ends_s, plan


def main() -> int:
    """Run what was asked for; 0 where everything held, 1 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="See tests/chaos/README.md.")
    parser.add_argument("--n", type=int, default=100, help="faults; default: 100")
    parser.add_argument("--seed", type=int, default=None, help="the same seed makes the same schedule; default: any")
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=list(KINDS), default=[], help="these kinds only")
    parser.add_argument("--gap", type=float, default=GAP_S, help=f"seconds between two on average; default: {GAP_S:g}")
    parser.add_argument(
        "--list", action="store_true", help="show the kinds, or with --n or --seed the schedule, and end"
    )
    parser.add_argument("--keep", action="store_true", help="keep data and logs also where everything held")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON; progress goes to stderr")
    parser.add_argument("--out", type=Path, default=Path("chaos.json"), help="default: chaos.json")
    arguments = parser.parse_args()
    seed = time.time_ns() % 2**31 if arguments.seed is None else arguments.seed
    planned = plan(arguments.n, seed, only=arguments.only, gap_s=arguments.gap)
    console = Console(stderr=arguments.json)
    if arguments.list:
        _list(Console(), None if arguments.seed is None else planned)
        return 0
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    directory = Path(tempfile.mkdtemp(prefix="rewatch-chaos-"))
    expected = campaign.WARM_S * 2 + ends_s(planned) + campaign.TAIL_S
    console.print(f"{len(planned)} faults, seed {seed}, about {expected / 60:.0f} minutes; data in {directory}")
    outcome = asyncio.run(_run(planned, directory, expected, console))
    found = outcome.as_json() | {"seed": seed, "n": len(planned), "gap_s": arguments.gap, "machine": _machine()}
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    _evidence(directory, planned, outcome, found)
    if outcome.violations:
        console.print(f"[red]{len(outcome.violations)} violations[/red]; data, logs and schedule.json: {directory}")
        for line in outcome.violations[:20]:
            console.print(f"  {line}", markup=False)
    elif not arguments.keep:
        shutil.rmtree(directory)
    _show(found, console)
    if arguments.json:
        print(json.dumps(found))
    return 1 if outcome.violations else 0


async def _run(planned: list[Planned], directory: Path, expected: float, console: Console) -> Outcome:
    progress = Progress(expected, tell=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    if not console.is_terminal:
        showing = asyncio.create_task(_lines(progress, len(planned), console))
    else:
        showing = asyncio.create_task(_line(progress, len(planned), console))
    try:
        return await campaign.run(planned, directory, progress)
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _line(progress: Progress, n: int, console: Console) -> None:
    """One line that changes."""
    with console.status("") as status:
        while True:
            status.update(_now(progress, n))
            await asyncio.sleep(0.5)


async def _lines(progress: Progress, n: int, console: Console) -> None:
    """A line now and then, for a log."""
    while True:
        await asyncio.sleep(30)
        console.print(_now(progress, n), markup=False, highlight=False, soft_wrap=True)


def _now(progress: Progress, n: int) -> str:
    elapsed = time.monotonic() - progress.began
    lasting = ", ".join(progress.now.values()) or progress.doing
    behind = (
        "broker away"
        if progress.behind is None
        else ", ".join(f"{stage} {count}" for stage, count in progress.behind.items() if count) or "caught up"
    )
    return (
        f"{elapsed / 60:.1f}/{progress.expected_s / 60:.1f} min  {progress.done}/{n} faults  now: {lasting}  "
        f"accepted {len(progress.accepted)}  behind: {behind}"
    )


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "kafka": broker.ARTIFACTS.split("+")[0].rpartition(":")[2],
        "load_after": round(os.getloadavg()[1], 2),
    }


def _evidence(directory: Path, planned: list[Planned], outcome: Outcome, found: dict[str, Any]) -> None:
    """What was planned and what happened, beside the data and the logs."""
    schedule = {
        "planned": [fault._asdict() for fault in planned],
        "happened": [fault._asdict() for fault in outcome.happened],
        "stalls": [stall._asdict() | {"fault": stall.fault.number} for stall in outcome.stalls],
    }
    (directory / "schedule.json").write_text(json.dumps(schedule, indent=1))
    (directory / "chaos.json").write_text(json.dumps(found, indent=2))


def _list(console: Console, planned: list[Planned] | None) -> None:
    table = Table("kind", "what", "hits") if planned is None else Table("", "at s", "kind", "hits", "for s")
    if planned is None:
        for kind in KINDS.values():
            table.add_row(kind.name, kind.what, " ".join(kind.targets))
    else:
        for fault in planned:
            table.add_row(str(fault.number), f"{fault.at_s:.1f}", fault.kind, fault.target, f"{fault.length_s:.0f}")
    console.print(table)


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table("kind", "times", "stall s", "recovery s", "overlapped s")
    for kind, count in found["faults"].items():
        cells = [found[column].get(kind, "") for column in ("stall_s", "recovery_s", "overlapped_s")]
        table.add_row(kind, str(count), *map(str, cells))
    console.print(table)
    console.print(
        f"accepted {found['accepted']}, lost {found['lost']}, duplicates {found['duplicates']}, "
        f"unexplained dead letters {found['unexplained_dead_letters']}, "
        f"longest stall {found['longest_stall_s']} s ({found['longest_stall_of']}); {found['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())

"""`make chaos`: a campaign on an installation of its own, a line while it runs, and `chaos.json` at the end."""

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import structlog
from rich.console import Console
from rich.table import Table

from infra.local import broker
from infra.local.process import StartError
from tests.bench.__main__ import _cpu_model
from tests.chaos import campaign
from tests.chaos.campaign import Outcome, Progress
from tests.chaos.schedule import GAP_S, KINDS, Planned, ends_s, plan

FAULTS = 100
"""As many as fit into 40 minutes."""

SHOWN = 20
"""Violations that are printed."""

MOST_S = 3600.0
"""Between two faults."""

# A terminal's Ctrl-C, a supervisor's end, a terminal that is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

VIOLATED = 1
NOT_RUN = 3

_EPILOG = """exit codes:
  0  everything held
  1  a violation; data, logs and schedule.json are kept, and the last lines say where
  2  the arguments make no sense
  3  the installation did not start; its logs are kept
  128 + n  stopped by signal n (130 is Ctrl-C): every child is stopped, and what it wrote removed, unless --keep
tests/chaos/README.md says what must hold and what chaos.json means."""


class StoppedError(Exception):
    """The campaign was told to stop, by a signal, and did."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit code, as the help says."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    out = asked.out.resolve()
    if not asked.list and not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        parser.error(f"--out {asked.out}: {out.parent} is no directory that can be written to")
    seed = time.time_ns() % 2**31 if asked.seed is None else asked.seed
    planned = plan(FAULTS if asked.n is None else asked.n, seed, only=asked.only, gap_s=asked.gap)
    console = Console(stderr=asked.json)
    if asked.list:
        _list(Console(), planned if (asked.n, asked.seed) != (None, None) else None)
        return 0
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    directory = Path(tempfile.mkdtemp(prefix="rewatch-chaos-"))
    expected = campaign.WARM_S * 2 + ends_s(planned) + campaign.TAIL_S
    console.print(f"{len(planned)} faults, seed {seed}, about {expected / 60:.0f} minutes; data in {directory}")
    try:
        outcome = asyncio.run(_run(planned, directory, expected, console))
    except StoppedError as stopped:
        if not asked.keep:
            shutil.rmtree(directory)
        kept = f"data and logs: {directory}" if asked.keep else "nothing was kept"
        console.print(f"stopped by {signal.Signals(stopped.number).name}: no child runs, {kept}", soft_wrap=True)
        return 128 + stopped.number
    except StartError as error:
        console.print(f"the installation did not start: {error}", markup=False, soft_wrap=True)
        return NOT_RUN
    found = outcome.as_json() | {"seed": seed, "n": len(planned), "gap_s": asked.gap, "machine": _machine()}
    out.write_text(json.dumps(found, indent=2) + "\n")
    _evidence(directory, planned, outcome, found)
    _show(found, console)
    if outcome.violations:
        for line in outcome.violations[:SHOWN]:
            console.print(f"  {line}", markup=False, soft_wrap=True)
        more = f", the first {SHOWN} above, all in {out}" if len(outcome.violations) > SHOWN else ""
        said = f"[red]{len(outcome.violations)} violations[/red]{more}; data, logs and schedule.json: {directory}"
        console.print(said, soft_wrap=True)
    elif not asked.keep:
        shutil.rmtree(directory)
    if asked.json:
        print(json.dumps(found))
    return VIOLATED if outcome.violations else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Torment an installation of its own at random, seeded instants, and audit it from outside.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=_count, help=f"faults; default: {FAULTS}, in 40 minutes")
    parser.add_argument("--seed", type=int, help="the same seed makes the same schedule; default: any")
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=list(KINDS), default=[], help="these kinds only")
    gap = f"seconds from one to the next on average; default: {GAP_S:g}"
    parser.add_argument("--gap", type=_seconds, default=GAP_S, help=gap)
    listed = "show the kinds, or with --n or --seed the schedule, and end"
    parser.add_argument("--list", action="store_true", help=listed)
    parser.add_argument("--keep", action="store_true", help="keep data and logs also where everything held")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON; progress goes to stderr")
    parser.add_argument("--out", type=Path, default=Path("chaos.json"), help="the outcome; default: chaos.json")
    return parser


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MOST_S:
        raise argparse.ArgumentTypeError(f"more than 0, and {MOST_S:g} at most")
    return seconds


async def _run(planned: list[Planned], directory: Path, expected: float, console: Console) -> Outcome:
    """The campaign, ended in order by the first signal.

    Raises:
        StoppedError: a signal came.
        StartError: the installation did not start.
    """
    task, got = asyncio.current_task(), list[int]()
    assert task is not None

    def stop(number: int) -> None:
        if not got:  # stopping takes half a minute; whoever is impatient does not make it take less
            got.append(number)
            console.print("stopping every child ...")
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        return await _watched(planned, directory, expected, console)
    except asyncio.CancelledError:
        if not got:
            raise
        raise StoppedError(got[0]) from None
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _watched(planned: list[Planned], directory: Path, expected: float, console: Console) -> Outcome:
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
    table = Table("kind")
    for name in ("times", "stall s", "recovery s", "overlapped s"):
        table.add_column(name, justify="right")
    for kind, count in found["faults"].items():
        cells = [found[column].get(kind, "") for column in ("stall_s", "recovery_s", "overlapped_s")]
        table.add_row(kind, str(count), *map(str, cells))
    console.print(table)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for one in found["skipped"]:
        say(f"not counted: {one['number']} {one['kind']} {one['target']}: {one['why']}")
    for name, count in found["ended_by_themselves"].items():
        say(f"{name} was restarted {count} times without having been killed")
    stall = (
        f"{found['longest_stall_s']} s ({found['longest_stall_of']})" if found["longest_stall_of"] else "none measured"
    )
    lost = {
        key: "?" if found[key] is None else found[key] for key in ("lost", "duplicates", "unexplained_dead_letters")
    }
    say(
        f"{sum(found['faults'].values())} faults, {found['kills']} kills, accepted {found['accepted']}, "
        f"lost {lost['lost']}, duplicates {lost['duplicates']}, "
        f"unexplained dead letters {lost['unexplained_dead_letters']}, longest stall {stall}; {found['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())

"""One campaign: start, load, faults, drain, audit."""

import asyncio
import logging
import re
import signal
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from infra.cli.audit import plain
from infra.cli.show import collect
from processors.store.audit import Report
from tests.chaos import faults, product, stalls
from tests.chaos.audit import CampaignAudit, Made, counted
from tests.chaos.load import Load
from tests.chaos.schedule import Planned, ends_s
from tests.chaos.site import CAMERAS, NotInflictedError, Site, site
from tests.chaos.stalls import Happened, Stall
from tests.e2e.installation import Feeder, pictures

# Before the first fault: the first windows have closed, so each stage has something to lose.
WARM_S = 10.0

# From the last fault to the audit's end, for what is shown as the expected time.
TAIL_S = 60.0

# What makes no headway for so long is stuck: many times what a stage's start takes.
STUCK_S = 240.0

# Faults wait for what they need, and for each other: so much longer than planned all of it may take.
_PATIENCE_S = 900.0

# A hanging LLM must run into the deadline; a busy one must not. Its threads wait for each other by spinning: two
# of them on two busy cores were seen to take four minutes for what one does in a second.
_SETTINGS = {"LLM__DEADLINE_S": "60", "LLM__THREADS": "1", "LLM__CONNECT_TIMEOUT_S": "5"}


@dataclass
class Outcome:
    """What a campaign found."""

    happened: list[Happened] = field(default_factory=list)
    accepted: int = 0
    put_off: int = 0
    explained: int = 0
    violations: list[str] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    kills: int = 0
    """SIGKILLs that reached a live process."""
    ended_by_themselves: dict[str, int] = field(default_factory=dict)
    """How often processes were restarted that nobody had killed, by name."""
    product: Report | None = None
    """What the product's own audit said; None where the campaign broke off before."""
    seconds: float = 0.0

    @property
    def skipped(self) -> list[Happened]:
        """Faults that could not be inflicted."""
        return [fault for fault in self.happened if not fault.inflicted]

    def as_json(self) -> dict[str, Any]:
        """As `chaos.json` has it."""
        longest = stalls.longest(self.stalls)
        kinds = Counter(fault.kind for fault in self.happened if fault.inflicted)
        audited = self.product is not None  # else nobody knows, and 0 would be a claim
        counts = counted(self.violations)
        outages = [stall for stall in self.stalls if stall.fault.target in {"kafka", "clickhouse", "llama"}]
        return {
            "kills": self.kills,
            "faults": dict(sorted(kinds.items())),
            "skipped": [
                {"number": fault.number, "kind": fault.kind, "target": fault.target, "why": fault.note}
                for fault in self.skipped
            ],
            "accepted": self.accepted,
            "lost": counts.lost if audited else None,
            "duplicates": counts.duplicates if audited else None,
            "unexplained_dead_letters": counts.unexplained if audited else None,
            "explained_dead_letters": self.explained if audited else None,
            "rewatch_audit": _plain(self.product) if self.product is not None else None,
            "longest_stall_s": round(longest.seconds, 2) if longest else None,
            "longest_stall_of": f"{longest.fault.kind} {longest.stage}" if longest else None,
            "stalls_measured": len(stalls.single(self.stalls)),
            "stall_s": stalls.by_kind([s for s in self.stalls if s not in outages], alone=True),
            "recovery_s": stalls.by_kind(outages, alone=True),
            "overlapped_s": stalls.by_kind(self.stalls, alone=False),
            "ended_by_themselves": self.ended_by_themselves,
            "violations": self.violations,
            "seconds": round(self.seconds, 1),
        }


@dataclass
class Progress:
    """What somebody who looks is told."""

    expected_s: float
    began: float = field(default_factory=time.monotonic)
    doing: str = ""
    now: dict[int, str] = field(default_factory=dict)
    """The faults that last, by number."""
    done: int = 0
    accepted: Sized = ()
    behind: dict[str, int] | None = field(default_factory=dict)
    tell: Callable[[str], None] = print
    """Takes a line that is worth keeping."""

    def say(self, what: str) -> None:
        self.doing = what
        self.tell(what)


class Endings(logging.Handler):
    """How the supervised processes ended inside the block, as their supervisor says it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._codes: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def __enter__(self) -> Self:
        logging.getLogger("infra.local.supervisor").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("infra.local.supervisor").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of a process that ended; one that stalled was ended by its supervisor."""
        if found := re.match(r"([\w.-]+): ended with code (-?\d+)", record.getMessage()):
            self._codes[found[1]][int(found[2])] += 1

    def violations(self, kills: Mapping[str, int]) -> list[str]:
        """Processes that ended though nobody killed them, with their codes; `kills` by name were the campaign's."""
        said = []
        for name, codes in sorted(self._codes.items()):
            own = codes - Counter({-signal.SIGKILL: kills.get(name, 0)})
            if own:
                told = ", ".join(f"{count} times with code {code}" for code, count in sorted(own.items()))
                said.append(f"{name} ended by itself, {told}: its log says why")
        return said


async def run(plan: Sequence[Planned], directory: Path, progress: Progress, **settings: str) -> Outcome:
    """Torment an installation below the directory as planned, let it drain, and audit it.

    `settings`: by their names in the environment. The session timeout is the product's own unless it is given.
    """
    outcome = Outcome()
    began = time.monotonic()
    # `settings_for` shortens it for other tests; what a killed process costs is measured here.
    settings = {"KAFKA__SESSION_TIMEOUT_MS": "10000"} | _SETTINGS | settings
    try:
        with pytest.MonkeyPatch.context() as patch:
            async with site(directory, patch, progress.say, **settings) as home:
                with Endings() as endings:
                    await _torment(home, plan, outcome, progress)
                outcome.kills = home.kills.total()
                outcome.ended_by_themselves = home.ended_by_themselves()
                outcome.violations += endings.violations(home.kills)
    finally:
        outcome.seconds = time.monotonic() - began
    return outcome


async def _torment(home: Site, plan: Sequence[Planned], outcome: Outcome, progress: Progress) -> None:
    watching = asyncio.create_task(_watch(home, progress))
    try:
        progress.say("rendering pictures")
        load = Load(home.settings, await asyncio.to_thread(pictures, 12), CAMERAS)
        progress.accepted = load.accepted
        progress.say("load")
        async with asyncio.timeout(WARM_S + ends_s(plan) + _PATIENCE_S), load.running():
            await asyncio.sleep(WARM_S)
            await _inflict(home, plan, outcome.happened, progress)
            await asyncio.sleep(WARM_S)
        outcome.accepted, outcome.put_off = len(load.accepted), load.put_off
        outcome.violations += load.refused
        progress.say("draining")
        await Feeder(home.settings, []).end(CAMERAS)
        stuck = await _drain(home)
        if stuck:
            outcome.violations.append(f"no headway for {STUCK_S:g} s, or no end in {_PATIENCE_S:g} s: {stuck}")
        progress.say("auditing the log")
        audit = CampaignAudit(home.settings)
        await audit.read()
        outcome.violations += audit.check(load.accepted, home.llm.spoiled, home.llm.poisoned)
        outcome.explained = audit.explained
        outcome.violations += await audit.violations_of_replay()
        progress.say("auditing ClickHouse")
        outcome.violations += await asyncio.to_thread(audit.violations_in_clickhouse)
        progress.say("`rewatch audit`")
        report = await product.report_of(home.settings)
        letters = len({(letter.stage, letter.origin) for letter in audit.decoded("dead_letters")})
        outcome.violations += product.violations(report, len(load.accepted), counted(outcome.violations), letters)
        outcome.product = report
        looked = [Made(at, 0) for at in load.looked]
        outcome.stalls = stalls.stalls(outcome.happened, audit.made() | {"gateway": looked})
    except (Exception, asyncio.CancelledError):  # whatever stops it is a finding, and the evidence must be kept
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        outcome.violations.append(f"the campaign broke off: {traceback.format_exc()}")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        outcome.happened.sort()


def _plain(report: Report) -> dict[str, Any]:
    """The report for `chaos.json`; its violations are among the campaign's own."""
    told = plain(report)
    return {name: told[name] for name in ("clean", "accepted", "lost", "duplicates", "unread", "notes", "took_s")}


class _Notes:
    """What is told of one fault while it lasts."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.over_at: int | None = None

    def __call__(self, what: str) -> None:
        self.said.append(what)

    def over(self) -> None:
        self.over_at = _now()


async def _inflict(home: Site, plan: Sequence[Planned], happened: list[Happened], progress: Progress) -> None:
    """Every fault at its instant, those of one resource one after another; `happened` gets each as it ends."""
    began = time.monotonic()
    busy: dict[str, asyncio.Lock] = {}

    async def one(fault: Planned) -> None:
        await asyncio.sleep(max(0.0, began + fault.at_s - time.monotonic()))
        notes = _Notes()
        inflicted = True
        async with busy.setdefault(fault.target, asyncio.Lock()):
            started = _now()
            progress.now[fault.number] = f"{fault.kind} {fault.target}"
            ended = started
            try:
                async with faults.make(fault, home, notes):
                    if fault.length_s:
                        await asyncio.sleep(fault.length_s)
                    ended = _now()
            except NotInflictedError as error:  # what it needs is away for another fault's sake
                notes(f"not inflicted: {error}")
                inflicted = False
            finally:
                del progress.now[fault.number]
                progress.done += 1
            since = _now()
        # A worker that was added leaves at the end of its block, and what was stopped goes on: the fault is over then.
        ended = since if fault.length_s else ended
        ended = notes.over_at or ended
        what = f"{fault.number:4} {fault.kind} {fault.target}"
        said = "; ".join(notes.said)
        progress.tell(f"{what} {(since - started) / 1000:.1f} s {said[:150]}")
        happened.append(Happened(fault.number, fault.kind, fault.target, started, ended, said, inflicted))

    async with asyncio.TaskGroup() as group:
        for fault in plan:
            group.create_task(one(fault))


async def _drain(home: Site) -> str:
    """Wait until every stage has done everything and everything is in ClickHouse; what is missing, if that never is."""
    last, began = "", time.monotonic()
    since = began
    while True:
        state = await collect(home.settings)
        lags = {stage["stage"]: stage["lag"] for stage in state["stages"] if stage["lag"] != 0}
        missing = {t["topic"]: t["in_clickhouse"] for t in state["topics"] if t["records"] != t["in_clickhouse"]}
        if not lags and not missing and not state["problems"]:
            return ""
        left = f"{lags} {missing} {state['problems']}"
        if left != last:
            last, since = left, time.monotonic()
        if time.monotonic() - since > STUCK_S or time.monotonic() - began > _PATIENCE_S:
            return left
        await asyncio.sleep(1)


async def _watch(home: Site, progress: Progress) -> None:
    while True:
        progress.behind = await home.behind()
        await asyncio.sleep(5)


def _now() -> int:
    return int(time.time() * 1000)

"""What `rewatch replay` does: the plan that was asked for, a planner seen through, Ctrl-C. Imported by who does it."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from infra import replaying, replays
from infra.cli import errors
from infra.cli.lifecycle import Stop, duration
from infra.cli.output import INTERRUPTED, NO, USAGE, fail, printable
from infra.config import Settings
from infra.local.supervisor import running
from infra.replaying import Place
from infra.replays import Made, Office, UnknownReplayError, Weighed
from processors.analyze.port import Server
from processors.analyze.settings import SLOTS
from processors.detect.settings import ModelError
from processors.replay.estimate import Estimate, estimate, measure
from processors.replay.plan import ENDED, Change, Llm, Plan, PlanError, Scope, State
from processors.replay.planner import EndedError, Progress, TakenOverError
from processors.replay.sorting import OtherWeightsError
from processors.store.queries import Queries, Row
from streams.errors import UnavailableError
from streams.prompts import UnknownVersionError

T = TypeVar("T")

_STEP_S = 10.0
"""How long `pause` and `cancel` wait until `replay ls` tells of them; they are in force before."""

_ASK_FROM_S = 600.0
"""An estimate from which a person at a terminal is asked first."""

_QUIET_S = 30.0
"""Without a result for so long, a person wants to know why: a window takes seconds, 40 s on a slow GPU."""


class Outcome(NamedTuple):
    """How one replay's run ended."""

    made: Made
    state: str
    why: str
    progress: Progress
    seconds: float
    left_out: dict[str, str]
    failures: dict[str, str]
    settled: bool
    stopped: bool
    """Whether Ctrl-C paused it."""
    strict: tuple[int, int] | None
    """Of a strict run without a change that came to its end: verdicts compared, and those that were the same."""

    @property
    def unproven(self) -> str:
        """Why a strict run without a change does not show that the answers are the same; empty where it does."""
        if not is_proof(self.made.plan):
            return ""
        compared, identical = self.strict or (0, 0)
        judged = self.progress.judged
        found = {
            f"it is {self.state}": self.state != "done",
            f"{self.progress.failed} windows failed": bool(self.progress.failed),
            "ClickHouse does not have all verdicts yet": not self.settled,
            "no verdict was compared": self.strict is not None and not compared,
            f"{judged - compared} of {judged} verdicts were not compared": 0 < compared != judged,
            f"{compared - identical} of {compared} verdicts differ": identical != compared,
        }
        return "; ".join(why for why, holds in found.items() if holds)


def is_proof(plan: Plan) -> bool:
    """Whether a replay is to show that the same question has the same answer."""
    return plan.mode == "strict" and not plan.change.prompt


class Asked(NamedTuple):
    """A change, as it was typed."""

    prompt: str | None
    model: str | None
    threshold: float | None
    idle_ms: int | None
    max_ms: int | None
    detector: str | None

    @property
    def name(self) -> str:
        """What a replay with this change may be called."""
        if self.prompt:
            return self.prompt.replace("/", "-")
        if self.model:
            return self.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf") or "model"
        if self.detector:
            return self.detector.rstrip("/").rpartition("/")[2] or "detector"
        if self.threshold is not None:
            return f"threshold-{self.threshold:g}"
        return "baseline" if self.idle_ms is None and self.max_ms is None else "window"

    async def change(self, office: Office, place: Place, *, start: bool) -> Change:
        """What it means here; with `start` a prompt that nobody used yet is put on the log, a model's server starts.

        Raises:
            PlanError: it means nothing.
        """
        digest = ""
        if self.prompt is not None:
            try:
                version = office.prompts.find(self.prompt)
            except UnknownVersionError as error:
                fail(f"--prompt: {error}", NO)
            if start:
                await office.prompts.add(version, "for a replay")
            digest = version.digest
        llm = None
        if self.model is not None:
            llm = await replaying.another_llm(place, self.model) if start else _unstarted(place.settings, self.model)
        return Change(
            prompt=digest,
            llm=llm,
            threshold=self.threshold,
            idle_ms=self.idle_ms,
            max_ms=self.max_ms,
            detector=replaying.another_detector(place.settings, self.detector) if self.detector else "",
        )


def _unstarted(settings: Settings, named: str) -> Llm:
    """The LLM that `--model` names, of which nothing runs here yet; a model may be planned before it is pulled."""
    try:
        return replaying.named_llm(settings, named)
    except ModelError:
        return Llm(url="", model_path=named)


class Wish(NamedTuple):
    """A replay, as it was asked for."""

    asked: Asked
    scope: Scope
    mode: Any
    share: float
    max_tokens: int | None = None

    def plan(self, change: Change) -> Plan:
        """The plan, without bounds and counts."""
        kind: Any = "baseline" if change == Change() else "change"
        return Plan(
            kind=kind,
            mode=self.mode,
            scope=self.scope,
            change=change,
            share=self.share,
            max_tokens=self.max_tokens,
        )


class Interrupt:
    """Ctrl-C, as a replay's run takes it: who waits for it sets `asked`."""

    def __init__(self, asked: asyncio.Event) -> None:
        self.asked = asked
        self.orderly = False
        """Whether a planner is at work, which pauses by itself."""


@asynccontextmanager
async def at_work(
    ctx: typer.Context, *, judging: bool, strict: bool = False, workers: int = 0
) -> AsyncIterator[tuple[Place, Office]]:
    """What the replay needs, running."""
    async with (
        replaying.place(ctx.obj, ctx.meta["config"], judging=judging, strict=strict, workers=workers) as place,
        replays.office(place.settings) as office,
    ):
        yield place, office


async def planned(ctx: typer.Context, wish: Wish) -> tuple[Plan, Weighed, Estimate]:
    """What a replay would judge, and what it would take."""
    async with at_work(ctx, judging=False) as (place, office):
        plan, weighed = await _weighed(office, wish.plan(await wish.asked.change(office, place, start=False)))
        return plan, weighed, await _estimated(office, plan, weighed)


async def begun(  # noqa: PLR0917
    ctx: typer.Context, wish: Wish, stop: Interrupt, name: str, workers: int, baseline: int, *, ask: bool, quiet: bool
) -> list[Outcome]:
    """Start what a replay needs; make it, and its baseline, and see them through."""
    async with at_work(ctx, judging=True, strict=wish.mode == "strict", workers=workers) as (place, office):
        return await carried_out(office, place, wish, stop, name, baseline, ask=ask, quiet=quiet)


async def carried_out(  # noqa: PLR0917
    office: Office, place: Place, wish: Wish, stop: Interrupt, name: str, baseline: int, *, ask: bool, quiet: bool
) -> list[Outcome]:
    """As `begun`, where everything runs."""
    chosen = office.name(name, wish.asked.name)
    plan, weighed = await _weighed(office, wish.plan(await wish.asked.change(office, place, start=True)))
    if not weighed.windows:
        _nothing(weighed)
    if ask:
        await _ask_first(office, plan, weighed)
    other = None
    if plan.kind == "change" and plan.mode != "strict" and baseline:
        again = await office.drawn(_baseline(plan, baseline))
        other = await office.make(office.name("", f"{chosen}-baseline"), again)
        plan = msgspec.structs.replace(plan, baseline=other.replay_id)
    made = await office.make(chosen, plan)
    said = [await _see_through(office, made, place, stop, quiet=quiet)]
    if other is not None and said[0].state == "done":
        said.append(await _see_through(office, other, place, stop, quiet=quiet))
    return said


async def resumed(  # noqa: PLR0917
    ctx: typer.Context,
    replay: str,
    stop: Interrupt,
    workers: int,
    share: float | None,
    max_tokens: int | None,
    *,
    quiet: bool,
) -> list[Outcome]:
    """Go on with a replay, then with its baseline; none where both are done."""
    strict = await _is_strict(ctx.obj, replay)
    async with at_work(ctx, judging=True, strict=strict, workers=workers) as (place, office):
        made = office.find(replay)
        state = office.state(made.replay_id)
        if state == "cancelled":
            fail(f"{made.name} was cancelled: `rewatch replay run` begins another", NO)
        said: list[Outcome] = []
        if state != "done" or await office.lacked_llm(made.replay_id):
            plan = msgspec.structs.replace(
                made.plan, share=share or made.plan.share, max_tokens=max_tokens or made.plan.max_tokens
            )
            llm = await replaying.again(place, plan.change.llm)
            made = replays.with_llm(made._replace(plan=plan), llm)
            said.append(await _see_through(office, made, place, stop, quiet=quiet))
        if made.plan.baseline and (not said or said[0].state == "done"):
            other = office.find(made.plan.baseline)
            if office.state(other.replay_id) not in ENDED:
                said.append(await _see_through(office, other, place, stop, quiet=quiet))
        return said


async def step(ctx: typer.Context, replay: str, state: State, why: str) -> tuple[Made, State]:
    """Write a step of a replay's life down, unless it has ended; the replay, and where it was."""
    async with at_work(ctx, judging=False) as (_, office):
        made = office.find(replay)
        before = office.state(made.replay_id)
        if before not in ENDED and before != state:
            await office.say(made, state, why)
            await office.settle(made.replay_id, 0, within_s=_STEP_S)
        return made, before


async def listed(settings: Settings) -> list[Row]:
    """Every replay, the newest first; ClickHouse is started where nothing runs here."""
    async with replaying.store(settings), aclosing(Queries(settings.clickhouse)) as store:
        return await replays.listed(store)


async def shown(settings: Settings, replay: str) -> tuple[Row, list[Row]]:
    """One replay, and its units that could not be judged."""
    async with replaying.store(settings), aclosing(Queries(settings.clickhouse)) as store:
        row = await replays.one(store, replay)
        return row, await replays.failures(store, row["replay_id"])


def run(settings: Settings, main: Callable[[], Coroutine[Any, Any, T]], doing: str) -> T:
    """Do a command's work; what a person can mend is a line and an exit code."""

    async def work() -> T:
        with _mending():
            return await main()

    return errors.run(settings, work, doing=doing)


def stoppable(settings: Settings, main: Callable[[Interrupt], Coroutine[Any, Any, T]]) -> T:
    """As `run`; Ctrl-C pauses a replay that runs, and ends what only prepares one."""

    async def work() -> T:
        stop = Interrupt(Stop(Console(stderr=True)).asked)
        task = asyncio.create_task(main(stop))
        asked = asyncio.create_task(stop.asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not stop.orderly:
                task.cancel()
            with _mending():
                return await task
        except asyncio.CancelledError:
            raise typer.Exit(INTERRUPTED) from None
        finally:
            asked.cancel()

    return errors.mendable(settings, lambda: asyncio.run(work()))


@contextlib.contextmanager
def _mending() -> Iterator[None]:
    try:
        yield
    except PlanError as error:
        fail(str(error), USAGE)
    except (OtherWeightsError, UnknownReplayError) as error:
        fail(str(error), NO)


async def _is_strict(settings: Settings, replay: str) -> bool:
    """Whether the replay is strict: its LLM server must be so, and that is decided before the log can be read."""
    if running(settings.data_dir):
        async with replays.office(settings) as office:
            return office.find(replay).plan.mode == "strict"
    with contextlib.suppress(UnknownReplayError):  # the log may know it, and says so otherwise
        row, _ = await shown(settings, replay)
        return bool(row["plan"].mode == "strict")
    return False


async def _weighed(office: Office, plan: Plan) -> tuple[Plan, Weighed]:
    """The plan with its bounds and counts."""
    drawn = await office.drawn(plan)
    server = Server("", "", 0, 0, "")  # a plan without its LLM does not know what could be reused
    if plan.change.llm is None or plan.change.llm.url:
        with contextlib.suppress(UnavailableError):
            server = await replaying.server(office.settings, plan.change.llm)
    weighed = await office.weigh(drawn, office.judging(drawn, server))
    return msgspec.structs.replace(drawn, windows=weighed.windows), weighed


async def _estimated(office: Office, plan: Plan, weighed: Weighed) -> Estimate:
    verdicts, detections = await measure(office.store)
    slots = office.settings.llm.slots or SLOTS
    return estimate(plan, verdicts, detections, reused=weighed.reused, slots=slots)


async def _ask_first(office: Office, plan: Plan, weighed: Weighed) -> None:
    """At a terminal, ask whether a long one is meant."""
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        return
    took = await _estimated(office, plan, weighed)
    if took.seconds is not None and took.seconds < _ASK_FROM_S:
        return
    lasts = f"about {duration(took.seconds)}" if took.seconds is not None else "nobody knows how long"
    question = f"Judge {plan.windows - weighed.reused} windows again ({lasts})?"
    if not await asyncio.to_thread(typer.confirm, question, err=True):
        raise typer.Exit(NO)


def _baseline(plan: Plan, count: int) -> Plan:
    """The plan that measures the noise for this one: the same windows as they were recorded, without the change."""
    scope = msgspec.structs.replace(plan.scope, sample=min(count, plan.scope.sample or count))
    return msgspec.structs.replace(
        plan, kind="baseline", scope=scope, change=Change(), frames=0, windows=min(count, plan.windows)
    )


def _nothing(weighed: Weighed) -> NoReturn:
    why = next(iter(weighed.why.items()), None)
    told = f"; {weighed.left_out} are left out, as {why[0]}: {why[1]}" if why is not None else ""
    fail(f"no window fits{told}", NO)


async def _see_through(office: Office, made: Made, place: Place, stop: Interrupt, *, quiet: bool) -> Outcome:
    """Run a planner to its end, and show how far it is."""
    began = time.monotonic()
    stop.orderly = True
    with _bar(made, quiet=quiet) as show:
        planner, sorter, windows = await office.planner(made, workers=place.workers, show=show, stop=stop.asked)
        state, why = "done", ""
        try:
            await planner.run()
        except TakenOverError as error:
            state, why = "taken over", str(error)
        except EndedError as error:
            state, why = error.state or "failed", str(error)
    seconds = time.monotonic() - began
    settled = await office.settle(made.replay_id, len(planner.ledger.judged) + len(planner.ledger.reused))
    checks = state == "done" and is_proof(made.plan)
    return Outcome(
        made,
        state,
        why,
        planner.progress(),
        seconds,
        {name: why for skips in (sorter.skipped, windows.skipped) for name, why in skips.named.items()},
        dict(planner.ledger.failed),
        settled,
        state == "paused" and stop.asked.is_set(),
        await office.identical(made.replay_id) if checks else None,
    )


@contextlib.contextmanager
def _bar(made: Made, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    hidden = quiet or not sys.stderr.isatty()
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(printable(made.name), total=made.plan.windows or None, pace="starting ...")

        def show(now: Progress) -> None:
            bar.update(task, completed=now.done, total=now.total or made.plan.windows or None, pace=_pace(now))

        yield show


def _pace(now: Progress) -> str:
    if now.quiet_s > _QUIET_S:
        return f"no result for {duration(now.quiet_s)}: `rewatch status` tells what waits on what"
    if now.eta_s is None:
        return ""
    return f"{now.rate:.1f}/s, {duration(now.eta_s)} left"

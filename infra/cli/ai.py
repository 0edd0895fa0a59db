"""`rewatch ai start|stop|restart|status|health|profiles`: the models' services on a GPU host of its own."""

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infra.cli.errors import mendable, run
from infra.cli.help import RUN, examples
from infra.cli.lifecycle import duration
from infra.cli.output import AWAY, NO, USAGE, JsonFlag, console, fail, print_json, print_table, printable, when, working

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.status import Status

    from infra.ai.plan import Plan, Service
    from infra.config import Settings

app = typer.Typer(no_args_is_help=True, help="Run the detector's and the LLM's services on a host, in the background.")

# Where no spinner turns a line now and then says that it goes on, seconds.
_LINE_S = 15.0

_SERVICES = ("detector", "llm")
"""`infra.ai.plan.SERVICES`, whose import takes longer than a completion may; a test holds them together."""


def _complete(incomplete: str) -> list[str]:
    return [name for name in _SERVICES if name.startswith(incomplete)]


_Which = Annotated[
    str | None,
    typer.Argument(metavar="[detector|llm]", help="Only this one; otherwise both.", autocompletion=_complete),
]
_Model = Annotated[str | None, typer.Option("--model", help="The LLM: a GGUF file, or a name of `rewatch models ls`.")]
_Profile = Annotated[
    str | None, typer.Option("--profile", help="How the LLM is served: a name of `rewatch ai profiles`.")
]
_Host = Annotated[
    str | None, typer.Option("--host", help="Address to listen on, as 0.0.0.0; other than loopback needs a key.")
]
_Open = Annotated[
    bool | None, typer.Option("--open/--no-open", help="Let in whoever reaches the LLM, without a key, all the same.")
]
_Allow = Annotated[
    float | None, typer.Option("--allow", min=1, help="Seconds that a start may take; by default the profile's.")
]
_Anyway = Annotated[
    bool | None, typer.Option("--anyway/--no-anyway", help="Start the LLM though it does not fit by the arithmetic.")
]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="ai",
        rich_help_panel=RUN,
        epilog=examples("rewatch ai start", "rewatch ai status", "rewatch ai stop"),
    )


@app.command(
    "start",
    epilog=examples(
        "rewatch ai start",
        "rewatch ai start llm --model nemotron-3-nano-30b",
        "NEMOTRON_API_KEY=... rewatch ai start llm --host 0.0.0.0",
        "NEMOTRON_GPU_LAYERS=20 rewatch ai start llm   # instead of the profile's",
        "rewatch ai start llm --profile nemotron-3-nano-30b-16gb --allow 300",
    ),
)
def start(
    ctx: typer.Context,
    which: _Which = None,
    *,
    model: _Model = None,
    profile: _Profile = None,
    host: _Host = None,
    open_: _Open = None,
    allow: _Allow = None,
    anyway: _Anyway = None,
    as_json: JsonFlag = False,
) -> None:
    """Start the services, and return when they are healthy; they go on in the background.

    What dies or hangs is started again, five times in a row at most. Where CUDA memory runs out the LLM is started
    with half the layers on the GPU, then on the CPU, and `status` and `health` say so. llama-server is that of
    LLAMA_SERVER_PATH, else /usr/bin's, /usr/local/bin's, PATH's, else the one that comes with rewatch.
    """
    given = _options(model=model, profile=profile, host=host, open=open_, allowance_s=allow, anyway=anyway)
    _start(ctx.obj, [_plan(ctx, name, given) for name in _which(which)], as_json=as_json)


@app.command("stop", epilog=examples("rewatch ai stop", "rewatch ai stop llm"))
def stop(ctx: typer.Context, which: _Which = None, as_json: JsonFlag = False) -> None:
    """Stop the services in order: what is in hand is answered, within 20 s."""
    names = list(reversed(_which(which)))
    stopped = [_stop(ctx.obj, name) for name in names]
    if as_json:
        print_json([{"service": name, "ran": ran} for name, ran in zip(names, stopped, strict=True)])
        return
    for name, ran in zip(names, stopped, strict=True):
        typer.echo(f"{name}: {'stopped' if ran else 'was not running'}")


@app.command("restart", epilog=examples("rewatch ai restart", "rewatch ai restart llm --profile gemma-3-4b"))
def restart(
    ctx: typer.Context,
    which: _Which = None,
    *,
    model: _Model = None,
    profile: _Profile = None,
    host: _Host = None,
    open_: _Open = None,
    allow: _Allow = None,
    anyway: _Anyway = None,
    as_json: JsonFlag = False,
) -> None:
    """Stop the services and start them as they were asked for.

    Options given now count before those of the start. Without a name it is about those that have been started. What
    did not fit on the GPU is tried anew.
    """
    from infra.ai import plan as plans

    settings: Settings = ctx.obj
    given = _options(model=model, profile=profile, host=host, open=open_, allowance_s=allow, anyway=anyway)
    before = {name: plans.load(plans.folder(settings.data_dir, name)) for name in _which(which)}
    names = [name for name, plan in before.items() if plan is not None or which is not None]
    if not names:
        fail("nothing has been started: `rewatch ai start`", NO)
    # What cannot be started again is not stopped.
    planned = [_plan(ctx, name, _merged(before[name], given)) for name in names]
    for name in reversed(names):
        _stop(settings, name)
    _start(settings, planned, as_json=as_json)


@app.command(
    "status",
    epilog=examples("rewatch ai status", "rewatch ai status llm --json | jq '.[0].values'"),
)
def status(ctx: typer.Context, which: _Which = None, as_json: JsonFlag = False) -> None:
    """Show what runs, as what, and where each value is from.

    Exit code 3 when a service that was started, or that is named, is not ready, or none was started.
    """
    from infra.ai.watch import status as look

    settings: Settings = ctx.obj
    rows = run(settings, lambda: look(settings.data_dir, tuple(_which(which))), doing="looking ...")
    if as_json:
        print_json(rows)
    else:
        _print_status(rows, settings)
    started = rows if which else [row for row in rows if row["state"] != "not started"]
    if not started or any(row["state"] != "ready" for row in started):
        raise typer.Exit(AWAY)


@app.command(
    "health",
    epilog=examples("rewatch ai health", "until rewatch ai health llm; do sleep 5; done"),
)
def health(ctx: typer.Context, which: _Which = None, as_json: JsonFlag = False) -> None:
    """Ask the services themselves, a line each with how long the answer took.

    Exit code 3 when one that was started, or that is named, is not healthy, or none was started.
    """
    from infra.ai.watch import health as ask

    settings: Settings = ctx.obj
    found = run(settings, lambda: ask(settings.data_dir, tuple(_which(which)) if which else ()), doing="asking ...")
    if as_json:
        print_json([answer._asdict() for answer in found])
    else:
        for answer in found:
            took = "-" if answer.ms is None else f"{answer.ms:.0f} ms"
            typer.echo(f"{answer.service:<8}  {'ok' if answer.ok else 'bad':<3}  {took:>8}  {printable(answer.says)}")
        if not found:
            typer.echo("nothing has been started: `rewatch ai start`")
    if not found or not all(answer.ok for answer in found):
        raise typer.Exit(AWAY)


@app.command("profiles", epilog=examples("rewatch ai profiles", "rewatch ai profiles --json"))
def profiles(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List how each model is served, and which profile the model that is set would get here."""
    from infra.ai.planning import chosen
    from infra.ai.watch import layers_said
    from infra.models.profiles import PROFILES

    mine = run(ctx.obj, lambda: chosen(ctx.obj), doing="looking ...")
    if as_json:
        print_json(
            [
                {key: value for key, value in profile._asdict().items() if key not in {"architectures", "named"}}
                | {"chosen": profile.name == mine}
                for profile in PROFILES
            ]
        )
        return
    print_table(
        ("profile", "context", "slots", "layers", "start, s", "here", "for"),
        [
            (
                p.name,
                p.context,
                p.slots,
                layers_said(p.gpu_layers),
                p.allowance_s,
                "*" if p.name == mine else "",
                p.about,
            )
            for p in PROFILES
        ],
    )
    typer.echo("llm.context_size, llm.slots, llm.gpu_layers and llm.threads count before a profile's values")


def _which(name: str | None) -> "list[Service]":
    from infra.ai.plan import SERVICES

    if name is not None and name not in SERVICES:
        fail(f"there is no service {name!r}; there are {', '.join(SERVICES)}", USAGE)
    return [service for service in SERVICES if name in {None, service}]


def _options(**options: Any) -> dict[str, Any]:
    """Those that were given, by the names of `Options`."""
    return {name: value for name, value in options.items() if value is not None}


def _merged(before: "Plan | None", given: dict[str, Any]) -> dict[str, Any]:
    return ({field: getattr(before.asked, field) for field in before.asked.__struct_fields__} if before else {}) | given


def _plan(ctx: typer.Context, name: "Service", given: dict[str, Any]) -> "Plan":
    """How it is to be run; what stands in the way ends the command."""
    from infra.ai.plan import Options
    from infra.ai.planning import of_detector, of_llm

    settings: Settings = ctx.obj
    options: Options = Options(**given)
    if options.model and Path(options.model).exists():
        options = Options(**given | {"model": str(Path(options.model).resolve())})  # a restart may come from elsewhere

    def plan() -> "Plan":
        if name == "detector":
            return of_detector(settings, options, ctx.meta["config"])
        return asyncio.run(of_llm(settings, options))

    from pydantic import ValidationError

    try:
        return mendable(settings, plan)
    except ValidationError as error:
        fail("; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors()), USAGE)
    except ValueError as error:
        fail(str(error), USAGE)


def _start(settings: "Settings", planned: "list[Plan]", *, as_json: bool) -> None:
    """Start one after the other; one that cannot start does not hold up the next."""
    from infra.ai.watch import status as look

    out = Console(stderr=True, highlight=False) if as_json else console()
    with _ended_by_sigterm():
        bad = [plan.service for plan in planned if not _begin(settings, plan, out)]
    if as_json:
        names = tuple(plan.service for plan in planned)
        print_json(run(settings, lambda: look(settings.data_dir, names), doing="looking ..."))
    if bad:
        raise typer.Exit(AWAY)


@contextlib.contextmanager
def _ended_by_sigterm() -> "Iterator[None]":
    """A SIGTERM in the middle of a start ends what was begun, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _begin(settings: "Settings", plan: "Plan", out: Console) -> bool:
    """Start one, with a line for whatever is worth knowing; False where it did not start."""
    from infra.ai import hold
    from infra.ai.plan import folder
    from infra.local.process import StartError
    from infra.private import make_private

    make_private(settings.data_dir)
    place = folder(settings.data_dir, plan.service)
    key = settings.llm.api_key.get_secret_value() if settings.llm.api_key else ""
    log = place / "logs" / f"{plan.service}.log"
    began = time.monotonic()
    out.print(_what(plan), soft_wrap=True, markup=False)
    try:
        with out.status(f"{plan.service}: starting ...") as spinner:
            started = hold.start(place, plan, key, _Telling(plan, out, spinner, f"its log: {log}"))
    except (StartError, hold.BusyError) as error:
        hint = "; a slower disk needs a longer --allow" if "was not ready within" in str(error) else ""
        typer.echo(f"error: {printable(str(error))}{hint}", err=True)
        return False
    if started:
        out.print(f"  healthy after {duration(time.monotonic() - began)} at {plan.url}; its log: {log}", soft_wrap=True)
    else:
        out.print("  already runs: `rewatch ai status`; `rewatch ai restart` takes what is new", soft_wrap=True)
    return True


class _Telling:
    """How a start goes on: a spinner on a terminal, now and then a line elsewhere, and each note once."""

    def __init__(self, plan: "Plan", out: Console, spinner: "Status", log: str) -> None:
        self._plan = plan
        self._out = out
        self._spinner = spinner
        self._log = log
        self._notes = 0
        self._next_line = _LINE_S

    def __call__(self, seconds: float, now: "Plan") -> None:
        for note in now.notes[self._notes :]:
            self._out.print(f"  {note}", soft_wrap=True, markup=False)
        self._notes = len(now.notes)
        line = f"{self._plan.service}: starting, {seconds:.0f} of {self._plan.allowance_s:.0f} s; {self._log}"
        self._spinner.update(line)
        if not self._out.is_terminal and seconds >= self._next_line:
            self._next_line += _LINE_S
            self._out.print(f"  {line}", soft_wrap=True, markup=False)


def _stop(settings: "Settings", name: "Service") -> bool:
    """Stop one; whether it ran."""
    from infra.ai import hold
    from infra.ai.plan import folder

    try:
        with working(f"{name}: stopping ..."):
            return hold.stop(folder(settings.data_dir, name))
    except hold.BusyError as error:
        fail(str(error), NO)


def _what(plan: "Plan") -> str:
    from infra.ai.watch import layers_said

    if plan.service == "detector":
        return f"detector: {plan.model}"
    values = plan.values
    server = plan.server or "the llama.cpp that comes with rewatch"
    return (
        f"llm: {plan.model} by {server}, profile {plan.profile}: context {values['context'].value}, "
        f"{values['slots'].value} slots, {layers_said(values['gpu_layers'].value)}"
    )


def _print_status(rows: list[dict[str, Any]], settings: "Settings") -> None:
    from infra.ai.watch import layers_said

    print_table(
        ("service", "state", "pid", "address", "device", "restarts", "since"),
        [
            (
                row["service"],
                row["state"],
                row.get("pid"),
                row.get("url"),
                row.get("device"),
                row.get("restarts"),
                when(int(row["since"]) * 1000, settings.time_zone) if row.get("since") else None,
            )
            for row in rows
        ],
    )
    for row in rows:
        if row["state"] == "not started":
            continue
        server = f", by {row['server']}" if row["server"] else ""
        typer.echo(f"{row['service']}: {printable(row['model'])}{server}; its log: {row['log']}")
        if row["values"]:
            said = {
                "context": "context {}",
                "slots": "{} slots",
                "gpu_layers": layers_said(row["values"]["gpu_layers"]["value"]),
                "threads": "{} threads" if row["values"]["threads"]["value"] else "all cores but one",
            }
            typer.echo(
                "  " + ", ".join(f"{said[key].format(v['value'])} ({v['from']})" for key, v in row["values"].items())
            )
        for line in (*row["notes"], *([f"last failure: {row['reason']}"] if row["reason"] else [])):
            typer.echo(f"  {printable(line)}")

"""`rewatch replay plan|run|pause|resume|cancel|ls|show`: recorded windows judged again under a change."""

import shlex
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli import complete, replay_diff, replay_history, replay_report, times
from infra.cli.help import PROMPTS, examples
from infra.cli.output import INTERRUPTED, NO, USAGE, JsonFlag, fail, print_json

if TYPE_CHECKING:
    from infra.cli.replay_work import Asked, Interrupt, Outcome
    from infra.config import Settings
    from infra.replays import Made, Weighed
    from processors.replay.estimate import Estimate
    from processors.replay.plan import Plan, Scope, State

app = typer.Typer(no_args_is_help=True)

_BASELINE = 100
"""Windows of the baseline: a share of flips of 5 % is then known to some 4 points either way."""


class Mode(StrEnum):
    """How a replay treats what was recorded."""

    FAST = "fast"
    STRICT = "strict"


_Prompt = Annotated[
    str | None,
    typer.Option(
        help="Judge with this prompt version: a name, a digest or its beginning, `active`.",
        autocompletion=complete.prompts,
    ),
]
_Model = Annotated[
    str | None,
    typer.Option(help="Judge by another LLM: a GGUF file, a name of `rewatch models ls`, a server's address."),
]
_Threshold = Annotated[
    float | None, typer.Option(min=0, max=1, help="Cut new windows: the score from which a box matters.")
]
_Window = Annotated[
    str | None,
    typer.Option(metavar="idle=T,max=T", help="Cut new windows: closed after so long without news; at such a length."),
]
_Detector = Annotated[
    str | None, typer.Option(help="Look at the frames again with this model: a name of `rewatch models ls`, a folder.")
]
_Since = Annotated[str | None, typer.Option(help="Windows from then on: an age (7d, 12h) or a time, by event time.")]
_Until = Annotated[str | None, typer.Option(help="Windows before then.")]
_Camera = Annotated[
    list[str] | None,
    typer.Option(help="This camera only; can be given more than once.", autocompletion=complete.cameras),
]
_Where = Annotated[
    str | None,
    typer.Option(metavar="SQL", help="Windows whose event fits: a condition on the columns of view `events`."),
]
_Sample = Annotated[int | None, typer.Option(min=1, help="So many of them, drawn by hash: the same ones each time.")]
_Mode = Annotated[
    Mode,
    typer.Option(help="strict: one slot, no cache, the recorded model; every answer must be the same, byte for byte."),
]
_Share = Annotated[float, typer.Option(min=0.01, max=1, help="Share of the LLM's slots. Live windows come first.")]
_Workers = Annotated[int, typer.Option(min=0, max=64, help="Processes that judge, besides those that run.")]
_MaxTokens = Annotated[int | None, typer.Option(min=1, help="Pause when so many tokens were spent.")]
_Name = Annotated[
    str, typer.Argument(metavar="REPLAY", help="A name, an id or its beginning.", autocompletion=complete.replays)
]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    for commands in (replay_diff, replay_report, replay_history):
        commands.register(app)
    root.add_typer(
        app,
        name="replay",
        rich_help_panel=PROMPTS,
        help="Judge recorded windows again under a change, and compare.",
        epilog=examples(
            "rewatch replay plan --prompt 3fa9c1 --since 30d",
            "rewatch replay run --prompt 3fa9c1 --name calmer",
            "rewatch replay diff live calmer",
            "rewatch replay report calmer",
            "rewatch replay ls",
        ),
    )


@app.command(
    "plan",
    epilog=examples(
        "rewatch replay plan --prompt deliveries-strict-nights",
        "rewatch replay plan --threshold 0.6 --since 30d",
        "rewatch replay plan --where \"risk_level = 'high'\" --json",
    ),
)
def plan_(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    prompt: _Prompt = None,
    model: _Model = None,
    threshold: _Threshold = None,
    window: _Window = None,
    detector: _Detector = None,
    since: _Since = None,
    until: _Until = None,
    camera: _Camera = None,
    where: _Where = None,
    sample: _Sample = None,
    mode: _Mode = Mode.FAST,
    share: _Share = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Say what a replay would judge again, and what it would take.

    Nothing is judged, and nothing is written. Time and tokens are those that the same work took before. Without a
    change: the recorded prompts and model again.

    Exit code 1 where no window fits.
    """
    from infra.cli import replay_show, replay_work

    asked = _asked(prompt, model, threshold, window, detector)
    wish = replay_work.Wish(asked, _scope(since, until, camera, where, sample), mode.value, share)

    async def main() -> "tuple[Plan, Weighed, Estimate]":
        return await replay_work.planned(ctx, wish)

    plan, weighed, took = replay_work.run(ctx.obj, main, "going through what was recorded ...")
    if as_json:
        print_json(replay_show.plan_plain(plan, weighed, took))
    else:
        replay_show.print_plan(plan, weighed, took, ctx.obj.time_zone)
    if not weighed.windows:
        raise typer.Exit(NO)


@app.command(
    "run",
    epilog=examples(
        "rewatch replay run --prompt 3fa9c1 --name calmer   # and a baseline of 100 windows",
        "rewatch replay run --model qwen.gguf --since 7d --share 0.5",
        "rewatch replay run --threshold 0.6 --camera driveway",
        "rewatch replay run --mode strict   # the same answers, byte for byte?",
    ),
)
def run(  # noqa: PLR0917
    ctx: typer.Context,
    prompt: _Prompt = None,
    model: _Model = None,
    threshold: _Threshold = None,
    window: _Window = None,
    detector: _Detector = None,
    since: _Since = None,
    until: _Until = None,
    camera: _Camera = None,
    where: _Where = None,
    sample: _Sample = None,
    name: Annotated[str, typer.Option(help="What to call it; without one a name is made.")] = "",
    mode: _Mode = Mode.FAST,
    share: _Share = 1.0,
    workers: _Workers = 0,
    max_tokens: _MaxTokens = None,
    baseline: Annotated[
        int, typer.Option(min=0, help="With a change: windows judged again without it, for the noise; 0: none.")
    ] = _BASELINE,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first, however long it takes.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Judge recorded windows again under a change, beside what was said of them.

    What does not run here is started for the time. Verdicts that are there already are taken, and counted as reused;
    never without a change, which measures the noise, and never by --mode strict. Nothing of it can alert. Ctrl-C pauses
    in order; killed at whatever instant, `replay resume` goes on, and no window is judged twice.

    Exit code 1 where no window fits, or where a strict replay does not show that every answer is the same: windows
    failed, verdicts differ or could not be compared, or it was paused.
    """
    from infra.cli import replay_work

    asked = _asked(prompt, model, threshold, window, detector)
    wish = replay_work.Wish(asked, _scope(since, until, camera, where, sample), mode.value, share, max_tokens)

    async def main(stop: "Interrupt") -> "list[Outcome]":
        return await replay_work.begun(ctx, wish, stop, name, workers, baseline, ask=not yes, quiet=as_json)

    _tell(replay_work.stoppable(ctx.obj, main), as_json=as_json)


@app.command(
    "resume",
    epilog=examples("rewatch replay resume calmer", "rewatch replay resume calmer --max-tokens 200000 --share 0.5"),
)
def resume(  # noqa: PLR0917
    ctx: typer.Context,
    replay: _Name,
    share: Annotated[float | None, typer.Option(min=0.01, max=1, help="Another share of the LLM's slots.")] = None,
    workers: _Workers = 0,
    max_tokens: _MaxTokens = None,
    as_json: JsonFlag = False,
) -> None:
    """Go on with a replay that was paused, killed or failed.

    Windows that failed because its LLM was away are judged after all. Then with its baseline, where that is not done.
    It takes over from whoever runs it.
    """
    from infra.cli import replay_work

    async def main(stop: "Interrupt") -> "list[Outcome]":
        return await replay_work.resumed(ctx, replay, stop, workers, share, max_tokens, quiet=as_json)

    said = replay_work.stoppable(ctx.obj, main)
    if not said:
        typer.echo(f"{replay} is done: there is nothing to go on with", err=as_json)
    _tell(said, as_json=as_json)


@app.command("pause", epilog=examples("rewatch replay pause calmer"))
def pause(ctx: typer.Context, replay: _Name, as_json: JsonFlag = False) -> None:
    """Pause a replay, wherever it runs; `replay resume` goes on.

    Windows in hand are still judged. Exit code 1 where it has ended.
    """
    made, before = _step(ctx, replay, "paused", "paused by `rewatch replay pause`")
    if before in {"done", "cancelled"}:
        fail(f"{made.name} is {before}: there is nothing to pause", NO)
    _say_step(made, before, "paused", as_json=as_json)


@app.command("cancel", epilog=examples("rewatch replay cancel calmer"))
def cancel(ctx: typer.Context, replay: _Name, as_json: JsonFlag = False) -> None:
    """End a replay for good; what it said so far stays.

    Windows in hand give nothing any more. Exit code 1 where it is done.
    """
    made, before = _step(ctx, replay, "cancelled", "cancelled by `rewatch replay cancel`")
    if before == "done":
        fail(f"{made.name} is done: it stays so", NO)
    _say_step(made, before, "cancelled", as_json=as_json)


@app.command("ls", epilog=examples("rewatch replay ls", "rewatch replay ls --json"))
def ls(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List replays, the newest first: what each changes, how far it is, what it took."""
    from infra.cli import replay_show, replay_work

    settings: Settings = ctx.obj
    rows = replay_work.run(settings, lambda: replay_work.listed(settings), "reading ...")
    if as_json:
        print_json([replay_show.row_plain(row) for row in rows])
    else:
        replay_show.print_rows(rows, settings.time_zone)


@app.command("show", epilog=examples("rewatch replay show calmer", "rewatch replay show calmer --json"))
def show(ctx: typer.Context, replay: _Name, as_json: JsonFlag = False) -> None:
    """Show one replay: its plan, its state and why, its counts, and what failed."""
    from infra.cli import replay_show, replay_work

    settings: Settings = ctx.obj
    row, failed = replay_work.run(settings, lambda: replay_work.shown(settings, replay), "reading ...")
    if as_json:
        print_json(replay_show.row_plain(row) | {"failures": failed})
    else:
        replay_show.print_row(row, failed, settings.time_zone)


def _step(ctx: typer.Context, replay: str, state: "State", why: str) -> "tuple[Made, State]":
    from infra.cli import replay_work

    return replay_work.run(ctx.obj, lambda: replay_work.step(ctx, replay, state, why), "writing ...")


def _say_step(made: "Made", before: str, state: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"replay_id": made.replay_id, "name": made.name, "state": state, "before": before})
    elif state == "paused":
        typer.echo(f"{made.name} is paused; go on by `rewatch replay resume {shlex.quote(made.name)}`")
    else:
        typer.echo(f"{made.name} is cancelled")


def _tell(said: "list[Outcome]", *, as_json: bool) -> None:
    """What a run came to, and what to do next; the exit code is the first one's that is not well."""
    from infra.cli import replay_show

    if not said:
        return
    if as_json:
        documents = [replay_show.outcome_plain(one) for one in said]
        print_json(documents[0] | ({"baseline": documents[1]} if len(documents) > 1 else {}))
    else:
        for one in said:
            replay_show.print_outcome(one)
        for line in replay_show.following(said[0].made.name, said[-1].state, said[0].made.plan.kind):
            typer.echo(line)
    for one in said:
        if one.stopped:
            raise typer.Exit(INTERRUPTED)
        if one.state not in {"done", "paused"}:
            raise typer.Exit(NO)
        if one.unproven:
            raise typer.Exit(NO)


def _asked(
    prompt: str | None, model: str | None, threshold: float | None, window: str | None, detector: str | None
) -> "Asked":
    from infra.cli.replay_work import Asked

    return Asked(prompt, model, threshold, *_lengths(window), detector)


def _scope(
    since: str | None, until: str | None, cameras: list[str] | None, where: str | None, sample: int | None
) -> "Scope":
    from processors.replay.plan import Scope

    now = datetime.now(UTC)

    def at(text: str | None, option: str) -> int | None:
        try:
            return None if text is None else int(times.moment(text, now).timestamp() * 1000)
        except ValueError as error:
            fail(f"{option} {text}: {error}", USAGE)

    return Scope(
        since=at(since, "--since"),
        until=at(until, "--until"),
        cameras=tuple(dict.fromkeys(cameras or ())),
        where=where or "",
        sample=sample,
    )


def _lengths(text: str | None) -> tuple[int | None, int | None]:
    """`idle=45s,max=2m` in milliseconds."""
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.strip().partition("=")
        try:
            if name not in {"idle", "max"}:
                raise ValueError("write idle=45s, max=2m, or both with a comma between")
            found[name] = round(times.seconds(value) * 1000)
            if not found[name]:
                raise ValueError("no time passes in it")
        except ValueError as error:
            fail(f"--window {text}: {error}", USAGE)
    return found.get("idle"), found.get("max")

"""`rewatch dlq ls|show|redrive`: records that could not be processed, and the way back for them."""

import asyncio
import json
import sys
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.text import Text

from infra.cli import complete
from infra.cli.errors import mendable, run
from infra.cli.help import LETTERS, examples
from infra.cli.output import NO, USAGE, JsonFlag, console, fail, print_json, print_table, printable, text_of, when
from infra.cli.times import moment

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.redrive import Outcome
    from processors.store.queries import Row
    from schemas.records import Record

app = typer.Typer(no_args_is_help=True)

# Bytes of a value that `show` prints where they are no record: enough to see what they are.
_SHOWN = 512

# Letters of one `redrive`, without their bytes: 100 MB of memory. Who has more runs it again.
_MOST = 100_000

FIXES = {
    "gap": "records are gone from the log (retention, or a truncated segment); what ClickHouse holds is whole",
    "rejected": "a file of the inbox lies in .rejected/ of its camera's folder: mend what it failed of and redrive it",
    "shed": (
        "detect or analyze did not keep up: give them more processes "
        "(stages.detect.processes, stages.analyze.processes)"
    ),
}


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="dlq",
        rich_help_panel=LETTERS,
        help="List dead letters, the records that could not be processed, show one, try them again.",
        epilog=examples("rewatch dlq ls", "rewatch dlq show frames:3f2a", "rewatch dlq redrive frames:3f2a"),
    )


def _filters(given: "Filters") -> dict[str, Any]:
    """The filters as `Queries.dead_letters` takes them."""
    times: dict[str, datetime | None] = {"since": None, "until": None}
    now = datetime.now(UTC)
    for name in times:
        text = getattr(given, name)
        try:
            times[name] = None if text is None else moment(text, now)
        except ValueError as error:
            fail(f"--{name} {text}: {error}", USAGE)
    return {"stage": given.stage, "kind": given.kind, "error": given.error, **times}


class Filters(NamedTuple):
    """Which letters, as they were asked for."""

    stage: str | None
    kind: str | None
    error: str | None
    since: str | None
    until: str | None


_STAGE = Annotated[str | None, typer.Option(help="Of this stage only.", autocompletion=complete.stages)]
_KIND = Annotated[str | None, typer.Option(help="error, gap, rejected or shed.", autocompletion=complete.kinds)]
_ERROR = Annotated[str | None, typer.Option(help="Part of the error's class or message, case ignored.")]
_SINCE = Annotated[str | None, typer.Option(help="Failed since then: 30m, 12h, 7d, or a time, 2026-11-02T18:00.")]
_UNTIL = Annotated[str | None, typer.Option(help="Failed before then: written as for --since.")]


@app.command(
    "ls",
    epilog=examples(
        "rewatch dlq ls",
        "rewatch dlq ls --stage analyze --error timeout --since 12h",
        "rewatch dlq ls --status open --limit 1000 --json",
    ),
)
def ls(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    stage: _STAGE = None,
    kind: _KIND = None,
    error: _ERROR = None,
    since: _SINCE = None,
    until: _UNTIL = None,
    status: Annotated[
        Literal["open", "resolved"] | None, typer.Option(help="Redriven ones are open until they are resolved.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """List dead letters, newest first.

    One that failed again and again is there once, as it failed last.
    """
    settings: Settings = ctx.obj
    filters = _filters(Filters(stage, kind, error, since, until))

    async def main() -> "list[Row]":
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            return await store.dead_letters(**filters, status=status, limit=limit)

    letters = run(settings, main)
    if as_json:
        print_json([plain(letter) for letter in letters])
    elif not letters:
        typer.echo("no dead letters" + (" that fit" if status or any(filters.values()) else ""))
    else:
        print_table(
            ("when", "stage", "kind", "camera", "message", "attempts", "status", "origin"),
            [
                (
                    when(letter["failed_at"], settings.time_zone),
                    letter["stage"],
                    letter["kind"],
                    letter["camera_id"],
                    letter["message"],
                    letter["attempt"],
                    letter["status"],
                    letter["origin"],
                )
                for letter in letters
            ],
        )


@app.command("show", epilog=examples("rewatch dlq show frames:3f2a", "rewatch dlq show frames:3f2a --json"))
def show(
    ctx: typer.Context,
    origin: Annotated[
        str,
        typer.Argument(
            metavar="ORIGIN",
            help="The origin that `dlq ls` prints, or a beginning that only one has.",
            autocompletion=complete.letters,
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Show one dead letter: what it was, why it failed, what mends it, the way back."""
    settings: Settings = ctx.obj

    async def main() -> "list[Row]":
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            return await store.dead_letters(origin=origin, every=True, limit=20)

    # One origin can fail in several stages, and again after a redrive.
    found = [plain(letter) for letter in _of_one(origin, run(settings, main))]
    if as_json:
        print_json(found)
        return
    out = console()
    for letter in found:
        width = max(len(name) for name in letter)
        for name, value in letter.items():
            shown = when(value, settings.time_zone) if isinstance(value, datetime) else text_of(value)
            out.print(Text(f"{name:<{width}}  ", style="bold") + Text(printable(shown)), soft_wrap=True)
        out.print()


@app.command(
    "redrive",
    epilog=examples(
        "rewatch dlq redrive frames:3f2a",
        "rewatch dlq redrive --stage enrich --error zone --dry-run",
        "rewatch dlq redrive --kind rejected --since 2h --yes",
        "rewatch dlq redrive --all --yes --json",
    ),
)
def redrive(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    origins: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ORIGIN...",
            help="Origins that `dlq ls` prints, or beginnings that only one has; or say which by options.",
            autocompletion=complete.letters,
            show_default=False,
        ),
    ] = None,
    stage: _STAGE = None,
    kind: _KIND = None,
    error: _ERROR = None,
    since: _SINCE = None,
    until: _UNTIL = None,
    everything: Annotated[bool, typer.Option("--all", help="Every open one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, also where there are several.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Try dead letters again, once what they failed of is mended.

    Their original bytes are appended to the topic they came from, and their
    stage sees to it that each has one result, however often it is redriven.
    A rejected file goes back to its camera's folder. By options only open
    ones are taken that are not on their way already.
    """
    settings: Settings = ctx.obj
    filters = _filters(Filters(stage, kind, error, since, until))
    ways = sum((bool(origins), any(filters.values()), everything))
    if ways != 1:
        fail("say which: by ORIGIN, or by --stage, --kind, --error, --since, --until, or --all", USAGE)
    letters = run(settings, lambda: _chosen(settings, origins or [], filters))
    if not letters:
        fail("no dead letter is open that fits; `rewatch dlq ls --status open` lists them", NO)
    if len(letters) > 1 and not (dry_run or yes):
        if as_json or not sys.stdin.isatty():
            fail(f"these are {len(letters)}: say --yes, or look first with --dry-run", USAGE)
        if not typer.confirm(f"redrive {len(letters)} dead letters?", err=True):
            fail("nothing was redriven", NO)
    outcomes = _redrive(settings, letters, dry_run=dry_run)
    _tell(outcomes, dry_run=dry_run, as_json=as_json)
    if any(outcome.why for outcome in outcomes):
        raise typer.Exit(NO)


async def _chosen(settings: "Settings", origins: list[str], filters: dict[str, Any]) -> "list[Row]":
    """The letters that were asked for, one of each origin, without their bytes."""
    from infra.redrive import one_each
    from processors.store.queries import Queries

    async with aclosing(Queries(settings.clickhouse)) as store:
        if not origins:
            found = await store.dead_letters(**filters, status="open", bodies=False, limit=_MOST)
            return one_each([letter for letter in found if letter["status"] == "open"])
        named: list[Row] = []
        for origin in origins:
            named += _of_one(origin, await store.dead_letters(origin=origin, bodies=False, limit=20))
        return one_each(named)


def _of_one(origin: str, letters: "list[Row]") -> "list[Row]":
    """Those of the one origin that begins so; says what is near where there is none, or several."""
    found = sorted({letter["origin"] for letter in letters})
    if origin in found:
        found = [origin]
    if not found:
        fail(f"there is no dead letter of {origin}; `rewatch dlq ls` lists them", NO)
    if len(found) > 1:
        fail(f"several begin with {origin}; say more:\n  " + "\n  ".join(found), NO)
    return [letter for letter in letters if letter["origin"] == found[0]]


def _redrive(settings: "Settings", letters: "list[Row]", *, dry_run: bool) -> "list[Outcome]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from infra.redrive import Redriver
    from processors.store.queries import Queries

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = 0

    async def main() -> "list[Outcome]":
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("looking" if dry_run else "redriving", total=len(letters))

            def show(count: int) -> None:
                nonlocal done
                done = count
                bar.update(task, completed=count)

            async with aclosing(Queries(settings.clickhouse)) as store:
                return await Redriver(settings, store, dry_run=dry_run).run(letters, show)

    try:
        return mendable(settings, lambda: asyncio.run(main()))
    except typer.Exit:
        if not dry_run:
            said = f"{done} of {len(letters)} were done before; doing them again is harmless"
            typer.echo(said, err=True)
        raise


def _tell(outcomes: "list[Outcome]", *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": dry_run, "letters": [outcome._asdict() for outcome in outcomes]})
        return
    done = [outcome for outcome in outcomes if not outcome.why]
    if dry_run and done:
        print_table(
            ("stage", "kind", "attempts", "to", "origin"), [(o.stage, o.kind, o.attempts, o.to, o.origin) for o in done]
        )
    refused = [outcome for outcome in outcomes if outcome.why]
    if refused:
        print_table(("stage", "kind", "why not", "origin"), [(o.stage, o.kind, o.why, o.origin) for o in refused])
    typer.echo(f"{len(done)} {'would be ' if dry_run else ''}redriven" + (f", {len(refused)} not" if refused else ""))
    if done and not dry_run:
        typer.echo("`rewatch dlq ls --status open` says which are not resolved yet")


def plain(letter: "Row") -> dict[str, Any]:
    """The letter as people and programs can read it: its value decoded where it is a record, else as hex."""
    value = None if letter["value"] is None else bytes.fromhex(letter["value"])
    headers = {name: bytes.fromhex(content) for name, content in letter["headers"]}
    return {
        "origin": letter["origin"],
        "stage": letter["stage"],
        "kind": letter["kind"],
        "camera_id": letter["camera_id"],
        "status": letter["status"],
        "failed_at": letter["failed_at"],
        "attempt": letter["attempt"],
        "error": letter["error"],
        "message": letter["message"],
        "fix": FIXES.get(letter["kind"], "mend what the message names, then redrive it"),
        "redrive": _way_back(letter),
        "detail": _json(letter["detail"]),
        "key": None if letter["key"] is None else _text(bytes.fromhex(letter["key"])),
        "headers": {name: _text(content) for name, content in headers.items()},
        "size": None if value is None else len(value),
        "claim": letter["claim"],
        "value": None if value is None else _value(letter["origin"].split(":", 1)[0], value, headers),
    }


def _way_back(letter: "Row") -> str:
    """Whether and how it can be redriven."""
    from infra.redrive import obstacle

    why = obstacle(letter)
    if why is not None:
        return f"no: {why}"
    if letter["kind"] == "rejected":
        does = "moves its file from .rejected/ back to its camera's folder"
    elif letter["claim"]:
        does = "reads its bytes from the log, as long as retention keeps them, and appends them again"
    else:
        does = "appends its bytes again"
    way = "it is on its way; again:" if letter["status"] == "redriven" else "yes:"
    return f"{way} `rewatch dlq redrive {letter['origin']}` {does}"


def _value(topic: str, value: bytes, headers: dict[str, bytes]) -> Any:
    from streams import codec
    from streams.messages import FINGERPRINT
    from streams.topics import TOPICS

    if topic in TOPICS:
        kind: type[Record] = TOPICS[topic].record
        try:
            record = codec.decode_bytes(topic, value, headers.get(FINGERPRINT), kind)
        except codec.DecodeError:
            pass
        else:
            return {name: _short(getattr(record, name)) for name in record.__struct_fields__}
    return _text(value[:_SHOWN]) + (f" ... ({len(value)} bytes)" if len(value) > _SHOWN else "")


def _short(value: Any) -> Any:
    """Bytes inside a record (an image) by their length: they are in the log, not for a terminal."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else value


def _text(data: bytes) -> str:
    """Text where it is text, else hex."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"hex {data.hex()}"
    return text if all(c.isprintable() or c in "\n\t" for c in text) else f"hex {data.hex()}"


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text

"""`rewatch hold EVENT --why "..."`, `hold ls`, `hold release`: events that stay whatever retention says."""

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.event_first import EVENT, EventFirst, OnEvent
from infra.cli.help import LOOK, examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, print_table, printable, when

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.retention.holds import Holds
    from processors.store.queries import Queries
    from schemas.records import Hold


class _Held(EventFirst):
    """The group of holds."""

    said_of_events = frozenset({"--why"})


app = typer.Typer(
    cls=_Held,
    no_args_is_help=True,
    subcommand_metavar='EVENT --why "..." | COMMAND [ARGS]...',
    context_settings={"ignore_unknown_options": True},  # those before the event are its command's
)

_Event = Annotated[
    str,
    typer.Argument(
        metavar=EVENT,
        help="An event's id, or a beginning of it that only one has; with or without its camera.",
        autocompletion=complete.events,
    ),
]
_Author = Annotated[str, typer.Option(help="Who says so.", metavar="NAME")]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="hold",
        rich_help_panel=LOOK,
        help="Keep an event with all it was made from, whatever retention says.",
        epilog=examples(
            'rewatch hold front-door:7c1b --why "the insurance asks"',
            "rewatch hold ls",
            'rewatch hold release 7c1b --why "settled"',
        ),
    )


@app.command(
    EVENT,
    cls=OnEvent,
    epilog=examples(
        'rewatch hold front-door:7c1b --why "the insurance asks"',
        'rewatch hold 7c1b --why "case 2026/118" --author maria --json',
    ),
)
def event_(
    ctx: typer.Context,
    event: _Event,
    why: Annotated[str, typer.Option(help="Why it is to stay: whoever asks in a year will want to know.")],
    author: _Author = "",
    as_json: JsonFlag = False,
) -> None:
    """Keep an event whole until it is released, whatever retention says.

    Its frames, images, detections, window, verdicts and raw records stay. Exit
    code 0 means that no `rewatch gc` deletes any of it from now on.
    """
    settings: Settings = ctx.obj
    _check(why, author)

    async def main() -> "Hold":
        from infra.cli.events import find
        from infra.retention.holds import GoingError, UnreadableHoldError
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            try:
                return await _holds(settings, store).hold(await find(store, event), why=why, author=author)
            except (GoingError, UnreadableHoldError) as error:
                fail(str(error), NO)

    held = run(settings, main, doing="holding ...")
    if as_json:
        print_json(_plain(held))
    else:
        typer.echo(f"held: {printable(held.event_id)}")


@app.command("ls", epilog=examples("rewatch hold ls", "rewatch hold ls --json"))
def ls(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List the events that are held, the oldest hold first."""
    settings: Settings = ctx.obj

    async def main() -> "list[Hold]":
        from infra.retention.holds import UnreadableHoldError
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            try:
                return await _holds(settings, store).all()
            except UnreadableHoldError as error:
                fail(str(error), NO)

    found = run(settings, main)
    if as_json:
        print_json([_plain(hold) for hold in found])
    elif not found:
        typer.echo("nothing is held")
    else:
        print_table(
            ("since", "event", "why", "author"),
            [(when(hold.at, settings.time_zone), hold.event_id, hold.why, hold.author or None) for hold in found],
        )


@app.command(
    "release", epilog=examples("rewatch hold release front-door:7c1b", 'rewatch hold release 7c1b --why "settled"')
)
def release(
    ctx: typer.Context,
    event: _Event,
    why: Annotated[str, typer.Option(help="Why it need not stay any more.")] = "",
    author: _Author = "",
    as_json: JsonFlag = False,
) -> None:
    """Let go of an event: from now on retention decides."""
    settings: Settings = ctx.obj
    _check(why or "-", author)

    async def main() -> "Hold":
        from infra.retention.holds import UnreadableHoldError
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            holds = _holds(settings, store)
            try:
                held = await holds.all()
                # Among the held ones alone: an event may be held whose row a person cannot find any more.
                found = [h for h in held if h.event_id.startswith(event) or _without_camera(h).startswith(event)]
                exact = [hold for hold in found if hold.event_id == event]
                if not (exact or len(found) == 1):
                    listed = "\n  ".join(["held are:", *(hold.event_id for hold in (found or held)[:5])])
                    many = f"{event} is the beginning of several that are held" if found else f"{event} is not held"
                    fail(f"{many}; {listed if held else 'nothing is held'}", NO)
                return await holds.release((exact or found)[0], why=why, author=author)
            except UnreadableHoldError as error:
                fail(str(error), NO)

    released = run(settings, main, doing="releasing ...")
    if as_json:
        print_json(_plain(released))
    else:
        typer.echo(f"released: {printable(released.event_id)}")


def _check(why: str, author: str) -> None:
    from infra.retention.holds import MAX_AUTHOR, MAX_WHY

    if not why.strip():
        fail("--why is empty: say why it is to stay", USAGE)
    if len(why) > MAX_WHY or len(author) > MAX_AUTHOR:
        fail(f"--why has {MAX_WHY} characters at most, --author {MAX_AUTHOR}", USAGE)


def _holds(settings: "Settings", store: "Queries") -> "Holds":
    from infra.retention.holds import Holds
    from streams.kafka import Kafka

    return Holds(Kafka(settings.kafka), store)


def _without_camera(hold: "Hold") -> str:
    return hold.event_id.removeprefix(f"{hold.camera_id}:")


def _plain(hold: "Hold") -> dict[str, str | int]:
    import msgspec

    plain: dict[str, str | int] = msgspec.structs.asdict(hold)
    return plain

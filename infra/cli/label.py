"""`rewatch label EVENT true|false`, `label missed`, `ls`, `session`: what people say of events."""

import asyncio
import secrets
import sys
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from infra.cli import complete
from infra.cli.errors import mendable, run
from infra.cli.event_first import EVENT, EventFirst, OnEvent
from infra.cli.help import LOOK, examples
from infra.cli.output import INTERRUPTED, NO, USAGE, JsonFlag, fail, level_text, print_json, print_table, when
from infra.cli.times import moment

if TYPE_CHECKING:
    from infra.cli.labelling import Item
    from infra.config import Settings
    from processors.replay.sampling import Draw
    from processors.store.queries import Queries, Row
    from schemas.records import Label
    from streams.labels import LabelLog


class _Labelled(EventFirst):
    """The group of labels."""

    said_of_events = frozenset({"true", "false"})


app = typer.Typer(
    cls=_Labelled,
    no_args_is_help=True,
    subcommand_metavar="EVENT true|false | COMMAND [ARGS]...",
    context_settings={"ignore_unknown_options": True},  # those before the event are its command's
)

_Note = Annotated[str, typer.Option(help="Free text, for those who ask later.")]
_Author = Annotated[str, typer.Option(help="Who says so.", metavar="NAME")]
_Camera = Annotated[str | None, typer.Option(help="Of this camera only.", autocompletion=complete.cameras)]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="label",
        rich_help_panel=LOOK,
        help="Say which events were true alarms and which were not.",
        epilog=examples(
            "rewatch label front-door:7c1b true",
            'rewatch label 7c1b false --note "the post"',
            "rewatch label missed --camera yard --from 2h --to 1h",
            "rewatch label session",
            "rewatch label ls",
        ),
    )


@app.command(
    EVENT,
    cls=OnEvent,
    epilog=examples(
        "rewatch label front-door:7c1b true",
        'rewatch label 7c1b false --note "the post"',
        "rewatch label 7c1b false --selection near_threshold --chance 0.31",
    ),
)
def event_(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    event: Annotated[
        str,
        typer.Argument(
            metavar=EVENT,
            help="An event's id, or a beginning of it that only one has; with or without its camera.",
            autocompletion=complete.events,
        ),
    ],
    verdict: Annotated[
        Literal["true", "false"],
        typer.Argument(
            metavar="true|false", help="true: somebody should have been told of it. false: nobody should have been."
        ),
    ],
    note: _Note = "",
    author: _Author = "",
    selection: Annotated[
        Literal["near_threshold", "flipped", "rare", "random"] | None,
        typer.Option(help="What `label session --json` chose it as; with --chance."),
    ] = None,
    chance: Annotated[
        float | None, typer.Option(min=0, max=1, help="The chance that `label session --json` gave it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say of an event whether it was a true alarm.

    Of what was said of an event the newest counts. Events come from
    ClickHouse: also those that the broker keeps no longer.
    """
    settings: Settings = ctx.obj
    _check(note, author)
    if (selection is None) != (not chance):
        fail("--selection and --chance belong together: say both as `rewatch label session --json` has them", USAGE)

    async def main() -> "Label":
        from infra.cli.events import find
        from infra.cli.labelling import VERDICTS, label_of
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            found = await find(store, event)
        label = label_of(
            found, VERDICTS[verdict], note=note, author=author, selection=selection or "", chance=chance or 0.0
        )
        return await _log(settings).append(label)

    _tell(run(settings, main, doing="labelling ..."), settings, as_json=as_json)


@app.command(
    "missed",
    epilog=examples(
        "rewatch label missed --camera yard --from 2026-11-02T18:00 --to 2026-11-02T18:05",
        'rewatch label missed --camera yard --from 2h --to 1h --note "the bicycle went"',
    ),
)
def missed(  # noqa: PLR0917
    ctx: typer.Context,
    camera: Annotated[str, typer.Option(help="Where.", autocompletion=complete.cameras)],
    since: Annotated[
        str, typer.Option("--from", help="From when: an age (30m, 12h, 7d), or a time, 2026-11-02T18:00 (UTC).")
    ],
    until: Annotated[str, typer.Option("--to", help="Until when: written as for --from.")],
    note: _Note = "",
    author: _Author = "",
    as_json: JsonFlag = False,
) -> None:
    """Say that a camera saw what should have been an alarm, and there was none."""
    settings: Settings = ctx.obj
    _check(note, author)
    now = datetime.now(UTC)
    began, ended = _moment("--from", since, now), _moment("--to", until, now)

    async def main() -> "Label":
        from infra.cli.labelling import ms
        from processors.gateway.reads import Reads
        from processors.store.queries import Queries
        from schemas.records import Label
        from streams.labels import LONGEST_MISSED

        if not 0 <= (ended - began).total_seconds() <= LONGEST_MISSED.total_seconds():
            fail(f"--to must not lie before --from, and {LONGEST_MISSED.days} days behind it at most", USAGE)
        async with aclosing(Queries(settings.clickhouse)) as store:
            reads = Reads(store)
            if not await reads.camera_names(camera):
                known = ", ".join(sorted(row["camera_id"] for row in await reads.camera_names()))
                fail(f"there is no camera {camera}; {f'there are {known}' if known else 'there is none yet'}", NO)
        label = Label(
            label_id="",
            camera_id=camera,
            started_at=ms(began),
            ended_at=ms(ended),
            verdict="missed",
            author=author,
            note=note,
            labelled_at=0,
        )
        return await _log(settings).append(label)

    _tell(run(settings, main, doing="labelling ..."), settings, as_json=as_json)


@app.command(
    "ls",
    epilog=examples("rewatch label ls", "rewatch label ls --camera front-door --since 7d", "rewatch label ls --json"),
)
def ls(
    ctx: typer.Context,
    camera: _Camera = None,
    since: Annotated[str | None, typer.Option(help="Given since then: 30m, 12h, 7d, or a time.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """List labels as ClickHouse has them, newest first.

    The sink brings a label there a moment after it was given.
    """
    settings: Settings = ctx.obj
    from_time = None if since is None else _moment("--since", since, datetime.now(UTC))

    async def main() -> "list[Row]":
        from processors.replay.labelling import labels
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            return await labels(store, camera=camera or "", since=from_time, limit=limit)

    found = run(settings, main)
    if as_json:
        print_json(found)
        return
    if not found:
        typer.echo("no labels" + (" that fit" if camera or since else " yet"))
        return
    from infra.cli.labelling import WORDS, stratum_text

    print_table(
        ("given", "verdict", "camera", "when", "the event said", "chosen as", "author", "note", "event"),
        [
            (
                when(label["labelled_at"], settings.time_zone),
                WORDS.get(label["verdict"], label["verdict"]),
                label["camera_id"],
                when(label["started_at"], settings.time_zone),
                None if label["risk_level"] is None else level_text(label["risk_level"], label["risk_score"]),
                stratum_text(label["selection"]) or None,
                label["author"] or None,
                label["note"] or None,
                label["event_id"],
            )
            for label in found
        ],
    )


@app.command(
    "session",
    epilog=examples(
        "rewatch label session",
        "rewatch label session --count 50 --camera front-door --since 7d",
        "rewatch label session --replay stricter    # what that replay judged otherwise, among others",
        "rewatch label session --json --seed 7      # the list alone",
    ),
)
def session(  # noqa: PLR0917
    ctx: typer.Context,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many events.")] = 20,
    camera: _Camera = None,
    since: Annotated[
        str | None, typer.Option(help="Not older than this: 30m, 12h, 7d, or a time, 2026-11-02T18:00.")
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(help="Flipped is what this replay, by name or id, judged otherwise; else any that is done."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the same events again, as long as none is labelled.")] = None,
    author: _Author = "",
    as_json: JsonFlag = False,
) -> None:
    """Label the events that teach most, one key each.

    Unlabelled events near the alarm threshold, flipped by a replay, or rare; and
    a third at random from all, so that statistics stay honest: each label says what
    its event was chosen as and with which chance. Without a terminal: the list.
    """
    settings: Settings = ctx.obj
    _check("", author)
    from_time = None if since is None else _moment("--since", since, datetime.now(UTC))
    sown = secrets.randbelow(2**31) if seed is None else seed

    async def main() -> "tuple[Draw, list[Item]]":
        from processors.replay import labelling, sampling
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            try:
                flipped = await labelling.flips(store, replay)
            except labelling.NoReplayError as error:
                fail(f"--replay {replay}: {error}", NO)
            known = [label.event_id for label in await _log(settings).read() if label.event_id is not None]
            events = await labelling.events(
                store, camera=camera or "", since=from_time, flipped=flipped, labelled=known
            )
            drawn = sampling.draw(events, count=count, seed=sown)
            return drawn, await _items(settings, store, drawn)

    drawn, items = run(settings, main, doing="choosing ...")
    if as_json:
        print_json(_plain(drawn, items, sown))
    elif not items:
        typer.echo("no event without a label" + (" that fits" if camera or since else " yet"))
    elif sys.stdin.isatty() and sys.stdout.isatty():
        _ask(settings, drawn, items, author)
    else:
        _list(items)


def _ask(settings: "Settings", drawn: "Draw", items: "list[Item]", author: str) -> None:
    """The session on a terminal; whatever ends it, what was labelled is told."""
    from infra.cli.labelling import Session, Terminal

    with Terminal().open() as keyboard:
        asked = Session(items, give=_log(settings).append, keyboard=keyboard, author=author)
        try:
            mendable(settings, lambda: asyncio.run(asked.run()))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        finally:
            asked.tell(drawn.strata)


def _list(items: "list[Item]") -> None:
    from infra.cli.labelling import stratum_text

    print_table(
        ("when", "camera", "risk", "what", "chosen as", "chance", "event"),
        [
            (
                when(item.window.event["started_at"], item.window.event["time_zone"]),
                item.window.event["camera_id"],
                level_text(item.window.event["risk_level"], item.window.event["risk_score"]),
                item.window.event["summary"],
                stratum_text(item.chosen.selection),
                f"{item.chosen.chance:.6g}",
                item.chosen.event_id,
            )
            for item in items
        ],
    )
    typer.echo("label them on a terminal, or with `rewatch label EVENT true|false --selection ... --chance ...`")


def _plain(drawn: "Draw", items: "list[Item]", seed: int) -> dict[str, Any]:
    shown = ("started_at", "ended_at", "camera_id", "camera_name", "time_zone", "risk_score", "risk_level", "summary")
    return {
        "seed": seed,
        "strata": {
            stratum: {
                "without_label": len(members),
                "chosen": sum(chosen.selection == stratum for chosen in drawn.chosen),
            }
            for stratum, members in drawn.strata.items()
        },
        "events": [
            {
                **item.chosen._asdict(),
                **{name: item.window.event[name] for name in (*shown, "reasoning")},
                "seen": [sighting._asdict() for sighting in item.window.seen],
                **item.links,
            }
            for item in items
        ],
    }


async def _items(settings: "Settings", store: "Queries", drawn: "Draw") -> "list[Item]":
    """The chosen events with what there is to see of them."""
    from infra.cli.labelling import Item
    from processors.gateway import words
    from processors.gateway.detail import image_address
    from processors.gateway.reads import Reads
    from processors.replay.labelling import windows

    chosen = {one.event_id: one for one in drawn.chosen}
    found = await windows(store, list(chosen))
    covers = await Reads(store).covers([window.event["batch_id"] for window in found])
    items = []
    for window in found:
        event = window.event
        links: dict[str, str] = {}
        if settings.gateway.enabled:
            links["page"] = f"{settings.gateway.url}/events/{words.url_part(event['event_id'])}"
            if (sha256 := covers.get(event["batch_id"])) is not None:
                links["image"] = f"{settings.gateway.url}{image_address(event['camera_id'], sha256)}"
        items.append(Item(chosen[event["event_id"]], window, links))
    return items


def _log(settings: "Settings") -> "LabelLog":
    from infra import topology
    from streams.kafka import Kafka
    from streams.labels import LabelLog

    kafka = Kafka(settings.kafka)
    return LabelLog(kafka, topology.cameras(settings, kafka))


def _moment(option: str, text: str, now: datetime) -> datetime:
    try:
        at = moment(text, now)
    except ValueError as error:
        fail(f"{option} {text}: {error}", USAGE)
    # What ClickHouse's times hold.
    if not 1900 < at.year < 2299:
        fail(f"{option} {text}: {at.year} is no year of a camera", USAGE)
    return at


def _check(note: str, author: str) -> None:
    from streams.labels import MAX_AUTHOR, MAX_NOTE

    for option, text, most in (("--note", note, MAX_NOTE), ("--author", author, MAX_AUTHOR)):
        if len(text) > most:
            fail(f"{option}: {len(text)} characters; {most} at most", USAGE)


def _tell(label: "Label", settings: "Settings", *, as_json: bool) -> None:
    """What is on the log now."""
    import msgspec

    from infra.cli.labelling import WORDS

    if as_json:
        at = {
            name: datetime.fromtimestamp(getattr(label, name) / 1000, UTC)
            for name in ("started_at", "ended_at", "labelled_at")
        }
        print_json(msgspec.structs.asdict(label) | at)
    elif label.event_id is not None:
        typer.echo(f"{label.event_id} is labelled a {WORDS[label.verdict]}")
    else:
        began, ended = (when(at, settings.time_zone) for at in (label.started_at, label.ended_at))
        typer.echo(f"an alarm missed by {label.camera_id}, {began} to {ended}")

"""`rewatch audit`: is everything that was accepted there exactly once?"""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli import complete
from infra.cli.errors import mendable
from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, print_table, printable
from infra.cli.times import moment

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.store.audit import Report

# A question over millions of rows takes seconds, on a busy machine a minute.
ASK_S = 600.0

# Between two looks while waiting; a window without frames takes 30 s to close.
_LOOK_EVERY_S = 1.0


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command(
        rich_help_panel=MAINTENANCE,
        epilog=examples(
            "rewatch audit",
            "rewatch audit --wait           # when the work is done",
            "rewatch audit --since 24h --camera front-door",
            "rewatch audit --json | jq '.violations[]'",
        ),
    )(audit)


def audit(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    camera: Annotated[str | None, typer.Option(help="Of this camera only.", autocompletion=complete.cameras)] = None,
    since: Annotated[
        str | None, typer.Option(help="What ClickHouse took since then: 30m, 12h, 7d, or a time, 2026-11-02T18:00.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="What it took before: an age or a time.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="First wait until nothing is in flight.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Account for every record: nothing lost, nothing doubled, each where it belongs.

    Every accepted frame, window and verdict is followed by its id through ClickHouse, and compared with the log. What
    a stage has not reached yet is in flight, not lost. It only reads, and can be asked while everything runs.
    Exit code 1 when something is wrong.
    """
    settings: Settings = ctx.obj
    bounds: dict[str, datetime | None] = {}
    for name, text in (("since", since), ("until", until)):
        try:
            bounds[name] = None if text is None else moment(text, datetime.now(UTC))
        except ValueError as error:
            fail(f"--{name} {text}: {error}", USAGE)
    report = mendable(settings, lambda: _audited(settings, camera, bounds, wait=wait))
    if as_json:
        print_json(plain(report))
    else:
        _print(report)
    if not report.clean:
        raise typer.Exit(NO)


def _audited(settings: "Settings", camera: str | None, bounds: "dict[str, datetime | None]", *, wait: bool) -> "Report":
    from rich.console import Console

    from processors.store import audit as accounting
    from processors.store.queries import Queries
    from streams.kafka import Kafka
    from streams.survey import survey

    out = Console(stderr=True)
    patient = settings.clickhouse.model_copy(update={"read_timeout_s": max(ASK_S, settings.clickhouse.read_timeout_s)})
    kafka = Kafka(settings.kafka)

    async def main() -> "Report":
        with out.status("looking ...") as status:

            def told(what: str) -> None:
                status.update(what)

            while wait:
                flying = {s: n for s, n in accounting.in_flight(await survey(kafka, count=False)).items() if n}
                if not flying:
                    break
                told(f"in flight: {', '.join(f'{count} before {stage}' for stage, count in flying.items())}")
                await asyncio.sleep(_LOOK_EVERY_S)
            async with aclosing(Queries(patient)) as queries:
                return await accounting.audit(
                    queries,
                    kafka,
                    settings.windows.record(),
                    camera=camera,
                    told=lambda what: told(f"asking about {what} ..."),
                    **bounds,
                )

    return asyncio.run(main())


def plain(report: "Report") -> dict[str, Any]:
    """The report for programs."""
    return {
        "clean": report.clean,
        "accepted": report.accepted,
        "lost": report.lost,
        "duplicates": report.duplicates,
        "unexplained_dead_letters": report.unexplained_dead_letters,
        "in_flight": dict(report.in_flight),
        "counts": dict(report.counts),
        "violations": [{"kind": one.kind, "id": one.id, "detail": one.detail} for one in report.violations],
        "dead_letters": list(report.dead_letters),
        "repeated": report.repeated,
        "forgotten": report.forgotten,
        "unread": list(report.unread),
        "notes": list(report.notes),
        "took_s": round(report.took_s, 1),
    }


def _print(report: "Report") -> None:
    flying = {stage: count for stage, count in report.in_flight.items() if count}
    print_table(
        ("", "records"),
        [
            ("frames accepted", report.accepted),
            ("lost", report.lost),
            ("doubled", report.duplicates),
            ("unexplained dead letters", report.unexplained_dead_letters),
            *((kind, count) for kind, count in sorted(report.counts.items()) if kind not in _told()),
            *((f"in flight before {stage}", count) for stage, count in flying.items()),
            *(
                (f"dead letters of {row['stage']} ({row['kind']}), {row['status']}", row["count"])
                for row in report.dead_letters
            ),
            *([("sent again by a camera", report.repeated)] if report.repeated else []),
            *([("taken by retention (`rewatch gc`)", report.forgotten)] if report.forgotten else []),
        ],
    )
    if report.violations:
        print_table(("what", "id", "why"), [(one.kind, one.id, one.detail) for one in report.violations])
    for note in report.notes:
        typer.echo(printable(note))
    if report.unread:
        typer.echo(
            f"too long to be compared with the log itself: {', '.join(report.unread)}; the sink's own notes served"
        )
    if report.clean:
        more = ": what is in flight is not judged, `--wait` waits for it" if flying else ""
        typer.echo(f"everything is accounted for{more} ({report.took_s:.1f} s)")
    else:
        count = sum(report.counts.values())
        more = "" if count == len(report.violations) else f", the first {len(report.violations)} are shown"
        typer.echo(
            f"{count} violations{more} ({report.took_s:.1f} s); `rewatch rebuild` mends tables from `log`", err=True
        )


def _told() -> frozenset[str]:
    """Kinds that stand in the table's first lines."""
    from processors.store.audit import DOUBLED, LOST, UNEXPLAINED

    return LOST | DOUBLED | {UNEXPLAINED}

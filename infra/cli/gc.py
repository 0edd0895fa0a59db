"""`rewatch gc`: what is past its time goes, unless it is held; `--dry-run` says what would."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.errors import run
from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import AWAY, NO, USAGE, JsonFlag, fail, print_json, print_table

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.retention.collector import Report
    from infra.retention.work import Outcome

_DAY_MS = 86_400_000


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command(
        rich_help_panel=MAINTENANCE,
        epilog=examples(
            "rewatch gc --dry-run",
            "rewatch gc",
            "REWATCH_RETENTION__QUIET=14d rewatch gc --dry-run  # what would that free?",
            "rewatch gc --yes --json                            # from a timer",
        ),
    )(gc)


def gc(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete what is past the time that `retention:` gives it.

    Without settings there nothing goes. Events that are held stay, and whatever a
    replay that has not ended may read. Everything may go on meanwhile; killed in the
    middle, run it again. Images lie in the image store's .trash for `retention.trash`
    before they are gone.
    """
    settings: Settings = ctx.obj
    if not dry_run and not yes:
        if as_json or not sys.stdin.isatty():
            fail("events would be deleted for good: say --yes, or look first with --dry-run", USAGE)
        would = _collected(settings, dry_run=True)
        _print(would, settings, would=True)
        if not (would.report.records or would.report.purged or would.changes):
            return
        if not typer.confirm("Delete this for good?", err=True):
            raise typer.Exit(NO)
    done = _collected(settings, dry_run=dry_run)
    if as_json:
        print_json(plain(done, settings))
    else:
        _print(done, settings, would=dry_run)


def plain(outcome: "Outcome", settings: "Settings") -> dict[str, Any]:
    """The outcome for programs."""
    report = outcome.report
    return {
        "records": report.records,
        "taken": [one._asdict() for one in report.taken],
        "windows": report.windows,
        "images": {"trashed": report.images, "bytes": report.images_size, "put_back": report.put_back},
        "purged": {"images": report.purged, "bytes": report.purged_size},
        "held": report.held,
        "replays": report.replays,
        "passes": report.passes,
        "finished": report.finished,
        "keep": {name: getattr(settings.retention, name) for name in _classes()},
        "topics": [
            {"topic": change.topic, "was_ms": change.was_ms, "now_ms": change.now_ms} for change in outcome.changes
        ],
    }


def _classes() -> tuple[str, ...]:
    from infra.retention.settings import CLASSES

    return CLASSES


def _collected(settings: "Settings", *, dry_run: bool) -> "Outcome":
    from rich.console import Console

    from infra.retention.collector import NotNowError
    from infra.retention.holds import UnreadableHoldError
    from infra.retention.work import collect

    async def main() -> "Outcome":
        with Console(stderr=True).status("looking ...") as status:
            try:
                return await collect(settings, dry_run=dry_run, told=lambda what: status.update(f"{what} ..."))
            except NotNowError as error:
                fail(str(error), AWAY)
            except UnreadableHoldError as error:
                fail(str(error), NO)

    return run(settings, main, doing="")


def _print(outcome: "Outcome", settings: "Settings", *, would: bool) -> None:
    report = outcome.report
    kept = {name: getattr(settings.retention, name) for name in _classes()}
    rows = []
    for name in _classes():
        here = [one for one in report.taken if one.why == name]
        rows.append(
            (
                name,
                kept[name] or "for ever",
                sum(one.records for one in here),
                _size(sum(one.size for one in here)) if would and here else None,
                ", ".join(f"{one.records} {one.topic}" for one in here) or None,
            )
        )
    print_table(("what", "kept", "would go" if would else "went", "bytes", "records"), rows)
    _print_images(report, settings, would=would)
    for change in outcome.changes:
        verb = "would keep" if would else "keeps"
        typer.echo(f"topic {change.topic}: the broker {verb} it {_days(change.now_ms)} (was {_days(change.was_ms)})")
    if report.held or report.replays:
        typer.echo(f"{report.held} events are held (`rewatch hold ls`), {report.replays} replays have not ended")
    if report.finished:
        typer.echo(f"{report.finished} passes of a run that was killed were finished")
    if not settings.retention.kept:
        typer.echo("nothing goes: `retention:` in rewatch.yaml sets no time (retention.quiet frees the most)")


def _print_images(report: "Report", settings: "Settings", *, would: bool) -> None:
    if report.images:
        to = f"to .trash, and for good {settings.retention.trash} later"
        size = "" if would else f" ({_size(report.images_size)})"
        typer.echo(f"{report.images} images{size} {'would go' if would else 'went'} {to}")
    if report.purged:
        verb = "would be" if would else "were"
        typer.echo(f"{report.purged} images ({_size(report.purged_size)}) in .trash {verb} deleted for good")
    if report.put_back:
        typer.echo(f"{report.put_back} images in .trash are claimed again and were put back")


def _days(ms: int) -> str:
    return "for ever" if ms < 0 else f"{ms / _DAY_MS:g} days"


def _size(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"

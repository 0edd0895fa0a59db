"""`rewatch backup`: everything that the installation knows, in a directory; `backup verify`; and `rewatch restore`."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from infra.cli.errors import mendable
from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, print_table, printable, when

if TYPE_CHECKING:
    from infra.backup.manifest import Manifest
    from infra.config import Settings

T = TypeVar("T")
Told = Callable[[str, int, int], None]

Where = Annotated[
    str, typer.Argument(metavar="DIR", help="A directory, or an address that fsspec knows: s3://bucket/rewatch.")
]


class _DirFirst(TyperGroup):
    """`rewatch backup DIR` is `rewatch backup make DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["make", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_DirFirst, no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="backup",
        rich_help_panel=MAINTENANCE,
        help="Copy everything that is known into a directory, or check such a copy.",
        epilog=examples(
            "rewatch backup /mnt/backup/rewatch   # again tomorrow: only what is new is added",
            "rewatch backup verify /mnt/backup/rewatch",
        ),
    )
    root.command(
        rich_help_panel=MAINTENANCE,
        epilog=examples(
            "rewatch restore /mnt/backup/rewatch",
            "REWATCH_DATA_DIR=/srv/rewatch rewatch restore s3://bucket/rewatch --json",
        ),
    )(restore)


@app.command(
    "make",
    epilog=examples(
        "rewatch backup /mnt/backup/rewatch          # `make` need not be said",
        "rewatch backup s3://bucket/rewatch --json",
    ),
)
def make(
    ctx: typer.Context,
    directory: Where,
    as_json: JsonFlag = False,
) -> None:
    """Copy log, history and images into a directory.

    Into one that has a backup only what is new is copied. Everything may go on meanwhile. The backup shows one
    moment: what was accepted then and not processed yet is in it,
    and is processed after a restore. Killed in the middle, run it again: it goes on, and until it is done the last
    backup is what the directory holds. Exit code 1 where images are missing that records name.
    """
    settings: Settings = ctx.obj

    async def main(told: Told) -> Any:
        from infra.backup.make import backup
        from infra.backup.servers import servers
        from infra.backup.target import Target

        async with servers(settings, ctx.meta["config"], fresh=False):
            return await backup(settings, Target(directory), told)

    done = _run(settings, main, quiet=as_json)
    manifest = done.manifest
    if as_json:
        added = {"records_added": done.records, "images_added": done.images, "bytes_added": done.bytes}
        print_json(_plain(directory, manifest) | added)
    else:
        _print(settings, directory, manifest)
        typer.echo(f"added: {done.records} records, {done.images} images, {_mb(done.bytes)}")
    if manifest.missing:
        fail(
            f"the backup is complete but for {len(manifest.missing)} images that the image store has not "
            f"({settings.images_root}), as {manifest.missing[0]}",
            NO,
        )


@app.command(
    "verify", epilog=examples("rewatch backup verify /mnt/backup/rewatch", "rewatch backup verify s3://bucket/x --json")
)
def verify(ctx: typer.Context, directory: Where, as_json: JsonFlag = False) -> None:
    """Read every file of a backup and compare it with the manifest.

    Nothing else needs to be there. Exit code 1 where a file is missing or damaged, where the backup was never finished,
    or where it was made without images that its records name.
    """
    settings: Settings = ctx.obj

    async def main(told: Told) -> Any:
        from infra.backup.check import check
        from infra.backup.target import Target

        return await asyncio.to_thread(check, Target(directory), told)

    found = _run(settings, main, quiet=as_json)
    missing = found.manifest.missing
    if as_json:
        print_json(
            _plain(directory, found.manifest)
            | {
                "whole": not found.wrong and not missing,
                "files": found.files,
                "problems": [one._asdict() for one in found.problems],
            }
        )
    else:
        _print(settings, directory, found.manifest)
    if found.wrong:
        listed = "\n  ".join(f"{one.file} {one.what}" for one in found.problems)
        more = "" if found.wrong == len(found.problems) else f"\n  and {found.wrong - len(found.problems)} more"
        fail(f"{found.wrong} problems: use another copy of the backup\n  {listed}{more}", NO)
    if missing:
        fail(
            f"{found.files} files are as they were written, but {len(missing)} images are not among them: the image "
            f"store had lost them when the backup was made, as {missing[0]}",
            NO,
        )
    if not as_json:
        typer.echo(f"whole: {found.files} files are as they were written")


def restore(ctx: typer.Context, directory: Where, as_json: JsonFlag = False) -> None:
    """Make an empty installation what a backup shows.

    History, images, prompts, cameras, labels and work to be done: it is the same installation then. It checks
    the backup first, and refuses a broker or a ClickHouse that holds something. The embedded servers are
    started for it. Afterwards `rewatch up` goes on where the backup's moment was, and `rewatch audit --wait` accounts
    for all of it. Killed in the middle, run it again.
    """
    settings: Settings = ctx.obj

    async def main(told: Told) -> Any:
        from infra.backup.check import check
        from infra.backup.manifest import ManifestError
        from infra.backup.restore import restore as restored
        from infra.backup.servers import servers
        from infra.backup.target import Target

        target = Target(directory)
        found = await asyncio.to_thread(check, target, told)
        if found.wrong:
            listed = "\n  ".join(f"{one.file} {one.what}" for one in found.problems)
            raise ManifestError(f"nothing was restored: the backup is not whole\n  {listed}")
        async with servers(settings, ctx.meta["config"], fresh=True):
            return found.manifest, await restored(settings, target, found.manifest, told)

    manifest, done = _run(settings, main, quiet=as_json)
    if as_json:
        print_json(
            _plain(directory, manifest)
            | {"rows": done.rows, "on_log": done.on_log, "todo": dict(done.todo), "took_s": round(done.took_s, 1)}
        )
        return
    _print(settings, directory, manifest)
    typer.echo(f"restored: {done.rows} records in ClickHouse, {done.on_log} on the log, {done.images} images")
    todo = ", ".join(f"{count} before {stage}" for stage, count in done.todo.items() if count)
    typer.echo(f"to be done: {todo or 'nothing'}; `rewatch up` goes on, then `rewatch audit --wait`")


def _run(settings: "Settings", main: Callable[[Told], Coroutine[Any, Any, T]], *, quiet: bool) -> T:
    """Run with a progress bar; what a person can mend is one line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def work() -> T:
        with Bar(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
            task = bar.add_task("looking", total=None)

            def told(what: str, done: int, total: int) -> None:
                bar.update(task, description=what, completed=done, total=total)

            return asyncio.run(main(told))

    try:
        return mendable(settings, work)
    except Exception as error:
        _say(error)
        raise


def _say(error: Exception) -> None:
    """End the command if a person can mend the error."""
    from infra.backup.make import DivergedError
    from infra.backup.manifest import ManifestError
    from infra.backup.packs import PackError
    from infra.backup.refill import RefillError
    from infra.backup.restore import NotEmptyError
    from infra.backup.target import BusyError

    match error:
        case ManifestError() | PackError():
            fail(str(error), NO)
        case DivergedError() | NotEmptyError() | RefillError() | BusyError():
            fail(str(error), USAGE)


def _plain(directory: str, manifest: "Manifest") -> dict[str, Any]:
    return {
        "directory": directory,
        "made_at": datetime.fromtimestamp(manifest.made_at / 1000, UTC),
        "version": manifest.version,
        "records": manifest.records,
        "images": manifest.images,
        "images_missing": len(manifest.missing),
        "files": len(manifest.files),
        "notes": list(manifest.notes),
    }


def _print(settings: "Settings", directory: str, manifest: "Manifest") -> None:
    counts: dict[str, int] = {}
    for pack in (*manifest.history, *manifest.tail):
        for part in pack.parts:
            counts[part.topic] = counts.get(part.topic, 0) + part.records
    typer.echo(f"{printable(directory)}: as of {when(manifest.made_at, settings.time_zone)}")
    print_table(("", "records"), [*sorted(counts.items()), ("images", manifest.images)])
    for note in manifest.notes:
        typer.echo(printable(note))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"

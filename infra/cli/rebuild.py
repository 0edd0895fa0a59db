"""`rewatch rebuild`: ClickHouse's tables and views, made anew from its `log`."""

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli import complete
from infra.cli.audit import ASK_S
from infra.cli.errors import mendable
from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import AWAY, NO, USAGE, JsonFlag, fail, print_json, print_table

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.sink.rebuild import Progress


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command(
        rich_help_panel=MAINTENANCE,
        epilog=examples(
            "rewatch rebuild --dry-run",
            "rewatch rebuild",
            "rewatch rebuild --table detections --table frames --yes",
        ),
    )(rebuild)


def rebuild(
    ctx: typer.Context,
    table: Annotated[
        list[str] | None,
        typer.Option(help="This table only; can be given more than once.", autocompletion=complete.tables),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make ClickHouse's typed tables and views anew from `log`, row for row.

    It is for a table that was damaged, or records that an older version could not read. Everything may go on
    meanwhile: each table is built beside the old one, then the two change names. Killed in the middle, run it again.
    `log` itself is read, never made anew.
    """
    settings: Settings = ctx.obj
    tables = tuple(dict.fromkeys(table or complete.TABLES))
    if unknown := [name for name in tables if name not in complete.TABLES]:
        fail(f"--table {unknown[0]}: there is no such table; there are {', '.join(complete.TABLES)}", USAGE)
    plan = mendable(settings, lambda: asyncio.run(_plan(settings, tables)))
    if dry_run:
        if as_json:
            print_json([{"table": name, "records": records, "rows": rows} for name, records, rows in plan])
        else:
            print_table(("table", "records in log", "rows now"), plan)
        return
    if not yes:
        if as_json or not sys.stdin.isatty():
            fail(f"{len(tables)} tables would be replaced: say --yes, or look first with --dry-run", USAGE)
        records = sum(records for _, records, _ in plan)
        if not typer.confirm(f"Make {len(tables)} tables anew from {records} records?", err=True):
            raise typer.Exit(NO)
    done = mendable(settings, lambda: _rebuilt(settings, tables, quiet=as_json))
    if as_json:
        print_json(done)
        return
    print_table(
        ("table", "records", "rows", "rows before", "without a row"),
        [(one["table"], one["records"], one["rows"], one["rows_before"], one["undecodable"]) for one in done],
    )
    if corrected := sum(one["corrected"] for one in done):
        typer.echo(f"{corrected} records are read otherwise than when they came; `log.decode_error` says so now")


async def _plan(settings: "Settings", tables: tuple[str, ...]) -> list[tuple[str, int, int | None]]:
    from processors.sink.rebuild import Rebuild
    from processors.sink.store import ClickHouseStore

    store = ClickHouseStore(_patient(settings))
    try:
        return await Rebuild(store).plan(tables)
    finally:
        await store.close()


def _rebuilt(settings: "Settings", tables: tuple[str, ...], *, quiet: bool) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from infra.retention.collector import NotNowError
    from infra.retention.work import alone
    from processors.sink.rebuild import Rebuild
    from processors.sink.store import ClickHouseStore

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    async def main() -> list[dict[str, Any]]:
        store = ClickHouseStore(_patient(settings))
        try:
            with Bar(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
                task = bar.add_task("views", total=None)

                def show(now: "Progress") -> None:
                    bar.update(task, description=now.table, completed=now.done, total=now.total)

                rebuild = Rebuild(store, show)
                await store.migrate()
                await rebuild.views()
                return [(await rebuild.table(name))._asdict() for name in tables]
        finally:
            await store.close()

    try:
        with alone(settings):  # what a collector deletes meanwhile would come back with the new table
            return asyncio.run(main())
    except NotNowError as error:
        fail(str(error), AWAY)


def _patient(settings: "Settings") -> Any:
    """ClickHouse's settings with time for large tables."""
    own = settings.clickhouse
    return own.model_copy(update={"read_timeout_s": max(ASK_S, own.read_timeout_s)})

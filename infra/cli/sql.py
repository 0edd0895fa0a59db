"""`rewatch sql`: a question to ClickHouse, read-only."""

import json
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.errors import run
from infra.cli.help import LOOK, examples
from infra.cli.output import USAGE, JsonFlag, fail, print_table, printable

if TYPE_CHECKING:
    from infra.config import Settings


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command(
        rich_help_panel=LOOK,
        epilog=examples(
            'rewatch sql "SHOW TABLES"',
            'rewatch sql "DESCRIBE events"',
            'rewatch sql "SELECT camera_id, risk_level, count() FROM events GROUP BY ALL"',
            'rewatch sql "SELECT * FROM events" --limit 0 --csv > events.csv',
        ),
    )(sql)


def sql(
    ctx: typer.Context,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="One statement; it cannot write. `-` reads it from standard input.")
    ],
    limit: Annotated[int, typer.Option(min=0, help="At most so many rows; 0 for all.")] = 1000,
    as_json: JsonFlag = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with a header line.")] = False,
) -> None:
    """Ask ClickHouse in SQL, read-only."""
    settings: Settings = ctx.obj
    if as_json and as_csv:
        fail("--json or --csv, not both", USAGE)
    text = (typer.get_text_stream("stdin").read() if query == "-" else query).strip().rstrip(";")
    if not text:
        fail("the query is empty", USAGE)
    wanted = "CSVWithNames" if as_csv else "JSON" if as_json else "JSONCompact"

    async def main() -> bytes:
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            # One row more than is shown tells whether there are more.
            return await store.raw(text, wanted, limit=limit + 1 if limit and not as_json and not as_csv else limit)

    answer = run(settings, main, doing="asking ...").decode(errors="replace")
    if as_csv:
        # A pipe gets what the engine says, byte for byte; a terminal must not be steered by what a model wrote.
        typer.echo(printable(answer) if sys.stdout.isatty() else answer, nl=False)
        return
    document = json.loads(answer) if answer.strip() else {"meta": [], "data": []}
    if as_json:
        typer.echo(json.dumps(document["data"], indent=2, ensure_ascii=False))
        return
    rows = document["data"]
    print_table([column["name"] for column in document["meta"]], rows[:limit] if limit else rows)
    if limit and len(rows) > limit:
        typer.echo(f"the first {limit} rows; --limit 0 for all", err=True)

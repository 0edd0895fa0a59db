"""How commands speak: tables for people, JSON for programs, one line on stderr for what went wrong, exit codes.

Every command imports it, `--help` and completion too: it must import nothing that takes time.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn
from zoneinfo import ZoneInfo

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# What they mean stands in infra/cli/help.py, for `rewatch --help`.
NO = 1
USAGE = 2
AWAY = 3
INTERRUPTED = 130
"""As shells tell it: 128 and the number of SIGINT."""

# A pipe has no width: wide enough for an id and a sentence, so that lines stay whole for grep.
PIPE_WIDTH = 240

LEVEL_STYLES = {"low": "green", "medium": "yellow", "high": "red", "critical": "bold white on red"}

JsonFlag = Annotated[bool, typer.Option("--json", help="JSON for programs.")]


def fail(message: str, code: int = NO) -> NoReturn:
    """Say on stderr why not, and end with the exit code."""
    typer.echo(f"error: {printable(message)}", err=True)
    raise typer.Exit(code)


def console() -> Console:
    """Standard output as it is now; a pipe gets neither colour nor wrapping at 80 columns."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output. Bytes become text where they are text, times ISO 8601."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_jsonable))


# An event's id is 60 letters long; a camera's, a model's or a prompt's name is rarely half of this.
_WHOLE = 32


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table; numbers stand to the right, and nothing in a cell is taken for markup or terminal control."""
    rows = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row[index] is not None]
        numbers = sum(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)
        numeric = numbers > len(cells) / 2  # among counts an estimate is a text, `~70000`
        # What names a row stays in one piece, to be copied, unless it is long.
        whole = index == 0 and all(len(text_of(cell)) <= _WHOLE for cell in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(text_of(cell)) for cell in row))
    console().print(table)


def text_of(cell: Any) -> str:
    """A value as people read it in a cell."""
    match cell:
        case None:
            text = "-"
        case bool():
            text = "yes" if cell else "no"
        case datetime():
            text = cell.isoformat(sep=" ", timespec="milliseconds" if cell.microsecond else "seconds")
        case float():
            text = f"{cell:g}" if abs(cell) < 1e6 else f"{cell:.0f}"
        case bytes():
            text = repr(cell)[2:-1]
        case list() | tuple() | dict():
            text = json.dumps(cell, ensure_ascii=False, default=_jsonable)
        case _:
            text = str(cell)
    return printable(text)


def printable(text: str) -> str:
    """The text without characters that steer a terminal: cameras, models and strangers write what we show."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def level_text(level: str, score: int | None = None) -> Text:
    """A risk level in its colour."""
    return Text(level if score is None else f"{score} {level}", style=LEVEL_STYLES.get(level, ""))


def when(ms: float | datetime | None, time_zone: str = "UTC") -> str:
    """Milliseconds since the Unix epoch (or a time) in a zone, with its offset; `-` for none."""
    if ms is None:
        return "-"
    at = ms if isinstance(ms, datetime) else datetime.fromtimestamp(ms / 1000, UTC)
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    local = at.astimezone(ZoneInfo(time_zone))
    return local.isoformat(sep=" ", timespec="milliseconds" if local.microsecond else "seconds")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing when stderr is no terminal."""
    with Console(stderr=True).status(what) if sys.stderr.isatty() else contextlib.nullcontext():
        yield


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"hex": value.hex()}
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).isoformat()
    if hasattr(value, "items"):
        return dict(value)
    return str(value)

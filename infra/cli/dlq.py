"""`rewatch dlq ls|show`: records that could not be processed."""

import json
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.help import LETTERS, examples
from infra.cli.output import NO, JsonFlag, console, fail, print_json, print_table, printable, text_of, when

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.store.queries import Row
    from schemas.records import Record

app = typer.Typer(no_args_is_help=True)

# Bytes of a value that `show` prints where they are no record: enough to see what they are.
_SHOWN = 512

FIXES = {
    "gap": "records are gone from the log (retention, or a truncated segment); what ClickHouse holds is whole",
    "rejected": "the file lies in .rejected/ of its camera's folder: mend or delete it there",
    "shed": "the stage was overloaded: give it more processes (stages.<stage>.processes)",
}


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="dlq",
        rich_help_panel=LETTERS,
        help="List dead letters, the records that could not be processed, or show one.",
        epilog=examples("rewatch dlq ls", "rewatch dlq show frames:3f2a"),
    )


@app.command(
    "ls",
    epilog=examples(
        "rewatch dlq ls", "rewatch dlq ls --stage analyze --kind error", "rewatch dlq ls --limit 1000 --json"
    ),
)
def ls(
    ctx: typer.Context,
    stage: Annotated[str | None, typer.Option(help="Of this stage only.", autocompletion=complete.stages)] = None,
    kind: Annotated[
        str | None, typer.Option(help="error, gap, rejected or shed.", autocompletion=complete.kinds)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """List dead letters, newest first."""
    settings: Settings = ctx.obj

    async def main() -> "list[Row]":
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            return await store.dead_letters(stage=stage, kind=kind, limit=limit)

    letters = run(settings, main)
    if as_json:
        print_json([plain(letter) for letter in letters])
    elif not letters:
        typer.echo("no dead letters" + (" that fit" if stage or kind else ""))
    else:
        print_table(
            ("when", "stage", "kind", "camera", "message", "status", "origin"),
            [
                (
                    when(letter["failed_at"], settings.time_zone),
                    letter["stage"],
                    letter["kind"],
                    letter["camera_id"],
                    letter["message"],
                    letter["status"] or "open",
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
    """Show one dead letter: what it was, why it failed, what mends it."""
    settings: Settings = ctx.obj

    async def main() -> "list[Row]":
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            return await store.dead_letters(origin=origin, limit=20)

    letters = run(settings, main)
    origins = sorted({letter["origin"] for letter in letters})
    if origin in origins:
        origins = [origin]
    if not origins:
        fail(f"there is no dead letter of {origin}; `rewatch dlq ls` lists them", NO)
    if len(origins) > 1:
        fail("several begin so; say more:\n  " + "\n  ".join(origins), NO)
    # One origin can fail in several stages, and again after a redrive.
    found = [plain(letter) for letter in letters if letter["origin"] == origins[0]]
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


def plain(letter: "Row") -> dict[str, Any]:
    """The letter as people and programs can read it: its value decoded where it is a record, else as hex."""
    value = None if letter["value"] is None else bytes.fromhex(letter["value"])
    headers = {name: bytes.fromhex(content) for name, content in letter["headers"]}
    return {
        "origin": letter["origin"],
        "stage": letter["stage"],
        "kind": letter["kind"],
        "camera_id": letter["camera_id"],
        "status": letter["status"] or "open",
        "failed_at": letter["failed_at"],
        "attempt": letter["attempt"],
        "error": letter["error"],
        "message": letter["message"],
        "fix": FIXES.get(letter["kind"], "mend what the message names; the original bytes are kept for a redrive"),
        "detail": _json(letter["detail"]),
        "key": None if letter["key"] is None else _text(bytes.fromhex(letter["key"])),
        "headers": {name: _text(content) for name, content in headers.items()},
        "size": None if value is None else len(value),
        "claim": letter["claim"],
        "value": None if value is None else _value(letter["origin"].split(":", 1)[0], value, headers),
    }


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

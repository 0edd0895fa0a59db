"""`rewatch replay history`: what every version made of one window, live and in replays, by when it was judged."""

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.text import Text

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.help import examples
from infra.cli.output import (
    LEVEL_STYLES,
    NO,
    JsonFlag,
    console,
    fail,
    level_text,
    print_json,
    print_table,
    printable,
    when,
)

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.store.queries import Queries, Row

# A score of 100 fills it: each cell is ten points.
_BAR = 10

_DIGEST = 12
"""Characters of a digest that people are shown, as `rewatch prompt ls` does."""

_NEAR = 6
"""One more than are listed where several windows begin so."""

# Ids of events begin with those of their windows, so one comparison finds both, with or without the camera before it.
_FIND = """
    SELECT DISTINCT camera_id, batch_id
    FROM (
        SELECT camera_id, batch_id, event_id FROM risk_events WHERE run = 'live'
        UNION ALL SELECT camera_id, batch_id, event_id FROM replay_events
    )
    WHERE startsWith(event_id, {text:String}) OR startsWith(substring(event_id, length(camera_id) + 2), {text:String})
    ORDER BY batch_id LIMIT {limit:UInt32}
"""
_VERDICTS = """
    SELECT * FROM score_history WHERE camera_id = {camera:String} AND batch_id = {batch:String}
    ORDER BY judged_at, run != 'live', reused, run
"""
_LABEL = """
    SELECT verdict, author, note, labelled_at FROM labels FINAL
    WHERE camera_id = {camera:String} AND startsWith(event_id, concat({batch:String}, ':'))
    ORDER BY labelled_at DESC, label_id LIMIT 1
"""


class History(NamedTuple):
    """All that was said of one window."""

    verdicts: "list[Row]"
    """Rows of the view `score_history`, in the order in which they were judged; at least one."""
    label: "Row | None"
    """The newest label that a person gave one of them."""


def register(app: typer.Typer) -> None:
    """Add this command to the group `rewatch replay`."""
    app.command(
        epilog=examples(
            "rewatch replay history front-door:7c1b",
            "rewatch replay history 7c1b --json | jq '.verdicts[].risk_score'",
        )
    )(history)


def history(
    ctx: typer.Context,
    event: Annotated[
        str,
        typer.Argument(
            metavar="EVENT|BATCH",
            help="An event's or a window's id, or a beginning of it that only one has; with or without its camera.",
            autocompletion=complete.events,
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Show every verdict on a window: the live one, and those of replays and shadows.

    One line a verdict, oldest first: when it was judged, in which run, with which prompt and model, and what it says.
    """
    settings: Settings = ctx.obj

    async def main() -> History:
        from infra import replaying
        from processors.store.queries import Queries

        async with replaying.store(settings), aclosing(Queries(settings.clickhouse)) as store:
            camera, batch = await _find(store, event)
            found = await store.rows(_LABEL, camera=camera, batch=batch)
            return History(await verdicts(store, camera, batch), found[0] if found else None)

    told = run(settings, main)
    first = told.verdicts[0]
    window = {name: first[name] for name in ("camera_id", "batch_id", "started_at")}
    if as_json:
        rows = [{name: value for name, value in row.items() if name not in window} for row in told.verdicts]
        print_json({**window, "label": told.label, "verdicts": rows})
        return
    out = console()
    began = when(first["started_at"], settings.time_zone)
    out.print(f"window {printable(first['batch_id'])}, {began}", soft_wrap=True, markup=False)
    if told.label is not None:
        out.print(_labelled(told.label, settings.time_zone), soft_wrap=True, markup=False)
    print_table(
        ("judged", "in", "prompt", "model", "score", "risk", "what"),
        [
            (
                when(row["judged_at"], settings.time_zone),
                run_of(row),
                prompt_of(row),
                row["model"],
                bar(row["risk_score"], row["risk_level"], ascii_only=out.options.ascii_only),
                level_text(row["risk_level"], row["risk_score"]),
                row["summary"],
            )
            for row in told.verdicts
        ],
    )


async def verdicts(store: "Queries", camera: str, batch: str) -> "list[Row]":
    """Every verdict on a window, as the view `score_history` has them, in the order in which they were judged."""
    return await store.rows(_VERDICTS, camera=camera, batch=batch)


def run_of(row: "Row") -> str:
    """The run of a verdict for people: `live`, or a replay's name and kind."""
    if row["run"] == "live":
        return "live"
    kind = row["kind"] or "replay"
    return f"{row['run_name'] or row['run']} ({kind}{', reused' if row['reused'] else ''})"


def prompt_of(row: "Row") -> str:
    """The prompt version of a verdict for people: its name, else the beginning of its digest."""
    return str(row["prompt_name"] or row["prompt_digest"][:_DIGEST])


def in_short(row: "Row") -> str:
    """A verdict in a few words: its run, its prompt, its score."""
    return f"{run_of(row)}, prompt {prompt_of(row)}: {row['risk_score']} {row['risk_level']}"


def bar(score: int, level: str, *, ascii_only: bool = False) -> Text:
    """A score of 0 to 100 as a bar of ten cells; whatever is above zero shows at least one."""
    full, empty = "#." if ascii_only else "█░"
    cells = min(_BAR, max(round(score / _BAR), int(score > 0)))
    return Text(full * cells, style=LEVEL_STYLES.get(level, "")) + Text(empty * (_BAR - cells), style="dim")


async def _find(store: "Queries", text: str) -> tuple[str, str]:
    """Camera and id of the window of that event or window; says what is near where there is none, or several."""
    found = await store.rows(_FIND, text=text, limit=_NEAR) if text else []
    if not found:
        recent = [row["event_id"] for row in await store.events(limit=3)]
        hint = "\n  ".join(["; the newest are:", *recent]) if recent else ": there are none yet"
        fail(f"there is no verdict on a window {text!r}{hint}", NO)
    if len(found) > 1:
        listed = "\n  ".join(row["batch_id"] for row in found[: _NEAR - 1])
        fail(f"{text} is the beginning of several windows; say more of it:\n  {listed}", NO)
    return found[0]["camera_id"], found[0]["batch_id"]


def _labelled(label: "Row", time_zone: str) -> str:
    by = f" by {label['author']}" if label["author"] else ""
    note = f": {label['note']}" if label["note"] else ""
    what = label["verdict"].replace("_", " ")
    return printable(f"labelled {what}{by}, {when(label['labelled_at'], time_zone)}{note}")

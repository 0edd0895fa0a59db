"""`rewatch events ls|show` and `rewatch explain`: verdicts, and all that stands behind one."""

import difflib
import json
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text
from rich.tree import Tree

from infra.cli import complete, replay_history
from infra.cli.errors import run
from infra.cli.help import LOOK, examples
from infra.cli.output import (
    NO,
    USAGE,
    JsonFlag,
    console,
    fail,
    level_text,
    print_json,
    print_table,
    printable,
    text_of,
    when,
)
from infra.cli.times import moment

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.store.queries import Lineage, Queries, Row

app = typer.Typer(no_args_is_help=True)

_ID = Annotated[
    str,
    typer.Argument(
        metavar="EVENT",
        help="An event's id, or a beginning of it that only one has; with or without its camera.",
        autocompletion=complete.events,
    ),
]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="events",
        rich_help_panel=LOOK,
        help="List events, the verdicts on windows, or show one.",
        epilog=examples("rewatch events ls --since 12h", "rewatch events show front-door:7c1b"),
    )
    root.command(
        rich_help_panel=LOOK,
        epilog=examples(
            "rewatch explain front-door:7c1b",
            "rewatch explain 7c1b --prompt      # what the model was asked, what it said",
            "rewatch explain 7c1b --json",
        ),
    )(explain)


@app.command(
    "ls",
    epilog=examples(
        "rewatch events ls",
        "rewatch events ls --since 12h --level critical",
        "rewatch events ls --camera front-door --since 2026-11-02T18:00 --limit 100",
        "rewatch events ls --json",
    ),
)
def ls(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    camera: Annotated[str | None, typer.Option(help="Of this camera only.", autocompletion=complete.cameras)] = None,
    level: Annotated[
        Literal["low", "medium", "high", "critical"] | None, typer.Option(help="Of this risk level only.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Not older than this: 30m, 12h, 7d, or a time, 2026-11-02T18:00.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List events, newest first."""
    settings: Settings = ctx.obj
    try:
        from_time = None if since is None else moment(since, datetime.now(UTC))
    except ValueError as error:
        fail(f"--since {since}: {error}", USAGE)

    async def main() -> "list[Row]":
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            return await store.events(camera=camera, level=level, since=from_time, limit=limit)

    events = run(settings, main)
    if as_json:
        print_json(events)
    elif not events:
        typer.echo("no events" + (" that fit" if camera or level or since else " yet"))
    else:
        print_table(
            ("when", "camera", "risk", "what", "event"),
            [
                (
                    when(event["started_at"], settings.time_zone),
                    event["camera_id"],
                    level_text(event["risk_level"], event["risk_score"]),
                    event["summary"],
                    event["event_id"],
                )
                for event in events
            ],
        )


@app.command("show", epilog=examples("rewatch events show front-door:7c1b", "rewatch events show 7c1b --json"))
def show(ctx: typer.Context, event: _ID, as_json: JsonFlag = False) -> None:
    """Show one event whole."""
    settings: Settings = ctx.obj

    async def main() -> "Row":
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            return await find(store, event)

    found = run(settings, main)
    if as_json:
        print_json(found)
        return
    out = console()
    width = max(len(name) for name in found)
    for name, value in found.items():
        shown = when(value, settings.time_zone) if isinstance(value, datetime) else _pretty(value)
        out.print(Text(f"{name:<{width}}  ", style="bold") + Text(shown), soft_wrap=True)


def explain(
    ctx: typer.Context,
    event: _ID,
    prompt: Annotated[bool, typer.Option("--prompt", help="Also the rendered prompt and the raw completion.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show where an event comes from.

    Its verdict and prompt, its window, each frame with the hash of its image, and what was seen in it.
    """
    settings: Settings = ctx.obj

    async def main() -> "tuple[Lineage, list[Row]]":
        from processors.store.queries import Queries

        async with aclosing(Queries(settings.clickhouse)) as store:
            lineage = await store.made_from(await find(store, event))
            said = await replay_history.verdicts(store, lineage.event["camera_id"], lineage.event["batch_id"])
            return lineage, [row for row in said if row["run"] != lineage.event["run"]]

    lineage, again = run(settings, main)
    if as_json:
        print_json(as_plain(lineage) | {"judged_again": again})
    else:
        zone = lineage.context["time_zone"] if lineage.context is not None else settings.time_zone
        root = tree(lineage, zone, prompt=prompt)
        if again:
            root.add(_line("judged again", "; ".join(map(replay_history.in_short, again))))
        console().print(root, soft_wrap=True)


async def find(store: "Queries", text: str) -> "Row":
    """The event of that id or beginning; says what is near where there is none, or several."""
    found = await store.events_like(text, limit=6)
    exact = [event for event in found if event["event_id"] == text]
    if exact or len(found) == 1:
        return (exact or found)[0]
    if len(found) > 1:
        listed = "\n  ".join(event["event_id"] for event in found[:5])
        fail(f"{text} is the beginning of several events; say more of it:\n  {listed}", NO)
    recent = [event["event_id"] for event in await store.events(limit=2000)]
    near = difflib.get_close_matches(text, recent, n=3, cutoff=0.3) or recent[:3]
    hint = "\n  ".join(["near it:", *near]) if near else "there are no events yet"
    return fail(f"there is no event {text}; {hint}", NO)


def as_plain(lineage: "Lineage") -> dict[str, Any]:
    """The lineage as one JSON-able tree: the event, its context, its batch, the batch's frames in order."""
    batch = lineage.batch
    return {
        "event": _with_origin("risk_events", lineage.event),
        "context": _with_origin("contexts", lineage.context),
        "batch": None if batch is None else _with_origin("batches", _without_frames(batch)),
        "frames": [
            {
                "frame_id": frame_id,
                **_in_batch(batch, frame_id),
                "frame": _with_origin("frames", lineage.frames.get(frame_id)),
                "detections": _detections(lineage.detections.get(frame_id)),
            }
            for frame_id in lineage.event["frame_ids"]
        ],
    }


def tree(lineage: "Lineage", time_zone: str, *, prompt: bool = False) -> Tree:
    """The lineage for people."""
    plain = as_plain(lineage)
    event = lineage.event
    root = Tree(Text.assemble(("event ", "bold"), printable(event["event_id"])))
    root.add(f"camera {printable(event['camera_id'])}, {when(event['started_at'], time_zone)}, run {event['run']}")
    _add_verdict(root, event)
    _add_judge(root, event, time_zone, prompt=prompt)
    _add_context(root, plain["context"])
    _add_batch(root, plain, time_zone)
    root.add(_line("on the log at", plain["event"]["origin"]))
    return root


def _add_verdict(root: Tree, event: "Row") -> None:
    branch = root.add(Text.assemble(("verdict ", "bold"), level_text(event["risk_level"], event["risk_score"])))
    branch.add(Text(printable(event["summary"])))
    branch.add(_line("why", event["reasoning"]))
    for name in ("risk_factors", "entities"):
        if event[name]:
            branch.add(_line(name.replace("_", " "), "; ".join(event[name])))
    branch.add(_line("recommended", event["recommended_action"]))


def _add_judge(root: Tree, event: "Row", time_zone: str, *, prompt: bool) -> None:
    branch = root.add(Text.assemble(("judged by ", "bold"), printable(event["model"])))
    branch.add(_line("prompt", event["prompt_digest"]))
    branch.add(_line("model sha256", event["model_digest"] or "unknown: the server's weights cannot be read here"))
    branch.add(_line("verdict digest", event["verdict_digest"]))
    branch.add(_line("parameters", _pretty(event["parameters"])))
    branch.add(_line("conditions", ", ".join(f"{key} {value}" for key, value in sorted(event["conditions"].items()))))
    branch.add(
        _line(
            "tokens",
            f"{event['prompt_tokens']} in ({event['cached_tokens']} cached), {event['completion_tokens']} out",
        )
    )
    branch.add(_line("took", f"{event['queued_ms']:.0f} ms waiting, {event['inference_ms']:.0f} ms judging"))
    branch.add(_line("at", when(event["judged_at"], time_zone)))
    if event["repaired"]:
        branch.add("the first completion was unusable; the second was taken")
    if event["dropped_sections"]:
        branch.add(_line("left out to fit the context", ", ".join(event["dropped_sections"])))
    if prompt:
        branch.add(_line("rendered prompt", _messages(event["rendered_prompt"])))
        branch.add(_line("raw completion", event["raw_completion"]))


def _add_context(root: Tree, context: dict[str, Any] | None) -> None:
    branch = root.add(Text("context", style="bold"))
    if context is None:
        branch.add("not in ClickHouse yet")
        return
    names, texts = context.get("sections.name", []), context.get("sections.text", [])
    if not names:
        branch.add("the window alone: no enricher added anything")
    for name, text, made_by in zip(names, texts, context.get("sections.made_by", []), strict=True):
        branch.add(_line(f"{name} (by {made_by})", text))
    branch.add(_line("on the log at", context["origin"]))


def _add_batch(root: Tree, plain: dict[str, Any], time_zone: str) -> None:
    batch = plain["batch"]
    branch = root.add(Text("window", style="bold"))
    if batch is None:
        branch.add("not in ClickHouse yet")
    else:
        length = (batch["ended_at"] - batch["started_at"]).total_seconds()
        branch.label = Text.assemble(("window ", "bold"), printable(batch["batch_id"]))
        branch.add(f"{when(batch['started_at'], time_zone)}, {length:.1f} s, {len(plain['frames'])} frames")
        branch.add(f"closed by {batch['closed_by']} at detections offset {batch['closed_at_offset']}")
        branch.add(_line("window settings", batch["settings_digest"]))
        branch.add(_line("on the log at", batch["origin"]))
    for entry in plain["frames"]:
        _add_frame(branch, entry, time_zone)


def _add_frame(parent: Tree, entry: dict[str, Any], time_zone: str) -> None:
    marks = [mark for mark, on in (("between", entry.get("matters") is False), ("late", entry.get("late"))) if on]
    branch = parent.add(
        Text.assemble(("frame ", "bold"), printable(entry["frame_id"]), f" ({', '.join(marks)})" if marks else "")
    )
    frame, detections = entry["frame"], entry["detections"]
    if frame is None:
        branch.add("not in ClickHouse (yet, or deleted)")
    else:
        branch.add(_line("sha256", frame["sha256"]))
        captured = when(frame["captured_at"], time_zone)
        branch.add(f"captured {captured} (by {frame['captured_from']}), arrived {when(frame['arrived_at'], time_zone)}")
        image = "inside its record" if frame["inline"] else frame["claim"]
        branch.add(f"{frame['width']} x {frame['height']}, {frame['size']} bytes, {image}")
        branch.add(_line("on the log at", frame["origin"]))
    if detections is None:
        branch.add("no detections in ClickHouse (yet, or deleted)")
        return
    seen = {(box["label"], box["x"], box["y"]): box for box in entry.get("boxes", [])}
    judging = "boxes" in entry  # the window is known: its boxes are those of at least the threshold
    below = 0
    for box in detections["boxes"]:
        judged = seen.get((box["label"], box["x"], box["y"]))
        if judged is None and judging:
            below += 1
            continue
        place = f"{box['width']:.0f} x {box['height']:.0f} at {box['x']:.0f}, {box['y']:.0f}"
        still = ", has not moved" if judged is not None and judged["stationary"] else ""
        branch.add(f"{printable(box['label'])} {box['score']:.2f}, {place}{still}")
    if below:
        branch.add(f"{below} more below the threshold")
    if not detections["boxes"]:
        branch.add("nothing seen")
    branch.add(_line("detected by", f"{detections['model']} on {detections['runtime']}, {detections['origin']}"))


def _with_origin(topic: str, row: "Row | None") -> dict[str, Any] | None:
    from schemas.ids import origin

    if row is None:
        return None
    place = {"origin": origin(topic, row["epoch"], row["partition"], row["offset"])}
    return {name: value for name, value in row.items() if name not in {"epoch", "partition", "offset"}} | place


def _without_frames(batch: "Row") -> "Row":
    return {name: value for name, value in batch.items() if not name.startswith("frames.")}


def _in_batch(batch: "Row | None", frame_id: str) -> dict[str, Any]:
    """What the window says of its frame."""
    if batch is None or frame_id not in batch["frames.frame_id"]:
        return {}
    index = list(batch["frames.frame_id"]).index(frame_id)
    return {name: batch[f"frames.{name}"][index] for name in ("event_at", "matters", "late", "boxes")}


def _detections(row: "Row | None") -> dict[str, Any] | None:
    plain = _with_origin("detections", row)
    if plain is None:
        return None
    names = ("label", "score", "x", "y", "width", "height")
    columns = [plain.pop(f"boxes.{name}") for name in names]
    return plain | {"boxes": [dict(zip(names, box, strict=True)) for box in zip(*columns, strict=True)]}


def _line(name: str, text: str) -> Text:
    return Text.assemble((f"{name}: ", "dim"), printable(text))


def _pretty(value: Any) -> str:
    return printable(value) if isinstance(value, str) else text_of(value)


def _messages(rendered: str) -> str:
    """The messages of a rendered prompt, one below the other."""
    try:
        return "\n".join(f"[{message['role']}] {message['content']}" for message in json.loads(rendered))
    except (ValueError, KeyError, TypeError):
        return rendered

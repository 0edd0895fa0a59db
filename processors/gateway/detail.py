"""An event whole, from the rows that ClickHouse has of it: frames with their boxes, and the tree of what made what.

Pure: rows in, models out. A row that is not there (not yet, or not any more) leaves its fields empty, never a failure.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from processors.gateway.models import Box, EventDetail, EventSummary, FrameView, Label, Section, Step
from processors.store.queries import Lineage, Row
from schemas import ids
from schemas.records import WindowSettings

# A box of the window is a box of the detections: the same numbers, but Float32 on the one and Float64 on the other way.
_SAME = 0.01

_BOX = ("label", "score", "x", "y", "width", "height")
_WINDOW = tuple(WindowSettings.__struct_fields__)


def image_address(camera_id: str, sha256: str) -> str:
    """Where a frame's JPEG is served."""
    return f"/api/images/{camera_id}/{sha256}.jpg"


def event_detail(
    summary: EventSummary,
    lineage: Lineage,
    *,
    settings: Sequence[Row],
    prompt_name: str,
    labels: Sequence[Label],
    toys: Collection[str] = (),
) -> EventDetail:
    """The event whole.

    Args:
        summary: what lists show of it.
        lineage: the rows that it was made from.
        settings: rows of `cameras`, newest first: what was ever set for its camera.
        prompt_name: the prompt version's name for people.
        labels: those to be shown with it, in order.
        toys: SHA-256 of the demo models' weights.
    """
    event, batch, context = lineage.event, lineage.batch, lineage.context
    opens = _open_on(batch, settings)
    return EventDetail(
        **summary.model_dump(),
        reasoning=event["reasoning"],
        risk_factors=tuple(event["risk_factors"]),
        entities=tuple(event["entities"]),
        batch_id=event["batch_id"],
        closed_by=batch["closed_by"] if batch else "",
        prompt_digest=event["prompt_digest"],
        prompt_name=prompt_name,
        verdict_digest=event["verdict_digest"],
        model_digest=event["model_digest"],
        toy=event["model_digest"] in toys,
        parameters=_parameters(event["parameters"]),
        conditions=dict(event["conditions"]),
        rendered_prompt=event["rendered_prompt"],
        raw_completion=event["raw_completion"],
        sections_dropped=tuple(event["dropped_sections"]),
        prompt_tokens=event["prompt_tokens"],
        completion_tokens=event["completion_tokens"],
        duration_ms=round(event["inference_ms"]),
        context=()
        if context is None
        else tuple(
            Section(name=name, text=text)
            for name, text in zip(context["sections.name"], context["sections.text"], strict=True)
        ),
        frame_views=tuple(_frame(lineage, n, frame_id, opens) for n, frame_id in enumerate(event["frame_ids"])),
        lineage=_lineage(lineage, prompt_name),
        labels=tuple(labels),
    )


def label_of(row: Row) -> Label:
    """A row of `labels`."""
    return Label(**{name: row[name] for name in Label.model_fields})


def covers_half(label: Label, started_at: datetime, ended_at: datetime) -> bool:
    """Whether a label's span covers at least half of another; a moment is covered where it lies inside."""
    common = min(label.ended_at, ended_at) - max(label.started_at, started_at)
    return common.total_seconds() >= 0 and common * 2 >= ended_at - started_at


def _frame(lineage: Lineage, n: int, frame_id: str, opens: frozenset[str]) -> FrameView:
    event = lineage.event
    frame, seen = lineage.frames.get(frame_id), lineage.detections.get(frame_id)
    window = _in_window(lineage.batch, frame_id)
    known = frame or seen or {}
    return FrameView(
        frame_id=frame_id,
        n=n + 1,
        at=window["event_at"] if window else known.get("arrived_at", event["started_at"]),
        matters=bool(window["matters"]) if window else True,
        width=known.get("width"),
        height=known.get("height"),
        image=image_address(event["camera_id"], frame["sha256"]) if frame else None,
        sha256=frame["sha256"] if frame else "",
        source=frame["source"] if frame else "",
        source_name=frame["source_name"] if frame else "",
        captured_at=known.get("captured_at"),
        arrived_at=known.get("arrived_at"),
        position=_position("frames", frame),
        detector=seen["model"] if seen else "",
        detector_digest=seen["model_digest"] if seen else "",
        boxes=_boxes(seen, window, opens),
    )


def _boxes(seen: Row | None, window: Row | None, opens: frozenset[str]) -> tuple[Box, ...]:
    """Every box that the detector saw; those of the window's that are news matter."""
    news = [box for box in (window["boxes"] if window else ()) if not box["stationary"] and box["label"] in opens]
    if seen is None:
        boxes = [dict(box) for box in (window["boxes"] if window else ())]
    else:
        columns = (seen[f"boxes.{name}"] for name in _BOX)
        boxes = [dict(zip(_BOX, box, strict=True)) for box in zip(*columns, strict=True)]
    return tuple(
        Box(**{name: box[name] for name in _BOX}, matters=any(_same(box, other) for other in news)) for box in boxes
    )


def _same(box: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return box["label"] == other["label"] and all(abs(box[name] - other[name]) < _SAME for name in _BOX[1:])


def _in_window(batch: Row | None, frame_id: str) -> Row | None:
    """What the window says of its frame."""
    if batch is None or frame_id not in batch["frames.frame_id"]:
        return None
    n = list(batch["frames.frame_id"]).index(frame_id)
    return {name: batch[f"frames.{name}"][n] for name in ("event_at", "matters", "late", "offset", "boxes")}


def _open_on(batch: Row | None, settings: Sequence[Row]) -> frozenset[str]:
    """The classes that opened windows under the settings that the window names, else under the newest."""
    if batch is not None:
        for row in settings:
            window = WindowSettings(**{name: row[f"window_{name}"] for name in _WINDOW})
            plain = msgspec.to_builtins(window) | {"open_on": list(window.open_on)}
            if ids.json_digest(plain) == batch["settings_digest"]:
                return frozenset(window.open_on)
        if not settings:  # a camera that nothing is known of: what the window holds is what counted
            return frozenset(box["label"] for boxes in batch["frames.boxes"] for box in boxes)
    return frozenset(settings[0]["window_open_on"]) if settings else frozenset()


def _lineage(lineage: Lineage, prompt_name: str) -> Step:
    """Verdict, context, window, detections, frames: each made from the next."""
    event, batch, context = lineage.event, lineage.batch, lineage.context
    window = Step(
        topic="batches",
        title="window",
        record_id=event["batch_id"],
        position=_position("batches", batch),
        made_by=f"window settings {batch['settings_digest']}" if batch else "",
        facts={}
        if batch is None
        else {
            "from": _moment(batch["started_at"]),
            "to": _moment(batch["ended_at"]),
            "frames": str(len(batch["frames.frame_id"])),
            "closed by": f"{batch['closed_by']}, detections offset {batch['closed_at_offset']}",
        },
        made_from=tuple(_seen_step(lineage, n, frame_id) for n, frame_id in enumerate(event["frame_ids"], 1)),
    )
    told = Step(
        topic="contexts",
        title="context",
        record_id=event["batch_id"],
        position=_position("contexts", context),
        made_by=", ".join(dict.fromkeys(context["sections.made_by"])) if context else "",
        facts={}
        if context is None
        else {
            "camera": context["camera_name"],
            "time zone": context["time_zone"],
            "sections": ", ".join(context["sections.name"]) or "none: the window alone",
        },
        made_from=(window,),
    )
    conditions = ", ".join(f"{name} {value}" for name, value in sorted(event["conditions"].items()))
    return Step(
        topic="risk_events",
        title="verdict",
        record_id=event["event_id"],
        position=_position("risk_events", event),
        made_by=f"{event['model']}, prompt {prompt_name or event['prompt_digest']}",
        facts={
            "risk": f"{event['risk_score']} {event['risk_level']}",
            "judged": _moment(event["judged_at"]),
            "prompt": event["prompt_digest"],
            "model sha256": event["model_digest"] or "unknown: the server's weights cannot be read",
            "verdict digest": event["verdict_digest"],
            "parameters": event["parameters"],
            "conditions": conditions,
        }
        | ({"repaired": "the first completion was unusable; the second was taken"} if event["repaired"] else {}),
        made_from=(told,),
    )


def _seen_step(lineage: Lineage, n: int, frame_id: str) -> Step:
    frame, seen = lineage.frames.get(frame_id), lineage.detections.get(frame_id)
    window = _in_window(lineage.batch, frame_id)
    marks = [] if window is None else [mark for mark, on in _marks(window) if on]
    source = Step(
        topic="frames",
        title=f"frame {n}",
        record_id=frame_id,
        position=_position("frames", frame),
        made_by=f"{frame['source']} {frame['source_name']}".strip() if frame else "",
        facts={"kept": "not any more, or not yet"}
        if frame is None
        else {
            "sha256": frame["sha256"],
            "captured": f"{_moment(frame['captured_at'])} (by {frame['captured_from']})"
            if frame["captured_at"]
            else "unknown",
            "arrived": _moment(frame["arrived_at"]),
            "size": f"{frame['width']} x {frame['height']}, {frame['size']} bytes",
            "image": "inside its record" if frame["inline"] else frame["claim"] or "",
        },
    )
    return Step(
        topic="detections",
        title=f"detections {n}" + (f" ({', '.join(marks)})" if marks else ""),
        record_id=frame_id,
        position=_position("detections", seen),
        made_by=f"{seen['model']} on {seen['runtime']}" if seen else "",
        facts={}
        if seen is None
        else {
            "boxes": str(len(seen["boxes.label"])),
            "model sha256": seen["model_digest"],
            "took": f"{seen['inference_ms']:.0f} ms",
        },
        made_from=(source,),
    )


def _marks(window: Row) -> tuple[tuple[str, bool], ...]:
    return ("between", not window["matters"]), ("late", bool(window["late"]))


def _position(topic: str, row: Row | None) -> str:
    return "" if row is None else f"{topic}-{row['partition']}@{row['offset']} {row['epoch'][:4]}"


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(sep=" ", timespec="milliseconds").replace("+00:00", " UTC")


def _parameters(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

"""The page of an exported event: opens without a network and without this product, loads nothing, runs nothing.

Small pictures stand in the page itself, as a browser that opens it from inside the archive finds no file beside it;
each leads to the whole image. What cameras, models and people wrote stays text.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from infra.export.evidence import Evidence, Shot
from processors.replay.pictures import thumbnail
from streams.errors import UnprocessableError

_TEMPLATES = Path(__file__).parent / "templates"

# A box that the window does not tell of is shown from here on, where the window is not kept.
_SCORE = 0.5


class Drawn(NamedTuple):
    """A box on the small picture, in its pixels."""

    x: float
    y: float
    width: float
    height: float
    text: str
    still: bool


class Figure(NamedTuple):
    """One frame on the page."""

    number: int
    at: datetime
    frame_id: str
    sha256: str
    jpeg: str
    """The small picture, Base64; empty where there is none."""
    width: int
    height: int
    boxes: Sequence[Drawn]
    seen: str
    missing: str
    """Why there is no picture."""


def page(evidence: Evidence, *, version: str) -> str:
    """The page as HTML; `version` is the product's."""
    event = evidence.event
    context = evidence.records.get("contexts")
    camera = str(context.record["camera_name"]) if context is not None else ""
    zone = _zone(str(context.record["time_zone"]) if context is not None else "UTC")
    style = (_TEMPLATES / "event.css").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("event.html")
        .render(
            event=event,
            camera=camera or event["camera_id"],
            zone=zone,
            figures=[_figure(evidence, number, shot) for number, shot in enumerate(evidence.shots, 1)],
            records=evidence.records,
            missing=evidence.missing,
            messages=_messages(event["rendered_prompt"]),
            version=version,
            style=style,
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        )
    )


def _figure(evidence: Evidence, number: int, shot: Shot) -> Figure:
    window = _in_window(evidence, shot.frame_id)
    seen = evidence.records.get(f"detections-{number:03}")
    frame = evidence.records.get(f"frames-{number:03}")
    known = window or {}
    record = seen.record if seen is not None else frame.record if frame is not None else {}
    at = known.get("event_at", record.get("arrived_at", evidence.event["started_at"]))
    boxes = known.get("boxes")
    if boxes is None:
        boxes = [box for box in (seen.record["boxes"] if seen is not None else ()) if box["score"] >= _SCORE]
    jpeg, width, height, missing = _small(shot)
    of = (known.get("width") or record.get("width") or 1, known.get("height") or record.get("height") or 1)
    return Figure(
        number,
        datetime.fromtimestamp(at / 1000, UTC),
        shot.frame_id,
        shot.sha256,
        jpeg,
        width,
        height,
        [_drawn(box, width / of[0], height / of[1]) for box in boxes],
        ", ".join(f"{box['label']} {box['score']:.2f}" for box in boxes) or "nothing of at least the threshold",
        missing,
    )


def _small(shot: Shot) -> tuple[str, int, int, str]:
    if shot.image is None:
        return "", 0, 0, "This image is not in the export."
    try:
        jpeg, width, height = thumbnail(shot.image)
    except UnprocessableError as error:
        return "", 0, 0, f"No picture of it: {error}."
    return base64.b64encode(jpeg).decode(), width, height, ""


def _drawn(box: Mapping[str, Any], across: float, down: float) -> Drawn:
    return Drawn(
        round(box["x"] * across, 1),
        round(box["y"] * down, 1),
        round(box["width"] * across, 1),
        round(box["height"] * down, 1),
        f"{box['label']} {box['score']:.2f}",
        bool(box.get("stationary")),
    )


def _in_window(evidence: Evidence, frame_id: str) -> Mapping[str, Any] | None:
    """What the window says of its frame."""
    window = evidence.records.get("batches")
    frames = window.record["frames"] if window is not None else ()
    return next((frame for frame in frames if frame["frame_id"] == frame_id), None)


def _messages(rendered: str) -> list[tuple[str, str]]:
    """The messages of a rendered prompt: role and text."""
    try:
        return [(str(message["role"]), str(message["content"])) for message in json.loads(rendered)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return [("prompt", rendered)]


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError):  # a camera's zone is what somebody wrote
        return ZoneInfo("UTC")


def _moment(at: datetime | int, zone: ZoneInfo) -> str:
    """A time, or milliseconds since the Unix epoch, by a clock of that zone and with its offset."""
    moment = at if isinstance(at, datetime) else datetime.fromtimestamp(at / 1000, UTC)
    return moment.astimezone(zone).isoformat(sep=" ", timespec="milliseconds" if moment.microsecond else "seconds")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters["moment"] = _moment
    return made

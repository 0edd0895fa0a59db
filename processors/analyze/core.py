"""What analyze tells the LLM of a window, and the event that a verdict makes. Pure: clock and server lie elsewhere."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain, pairwise
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from processors.analyze.answers import Verdict, risk_level
from schemas import ids
from schemas.prompts import Message, PromptVersion, fence
from schemas.records import Batch, BatchFrame, Context, ContextSection, RiskEvent, SeenBox

VEHICLES = ("bicycle", "car", "motorcycle", "bus", "truck")
ANIMALS = ("bird", "cat", "dog")

NIGHT_FROM, NIGHT_TO = 22, 6
"""Local hours: night is 22:00 to 05:59, when most places that cameras watch are closed and people sleep."""

STAYS_BELOW = 0.08
"""Of the image's diagonal: about a body's width at the distance where a person fills a third of the height, so
shifting from foot to foot and a detector's jitter stay below it."""

APPROACHES_FROM = 1.5
"""Growth in area that is more than a pose: half as much again is a distance shortened by a fifth."""

CHAT_OVERHEAD = 64
"""Tokens that a chat template may add to one message (role marks, separators, a notice of its own): those of Nemotron,
Llama, Qwen and Mistral add 4 to 30."""


class Rendered(NamedTuple):
    """A chat ready to send, and which sections it leaves out."""

    messages: tuple[Message, ...]
    dropped: tuple[str, ...]


class Answered(NamedTuple):
    """How a verdict came to be: what the lineage of its event says."""

    rendered: Rendered
    raw: str
    repaired: bool
    model: str
    model_digest: str
    parameters: Mapping[str, Any]
    conditions: Mapping[str, str]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_ms: float
    inference_ms: float


def variables(context: Context) -> dict[str, Any]:
    """What a prompt's templates can name.

    camera (its name in one word), camera_id, camera_name, time (local HH:MM at the window's start), day_or_night,
    weekday, started_at (local, ISO 8601), duration_s, frames, `seen` (a list of label, count, score), `moves` (label
    and how, or None), `sections` (a list of name and text).

    What strangers wrote is fenced (`schemas.prompts.fence`): names and labels are a word or few, camera_name and the
    sections' texts stand in quotes. A template says what they are; none of them can end its line, or begin a turn.

    Raises:
        ValueError: the window has no frames, or its time zone is none, or its times are beyond the calendar.
    """
    batch = context.batch
    if not batch.frames:
        raise ValueError("a window without frames: there is nothing to judge")
    try:
        local = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=batch.started_at)).astimezone(
            ZoneInfo(context.time_zone)
        )
    except (KeyError, OSError, OverflowError) as error:
        raise ValueError(f"no local time in zone {context.time_zone!r} for {batch.started_at} ms: {error}") from error
    boxes = _news(batch)
    seen = _seen(boxes)
    return {
        # One word, as ids are written: "Front door" reads as front-door, and no name can begin a new line.
        "camera": fence.word(context.camera_name) or fence.word(context.camera_id),
        "camera_id": fence.word(context.camera_id),
        "camera_name": fence.name(context.camera_name),
        "time": f"{local:%H:%M}",
        "day_or_night": "night" if local.hour >= NIGHT_FROM or local.hour < NIGHT_TO else "day",
        "weekday": f"{local:%A}",
        "started_at": local.isoformat(timespec="seconds"),
        "duration_s": math.floor((batch.ended_at - batch.started_at) / 1000 + 0.5),
        "frames": len(batch.frames),
        "seen": [thing | {"label": fence.label(thing["label"])} for thing in seen],
        "moves": {"label": fence.label(seen[0]["label"]), "how": _moves(boxes, seen[0]["label"])} if seen else None,
        "sections": [_told(section) for section in context.sections],
    }


def renderings(context: Context, prompt: PromptVersion) -> Iterator[Rendered]:
    """The chat with every section, then with one section less each time, the lowest priority first.

    Of equal priority the later one goes first. Take the first that fits.

    Raises:
        PromptError: the prompt cannot be rendered with this context.
        ValueError: as `variables`.
    """
    told = variables(context)
    kept = list(context.sections)
    dropped: list[str] = []
    while True:
        told["sections"] = [_told(section) for section in kept]
        yield Rendered(prompt.messages(told), tuple(dropped))
        if not kept:
            return
        least = min(reversed(kept), key=lambda section: _priority(section, prompt))
        kept.remove(least)
        dropped.append(least.name)


def token_bound(messages: Sequence[Message]) -> int:
    """A count of tokens that no tokenizer exceeds: byte-level and byte-fallback ones spend at most one a byte."""
    return sum(len(message.content.encode("utf-8", "replace")) + CHAT_OVERHEAD for message in messages)


def risk_event(
    context: Context,
    prompt: PromptVersion,
    verdict: Verdict,
    answered: Answered,
    *,
    judged_at: int,
    run: str = ids.LIVE,
) -> RiskEvent:
    """The event: the verdict and everything that it was made of; `judged_at` in ms since the Unix epoch."""
    batch = context.batch
    return RiskEvent(
        event_id=ids.event_id(batch.batch_id, run),
        batch_id=batch.batch_id,
        camera_id=batch.camera_id,
        run=run,
        started_at=batch.started_at,
        ended_at=batch.ended_at,
        frame_ids=tuple(frame.frame_id for frame in batch.frames),
        risk_score=verdict.risk_score,
        risk_level=risk_level(verdict.risk_score),
        summary=verdict.summary,
        reasoning=verdict.reasoning,
        risk_factors=verdict.risk_factors,
        entities=verdict.entities,
        recommended_action=verdict.recommended_action,
        # Weights that cannot be read are told apart by the name that the server gives them.
        verdict_digest=ids.verdict_digest(
            prompt.template,
            prompt.output_schema,
            answered.parameters,
            answered.model_digest or f"model:{answered.model}",
        ),
        prompt_digest=prompt.digest,
        model=answered.model,
        model_digest=answered.model_digest,
        parameters=json.dumps(answered.parameters, sort_keys=True),
        conditions=dict(answered.conditions),
        rendered_prompt=chat_json(answered.rendered.messages),
        raw_completion=answered.raw,
        dropped_sections=answered.rendered.dropped,
        repaired=answered.repaired,
        prompt_tokens=answered.prompt_tokens,
        completion_tokens=answered.completion_tokens,
        cached_tokens=answered.cached_tokens,
        queued_ms=round(answered.queued_ms, 3),
        inference_ms=round(answered.inference_ms, 3),
        judged_at=judged_at,
    )


def chat_json(messages: Sequence[Message]) -> str:
    """The messages as the server gets them."""
    return json.dumps([message._asdict() for message in messages], ensure_ascii=False)


def _news(batch: Batch) -> list[tuple[BatchFrame, list[SeenBox]]]:
    """Each frame's boxes without those that stand still, unless nothing else was seen at all."""
    moving = [(frame, [box for box in frame.boxes if not box.stationary]) for frame in batch.frames]
    if any(boxes for _, boxes in moving):
        return moving
    return [(frame, list(frame.boxes)) for frame in batch.frames]


def _seen(frames: Sequence[tuple[BatchFrame, list[SeenBox]]]) -> list[dict[str, Any]]:
    """Per class how many at once, and the best score; people first, then vehicles, animals, others.

    As many as two successive frames with that class show: a detector's second box on one thing is there in one frame
    and gone in the next, and made two people of a lone visitor in 2 frames of 42.
    """
    shown: dict[str, list[int]] = {}
    for _, boxes in frames:
        for label, count in Counter(box.label for box in boxes).items():
            shown.setdefault(label, []).append(count)
    counts = {label: max(map(min, pairwise(ns)), default=ns[0]) for label, ns in shown.items()}
    best: dict[str, float] = {}
    for box in chain.from_iterable(boxes for _, boxes in frames):
        best[box.label] = max(best.get(box.label, 0.0), box.score)
    return [{"label": label, "count": counts[label], "score": best[label]} for label in sorted(best, key=_importance)]


def _importance(label: str) -> tuple[int, str]:
    rank = 0 if label == "person" else 1 if label in VEHICLES else 2 if label in ANIMALS else 3
    return rank, label


def _moves(frames: Sequence[tuple[BatchFrame, list[SeenBox]]], label: str) -> str:
    """How the class's best box moved between the first and the last frame that have one."""
    tracks = [
        (frame, max((box for box in boxes if box.label == label), key=lambda box: box.score))
        for frame, boxes in frames
        if any(box.label == label for box in boxes)
    ]
    (first_frame, first), (last_frame, last) = tracks[0], tracks[-1]
    (x0, y0), (x1, y1) = _feet(first_frame, first), _feet(last_frame, last)
    if math.hypot(x1 - x0, y1 - y0) < STAYS_BELOW:
        return "stays"
    if _area(last_frame, last) > APPROACHES_FROM * _area(first_frame, first):
        return "approaches"
    return "passes"


def _feet(frame: BatchFrame, box: SeenBox) -> tuple[float, float]:
    """Where it touches the ground, in diagonals of its frame: a camera may change its resolution within a window."""
    diagonal = math.hypot(frame.width, frame.height) or 1.0
    return (box.x + box.width / 2) / diagonal, (box.y + box.height) / diagonal


def _area(frame: BatchFrame, box: SeenBox) -> float:
    return box.width * box.height / ((frame.width * frame.height) or 1)


def _told(section: ContextSection) -> dict[str, str]:
    return {"name": fence.word(section.name), "text": fence.quoted(section.text)}


def _priority(section: ContextSection, prompt: PromptVersion) -> int:
    return prompt.templates.sections.get(section.name, section.priority)

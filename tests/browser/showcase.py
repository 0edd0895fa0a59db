"""A household's day for the fake source: rendered footage, and verdicts as a good model would write them."""

import hashlib
import io
import json
import random
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from infra.models.scene import View, render
from infra.models.stories import DEFAULT_SEED, STORIES, Story, cast
from processors.gateway.detail import image_address
from processors.gateway.fakes import FakeSource
from processors.gateway.models import (
    Box,
    CameraCard,
    DeadLetterCount,
    EventDetail,
    FrameView,
    Gap,
    Health,
    Level,
    NewLabel,
    Problem,
    Section,
    StageHealth,
    Step,
    TopicHealth,
)
from schemas import ids

ZONE = "Europe/Berlin"
# What a camera, a file or a model may say to get at whoever looks at it.
HOSTILE = (
    '"><script>window.hit=1</script>',
    "'><img src=x onerror=window.hit=1>",
    "</textarea></title><svg onload=window.hit=1>",
    "{{ 7*7 }}{% raw %}<!--",
    "javascript:window.hit=1",
    "\u202egnp.exe\u202c \u2067abc\u2069 &lt;b&gt; \x00".replace("\x00", "\ufffd"),
)

NAMES = {"front-door": "Front door", "driveway": "Driveway", "back-yard": "Back yard"}
_SIZES = {"front-door": (640, 360), "driveway": (1280, 720), "back-yard": (640, 360)}


class Said(NamedTuple):
    """A verdict's words."""

    score: int
    level: Level
    summary: str
    reasoning: str
    factors: tuple[str, ...]
    entities: tuple[str, ...]
    action: str


SAID = {
    "cat at noon": Said(
        6,
        "low",
        "A cat walks across the front path at noon",
        "One animal in full daylight, no person near.",
        ("animal only", "daylight"),
        ("1 cat",),
        "none",
    ),
    "parcel delivered": Said(
        14,
        "low",
        "A courier leaves a parcel at the door and goes back to the van",
        "A person comes from a parked truck, puts a parcel down and returns the same way within 14 seconds. "
        "This is how deliveries look, and it is early afternoon.",
        ("delivery vehicle", "daytime"),
        ("1 person", "1 truck"),
        "none",
    ),
    "visitor loiters at the door by night": Said(
        88,
        "critical",
        "One person stands at the front door for 40 seconds at night without ringing",
        "A single person approaches at 23:14, stays within a metre of the door for most of the window and shifts from "
        "foot to foot. No vehicle arrived, nobody opens, and nothing is delivered. Night and loitering at an entrance "
        "raise the risk; nothing seen here lowers it.",
        ("night", "loitering at an entrance", "nobody known expected"),
        ("1 person",),
        "call",
    ),
    "walking the dog": Said(
        9,
        "low",
        "Someone walks a dog along the street",
        "A passer-by with a dog stays on the street side.",
        ("passing by", "morning"),
        ("1 person", "1 dog"),
        "none",
    ),
    "street traffic": Said(
        4,
        "low",
        "A bus, a motorcycle and a truck pass",
        "Traffic on the street; none of it turns in.",
        ("traffic only",),
        ("1 bus", "1 motorcycle", "1 truck"),
        "none",
    ),
    "car comes home": Said(
        18,
        "low",
        "A car turns into the driveway at dusk and parks",
        "One car turns in slowly and stops where cars usually stop at this hour.",
        ("vehicle turns in", "usual hour"),
        ("1 car",),
        "none",
    ),
    "unknown car by night": Said(
        52,
        "medium",
        "A car passes slowly, pausing in front of the driveway at night",
        "One car slows down before the driveway at 01:20 and goes on after four seconds. It does not turn in.",
        ("night", "vehicle slows down"),
        ("1 car",),
        "review",
    ),
    "birds in the morning": Said(
        3,
        "low",
        "Two birds on the lawn",
        "Animals only.",
        ("animals only",),
        ("2 birds",),
        "none",
    ),
    "someone in the garden by day": Said(
        47,
        "medium",
        "A person crosses the garden in the afternoon",
        "One person enters the back yard from the left, crosses it and leaves on the right. The yard is private, but "
        "it is daytime and they do not stop.",
        ("private area", "daytime"),
        ("1 person",),
        "review",
    ),
    "two people at the back by night": Said(
        79,
        "high",
        "Two people wait behind the house for half a minute at night",
        "Two people enter the back yard at 02:40. One stays by the fence, the other comes closer to the house; both "
        "wait for about 30 seconds and leave the way they came.",
        ("night", "private area", "two people", "loitering"),
        ("2 people",),
        "notify",
    ),
}

_PROMPT = (
    "You judge the risk of what a security camera saw. Night, loitering and private areas raise the risk; animals and "
    "daytime deliveries lower it."
)


class Day(NamedTuple):
    """Everything made, before it is put into a source."""

    events: list[EventDetail]
    images: dict[tuple[str, str], bytes]
    frames: dict[str, list[datetime]]
    cameras: list[CameraCard]
    gaps: dict[str, list[Gap]]


def make(*, most: int = 6, now: datetime | None = None, stories: tuple[Story, ...] = STORIES) -> Day:
    """Every story's event in the 24 hours before now, with at most so many frames each."""
    now = now or datetime.now(UTC)
    images: dict[tuple[str, str], bytes] = {}
    frames: dict[str, list[datetime]] = {camera: [] for camera in NAMES}
    events = []
    for number, story in enumerate(stories):
        if story.name not in SAID:
            continue
        at = datetime.combine(now.astimezone(ZoneInfo(ZONE)).date(), story.at, ZoneInfo(ZONE)).astimezone(UTC)
        if at > now - timedelta(minutes=1):
            at -= timedelta(days=1)
        events.append(_event(story, at, images, offset=100 * number, most=most))
    rng = random.Random(7)
    for camera, found in frames.items():
        for minutes in range(0, 24 * 60, 9):
            hour = 24 - minutes / 60
            if camera == "driveway" and 5 < hour < 8:
                continue  # a gap
            found.extend(now - timedelta(hours=hour, seconds=rng.random() * 500) for _ in range(rng.randint(1, 12)))
        found.extend(view.at for event in events if event.camera_id == camera for view in event.frame_views)
    gaps = {"driveway": [Gap(started_at=now - timedelta(hours=8), ended_at=now - timedelta(hours=5))]}
    cameras = []
    for camera, name in NAMES.items():
        own = [event for event in events if event.camera_id == camera]
        newest = max(own, key=lambda event: event.started_at) if own else None
        silent = camera == "driveway"
        cameras.append(
            CameraCard(
                camera_id=camera,
                name=name,
                time_zone=ZONE,
                last_frame_at=now - timedelta(seconds=1400 if silent else 12),
                last_taken_at=now - timedelta(seconds=1400 if silent else 12),
                last_image=newest.frame_views[-1].image if newest else None,
                frames_24h=len(frames[camera]),
                events_24h=len(own),
                top_level_24h=max(own, key=lambda event: event.risk_score).risk_level if own else None,
                silent=silent,
            )
        )
    return Day(events, images, frames, cameras, gaps)


def source(made: Day) -> FakeSource:
    """The day in a source, with a pipeline that waits."""
    return FakeSource(
        cameras=made.cameras,
        events=made.events,
        images=made.images,
        frames=made.frames,
        gaps=made.gaps,
        health=health(),
    )


async def label(fake: FakeSource, made: Day) -> None:
    """What people said of the day: a true alarm, a false one, and one that was missed."""
    by_summary = {event.summary: event for event in made.events}
    parcel = by_summary[SAID["parcel delivered"].summary]
    await fake.label(NewLabel(verdict="false_alarm", event_id=parcel.event_id, author="Ada", note="our usual courier"))
    night = by_summary[SAID["two people at the back by night"].summary]
    await fake.label(NewLabel(verdict="true_alarm", event_id=night.event_id, author="Ada"))
    await fake.label(
        NewLabel(
            verdict="missed",
            camera_id="back-yard",
            started_at=night.started_at + timedelta(hours=2),
            ended_at=night.started_at + timedelta(hours=2, minutes=9),
            note="fence post was moved",
        )
    )


def hostile(event: EventDetail) -> EventDetail:
    """The event with every text that a camera or a model writes turned against whoever reads it."""
    bad = " ".join(HOSTILE)

    def step(node: Step) -> Step:
        texts = {"title": bad, "made_by": bad, "facts": {bad: bad}, "made_from": tuple(map(step, node.made_from))}
        return node.model_copy(update=texts)

    frames = tuple(
        frame.model_copy(
            update={
                "source_name": bad,
                "detector": bad,
                "boxes": tuple(box.model_copy(update={"label": bad[:60]}) for box in frame.boxes),
            }
        )
        for frame in event.frame_views
    )
    return event.model_copy(
        update={
            **dict.fromkeys(("camera_name", "summary", "reasoning", "recommended_action", "model", "prompt_name"), bad),
            **dict.fromkeys(("raw_completion", "closed_by", "model_digest"), bad),
            "rendered_prompt": json.dumps([{"role": bad, "content": bad}]),
            "risk_factors": HOSTILE,
            "entities": HOSTILE,
            "parameters": {bad: bad},
            "conditions": {bad: bad},
            "sections_dropped": HOSTILE,
            "context": tuple(Section(name=text, text=text) for text in HOSTILE),
            "frame_views": frames,
            "lineage": step(event.lineage),
        }
    )


def health(*, status: str = "waiting") -> Health:
    """A pipeline whose analyst waits, with something to look at in each table."""
    now = datetime.now(UTC)
    rows = (
        ("detect", 3, False, (), 2, 212.0, 390.0),
        ("batch", 0, True, (), 1, 248.0, 431.0),
        ("enrich", 0, True, (), 1, 31_400.0, 61_300.0),
        ("analyze", 2, False, ("llm",) if status == "waiting" else (), 1, 33_900.0, 78_000.0),
        ("sink", 7, False, (), 1, 460.0, 1_210.0),
    )
    return Health.model_validate(
        {
            "at": now,
            "status": status,
            "system": "rewatch",
            "detector": "detector",
            "analyst": "analyst.gguf",
            "toys": ("detector", "analyst"),
            "stages": [
                StageHealth(
                    stage=stage,
                    lag=lag,
                    exact=True,
                    caught_up=caught_up,
                    waiting_on=waiting_on,
                    workers=workers,
                    stall=None,
                    latency_p50_ms=p50,
                    latency_p95_ms=p95,
                )
                for stage, lag, caught_up, waiting_on, workers, p50, p95 in rows
            ],
            "topics": [
                TopicHealth(
                    topic=topic,
                    records=records,
                    exact=records < 50_000,
                    in_clickhouse=records - behind,
                    last_at=now - timedelta(seconds=age),
                )
                for topic, records, behind, age in (
                    ("frames", 61_204, 7, 2),
                    ("detections", 61_190, 4, 2),
                    ("batches", 412, 0, 130),
                    ("contexts", 412, 0, 130),
                    ("risk_events", 410, 0, 190),
                    ("labels", 3, 0, 5400),
                    ("dead_letters", 3, 0, 86_000),
                )
            ],
            "dead_letters": [
                DeadLetterCount(stage="ingest", kind="rejected", count=2),
                DeadLetterCount(stage="analyze", kind="error", count=1),
            ],
            "problems": [Problem(service="llm", message="loading its model since 12 s; windows wait, nothing is lost")]
            if status == "waiting"
            else [],
        }
    )


def _event(story: Story, at: datetime, images: dict[tuple[str, str], bytes], *, offset: int, most: int) -> EventDetail:
    said = SAID[story.name]
    camera, name = story.camera, NAMES[story.camera]
    size = _SIZES[camera]
    seconds = (
        [round(i * (story.seconds - 1) / (most - 1)) for i in range(most)]
        if story.seconds > most
        else [*range(story.seconds)]
    )
    view = View(camera, random.Random(f"{DEFAULT_SEED}/{camera}").randrange(10**9))
    views: list[FrameView] = []
    for n, second in enumerate(seconds, 1):
        image, truth = render(
            view, cast(story, second, DEFAULT_SEED), story.weather, size=size, seed=DEFAULT_SEED + second, caption=""
        )
        out = io.BytesIO()
        image.save(out, "JPEG", quality=80)
        sha = hashlib.sha256(out.getvalue()).hexdigest()
        images[camera, sha] = out.getvalue()
        shown_at = at + timedelta(seconds=second)
        boxes = _boxes(truth, size, random.Random(f"{story.name}/{second}"))
        views.append(
            FrameView(
                frame_id=ids.frame_id(camera, sha, int(shown_at.timestamp() * 1000)),
                n=n,
                at=shown_at,
                matters=any(box.matters for box in boxes),
                width=size[0],
                height=size[1],
                image=image_address(camera, sha),
                sha256=sha,
                source="folder",
                source_name=f"{shown_at:%Y%m%dT%H%M%SZ}.jpg",
                captured_at=shown_at,
                arrived_at=shown_at + timedelta(milliseconds=180),
                position=f"frames-2@{4100 + offset + n}",
                detector="detector",
                detector_digest="5b0c2d6a1f3e4c9d8b7a6f5e4d3c2b1a",
                boxes=boxes,
            )
        )
    batch_id = ids.batch_id(camera, [frame.frame_id for frame in views])
    event_id = ids.event_id(batch_id)
    best = max(views, key=lambda frame: max((b.score for b in frame.boxes if b.matters), default=0))
    answer = {
        "reasoning": said.reasoning,
        "risk_factors": list(said.factors),
        "entities": list(said.entities),
        "summary": said.summary,
        "recommended_action": said.action,
        "risk_score": said.score,
    }
    asked = "\n".join(
        (
            f"camera: {name}",
            f"time: {at.astimezone(ZoneInfo(ZONE)):%Y-%m-%d %H:%M}",
            f"duration: {seconds[-1]} s",
            f"frames: {len(views)}",
            f"seen: {', '.join(said.entities)}",
        )
    )
    steps = tuple(
        Step(
            topic="detections",
            title=f"detections {frame.n}",
            record_id=frame.frame_id,
            position=frame.position.replace("frames", "detections"),
            made_by="detector on cpu",
            facts={"boxes": str(len(frame.boxes)), "took": "212 ms"},
            made_from=(
                Step(
                    topic="frames",
                    title=f"frame {frame.n}",
                    record_id=frame.frame_id,
                    position=frame.position,
                    made_by=f"folder {frame.source_name}",
                    facts={"sha256": frame.sha256, "image": "inside its record"},
                ),
            ),
        )
        for frame in views
    )
    window = Step(
        topic="batches",
        title="window",
        record_id=batch_id,
        position=f"batches-2@{88 + offset}",
        made_by="window settings 3f9a1c77d2b04e61",
        facts={"closed by": "idle", "frames": str(len(views))},
        made_from=steps,
    )
    context = Step(
        topic="contexts",
        title="context",
        record_id=batch_id,
        position=f"contexts-2@{88 + offset}",
        made_by="enrich",
        facts={},
        made_from=(window,),
    )
    return EventDetail(
        event_id=event_id,
        camera_id=camera,
        camera_name=name,
        time_zone=ZONE,
        started_at=at,
        ended_at=at + timedelta(seconds=seconds[-1]),
        judged_at=at + timedelta(seconds=seconds[-1] + 34),
        risk_score=said.score,
        risk_level=said.level,
        summary=said.summary,
        recommended_action=said.action,
        frames=len(views),
        model="Nemotron-Mini-4B-Instruct-Q4_K_M.gguf",
        cover=best.image,
        reasoning=said.reasoning,
        risk_factors=said.factors,
        entities=said.entities,
        batch_id=batch_id,
        closed_by="idle",
        prompt_digest="9d1e7c02b8f64a53",
        prompt_name="default",
        verdict_digest="c4b7e0912f6d4d18a3350f7e6b8c9d21",
        model_digest="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        parameters={"temperature": 0, "chat_template_kwargs": {"enable_thinking": False}},
        conditions={
            "slots": "1",
            "prompt cache": "off",
            "seed": "0",
            "build": "b7190",
            "threads": "2",
            "device": "cpu",
        },
        rendered_prompt=json.dumps([{"role": "system", "content": _PROMPT}, {"role": "user", "content": asked}]),
        raw_completion=json.dumps(answer),
        sections_dropped=(),
        prompt_tokens=412,
        completion_tokens=137,
        duration_ms=2840,
        context=(Section(name="zones", text="the front door opens onto the street"),) if camera == "front-door" else (),
        frame_views=tuple(views),
        lineage=Step(
            topic="risk_events",
            title="verdict",
            record_id=event_id,
            position=f"risk_events-2@{80 + offset}",
            made_by="Nemotron-Mini-4B-Instruct-Q4_K_M.gguf, prompt default",
            facts={"verdict digest": "c4b7e0912f6d4d18a3350f7e6b8c9d21"},
            made_from=(context,),
        ),
        labels=(),
    )


def _boxes(truth: list, size: tuple[int, int], rng: random.Random) -> tuple[Box, ...]:
    width, height = size
    found = [
        Box(
            label=box.label,
            score=round(rng.uniform(0.71, 0.97), 2),
            x=box.x0 * width - rng.random() * 3,
            y=box.y0 * height - rng.random() * 3,
            width=(box.x1 - box.x0) * width + rng.random() * 5,
            height=(box.y1 - box.y0) * height + rng.random() * 5,
            matters=True,
        )
        for box in truth
    ]
    for _ in range(rng.randint(0, 3)):
        x, y = rng.random() * 0.8 * width, (0.3 + rng.random() * 0.4) * height
        found.append(
            Box(
                label=rng.choice(("person", "bicycle", "potted plant", "car")),
                score=round(rng.uniform(0.1, 0.34), 2),
                x=x,
                y=y,
                width=width * rng.uniform(0.05, 0.16),
                height=height * rng.uniform(0.08, 0.2),
                matters=False,
            )
        )
    return tuple(found)

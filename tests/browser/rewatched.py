"""Two weeks of a household re-watched under another prompt: a comparison to report, with rendered frames.

The prompt expects deliveries and is stricter by night, as the one that comes with the product. What the models say is
written by hand; the figures are computed by the product.
"""

import functools
import io
import random
from datetime import datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from msgspec.structs import replace

from infra.models.scene import View, render
from infra.models.stories import DEFAULT_DAY, DEFAULT_SEED, STORIES, Story, cast
from processors.analyze.answers import risk_level
from processors.replay import statistics
from processors.replay.comparison import (
    Coverage,
    Difference,
    Ineligible,
    Noise,
    Pair,
    Regrouping,
    Side,
    Strict,
    Verdict,
)
from processors.replay.gathering import differences
from processors.replay.pairs import pairing
from processors.replay.pictures import thumbnail
from processors.replay.plan import Bound, Change, Plan, Scope
from processors.replay.report import LeftOut, Life, Part, Picture, PromptChange, Report, SeenBox, Told
from processors.replay.statistics import GivenLabel
from schemas import ids, prompts
from tests.browser.showcase import HOSTILE, NAMES, SAID, ZONE

REPLAY, BASELINE = "r3f09a1c27be", "r9d2e77b01f4"
NAME = "deliveries-strict-nights"
_MADE_AT = 1_773_700_000_000  # 2026-03-16 22:26 UTC, the evening after
_WEIGHTS = "4e1f0c9a7d2b5836" * 4


class _Again(NamedTuple):
    """What a side says of a story: a score around which it varies, and its words; None: as before."""

    score: int
    summary: str | None = None
    reasoning: str | None = None
    factors: tuple[str, ...] | None = None
    action: str | None = None


# Before, the parcels were alarms: the sort of thing that makes somebody change a sentence.
_BEFORE = {
    "parcel delivered": _Again(
        68,
        "A person walks up to the door with an object and leaves quickly",
        "Somebody comes from a stopped vehicle, puts something down at the door and goes away at once. An object left "
        "behind and a quick retreat are unusual.",
        ("object left behind", "quick retreat", "vehicle waits"),
        "notify",
    ),
    "unknown car by night": _Again(54),
    "two people at the back by night": _Again(74),
}
_AFTER = {
    "parcel delivered": _Again(
        16,
        "A courier leaves a parcel at the door and goes back to the van",
        "A person comes from a delivery truck in daylight, puts a parcel down and returns the same way within 14 "
        "seconds. Deliveries are expected here.",
        ("delivery vehicle", "daytime", "expected"),
        "none",
    ),
    "unknown car by night": _Again(
        66,
        "An unknown car slows down before the driveway at night and drives on",
        "One car slows at 01:20, pauses for four seconds before the driveway and goes on. Nights are to be judged "
        "strictly, and nobody is expected.",
        ("night", "vehicle slows down", "nobody expected"),
        "notify",
    ),
    "two people at the back by night": _Again(90),
}
_DAYS = 14


class _Window(NamedTuple):
    story: Story
    day: int
    camera: str
    frame_ids: tuple[str, ...]
    started_at: int


def made(*, days: int = _DAYS, baseline: bool = True, labels: bool = True, pictures: int = 100) -> Report:
    """The report, with a picture for at most so many flips."""
    rng = random.Random(8)
    windows = [window for day in range(days) for window in _day(day)]
    before = [_verdict(window, "live", _said(_BEFORE, window.story.name), rng, 5) for window in windows]
    after = [_verdict(window, REPLAY, _said(_AFTER, window.story.name), rng, 5) for window in windows]
    # What the new prompt makes worse, as new prompts do: on one night it talks itself out of an alarm.
    nights = [n for n, window in enumerate(windows) if window.story.name.startswith("two people")]
    worse = nights[min(2, len(nights) - 1)]
    after[worse] = _with(
        after[worse],
        41,
        "Two people stand by the fence at the back",
        "Two people wait by the fence and leave the way they came. They could be expecting a delivery.",
    )
    given = _labels(windows, before) if labels else []
    paired = pairing(before, after)
    again = [_verdict(window, BASELINE, _said(_BEFORE, window.story.name), rng, 2) for window in windows][::2]
    noise = statistics.noise(pairing(before[::2], again).pairs, BASELINE, f"{NAME}-baseline") if baseline else None
    found = statistics.compared(
        paired,
        given,
        noise,
        a=_side("live", before, "default"),
        b=_side(REPLAY, after, NAME),
        coverage=Coverage(
            planned=len(windows) + 2, units=len(windows) + 1, judged=len(windows), failed=1, complete=True
        ),
    )
    by_id = {verdict.event_id: window for window, verdict in zip(windows, before, strict=True)}
    shown = {
        flip.pair.a.event_id: _picture(by_id[flip.pair.a.event_id].story.name, by_id[flip.pair.a.event_id].day % 2)
        for flip in found.flips[:pictures]
    }
    return Report(
        comparison=found,
        told=_told(windows, before, _BEFORE)
        | _told(windows, after, _AFTER)
        | {after[worse].event_id: Told(reasoning=after[worse].reasoning, risk_factors=("two people", "no attempt"))},
        pictures=shown,
        prompts=(_change(len(windows)),),
        lives=tuple(_lives(noise, len(windows))),
        left_out=(
            LeftOut(
                what=f"windows of {NAME} that could not be judged",
                count=1,
                why="ExhaustedError: three answers in a row were no JSON",
                names=(windows[0].camera + ":5d1c0ffee0ddba11" if windows else "none",),
            ),
            LeftOut(
                what="records that nobody can read",
                count=1,
                why="cannot be read: schema 9f31c2 of contexts is not known to this version: upgrade the reader first",
                names=("contexts:a41b90c2:3:118",),
            ),
        ),
        made_at=_MADE_AT,
        time_zone=ZONE,
        version="0.1.0",
    )


def _day(day: int) -> list[_Window]:
    """Each story of a day, some of them not on all days."""
    found = []
    for number, story in enumerate(STORIES):
        if story.name not in SAID or (day + number) % 5 == 4:
            continue
        at = datetime.combine(DEFAULT_DAY - timedelta(days=day), story.at, ZoneInfo(ZONE)) + timedelta(minutes=7 * day)
        started = round(at.timestamp() * 1000)
        sha = ids.digest(story.name, str(day)) * 2
        frames = tuple(ids.frame_id(story.camera, sha, started + 1000 * n) for n in range(min(story.seconds, 20)))
        found.append(_Window(story, day, story.camera, frames, started))
    return found


def _said(told: dict[str, _Again], story: str) -> _Again:
    said = SAID[story]
    again = told.get(story, _Again(said.score))
    return _Again(
        again.score,
        again.summary or said.summary,
        again.reasoning or said.reasoning,
        again.factors or said.factors,
        again.action or said.action,
    )


def _verdict(window: _Window, run: str, said: _Again, rng: random.Random, around: int) -> Verdict:
    batch_id = ids.batch_id(window.camera, window.frame_ids)
    score = min(100, max(0, said.score + rng.randint(-around, around)))
    words = f"{said.summary}{score if run == BASELINE else ''}"
    digest = prompts.shipped()[NAME if run == REPLAY else "default"].digest
    return Verdict(
        event_id=ids.event_id(batch_id, run),
        batch_id=batch_id,
        camera_id=window.camera,
        started_at=window.started_at,
        ended_at=window.started_at + 1000 * (len(window.frame_ids) - 1),
        frame_ids=window.frame_ids,
        risk_score=score,
        risk_level=risk_level(score),
        summary=said.summary or "",
        reasoning=said.reasoning or "",
        recommended_action=said.action or "",
        camera_name=NAMES[window.camera],
        time_zone=ZONE,
        classes=tuple(sorted({role.kind for role in window.story.roles})),
        completion_digest=ids.digest(words, str(score)),
        prompt_digest=digest,
        verdict_digest=ids.digest(digest, _WEIGHTS),
        model="nemotron-mini-4b",
        model_digest=_WEIGHTS,
        reused=False,
        tokens=734,
    )


def _with(verdict: Verdict, score: int, summary: str, reasoning: str) -> Verdict:
    return replace(
        verdict,
        risk_score=score,
        risk_level=risk_level(score),
        summary=summary,
        reasoning=reasoning,
        recommended_action="review",
    )


def _labels(windows: list[_Window], verdicts: list[Verdict]) -> list[GivenLabel]:
    found = []
    for window, verdict in zip(windows, verdicts, strict=True):
        of = {"parcel delivered": "false_alarm", "two people at the back by night": "true_alarm"}.get(window.story.name)
        of = of or ("true_alarm" if window.story.name.startswith("visitor") else None)
        if of is None or window.day % 3 == 1:
            continue
        found.append(
            GivenLabel(
                label_id=ids.digest(verdict.event_id),
                camera_id=verdict.camera_id,
                started_at=verdict.started_at,
                ended_at=verdict.ended_at,
                verdict=of,
                event_id=verdict.event_id,
                frame_ids=verdict.frame_ids,
                labelled_at=verdict.ended_at + 60_000,
            )
        )
    return found


def _side(run: str, verdicts: list[Verdict], prompt: str) -> Side:
    digest = prompts.shipped()[prompt].digest
    live = run == "live"
    return Side(
        id=run,
        name="live" if live else NAME,
        kind="" if live else "change",
        mode="" if live else "fast",
        state="" if live else "done",
        change="" if live else f"prompt {NAME}",
        verdicts=len(verdicts),
        alarms=sum(verdict.alarm for verdict in verdicts),
        reused=0,
        tokens=sum(verdict.tokens for verdict in verdicts),
        prompts={digest: len(verdicts)},
        models={_WEIGHTS: len(verdicts)},
        prompt_names={digest: prompt},
        model_names={_WEIGHTS: "nemotron-mini-4b"},
    )


def _told(windows: list[_Window], verdicts: list[Verdict], told: dict[str, _Again]) -> dict[str, Told]:
    return {
        verdict.event_id: Told(reasoning=verdict.reasoning, risk_factors=_said(told, window.story.name).factors or ())
        for window, verdict in zip(windows, verdicts, strict=True)
    }


@functools.cache
def frame(name: str, variant: int) -> tuple[bytes, tuple[SeenBox, ...]]:
    """A rendered frame of a story, as the camera's JPEG, with what a detector would see."""
    story = next(story for story in STORIES if story.name == name)
    second = min(story.seconds - 1, story.seconds // 2 + variant)
    view = View(story.camera, random.Random(f"{DEFAULT_SEED}/{story.camera}").randrange(10**9))
    image, truth = render(
        view, cast(story, second, DEFAULT_SEED), story.weather, size=(640, 360), seed=DEFAULT_SEED + variant, caption=""
    )
    out = io.BytesIO()
    image.save(out, "JPEG", quality=86)
    rng = random.Random(f"{name}/{variant}")
    boxes = tuple(
        SeenBox(label=b.label, score=rng.uniform(0.72, 0.97), x=b.x0, y=b.y0, width=b.x1 - b.x0, height=b.y1 - b.y0)
        for b in truth
    )
    return out.getvalue(), boxes


def _picture(name: str, variant: int) -> Picture:
    data, boxes = frame(name, variant)
    small, width, height = thumbnail(data)
    return Picture(jpeg=small, width=width, height=height, boxes=boxes, n=8, of=14)


def _change(windows: int) -> PromptChange:
    before, after = prompts.default(), prompts.deliveries_strict_nights()
    return PromptChange(
        before=f"default ({before.digest[:12]})",
        after=f"{NAME} ({after.digest[:12]})",
        windows=windows,
        parts=differences(before, after),
    )


def _lives(noise: Noise | None, windows: int) -> list[Life]:
    digest = prompts.deliveries_strict_nights().digest
    plan = Plan(
        kind="change",
        scope=Scope(since=_MADE_AT - 14 * 86_400_000),
        change=Change(prompt=digest),
        share=0.5,
        baseline=BASELINE if noise is not None else "",
        upto=tuple(Bound(topic="contexts", epoch="a41b90c2", partition=n, offset=1400 + n) for n in range(4)),
        windows=windows,
    )
    conditions = {
        "slots": "2",
        "prompt_cache": "on",
        "seed": "0",
        "server_build": "b6700-3f1c2a9",
        "threads": "2",
        "device": "cpu",
    }
    life = Life(
        replay_id=REPLAY,
        name=NAME,
        role="Side B",
        state="done",
        detail=f"{windows} judged, 0 reused, 1 failed, 1 left out",
        plan=plan.encode(),
        planned_at=_MADE_AT - 900_000,
        updated_at=_MADE_AT - 120_000,
        first_at=_MADE_AT - 880_000,
        last_at=_MADE_AT - 125_000,
        calls=windows,
        conditions=conditions,
    )
    if noise is None:
        return [life]
    other = Plan(kind="baseline", scope=plan.scope, upto=plan.upto, windows=noise.compared)
    return [
        life,
        Life(
            replay_id=BASELINE,
            name=f"{NAME}-baseline",
            role="Noise",
            state="done",
            plan=other.encode(),
            planned_at=_MADE_AT - 900_000,
            first_at=_MADE_AT - 620_000,
            last_at=_MADE_AT - 130_000,
            calls=noise.compared,
            conditions=conditions,
        ),
    ]


def hostile(report: Report) -> Report:
    """The report with every text that a camera, a model or a person writes turned against whoever reads it."""
    bad = " ".join(HOSTILE)

    def verdict(one: Verdict, **more: str) -> Verdict:
        texts = dict.fromkeys(("summary", "reasoning", "recommended_action", "camera_name", "model"), bad)
        return replace(one, **texts, time_zone=HOSTILE[0], classes=HOSTILE, **more)

    def pair(one: Pair) -> Pair:
        return replace(one, a=verdict(one.a), b=verdict(one.b))

    found = report.comparison
    pairs = tuple(pair(one) for one in found.pairing.pairs)
    slices = tuple(replace(one, name=bad, title=bad) for one in found.by_camera)
    group = Regrouping(a=(pairs[0].a,), b=(pairs[0].b, pairs[1].b))
    digest = f"{HOSTILE[0]}{HOSTILE[1]}"
    side = {"name": bad, "change": bad, "kind": bad, "mode": bad, "state": bad, "id": bad}
    names = {"prompts": {digest: 1}, "models": {digest: 1}, "prompt_names": {digest: bad}, "model_names": {digest: bad}}
    strict = Strict(
        eligible=1,
        identical=0,
        differences=(Difference(event_id=bad, field=bad, position=1, a=bad, b=bad),),
        ineligible=(Ineligible(reason=bad, count=1, examples=HOSTILE),),
    )
    return replace(
        report,
        comparison=replace(
            found,
            a=replace(found.a, **side, **names),
            b=replace(found.b, **side, **names),
            pairing=replace(found.pairing, pairs=pairs, split=(group,), appeared=(pairs[0].b,), vanished=(pairs[0].a,)),
            flips=tuple(replace(one, pair=pair(one.pair)) for one in found.flips),
            by_camera=slices,
            by_class=slices,
            strict=strict,
            notes=HOSTILE,
        ),
        told={event: Told(reasoning=bad, risk_factors=HOSTILE) for event in report.told},
        pictures={
            event: replace(
                picture,
                jpeg=picture.jpeg if n else b"",
                missing=bad,
                seen_by=bad,
                boxes=tuple(replace(box, label=bad) for box in picture.boxes),
            )
            for n, (event, picture) in enumerate(report.pictures.items())
        },
        prompts=(
            PromptChange(
                before=bad,
                after=bad,
                windows=1,
                parts=(Part(file=bad, lines=(("@", bad), ("-", bad), ("+", f"{bad} more"), (" ", bad))),),
            ),
            PromptChange(before=bad, after=bad, windows=1, missing=bad),
        ),
        lives=tuple(
            replace(one, name=bad, role=bad, state=bad, detail=bad, plan=bad, conditions={bad: bad})
            for one in report.lives
        ),
        left_out=(LeftOut(what=bad, count=1, why=bad, names=HOSTILE),),
        version=bad,
    )

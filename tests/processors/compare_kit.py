"""What the tests of comparisons share: verdicts, labels and sides made up, by hand or by hypothesis."""

from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from processors.replay.comparison import LEVELS, Pair, Verdict
from processors.replay.statistics import GivenLabel
from schemas import ids
from tests import examples

AT = examples.AT
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""What takes long says nothing on a machine that has other things to do."""
CAMERAS = ("gate", "yard")


def level(score: int) -> str:
    """The level of a score, as the product computes it."""
    return "critical" if score >= 85 else "high" if score >= 60 else "medium" if score >= 30 else "low"


def verdict(
    frames: Sequence[int] = (0,), score: int = 50, *, camera: str = "gate", side: str = "a", **more: Any
) -> Verdict:
    """A verdict on the camera's frames of these numbers, a second each."""
    names = tuple(f"{camera}:f{n}" for n in frames)
    batch = ids.batch_id(camera, names)
    made = {
        "event_id": f"{batch}:{side}",
        "batch_id": batch,
        "camera_id": camera,
        "started_at": AT + 1000 * min(frames, default=0),
        "ended_at": AT + 1000 * max(frames, default=0),
        "frame_ids": names,
        "risk_score": score,
        "risk_level": level(score),
        "completion_digest": str(score),
    }
    return Verdict(**made | more)


def pair(a: int, b: int, n: int = 0, *, camera: str = "gate", **more: Any) -> Pair:
    """A pair on a camera's nth frame, with these scores."""
    return Pair(a=verdict([n], a, camera=camera, **more), b=verdict([n], b, camera=camera, side="b", **more))


def label(said: str, of: Verdict | None = None, *, n: int = 0, **more: Any) -> GivenLabel:
    """The nth label, on that verdict's event."""
    made: dict[str, Any] = {
        "label_id": f"l{n}",
        "camera_id": "gate",
        "started_at": AT,
        "ended_at": AT,
        "verdict": said,
        "labelled_at": AT + n,
    }
    if of is not None:
        made |= {
            "camera_id": of.camera_id,
            "started_at": of.started_at,
            "ended_at": of.ended_at,
            "event_id": of.event_id,
            "frame_ids": of.frame_ids,
        }
    return GivenLabel(**made | more)


@st.composite
def cut(draw: st.DrawFn, side: str) -> list[Verdict]:
    """One side as stages make it: each camera's 24 frames in windows one after the other, some frames in none."""
    found = []
    for camera in CAMERAS:
        at = 0
        while at < 24:
            length, skipped = draw(st.integers(1, 8)), draw(st.integers(0, 4))
            score = draw(st.integers(0, 100))
            frames = range(at + skipped, min(at + skipped + length, 24))
            if frames:
                found.append(verdict(frames, score, camera=camera, side=side))
            at += skipped + length
    return found


@st.composite
def anything(draw: st.DrawFn, side: str) -> list[Verdict]:
    """Verdicts as no stage makes them: the same frame in several windows, the same window twice, none at all."""
    some = st.builds(
        verdict,
        st.lists(st.integers(0, 6), max_size=5),
        st.integers(-5, 105),
        camera=st.sampled_from(CAMERAS),
        side=st.just(side),
        risk_level=st.sampled_from([*LEVELS, "unheard of"]),
        time_zone=st.sampled_from(["UTC", "Europe/Berlin", "no zone", "", "..", "Europe"]),
        started_at=st.integers(-(10**16), 10**16),
        ended_at=st.integers(-(10**16), 10**16),
        classes=st.lists(st.sampled_from(["person", "car"]), unique=True).map(tuple),
        completion_digest=st.text(max_size=2),
    )
    found = draw(st.lists(some, max_size=12))
    return [Verdict(**_fields(one) | {"event_id": f"{one.event_id}{n}"}) for n, one in enumerate(found)]


@st.composite
def labels(draw: st.DrawFn, of: Sequence[Verdict]) -> list[GivenLabel]:
    """Labels on these verdicts, and on spans where there may be none."""
    found = []
    for n in range(draw(st.integers(0, 8))):
        on = draw(st.sampled_from(of)) if of and draw(st.booleans()) else None
        said = draw(st.sampled_from(["true_alarm", "false_alarm", "missed"]))
        more = {"chance": draw(st.sampled_from([0.0, 0.25, 1.0, 1e-300, float("nan"), 7.0, -1.0]))}
        if on is None:
            began = AT + draw(st.integers(-5_000, 30_000))
            more |= {"started_at": began, "ended_at": began + draw(st.integers(-10, 10_000))}
        found.append(label(said, on, n=n, **more))
    return found


def _fields(one: Verdict) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__struct_fields__}

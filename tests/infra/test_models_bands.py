"""What was said of the stories is counted as its docstring says, also where that is no praise."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.models.bands import Said, summary, told
from infra.models.stories import STORIES, Footage, Frame

DAY = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def footage() -> Footage:
    """The night at the door (high or critical), the cat (low), the quiet night (nothing); a frame a second."""
    chosen = tuple(s for s in STORIES if "loiters" in s.name or "cat" in s.name or "quiet" in s.name)
    frames = []
    for story in chosen:
        began = datetime.combine(DAY, story.at, UTC)
        times = [began + timedelta(seconds=second) for second in range(story.seconds)]
        frames += [Frame(Path("x.jpg"), story.camera, story.name, at, ()) for at in times]
    return Footage(Path(), chosen, tuple(frames))


def said(clock: str, level: str, score: int, camera: str = "front-door") -> Said:
    at = datetime.fromisoformat(f"2026-05-01T{clock}+00:00")
    return Said(f"{camera}:{clock}", camera, at, level, score)


def counts(footage: Footage, *events: Said) -> tuple[int, int, int]:
    found = summary(told(footage, events))
    assert found["told"] == 3
    return found["events"], found["in_intended_band"], found["right"]


RIGHT = (said("12:05:00", "low", 4), said("23:14:10", "high", 71))


def test_each_story_judged_right_counts_and_a_quiet_one_needs_no_event(footage: Footage) -> None:
    assert counts(footage, *RIGHT) == (2, 2, 3)


def test_a_first_alarm_that_was_too_mild_counts_against_the_share_but_not_against_the_story(footage: Footage) -> None:
    assert counts(footage, *RIGHT, said("23:14:00", "medium", 55)) == (3, 2, 3)


def test_a_false_alarm_beside_the_right_event_makes_the_story_wrong(footage: Footage) -> None:
    assert counts(footage, *RIGHT, said("12:05:03", "high", 70)) == (3, 2, 2)


def test_an_event_in_a_quiet_night_counts_against_it(footage: Footage) -> None:
    assert counts(footage, *RIGHT, said("03:30:01", "low", 4)) == (3, 2, 2)


def test_a_story_of_which_nothing_was_said_is_an_event_that_is_missing(footage: Footage) -> None:
    assert counts(footage, RIGHT[1]) == (2, 1, 2)


def test_other_cameras_and_other_times_are_none_of_the_stories(footage: Footage) -> None:
    others = (said("12:05:00", "critical", 99, "gate"), said("12:06:00", "critical", 99), said("23:14:42", "low", 1))
    assert counts(footage, *RIGHT, *others) == (2, 2, 3)
    names = [one.story.name for one in told(footage, RIGHT)]
    assert names == ["quiet night", "cat at noon", "visitor loiters at the door by night"]

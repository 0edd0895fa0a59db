"""The day's stories against what was said of them: pure, of footage and events."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra.models.stories import Footage, Story


@dataclass(frozen=True)
class Said:
    """One event, as far as it matters here."""

    event_id: str
    camera: str
    started_at: datetime
    level: str
    score: int


@dataclass(frozen=True)
class Told:
    """A story and what was said of it.

    Attributes:
        story: What happened, with the levels that are right for it.
        began: Capture time of its first frame.
        said: The events that began at its camera within its time span, the riskiest first.
    """

    story: Story
    began: datetime
    said: tuple[Said, ...]

    @property
    def got(self) -> str:
        """The level of its riskiest event; empty where there was none."""
        return self.said[0].level if self.said else ""

    @property
    def right(self) -> bool:
        """Whether the riskiest event has one of the story's levels; a story without levels must have no event."""
        return self.got in self.story.levels if self.story.levels else not self.said

    @property
    def missed(self) -> bool:
        """Whether something happened of which nothing was said."""
        return bool(self.story.levels) and not self.said

    @property
    def in_band(self) -> int:
        """How many of its events have one of the story's levels, each counted for itself."""
        return sum(event.level in self.story.levels for event in self.said)


def told(footage: Footage, events: Iterable[Said]) -> list[Told]:
    """Each story of the footage with its events, in the order in which the stories happened.

    Events at other cameras or times are none of the footage's, and are left out.
    """
    events = list(events)
    found = []
    for story in footage.stories:
        times = [frame.captured_at for frame in footage.frames if frame.story == story.name]
        mine = [e for e in events if e.camera == story.camera and min(times) <= e.started_at <= max(times)]
        mine.sort(key=lambda event: (-event.score, event.started_at))
        found.append(Told(story, min(times), tuple(mine)))
    return sorted(found, key=lambda one: one.began)


def summary(stories: Sequence[Told]) -> dict[str, Any]:
    """The stories as `demo.json` has them.

    `events` counts the events within the stories' spans, and one more for every story that was missed;
    `in_intended_band` counts those events whose own level is one of their story's. So an event too many in a story's
    span, a first alarm that was too mild, and a story of which nothing was said all count against the share.
    `right` of `told` is milder: a story is right if its riskiest event has one of its levels.
    """
    return {
        "events": sum(len(one.said) + one.missed for one in stories),
        "in_intended_band": sum(one.in_band for one in stories),
        "told": len(stories),
        "right": sum(one.right for one in stories),
        "list": [
            {
                "name": one.story.name,
                "camera": one.story.camera,
                "began": one.began.isoformat(timespec="milliseconds"),
                "wanted": list(one.story.levels),
                "got": one.got,
                "right": one.right,
                "events": [{"event_id": e.event_id, "level": e.level, "score": e.score} for e in one.said],
            }
            for one in stories
        ],
    }

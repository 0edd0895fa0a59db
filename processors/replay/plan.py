"""What a replay is to do: its scope, its change and its limits, as the JSON that `replays` keeps. Pure.

A plan names everything that decides what is re-run, so that whoever takes a replay over makes the same units of it:
which part of the history (`scope`, and `upto`, how far the history went when it was planned), from which stage on
(`entry`), and what is different (`change`).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from schemas import ids
from schemas.records import Record, ReplayEvent, RiskEvent, WindowSettings

State = Literal["planned", "running", "paused", "cancelled", "done", "failed"]
ENDED: frozenset[str] = frozenset({"cancelled", "done"})
"""States that nothing leads out of. One that failed or was paused can be resumed."""

Entry = Literal["contexts", "detections", "frames"]
"""The stage's output that a replay begins with: what lies before it is taken as it was recorded."""


class PlanError(ValueError):
    """The plan cannot be made or read; the message says what to change."""


class Scope(Record, frozen=True, kw_only=True):
    """Which part of the history. Times are event times, milliseconds since the Unix epoch."""

    since: int | None = None
    """Windows that began from then on."""
    until: int | None = None
    """Windows that began before."""
    cameras: tuple[str, ...] = ()
    """Only these; empty: all."""
    where: str = ""
    """A condition in SQL on the columns of the view `events`; empty: none."""
    sample: int | None = None
    """So many windows of those, drawn by the hash of their batch ids: the same ones each time."""


class Llm(Record, frozen=True, kw_only=True):
    """Another LLM than the one that judges live windows."""

    url: str
    """Its server's base address, without /v1."""
    model: str = ""
    """The name to ask for; empty takes the server's first."""
    model_path: str = ""
    """Its GGUF file, where it is on this machine: events name its SHA-256."""


class Change(Record, frozen=True, kw_only=True):
    """What is different. Nothing: each window under the very prompt that judged it, which measures the noise."""

    prompt: str = ""
    """Digest of the prompt version; empty: the one that each window was judged with."""
    llm: Llm | None = None
    threshold: float | None = None
    """Score from which a box matters, 0 to 1."""
    idle_ms: int | None = None
    max_ms: int | None = None
    detector: str = ""
    """A model's name or folder; empty: the detections as they were recorded."""

    @property
    def entry(self) -> Entry:
        """Where it enters: as late as the change allows."""
        if self.detector:
            return "frames"
        return "detections" if self.cuts else "contexts"

    @property
    def cuts(self) -> bool:
        """Whether it makes windows anew by other settings."""
        return any(value is not None for value in (self.threshold, self.idle_ms, self.max_ms))

    def window(self, settings: WindowSettings) -> WindowSettings:
        """A camera's settings with the change made."""
        changed = {"threshold": self.threshold, "idle_ms": self.idle_ms, "max_ms": self.max_ms}
        return msgspec.structs.replace(settings, **{k: v for k, v in changed.items() if v is not None})


class Bound(Record, frozen=True, kw_only=True):
    """How far one partition of one life of a topic went: offsets below `offset` were there."""

    topic: str
    epoch: str
    partition: int
    offset: int


Kind = Literal["change", "baseline", "shadow"]
"""A change to be weighed, the same again (for the noise), or live windows judged by a second version as they come."""

Mode = Literal["fast", "strict"]


class Plan(Record, frozen=True, kw_only=True):
    """A replay, whole. `replays.plan` holds it as JSON."""

    kind: Kind
    mode: Mode = "fast"
    scope: Scope = Scope()
    change: Change = Change()
    share: float = 1.0
    """Of a replay: which share of the LLM's slots it may hold. Of a shadow: which share of live windows it judges."""
    max_tokens: int | None = None
    """Pause when so many tokens were spent, prompts and answers together."""
    baseline: str = ""
    """The replay that measured the noise for this one."""
    upto: tuple[Bound, ...] = ()
    """How far the history that it reads went when it was planned (topics `contexts`, `detections`, `frames`)."""
    since: tuple[Bound, ...] = ()
    """Where `replay_units`, `replay_events` and `dead_letters` (a shadow: `contexts`) ended then: it begins there."""
    windows: int = 0
    """Windows to judge, as far as known when it was planned."""
    frames: int = 0
    """Frames to look at again, or whose detections are cut anew."""

    def encode(self) -> str:
        """As JSON."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> "Plan":
        """From JSON; fields that a later version added are left out.

        Raises:
            PlanError: it is none.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise PlanError(f"not a replay's plan: {error}") from error


class Unit(NamedTuple):
    """The name of one unit of a replay."""

    replay_id: str
    of: str
    """A batch id (kind judge) or a frame id (kind detect)."""

    def __str__(self) -> str:
        return f"{self.replay_id}:{self.of}"


def event_of(replay_id: str, event: RiskEvent, *, reused: bool) -> ReplayEvent:
    """A verdict as a replay's, made in its run; `reused`: no call was made for it."""
    return ReplayEvent(
        replay_id=replay_id,
        unit_id=str(Unit(replay_id, event.batch_id)),
        event_id=event.event_id,
        camera_id=event.camera_id,
        reused=reused,
        event=event,
    )


def replay_id(name: str, at: int) -> str:
    """A replay's id: a digest of its name and the time it was made, milliseconds since the Unix epoch."""
    return "r" + ids.digest(name, str(at))[:11]


def offsets(bounds: tuple[Bound, ...], topic: str) -> Iterator[Bound]:
    """The bounds of one topic."""
    return (bound for bound in bounds if bound.topic == topic)

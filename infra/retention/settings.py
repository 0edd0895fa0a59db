"""The `retention:` section of rewatch.yaml."""

import re
from datetime import timedelta
from itertools import pairwise
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from streams.retention import SHORTENED
from streams.topics import TOPICS

_SPAN = re.compile(r"([1-9][0-9]{0,5})(h|d|w|y)")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24, "y": 365 * 24}

LEVELS = ("low", "medium", "high", "critical")
"""Risk levels, the gravest last."""
CLASSES = (*LEVELS, "unjudged", "quiet", "replays", "gpu_metrics", "dead_letters")
"""What ClickHouse keeps, by what decides how long; each has a setting of its own."""


def span(text: str) -> timedelta:
    """A span as it is written in settings: `12h`, `30d`, `8w`, `1y` (365 days).

    Raises:
        ValueError: it is none.
    """
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError("no span of time: write 12h, 30d, 8w or 1y, or leave it out to keep everything")
    return timedelta(hours=int(match[1]) * _HOURS[match[2]])


def _checked(text: str) -> str:
    span(text)
    return text


Span = Annotated[str, AfterValidator(_checked)]


class RetentionSettings(BaseModel):
    """How long things are kept. What is not set is kept for ever: nobody loses an event without having said so.

    Ages count from when ClickHouse took a record, not from when its picture was taken: an archive that is taken in
    today is a day old tomorrow. `rewatch gc --dry-run` says what would go, `rewatch gc` lets it go.
    """

    model_config = ConfigDict(extra="forbid")

    low: Span | None = Field(
        None, description="Events of level low in ClickHouse, with all they were made from: 12h, 30d, 8w, 1y."
    )
    medium: Span | None = Field(None, description="Events of level medium, likewise; not shorter than low.")
    high: Span | None = Field(None, description="Events of level high, likewise; not shorter than medium.")
    critical: Span | None = Field(None, description="Events of level critical, likewise; not shorter than high.")
    unjudged: Span | None = Field(None, description="Windows that have no verdict, with all they were made from.")
    quiet: Span | None = Field(
        None, description="Frames that are in no window, their images, and what was seen in them: by far the most."
    )
    replays: Span | None = Field(None, description="Work and verdicts of replays that ended.")
    gpu_metrics: Span | None = Field(None, description="Readings of GPUs.")
    dead_letters: Span | None = Field(
        None, description="Dead letters of files that were not taken, and of records that are gone."
    )
    trash: Span = Field(
        "1d",
        description="How long an image that nothing claims any more lies in the image store's .trash before it is "
        "deleted for good.",
    )
    topics: dict[str, Span] = Field(
        default_factory=dict,
        description="How long the broker keeps a topic, by its name; choose it longer than the longest outage that "
        f"is to be survived. May be set for {', '.join(SHORTENED)}.",
    )

    @field_validator("topics")
    @classmethod
    def _only_those_that_may_go(cls, topics: dict[str, str]) -> dict[str, str]:
        for name in topics:
            if name not in TOPICS:
                raise ValueError(f"{name}: there is no such topic; there are {', '.join(SHORTENED)}")
            if name not in SHORTENED:
                raise ValueError(
                    f"{name} is kept for ever: its history is the product, or a stage's memory; "
                    f"only {', '.join(SHORTENED)} can be shortened"
                )
        return topics

    @model_validator(mode="after")
    def _the_graver_the_longer(self) -> Self:
        for milder, graver in pairwise(LEVELS):
            long, short = getattr(self, milder), getattr(self, graver)
            if short is not None and (long is None or span(short) < span(long)):
                kept = f"retention.{milder} {'keeps for ever' if long is None else f'is {long}'}"
                raise ValueError(
                    f"retention.{graver} is {short} and {kept}: graver events would go first; "
                    f"set retention.{milder} to at most {short}, or retention.{graver} longer"
                )
        return self

    @property
    def kept(self) -> dict[str, timedelta]:
        """How long each of `CLASSES` is kept; what is kept for ever is not in it."""
        return {name: span(value) for name in CLASSES if (value := getattr(self, name)) is not None}

    @property
    def topics_ms(self) -> dict[str, int]:
        """How long the broker is told to keep each topic, milliseconds."""
        return {name: round(span(value).total_seconds() * 1000) for name, value in self.topics.items()}

"""The `windows:` section of rewatch.yaml: what opens and closes a camera's windows unless the camera says other."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from schemas.records import WindowSettings

Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

# The detector hands on boxes of at least this score: below it there is nothing to set a threshold among.
_LEAST_SCORE = 0.10

# A frame of 100 boxes takes 4 KB of a batch: this many stay below the 1 MB that every broker takes.
MOST_FRAMES = 200

# Long enough for any camera; what is longer is a unit mistaken, milliseconds for seconds.
_LONGEST_S = 3600.0


class WindowsSettings(BaseModel):
    """Default window settings; times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    open_on: tuple[Label, ...] = Field(
        # What a site wants to hear of, of the 80 classes of COCO: people, vehicles, and animals that roam.
        ("person", "bicycle", "car", "motorcycle", "bus", "truck", "bird", "cat", "dog"),
        min_length=1,
        description="Classes that open a window, as the model names them.",
    )
    threshold: float = Field(
        0.5,
        ge=_LEAST_SCORE,
        le=1,
        description="Least score at which a detection matters; the detector records from 0.10 on.",
    )
    idle_s: float = Field(
        30.0,
        ge=0.001,
        le=_LONGEST_S,
        description="A window closes after this long without a frame that matters.",
    )
    max_s: float = Field(
        # Three times the idle limit: longer, and the verdict comes too late for anyone to act on.
        90.0,
        ge=0.001,
        le=_LONGEST_S,
        description="A window closes at this length.",
    )
    max_frames: int = Field(
        # One frame every two seconds for the 90 s, and some: what a prompt can still tell frame by frame.
        50,
        ge=1,
        le=MOST_FRAMES,
        description="A window closes at this many frames.",
    )
    fast_label: str = Field(
        "person",
        description='Class whose sure sighting closes a window at once; "" turns the fast path off.',
    )
    fast_score: float = Field(0.90, ge=_LEAST_SCORE, le=1, description="Score from which a sighting is sure.")
    fast_cooldown_s: float = Field(
        # As long as a window: who stays is judged at once, then by ordinary windows.
        90.0,
        ge=0,
        le=24 * _LONGEST_S,
        description="At most one fast close per camera in this long.",
    )
    stationary_iou: float = Field(
        # A detector's box of a parked car jitters by a few percent: 0.85 bears a shift of 4 % of both its sides.
        0.85,
        gt=0,
        le=1,
        description="Overlap (intersection over union) from which a box has not moved.",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_s < self.idle_s:
            raise ValueError(f"idle_s ({self.idle_s:g}) exceeds max_s ({self.max_s:g}): lower idle_s or raise max_s")
        if self.fast_label and self.fast_label not in self.open_on:
            raise ValueError(
                f'fast_label "{self.fast_label}" is not in open_on, so it never opens a window: '
                'add it there, or set fast_label to ""',
            )
        if self.fast_label and self.fast_score < self.threshold:
            raise ValueError(
                f"fast_score ({self.fast_score:g}) lies below threshold ({self.threshold:g}): raise fast_score",
            )
        return self

    def record(self) -> WindowSettings:
        """The settings as they travel on the log, times in milliseconds."""
        return WindowSettings(
            open_on=self.open_on,
            threshold=self.threshold,
            idle_ms=round(self.idle_s * 1000),
            max_ms=round(self.max_s * 1000),
            max_frames=self.max_frames,
            fast_label=self.fast_label,
            fast_score=self.fast_score,
            fast_cooldown_ms=round(self.fast_cooldown_s * 1000),
            stationary_iou=self.stationary_iou,
        )

    @classmethod
    def of(cls, settings: WindowSettings) -> Self:
        """A camera's settings as a person edits them.

        Raises:
            ValidationError: they could not have been set this way.
        """
        return cls(
            open_on=settings.open_on,
            threshold=settings.threshold,
            idle_s=settings.idle_ms / 1000,
            max_s=settings.max_ms / 1000,
            max_frames=settings.max_frames,
            fast_label=settings.fast_label,
            fast_score=settings.fast_score,
            fast_cooldown_s=settings.fast_cooldown_ms / 1000,
            stationary_iou=settings.stationary_iou,
        )

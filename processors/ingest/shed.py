"""Shedding: what ingest does with new frames while the stages behind it cannot keep up.

The log is the buffer: what is accepted waits there, on disk, and no stage holds more of it than its bounds. So nothing
has to be shed for memory's sake, and by default nothing is. Whoever would rather have late pictures than old alarms
switches it on. Then, while more waits than `detect_above` or `analyze_above` say, whoever can wait is told to: uploads
are answered with 429, files stay where they lie. A camera's snapshot cannot wait; it is dropped, and its dead letter
of kind `shed` says so. Below `detect_below` and `analyze_below` everything is taken again.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import structlog
from aiokafka.errors import KafkaError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

BACKLOG = "backlog"
"""What ingest says that it waits on."""

Look = Callable[[], Awaitable[Mapping[str, int]]]
"""Says how many records wait before a stage, by stage."""


class ShedSettings(BaseModel):
    """What is done with new frames while detect or the LLM cannot keep up."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(
        default=False,
        description="Take no new frames while too many wait. Off: everything is accepted and waits on the log.",
    )
    drop: tuple[Literal["snapshot", "folder"], ...] = Field(
        default=("snapshot",),
        description="Whose frames are dropped meanwhile, each with a dead letter of kind `shed` without its bytes. The "
        "others wait: files stay where they are, cameras are not asked. Uploads are answered with 429 in any case.",
    )
    # Thirty cameras at one frame a second fill it in a minute; a GPU is through it in some twenty seconds.
    detect_above: int = Field(default=2000, ge=1, description="Shed while more frames than this wait for the detector.")
    detect_below: int = Field(default=500, ge=0, description="... until no more than this wait.")
    # At the 40 s a window that a mid-size LLM takes on a CPU, 200 are two hours.
    analyze_above: int = Field(default=200, ge=1, description="Shed while more windows than this wait for the LLM.")
    analyze_below: int = Field(default=50, ge=0, description="... until no more than this wait.")
    look_s: float = Field(default=5.0, gt=0, description="How often to look at what waits, seconds.")
    retry_after_s: float = Field(default=30.0, gt=0, description="When refused uploads may come again, seconds.")

    @model_validator(mode="after")
    def _hysteresis(self) -> "ShedSettings":
        for stage, above, below in self.bounds():
            if below >= above:
                raise ValueError(f"ingest.shed.{stage}_below must be less than {stage}_above")
        return self

    def bounds(self) -> tuple[tuple[str, int, int], ...]:
        """`(stage, above, below)` of each stage that is looked at."""
        return (
            ("detect", self.detect_above, self.detect_below),
            ("analyze", self.analyze_above, self.analyze_below),
        )


class Shed:
    """Whether frames are shed now, and whose."""

    def __init__(self, settings: ShedSettings) -> None:
        self.settings = settings
        self.waiting: Mapping[str, int] = {}
        """How many records waited before each stage at the last look."""
        self._over: set[str] = set()

    @property
    def why(self) -> str:
        """Why frames are shed now; empty while none are."""
        said = [
            f"{self.waiting[stage]:,} records wait for {stage} (ingest.shed.{stage}_above: {above:,})"
            for stage, above, _ in self.settings.bounds()
            if stage in self._over
        ]
        return " and ".join(said)

    def drops(self, source: Literal["snapshot", "folder"]) -> bool:
        """Whether a frame of this source is to be dropped now."""
        return bool(self._over) and source in self.settings.drop

    def check(self, source: Literal["snapshot", "folder"]) -> None:
        """Go on, or not now.

        Raises:
            UnavailableError: frames are shed, and those of this source wait.
        """
        if self._over and source not in self.settings.drop:
            raise UnavailableError(BACKLOG, self.why)

    def seen(self, waiting: Mapping[str, int]) -> None:
        """Take the result of a look: begin above the upper bound, end at the lower one."""
        was = self.why
        self.waiting = waiting
        for stage, above, below in self.settings.bounds():
            if waiting.get(stage, 0) > above:
                self._over.add(stage)
            elif waiting.get(stage, 0) <= below:
                self._over.discard(stage)
        if self.why and not was:
            log.warning("shedding", why=self.why, drop=self.settings.drop)
        elif was and not self.why:
            log.info("taking everything again", **waiting)

    async def run(self, look: Look, stop: asyncio.Event) -> None:
        """Look every few seconds until told to stop. While the broker does not answer, what was so holds."""
        while self.settings.enabled and not stop.is_set():
            try:
                self.seen(await look())
            except (KafkaError, TimeoutError, OSError) as error:
                log.info("backlog not known", why=repr(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.settings.look_s)

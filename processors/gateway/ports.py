"""What the gateway's pages and API need of the world. The fake is in `fakes`, the real one in `source`."""

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Protocol

from processors.gateway.models import (
    CameraCard,
    CameraName,
    EventDetail,
    EventList,
    EventSummary,
    Health,
    Label,
    Level,
    NewLabel,
    Timeline,
)


class NotFoundError(Exception):
    """There is no such event, camera or image; the message says what is near, where something is."""


class InvalidError(Exception):
    """This cannot be done as it was asked; the message says what would be right."""


class Source(Protocol):
    """Everything that is shown. Methods raise `UnavailableError` while what they need is away."""

    async def events(
        self,
        *,
        camera: str | None = None,
        level: Level | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> EventList:
        """Live events, newest first. `level` means this level or above; `before` is the last page's `next`.

        Raises:
            InvalidError: `before` is none that was given out.
        """

    def live(self, *, after: str | None = None) -> AsyncGenerator[tuple[str, EventSummary]]:
        """Events as they come into ClickHouse, each with a cursor; `after` resumes behind a cursor.

        It ends when its reader is too slow, or the gateway stops; whoever resumes with the last cursor misses nothing.

        Raises:
            InvalidError: `after` is none that was given out.
        """

    async def event(self, event_id: str) -> EventDetail:
        """One event whole; the id may be a beginning that only one has.

        Raises:
            NotFoundError: there is none.
        """

    async def beside(self, event: EventSummary) -> tuple[EventSummary | None, EventSummary | None]:
        """The live event before this one on its camera, and the one behind it; None where there is none."""

    async def image(self, camera_id: str, sha256: str) -> bytes:
        """A frame's JPEG.

        Raises:
            NotFoundError: no frame of this camera has these bytes, or they are not kept any more.
        """

    async def camera_names(self) -> tuple[CameraName, ...]:
        """Every camera that was set or sent a frame, by name."""

    async def cameras(self) -> tuple[CameraCard, ...]:
        """The same, each with how it is: for whoever shows that, as it asks for much more."""

    async def timeline(self, camera_id: str, since: datetime, until: datetime) -> Timeline:
        """What a camera did in a span of at most 31 days.

        Raises:
            NotFoundError: there is no such camera.
            InvalidError: the span is none, or longer.
        """

    async def health(self) -> Health:
        """How the pipeline is now, at most two seconds old. It never raises: what is away is a problem in it."""

    async def label(self, new: NewLabel) -> Label:
        """Put a person's label on the log.

        Raises:
            NotFoundError: there is no such event or camera.
            InvalidError: it names neither an event nor a span, or both, or a span that ends before it begins.
        """

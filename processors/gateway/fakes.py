"""A source for tests and previews: it holds what it is given, answers as the real one, and can be told to be away."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from processors.gateway.models import (
    CameraCard,
    CameraName,
    EventDetail,
    EventList,
    EventSummary,
    Gap,
    Health,
    Hour,
    Label,
    Level,
    NewLabel,
    Timeline,
)
from processors.gateway.ports import InvalidError, NotFoundError

if TYPE_CHECKING:
    from streams.errors import UnavailableError

_LEVELS: tuple[Level, ...] = ("low", "medium", "high", "critical")
_SUMMARY = tuple(EventSummary.model_fields)


class FakeSource:
    """Events, cameras and images from memory. `away` makes every answer fail, but the health's, until it is unset."""

    def __init__(
        self,
        *,
        cameras: Sequence[CameraCard] = (),
        events: Sequence[EventDetail] = (),
        images: Mapping[tuple[str, str], bytes] | None = None,
        frames: Mapping[str, Sequence[datetime]] | None = None,
        gaps: Mapping[str, Sequence[Gap]] | None = None,
        health: Health | None = None,
    ) -> None:
        """Holds these.

        Args:
            cameras: in the order in which they are shown.
            events: in any order.
            images: JPEGs by camera and sha256.
            frames: arrival times by camera, for timelines.
            gaps: by camera.
            health: as it is given; otherwise all is well.
        """
        self.away: UnavailableError | None = None
        self.given: list[NewLabel] = []
        self._cameras = {camera.camera_id: camera for camera in cameras}
        self._events = {event.event_id: event for event in sorted(events, key=lambda event: event.started_at)}
        self._images = dict(images or {})
        self._frames = dict(frames or {})
        self._gaps = dict(gaps or {})
        self._labels: list[Label] = []
        self._health = health
        self._came: list[EventDetail] = []
        self._news = asyncio.Condition()
        self._ended = False

    async def add(self, event: EventDetail) -> None:
        """An event that comes in now: those who follow are told."""
        async with self._news:
            self._events[event.event_id] = event
            self._came.append(event)
            self._news.notify_all()

    async def end(self) -> None:
        """Those who follow are let go, as when the gateway stops."""
        async with self._news:
            self._ended = True
            self._news.notify_all()

    def set_health(self, health: Health) -> None:
        """What `health` answers from now on."""
        self._health = health

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
        """As the port says; a cursor is the id of the last event given out."""
        self._check()
        newest = sorted(self._events.values(), key=lambda event: (event.started_at, event.event_id), reverse=True)
        if before is not None:
            places = [place for place, event in enumerate(newest) if event.event_id == before]
            if not places:
                raise InvalidError(f"before={before}: no page ended there")
            newest = newest[places[0] + 1 :]
        least = _LEVELS.index(level) if level else 0
        found = [
            event
            for event in newest
            if camera in {None, event.camera_id}
            and _LEVELS.index(event.risk_level) >= least
            and (since is None or event.started_at >= since)
            and (until is None or event.started_at < until)
        ]
        more = len(found) > limit
        page = tuple(_summary(event) for event in found[:limit])
        return EventList(events=page, next=page[-1].event_id if more else None)

    def live(self, *, after: str | None = None) -> AsyncGenerator[tuple[str, EventSummary]]:
        """What `add` brings; a cursor is how many came before and with it."""
        self._check()
        if after is not None and not (after.isdecimal() and int(after) <= len(self._came)):
            raise InvalidError(f"after={after}: none that was given out")
        return self._live(len(self._came) if after is None else int(after))

    async def _live(self, seen: int) -> AsyncGenerator[tuple[str, EventSummary]]:
        while True:
            async with self._news:
                while len(self._came) <= seen and not self._ended:
                    await self._news.wait()
                if self._ended:
                    return
                event = self._came[seen]
            seen += 1
            yield str(seen), _summary(event)

    async def event(self, event_id: str) -> EventDetail:
        """As the port says."""
        self._check()
        if event_id in self._events:
            return self._events[event_id]
        like = [event for event in self._events.values() if event.event_id.startswith(event_id)]
        if len(like) == 1:
            return like[0]
        raise NotFoundError(f"there is no event {event_id}")

    async def beside(self, event: EventSummary) -> tuple[EventSummary | None, EventSummary | None]:
        """As the port says."""
        self._check()
        own = sorted(
            (other for other in self._events.values() if other.camera_id == event.camera_id),
            key=lambda other: (other.started_at, other.event_id),
        )
        place = [other.event_id for other in own].index(event.event_id)
        older = _summary(own[place - 1]) if place else None
        newer = _summary(own[place + 1]) if place + 1 < len(own) else None
        return older, newer

    async def image(self, camera_id: str, sha256: str) -> bytes:
        """As the port says."""
        self._check()
        try:
            return self._images[camera_id, sha256]
        except KeyError:
            raise NotFoundError(f"camera {camera_id} has no image {sha256}") from None

    async def camera_names(self) -> tuple[CameraName, ...]:
        """The names of those that were given."""
        self._check()
        return tuple(
            CameraName(camera_id=camera.camera_id, name=camera.name, time_zone=camera.time_zone)
            for camera in self._cameras.values()
        )

    async def cameras(self) -> tuple[CameraCard, ...]:
        """As they were given."""
        self._check()
        return tuple(self._cameras.values())

    async def timeline(self, camera_id: str, since: datetime, until: datetime) -> Timeline:
        """Hours counted from the frames and events given."""
        self._check()
        camera = self._camera(camera_id)
        if not timedelta() < until - since <= timedelta(days=31):
            raise InvalidError("a timeline is at most 31 days long")
        events = [e for e in self._events.values() if e.camera_id == camera_id and since <= e.started_at < until]
        hours = []
        at = since
        while at < until:
            end = at + timedelta(hours=1)
            within = [event for event in events if at <= event.started_at < end]
            seen = Counter(box.label for event in within for frame in event.frame_views for box in frame.boxes)
            hours.append(
                Hour(
                    hour=at,
                    frames=sum(at <= frame < end for frame in self._frames.get(camera_id, ())),
                    detections=dict(seen),
                    windows=len(within),
                    events=len(within),
                    top_level=max((e.risk_level for e in within), key=_LEVELS.index, default=None),
                )
            )
            at = end
        return Timeline(
            camera=camera,
            since=since,
            until=until,
            hours=tuple(hours),
            events=tuple(_summary(event) for event in reversed(events)),
            gaps=tuple(
                gap
                for gap in self._gaps.get(camera_id, ())
                if gap.started_at < until and (gap.ended_at is None or gap.ended_at > since)
            ),
            labels=tuple(
                label
                for label in reversed(self._labels)
                if label.camera_id == camera_id and label.started_at < until and label.ended_at > since
            ),
        )

    async def health(self) -> Health:
        """As it was given; what is away is a problem in it."""
        if self._health is not None:
            return self._health
        return Health(
            at=datetime.now(UTC),
            status="ok",
            system="rewatch",
            detector="",
            analyst="",
            stages=(),
            topics=(),
            dead_letters=(),
            problems=(),
        )

    async def label(self, new: NewLabel) -> Label:
        """Keeps it, and shows it on its event at once."""
        self._check()
        if new.event_id is not None and (new.camera_id or new.started_at or new.ended_at):
            raise InvalidError("a label names an event or a span, not both")
        event = await self.event(new.event_id) if new.event_id is not None else None
        camera_id = event.camera_id if event else new.camera_id
        started_at, ended_at = (event.started_at, event.ended_at) if event else (new.started_at, new.ended_at)
        if camera_id is None or started_at is None or ended_at is None:
            raise InvalidError("a label names an event, or a camera and a span")
        self._camera(camera_id)
        if ended_at < started_at:
            raise InvalidError("the span ends before it begins")
        self.given.append(new)
        label = Label(
            label_id=f"label-{len(self.given)}",
            camera_id=camera_id,
            started_at=started_at,
            ended_at=ended_at,
            verdict=new.verdict,
            event_id=event.event_id if event else None,
            author=new.author,
            note=new.note,
            labelled_at=datetime.now(UTC),
        )
        self._labels.append(label)
        if event is not None:
            labels = (label, *event.labels)
            self._events[event.event_id] = event.model_copy(update={"label": new.verdict, "labels": labels})
        return label

    def _camera(self, camera_id: str) -> CameraCard:
        try:
            return self._cameras[camera_id]
        except KeyError:
            raise NotFoundError(f"there is no camera {camera_id}") from None

    def _check(self) -> None:
        if self.away is not None:
            raise self.away


def _summary(event: EventDetail) -> EventSummary:
    return EventSummary(**{name: getattr(event, name) for name in _SUMMARY})

"""The real `Source`: ClickHouse for what was, the log for what is and for labels, the image store for pictures."""

import asyncio
import base64
import binascii
import difflib
import json
from collections.abc import AsyncGenerator, Collection
from datetime import UTC, datetime, timedelta

from processors.gateway import activity
from processors.gateway.detail import covers_half, event_detail, label_of
from processors.gateway.health import Pulse
from processors.gateway.images import Images
from processors.gateway.labels import Labels
from processors.gateway.live import Cursor, Feed
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
from processors.gateway.ports import InvalidError, NotFoundError
from processors.gateway.reads import Key, Reads, camera_of, ms
from processors.gateway.summaries import Summaries
from processors.store.queries import Queries, Row
from streams.labels import LONGEST_MISSED

LEVELS: tuple[Level, ...] = ("low", "medium", "high", "critical")

_LONGEST = timedelta(days=31)
_TIMELINE_EVENTS = 500
_DAY = timedelta(days=1)

# What counts as seen on a camera for which nothing was set: the default of `windows.threshold`.
_THRESHOLD = 0.5

# How many of the newest events are looked at for one that is named nearly so.
_NEAR = 500


class StoredSource:
    """Everything that is shown; see the port."""

    def __init__(
        self, queries: Queries, images: Images, labels: Labels, pulse: Pulse, *, toys: Collection[str] = ()
    ) -> None:
        self._queries = queries
        self._reads = Reads(queries)
        self._images = images
        self._labels = labels
        self._pulse = pulse
        self._toys = toys
        self._summaries = Summaries(self._reads, labels)
        self.feed = Feed(self._reads, self._summaries.of)

    async def close(self) -> None:
        """End the live feed and close the connection to ClickHouse."""
        await self.feed.close()
        await self._queries.aclose()

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
        """A page of events; see the port."""
        keys = await self._reads.page(
            camera=camera,
            levels=() if level is None else LEVELS[LEVELS.index(level) :],
            since=since,
            until=until,
            before=None if before is None else _parse(before),
            limit=limit + 1,
        )
        shown = keys[:limit]
        return EventList(
            events=tuple(await self._summaries.of([key.event_id for key in shown])),
            next=_mark(shown[-1]) if len(keys) > limit else None,
        )

    def live(self, *, after: str | None = None) -> AsyncGenerator[tuple[str, EventSummary]]:
        """Events as they come; see the port."""
        return self.feed.events(None if after is None else Cursor.parse(after))

    async def event(self, event_id: str) -> EventDetail:
        """One event whole; see the port."""
        row = await self._find(event_id)
        [[summary], lineage, settings, prompt_name, touching] = await asyncio.gather(
            self._summaries.of([row["event_id"]]),
            self._queries.made_from(row),
            self._reads.settings_of(row["camera_id"]),
            self._reads.prompt_name(row["prompt_digest"]),
            self._reads.labels_in(row["camera_id"], row["started_at"], row["ended_at"]),
        )

        def wanted(label: Label) -> bool:
            return label.event_id == row["event_id"] or (
                label.camera_id == row["camera_id"] and covers_half(label, row["started_at"], row["ended_at"])
            )

        stored = [label for label in map(label_of, touching) if wanted(label)]
        labels = self._labels.with_given(stored, wanted)
        return event_detail(
            summary, lineage, settings=settings, prompt_name=prompt_name, labels=labels, toys=self._toys
        )

    async def beside(self, event: EventSummary) -> tuple[EventSummary | None, EventSummary | None]:
        """Its neighbours in time; see the port."""
        key = Key(event.started_at, event.event_id)
        older, newer = await asyncio.gather(
            self._reads.page(camera=event.camera_id, before=key, limit=1), self._reads.next(event.camera_id, key)
        )
        found = {s.event_id: s for s in await self._summaries.of([near.event_id for near in (*older, *newer)])}
        return found.get(older[0].event_id) if older else None, found.get(newer[0].event_id) if newer else None

    async def image(self, camera_id: str, sha256: str) -> bytes:
        """A frame's JPEG; see the port."""
        return await self._images.get(camera_id, sha256)

    async def camera_names(self) -> tuple[CameraName, ...]:
        """Every camera's name; see the port."""
        return tuple(sorted(map(activity.name, await self._reads.camera_names()), key=_by_name))

    async def cameras(self) -> tuple[CameraCard, ...]:
        """Every camera; see the port."""
        return tuple(sorted(await self._cards(), key=_by_name))

    async def timeline(self, camera_id: str, since: datetime, until: datetime) -> Timeline:
        """What a camera did; see the port."""
        since, until = _utc(since), _utc(until)
        if not timedelta(0) < until - since <= _LONGEST:
            raise InvalidError("`until` must lie behind `since`, by 31 days at most")
        card = await self._camera(camera_id)
        settings = await self._reads.settings_of(camera_id)
        threshold = float(settings[0]["window_threshold"]) if settings else _THRESHOLD
        hours, pauses, keys, stored = await asyncio.gather(
            self._reads.hours(camera_id, since, until, threshold),
            self._reads.pauses(camera_id, since, until, activity.LEAST_GAP),
            self._reads.page(camera=camera_id, since=since, until=until, limit=_TIMELINE_EVENTS),
            self._reads.labels_in(camera_id, since, until),
        )
        labels = self._labels.with_given(
            map(label_of, stored),
            lambda label: label.camera_id == camera_id and label.ended_at >= since and label.started_at <= until,
        )
        return Timeline(
            camera=card,
            since=since,
            until=until,
            hours=tuple(activity.hours(since, until, hours)),
            events=tuple(await self._summaries.of([key.event_id for key in keys])),
            gaps=tuple(activity.gaps(pauses, since, until, datetime.now(UTC))),
            labels=tuple(labels),
        )

    async def health(self) -> Health:
        """How the pipeline is; see the port."""
        return await self._pulse.health()

    async def label(self, new: NewLabel) -> Label:
        """Put a label on the log; see the port."""
        span = (new.camera_id, new.started_at, new.ended_at)
        if new.event_id is not None:
            if any(part is not None for part in span) or new.verdict == "missed":
                raise InvalidError(
                    "a label on an event names no camera and no span, and is no `missed`: the event says it"
                )
            event = await self._find(new.event_id)
            event_id, camera_id = event["event_id"], event["camera_id"]
            started_at, ended_at = event["started_at"], event["ended_at"]
        else:
            if new.camera_id is None or new.started_at is None or new.ended_at is None or new.verdict != "missed":
                raise InvalidError("name an event_id; or, with `missed`, camera_id, started_at and ended_at")
            event_id, camera_id = None, new.camera_id
            started_at, ended_at = _utc(new.started_at), _utc(new.ended_at)
            if not timedelta(0) <= ended_at - started_at <= LONGEST_MISSED:
                raise InvalidError("`ended_at` must not lie before `started_at`, and 31 days behind it at most")
            await self._camera(camera_id)
        return await self._labels.append(
            Label(
                label_id="",
                camera_id=camera_id,
                started_at=started_at,
                ended_at=ended_at,
                verdict=new.verdict,
                event_id=event_id,
                author=new.author,
                note=new.note,
                labelled_at=datetime.now(UTC),
            )
        )

    async def _find(self, event_id: str) -> Row:
        """The row of the event of that id or beginning."""
        if (exact := await self._queries.live_event(event_id)) is not None:
            return exact
        found = await self._queries.events_like(event_id, limit=6) if event_id else []
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(row["event_id"] for row in found[:5])
            raise NotFoundError(f"{event_id} is the beginning of several events: {some}")
        recent = [key.event_id for key in await self._reads.page(limit=_NEAR)]
        near = difflib.get_close_matches(event_id[:300], recent, n=3, cutoff=0.5)
        raise NotFoundError(f"there is no event {event_id}" + (f"; near it: {', '.join(near)}" if near else ""))

    async def _camera(self, camera_id: str) -> CameraCard:
        cards = await self._cards(camera_id)
        if not cards:
            known = ", ".join(sorted(row["camera_id"] for row in await self._reads.camera_names())[:20])
            raise NotFoundError(f"there is no camera {camera_id}" + (f"; there are {known}" if known else " yet"))
        return cards[0]

    async def _cards(self, camera: str | None = None) -> list[CameraCard]:
        """The cards of every camera, or of one."""
        now = datetime.now(UTC)
        names, newest, (frames, events) = await asyncio.gather(
            self._reads.camera_names(camera), self._reads.newest_frames(camera), self._reads.day(now - _DAY, camera)
        )
        last = {row["camera_id"]: row for row in newest}
        return [
            activity.card(
                known,
                last=last.get(known.camera_id),
                frames=frames.get(known.camera_id, 0),
                events=events.get(known.camera_id, {}),
                now=now,
            )
            for known in map(activity.name, names)
        ]


def _by_name(camera: CameraName) -> tuple[str, str]:
    return camera.name.casefold(), camera.camera_id


def _mark(key: Key) -> str:
    """A key as the text that is given out: opaque, and checked when it comes back."""
    return base64.urlsafe_b64encode(json.dumps([ms(key.started_at), key.event_id]).encode()).decode().rstrip("=")


def _parse(text: str) -> Key:
    try:
        at, event_id = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        if not isinstance(event_id, str) or not camera_of(event_id):
            raise ValueError(event_id)
        return Key(datetime.fromtimestamp(int(at) / 1000, UTC), event_id)
    except (ValueError, TypeError, OverflowError, OSError, RecursionError, binascii.Error) as error:
        raise InvalidError("`before` is none that was given out: take `next` of the page before") from error


def _utc(at: datetime) -> datetime:
    """The time in UTC, where it stands without an offset too.

    Raises:
        InvalidError: it lies outside what ClickHouse holds, 1900 to 2299.
    """
    aware = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    if not 1900 < at.year < 2299:
        raise InvalidError(f"{at.year} is no year of a camera")
    return aware.astimezone(UTC)

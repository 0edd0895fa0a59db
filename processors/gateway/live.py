"""Events as they come into ClickHouse: one poller for everybody, a bounded queue for each, a cursor to go on from.

Rows become visible a moment after the `inserted_at` that they carry, and rows of different partitions overtake one
another on that way. So a cursor is no time: within the last minute it names, for each partition, the offset up to
which its owner has seen everything; the sink brings a partition's records in order.
"""

import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import structlog

from processors.gateway.models import EventSummary
from processors.gateway.ports import InvalidError
from processors.gateway.reads import Arrived, Reads, ms
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

# An insert is answered in milliseconds, and given up after clickhouse.read_timeout_s (30 s by default): what it
# brings cannot become visible later than this after its `inserted_at`.
OVERLAP = timedelta(seconds=60)

_POLL_S = 1.0
# What one question brings; more follow at once.
_AT_ONCE = 200
# Events that wait for one client. An event is about 1 KB; whoever is this far behind is dropped and resumes.
_QUEUE = 256


class Cursor(NamedTuple):
    """How far somebody has seen."""

    at: datetime
    """The newest `inserted_at`: whatever is older than this by `OVERLAP` was seen."""
    seen: dict[tuple[str, int], tuple[int, datetime]]
    """By epoch and partition, the last offset and its time; those older than `OVERLAP` are left out."""

    def has(self, event: Arrived) -> bool:
        """Whether it was seen."""
        if event.inserted_at <= self.at - OVERLAP:
            return True
        offset, _ = self.seen.get((event.epoch, event.partition), (-1, self.at))
        return event.offset <= offset

    def behind(self, event: Arrived) -> "Cursor":
        """The cursor once this event was seen too."""
        at = max(self.at, event.inserted_at)
        seen = self.seen | {(event.epoch, event.partition): (event.offset, event.inserted_at)}
        return Cursor(at, {place: last for place, last in seen.items() if last[1] > at - OVERLAP})

    def __str__(self) -> str:
        places = [[epoch, partition, offset, ms(at)] for (epoch, partition), (offset, at) in sorted(self.seen.items())]
        text = json.dumps([ms(self.at), places], separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """The cursor that this text is.

        Raises:
            InvalidError: it is none.
        """
        try:
            at, places = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
            return cls(_time(at), {(str(e), int(p)): (int(offset), _time(last)) for e, p, offset, last in places})
        except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error) as error:
            raise InvalidError(
                "this is no cursor of /api/events/stream: leave it out, or give the last event's id"
            ) from error


class Feed:
    """The one poller and its clients.

    Args:
        reads: the way to ClickHouse.
        summaries: makes of events' ids what clients are sent, those found, in order.
        poll_s: how often ClickHouse is asked while somebody listens, seconds.
    """

    def __init__(
        self,
        reads: Reads,
        summaries: Callable[[Sequence[str]], Awaitable[Sequence[EventSummary]]],
        *,
        poll_s: float = _POLL_S,
        queue: int = _QUEUE,
    ) -> None:
        self._reads = reads
        self._summaries = summaries
        self._poll_s = poll_s
        self._size = queue
        self._clients: set[_Client] = set()
        self._task: asyncio.Task[None] | None = None
        self._cursor: Cursor | None = None
        self._begun = asyncio.Event()

    async def events(self, after: Cursor | None) -> AsyncGenerator[tuple[str, EventSummary]]:
        """Events behind a cursor, and then as they come, each with the cursor behind it.

        It ends when the client that reads it is too slow; whoever resumes with the last cursor misses nothing.
        """
        client = _Client(self._size)
        self._clients.add(client)
        self._start()
        try:
            # What comes while the question below is answered must be news to the poller.
            await self._begun.wait()
            if after is not None:
                last: Arrived | None = None
                while True:
                    batch = await self._reads.arrived(after.at - OVERLAP, after=last, limit=_AT_ONCE)
                    for event, summary in await self._described([event for event in batch if not after.has(event)]):
                        after = after.behind(event)
                        yield str(after), summary
                    if len(batch) < _AT_ONCE:
                        break
                    last = batch[-1]
            while True:
                item = await client.queue.get()
                if item is None:
                    return
                event, summary, cursor = item
                if after is not None:
                    if after.has(event):
                        continue
                    after = cursor = after.behind(event)
                yield str(cursor), summary
        finally:
            self._clients.discard(client)

    async def close(self) -> None:
        """End the poller and every client."""
        for client in self._clients:
            client.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._cursor = None
            self._begun.clear()
            self._task = asyncio.create_task(self._poll(), name="live events")

    async def _poll(self) -> None:
        """Ask while anybody listens; ClickHouse away is waited for, and what came meanwhile comes then."""
        try:
            while self._clients:
                try:
                    await self._look()
                except UnavailableError as error:
                    log.warning("live events wait", on="store", why=str(error))
                await asyncio.sleep(self._poll_s)
        finally:
            for client in self._clients:
                client.end()
            self._begun.set()

    async def _look(self) -> None:
        if self._cursor is None:
            # What is there is not news; the offsets tell it from what becomes visible late.
            now = await self._reads.clock()
            cursor = Cursor(now, {})
            for event in await self._all(now - OVERLAP):
                cursor = cursor.behind(event)
            self._cursor = cursor
            self._begun.set()
            return
        news = [event for event in await self._all(self._cursor.at - OVERLAP) if not self._cursor.has(event)]
        for event, summary in await self._described(news):
            self._cursor = self._cursor.behind(event)
            for client in list(self._clients):
                client.offer((event, summary, self._cursor))

    async def _all(self, since: datetime) -> list[Arrived]:
        found: list[Arrived] = []
        while True:
            batch = await self._reads.arrived(since, after=found[-1] if found else None, limit=_AT_ONCE)
            found += batch
            if len(batch) < _AT_ONCE:
                return found

    async def _described(self, events: Sequence[Arrived]) -> list[tuple[Arrived, EventSummary]]:
        """The events with what clients are sent of them; one that was replaced meanwhile has none, and is skipped."""
        made = {summary.event_id: summary for summary in await self._summaries([e.event_id for e in events])}
        return [(event, made[event.event_id]) for event in events if event.event_id in made]


class _Client:
    def __init__(self, size: int) -> None:
        self.queue: asyncio.Queue[tuple[Arrived, EventSummary, Cursor] | None] = asyncio.Queue(size)

    def offer(self, item: tuple[Arrived, EventSummary, Cursor]) -> None:
        try:
            self.queue.put_nowait(item)
        except asyncio.QueueFull:
            self.end()

    def end(self) -> None:
        """End it in place of what waits: it resumes from what it was last given."""
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                self.queue.get_nowait()
        self.queue.put_nowait(None)


def _time(at: int) -> datetime:
    time = datetime.fromtimestamp(int(at) / 1000, UTC)
    if not 1900 < time.year < 2299:  # beyond, ClickHouse holds none, and Python cannot reckon with its first and last
        raise ValueError(at)
    return time

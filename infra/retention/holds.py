"""Holds on events: a person's word on the log that an event stays, and what is in force.

What the broker says counts. Of an event that it says nothing of, because it was made anew since, ClickHouse's table
counts: a hold must not be lost with a broker.
"""

import asyncio
import time
from collections.abc import Callable

import msgspec

from processors.store.queries import Queries, Row
from schemas.records import Hold
from streams.control import ControlTable
from streams.kafka import Kafka

MAX_WHY = 2000
"""Longest reason, characters."""
MAX_AUTHOR = 100
"""Longest name of whoever says so, characters."""

SETTLED_S = 60.0
"""How long a hold waits for a collector that has marked the event; marking and looking takes it some seconds."""
_LOOK_S = 0.5

_STORED = """
    SELECT event_id, batch_id, toString(camera_id) AS camera_id, why, toString(author) AS author,
        toUnixTimestamp64Milli(since) AS at
    FROM held
"""
_MARKS = """
    SELECT toString(f.pass) AS pass, p.state AS state, f.own AS own FROM
    (
        SELECT pass, 1 AS own FROM forgotten
        WHERE topic = 'risk_events' AND epoch = {epoch:String} AND partition = {partition:Int32}
        AND offset = {offset:Int64}
        UNION ALL
        SELECT pass, 0 FROM forgotten
        WHERE topic IN ('replay_events', 'replay_units') AND (topic, epoch, partition, offset) IN
        (
            SELECT 'replay_events', toString(epoch), partition, offset FROM replay_events
            WHERE batch_id = {batch:String}
            UNION ALL SELECT 'replay_units', toString(epoch), partition, offset FROM replay_units
            WHERE substring(unit_id, length(replay_id) + 2) = {batch:String}
        )
    ) AS f
    LEFT JOIN (SELECT pass, toString(state) AS state FROM gc_passes FINAL) AS p ON p.pass = f.pass
    WHERE f.own = 1 OR p.state != 'done'
"""


class UnreadableHoldError(Exception):
    """A hold on the log cannot be read: a newer version wrote it."""


class GoingError(Exception):
    """The event is being deleted; the message says what to do."""


class Holds:
    """The holds of an installation.

    Args:
        kafka: the log.
        store: ClickHouse.
        clock: wall time, seconds since the Unix epoch.
    """

    def __init__(
        self,
        kafka: Kafka,
        store: Queries,
        *,
        clock: Callable[[], float] = time.time,
        settled_s: float = SETTLED_S,
    ) -> None:
        self._table = ControlTable(kafka, "holds", Hold)
        self._store = store
        self._clock = clock
        self._settled_s = settled_s

    async def all(self) -> list[Hold]:
        """What is held now, the oldest hold first.

        Raises:
            UnreadableHoldError: a newer version wrote one.
            KafkaError or TimeoutError: the broker is away.
            UnavailableError: ClickHouse is away.
        """
        await self._load()
        stored = {row["event_id"]: Hold(state="held", **row) for row in await self._store.rows(_STORED)}
        found = {event: hold for event, hold in (stored | self._table.all()).items() if hold.state == "held"}
        return sorted(found.values(), key=lambda hold: (hold.at, hold.event_id))

    async def hold(self, event: Row, *, why: str, author: str = "") -> Hold:
        """Hold an event, as `risk_events` has it. When this returns, it is whole and stays.

        Raises:
            GoingError: a collector is deleting it: the hold is taken back, or is not certain yet.
            UnreadableHoldError, KafkaError, TimeoutError, FencedError, UncertainError: as `all` and
                `ControlTable.append`; saying it again is harmless.
        """
        await self._load()
        names = {name: event[name] for name in ("event_id", "batch_id", "camera_id")}
        hold = Hold(**names, state="held", why=why, author=author, at=self._now())
        await self._table.append(hold)
        # Behind the hold, as the collector looks at the holds behind its marks.
        await self._untouched(event, hold)
        return hold

    async def release(self, hold: Hold, *, why: str = "", author: str = "") -> Hold:
        """Let go of an event that is held; raises as `hold`, but for `GoingError`."""
        released = msgspec.structs.replace(hold, state="released", why=why, author=author, at=self._now())
        await self._table.append(released)
        return released

    def _now(self) -> int:
        return int(self._clock() * 1000)

    async def _load(self) -> None:
        await self._table.load()
        if self._table.skipped:
            raise UnreadableHoldError(
                "a record of topic holds cannot be read: a newer version wrote it; upgrade rewatch"
            )

    async def _untouched(self, event: Row, hold: Hold) -> None:
        """Wait until no collector has the event marked."""
        place = {name: event[name] for name in ("epoch", "partition", "offset")} | {"batch": hold.batch_id}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settled_s
        while marks := await self._store.rows(_MARKS, **place):
            states = {mark["state"] for mark in marks if mark["own"]}  # of replays' records the pass's end is awaited
            if states == {"done"} and await self._store.live_event(hold.event_id) is not None:
                return  # it was deleted, and came to the log again
            if states & {"deleting", "done"}:
                await self.release(hold, why="it was being deleted when the hold was asked for")
                raise GoingError(
                    f"{hold.event_id} was past its time, and `rewatch gc` is deleting it: it cannot be held any more"
                )
            if loop.time() > deadline:
                raise GoingError(
                    f"{hold.event_id} is past its time, and a `rewatch gc` that has not ended has marked it. The hold "
                    "is on the log: run `rewatch gc` if none runs, it sees the hold and lets go; then hold it again to "
                    "be sure"
                )
            await asyncio.sleep(_LOOK_S)

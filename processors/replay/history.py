"""The windows that were recorded: which a scope holds, their contexts byte for byte, and what was said of each.

Everything is read from ClickHouse, so the broker may have forgotten it long ago. A list of positions is read first (a
few hundred bytes a window), then the windows themselves, page by page: of 100,000 only a page is in memory.
"""

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import Any, NamedTuple, Protocol

from processors.replay.plan import Bound, PlanError, Scope, Unit
from processors.store.queries import Queries, QueryError
from processors.store.times import LAST_MS
from schemas import ids
from schemas.records import Context, Record, ReplayEvent, ReplayUnit, RiskEvent
from streams import codec
from streams.codec import DecodeError
from streams.topics import TOPICS

PAGE = 200
"""Windows read at once: some 3 KB each, 10 ms a page; of 50 frames full of boxes they are 60 KB each."""

NAMED = 100
"""Windows left out whose names are kept; beyond that they are counted."""

_TOPIC = "contexts"

# Not FINAL: of a window that was recorded twice (its frames were taken in again, by another life of the log) the one
# below the bound is wanted, and FINAL keeps the newest.
_POSITIONS = """
    SELECT camera_id, batch_id, epoch, partition, offset, cityHash64(batch_id) AS draw
    FROM contexts
    WHERE offset < transform(concat(epoch, ':', toString(partition)), {lives:Array(String)}, {ends:Array(Int64)}, 0)
    AND (empty({cameras:Array(String)}) OR camera_id IN {cameras:Array(String)})
    AND started_at >= fromUnixTimestamp64Milli({since:Int64}) AND started_at < fromUnixTimestamp64Milli({until:Int64})
    ORDER BY epoch, offset LIMIT 1 BY camera_id, batch_id
"""
# What a merge has taken out of the table since, for the same window was recorded once more: few, as a rule none.
_REPLACED = """
    SELECT epoch, partition, offset FROM log FINAL
    WHERE topic = 'contexts' AND decode_error = '' AND NOT tick
    AND offset < transform(concat(epoch, ':', toString(partition)), {lives:Array(String)}, {ends:Array(Int64)}, 0)
    AND (empty({cameras:Array(String)}) OR key IN {cameras:Array(String)})
    AND (epoch, partition, offset) NOT IN (SELECT epoch, partition, offset FROM contexts)
"""
_DRAWS = "SELECT batch_id, cityHash64(batch_id) AS draw FROM (SELECT arrayJoin({batches:Array(String)}) AS batch_id)"
_UNDECODED = """
    SELECT epoch, partition, offset, decode_error AS why FROM log FINAL
    WHERE topic = 'contexts' AND decode_error != ''
    AND offset < transform(concat(epoch, ':', toString(partition)), {lives:Array(String)}, {ends:Array(Int64)}, 0)
    AND offset >= transform(concat(epoch, ':', toString(partition)), {lives:Array(String)}, {starts:Array(Int64)}, 0)
    AND (empty({cameras:Array(String)}) OR key IN {cameras:Array(String)})
    ORDER BY epoch, partition, offset
"""
_VALUES = """
    SELECT epoch, partition, offset, hex(value) AS value, fingerprint FROM log FINAL
    WHERE topic = {topic:String} AND (epoch, partition, offset) IN
    (
        SELECT place.1, toInt32(place.2), place.3 FROM
        (SELECT arrayJoin(arrayZip({epochs:Array(String)}, {partitions:Array(Int32)}, {offsets:Array(Int64)})) AS place)
    )
"""
_LIVE = """
    SELECT batch_id, event_id, prompt_digest, verdict_digest, model, model_digest, parameters, conditions,
        risk_score, risk_level, summary
    FROM risk_events FINAL
    WHERE camera_id IN {cameras:Array(String)} AND event_id IN {events:Array(String)} AND run = 'live'
"""
# Those that were judged, live ones first; what reused a verdict only repeats it.
_SAID = """
    SELECT batch_id, verdict_digest, 'risk_events' AS topic, '' AS unit_id, epoch, partition, offset
    FROM risk_events FINAL
    WHERE camera_id IN {cameras:Array(String)} AND batch_id IN {batches:Array(String)}
    AND verdict_digest IN {verdicts:Array(String)} AND run = 'live'
    UNION ALL
    SELECT batch_id, verdict_digest, 'replay_events', unit_id, epoch, partition, offset
    FROM replay_events FINAL
    WHERE camera_id IN {cameras:Array(String)} AND batch_id IN {batches:Array(String)}
    AND verdict_digest IN {verdicts:Array(String)} AND NOT reused
"""
_UNITS = "SELECT unit_id, epoch, partition, offset FROM replay_units FINAL WHERE unit_id IN {units:Array(String)}"
_CONTEXTS = """
    SELECT batch_id, epoch, partition, offset FROM contexts FINAL
    WHERE camera_id IN {cameras:Array(String)} AND batch_id IN {batches:Array(String)}
"""
_PROMPTS = """
    SELECT camera_id, toUnixTimestamp64Milli(started_at) AS at, prompt_digest FROM
    (
        SELECT camera_id, started_at, prompt_digest,
            lagInFrame(toString(prompt_digest)) OVER
                (PARTITION BY camera_id ORDER BY started_at, event_id ROWS BETWEEN 1 PRECEDING AND CURRENT ROW)
                AS before
        FROM risk_events FINAL WHERE run = 'live'
    )
    WHERE prompt_digest != before ORDER BY camera_id, at
"""
_ENDS = """
    SELECT {topic:String} AS topic, epoch, partition, max(offset) + 1 AS offset
    FROM log WHERE topic = {topic:String} GROUP BY epoch, partition ORDER BY epoch, partition
"""

Place = tuple[str, int, int]
"""Epoch, partition and offset of a record of one topic."""


class Live(NamedTuple):
    """What live work said of a window, and how it was made."""

    event_id: str
    prompt_digest: str
    verdict_digest: str
    model: str
    model_digest: str
    parameters: str
    conditions: Mapping[str, str]
    score: int
    level: str
    summary: str


class Window(NamedTuple):
    """A window to judge."""

    context: Context
    live: Live | None
    """None where live work said nothing of it: it was not judged yet, or could not be, or a replay made it."""


class Skips:
    """What was left out and why: all counted, the first by name."""

    def __init__(self) -> None:
        self.named: dict[str, str] = {}
        self._all: set[str] = set()

    @property
    def count(self) -> int:
        """How many were left out."""
        return len(self._all)

    def add(self, name: str, why: str) -> None:
        """Leave something out; the same name counts once."""
        self._all.add(name)
        if len(self.named) < NAMED:
            self.named.setdefault(name, why)


class Windows(Protocol):
    """Where a replay's windows come from. The same ones in the same order each time it is asked."""

    @property
    def skipped(self) -> Skips:
        """What belongs to them and cannot be judged; complete when the last page was given."""

    async def count(self) -> int | None:
        """How many there are, those left out included; None where only reading them all would tell."""

    def pages(self, known: Callable[[str], bool]) -> AsyncIterator[list[Window]]:
        """The windows whose batch id is not known yet, some at a time.

        Raises:
            UnavailableError: ClickHouse is away.
        """


class RecordedWindows:
    """The windows of a scope as they were recorded, below the bounds.

    Partitions take turns, so that all workers have something to do; within one it goes by camera and offset.
    """

    def __init__(self, store: Queries, scope: Scope, upto: Sequence[Bound]) -> None:
        self.skipped = Skips()
        self._store = store
        self._scope = scope
        self._bounds = {f"{bound.epoch}:{bound.partition}": bound.offset for bound in upto if bound.topic == _TOPIC}
        self._found: list[tuple[str, Place]] | None = None

    async def count(self) -> int:
        """How many windows the scope holds.

        Raises:
            PlanError: ClickHouse does not take the scope's condition.
            UnavailableError: ClickHouse is away.
        """
        return len(await self._positions())

    async def batches(self) -> list[str]:
        """Their batch ids, in order; raises as `count`."""
        return [batch for batch, _ in await self._positions()]

    async def pages(self, known: Callable[[str], bool]) -> AsyncIterator[list[Window]]:
        """The windows whose batch id is not known yet, `PAGE` at a time; raises as `count`."""
        todo = iter([found for found in await self._positions() if not known(found[0])])
        while page := list(islice(todo, PAGE)):
            yield await self._read(page)

    async def _positions(self) -> list[tuple[str, Place]]:
        if self._found is None:
            self._found = await self._look()
        return self._found

    async def _look(self) -> list[tuple[str, Place]]:
        scope = self._scope
        if not self._bounds:
            return []
        wanted = await _where(self._store, scope.where) if scope.where.strip() else None
        since, until = span(scope)
        within = {
            "lives": list(self._bounds),
            "ends": list(self._bounds.values()),
            "cameras": list(scope.cameras),
        }
        rows = await self._store.rows(_POSITIONS, **within, since=since, until=until)
        rows += await self._replaced(within, {row["batch_id"] for row in rows}, range(since, until))
        if wanted is not None:
            rows = [row for row in rows if row["batch_id"] in wanted]
        await self._name_undecoded(rows)
        if scope.sample is not None:
            rows = sorted(rows, key=lambda row: (row["draw"], row["batch_id"]))[: scope.sample]
        rows.sort(key=lambda row: (row["partition"], row["camera_id"], row["epoch"], row["offset"]))
        by_partition: dict[int, list[tuple[str, Place]]] = {}
        for row in rows:
            place = (row["epoch"], row["partition"], row["offset"])
            by_partition.setdefault(row["partition"], []).append((row["batch_id"], place))
        turns = chain.from_iterable(zip_longest(*by_partition.values()))
        return [found for found in turns if found is not None]

    async def _replaced(self, within: dict[str, Any], known: Collection[str], times: range) -> list[dict[str, Any]]:
        """Windows below the bounds whose row has given way to a later one of the same window, above them."""
        places = [_place(row) for row in await self._store.rows(_REPLACED, **within)]
        found: dict[str, dict[str, Any]] = {}
        for at in range(0, len(places), PAGE):
            values = await _values(self._store, _TOPIC, places[at : at + PAGE])
            for place in sorted(values):
                context = _or_none(_TOPIC, values[place])
                if isinstance(context, Context) and context.batch_id not in known and context.batch.started_at in times:
                    row = dict(zip(("epoch", "partition", "offset"), place, strict=True))
                    found.setdefault(context.batch_id, row | {"camera_id": context.camera_id})
        if not found:
            return []
        draws = await self._store.rows(_DRAWS, batches=list(found))
        return [row | found[row["batch_id"]] for row in draws]

    async def _name_undecoded(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Name the records that nobody could read, so that they are no rows: of what time they are is not known.

        They count where they lie between windows of the scope. A condition or a sample never chose them.
        """
        scope = self._scope
        if scope.where.strip() or scope.sample is not None:
            return
        starts = dict.fromkeys(self._bounds, 0)
        ends = dict(self._bounds)
        if scope.since is not None or scope.until is not None:
            starts, ends = {}, {}
            for row in rows:
                life = f"{row['epoch']}:{row['partition']}"
                starts[life] = min(row["offset"], starts.get(life, row["offset"]))
                ends[life] = max(row["offset"], ends.get(life, 0))
        if not ends:
            return
        rows = await self._store.rows(
            _UNDECODED,
            lives=list(ends),
            ends=list(ends.values()),
            starts=[starts[life] for life in ends],
            cameras=list(scope.cameras),
        )
        for row in rows:
            name = ids.origin(_TOPIC, row["epoch"], row["partition"], row["offset"])
            self.skipped.add(name, f"cannot be read: {row['why']}")

    async def _read(self, page: Sequence[tuple[str, Place]]) -> list[Window]:
        values = await _values(self._store, _TOPIC, [place for _, place in page])
        contexts = []
        for batch_id, place in page:
            try:
                context = _decoded(_TOPIC, values.get(place), Context)
                if context.batch_id != batch_id:
                    raise DecodeError(f"its bytes are of window {context.batch_id[:255]}")
            except DecodeError as error:
                self.skipped.add(batch_id, f"cannot be read: {error}")
            else:
                contexts.append(context)
        return await _with_live(self._store, contexts)


class Maker(Protocol):
    """What makes windows anew: a cut of recorded detections."""

    skipped: Skips

    def windows(self) -> AsyncIterator[Context]:
        """The windows, the same ones in the same order each time it is asked."""


class MadeWindows:
    """Windows that a replay makes anew, with what live work said of those that it made as well."""

    def __init__(self, store: Queries, maker: Maker) -> None:
        self._store = store
        self._maker = maker

    @property
    def skipped(self) -> Skips:
        """What the maker left out."""
        return self._maker.skipped

    async def count(self) -> int | None:
        """Only making them tells."""
        return None

    async def pages(self, known: Callable[[str], bool]) -> AsyncIterator[list[Window]]:
        """The windows whose batch id is not known yet, `PAGE` at a time."""
        page: list[Context] = []
        async for context in self._maker.windows():
            if not known(context.batch_id):
                page.append(context)
            if len(page) >= PAGE:
                yield await _with_live(self._store, page)
                page = []
        if page:
            yield await _with_live(self._store, page)


class Said(NamedTuple):
    """A recorded verdict, and the window that it was given on."""

    event: RiskEvent
    context: Context


async def said(store: Queries, wanted: Mapping[str, str]) -> dict[str, Said]:
    """Recorded verdicts, live or a replay's, of these batch ids under these verdict digests, by batch id.

    What cannot be read any more is not among them.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    if not wanted:
        return {}
    cameras = _cameras(wanted)
    rows = await store.rows(_SAID, cameras=cameras, batches=list(wanted), verdicts=sorted(set(wanted.values())))
    first: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["topic"] != "risk_events", row["unit_id"])):
        if wanted.get(row["batch_id"]) == row["verdict_digest"]:
            first.setdefault(row["batch_id"], row)
    if not first:
        return {}
    events: dict[str, RiskEvent] = {}
    for topic in ("risk_events", "replay_events"):
        of_topic = {batch: row for batch, row in first.items() if row["topic"] == topic}
        values = await _values(store, topic, [_place(row) for row in of_topic.values()])
        for batch, row in of_topic.items():
            record = _or_none(topic, values.get(_place(row)))
            event = record.event if isinstance(record, ReplayEvent) else record
            if isinstance(event, RiskEvent):
                events[batch] = event
    contexts = await _recorded(store, cameras, [batch for batch in events if first[batch]["topic"] == "risk_events"])
    contexts |= await _judged(store, {first[batch]["unit_id"]: batch for batch in events if first[batch]["unit_id"]})
    return {batch: Said(event, contexts[batch]) for batch, event in events.items() if batch in contexts}


class Timeline:
    """Which prompt judged a camera's windows when: a window that nobody judged gets the one of its time."""

    def __init__(self, moves: Iterable[tuple[str, int, str]]) -> None:
        self._moves: dict[str, list[tuple[int, str]]] = {}
        for camera, at, digest in moves:
            self._moves.setdefault(camera, []).append((at, digest))

    @classmethod
    async def read(cls, store: Queries) -> "Timeline":
        """As live events have it."""
        rows = await store.rows(_PROMPTS)
        return cls((row["camera_id"], row["at"], row["prompt_digest"]) for row in rows)

    def at(self, camera_id: str, started_at: int) -> str:
        """Digest of the version that judged the camera's last window before, else its first; empty where none did."""
        moves = self._moves.get(camera_id, [])
        before = [digest for at, digest in moves if at <= started_at]
        return before[-1] if before else moves[0][1] if moves else ""


async def ends(store: Queries, *topics: str) -> tuple[Bound, ...]:
    """How far the history in ClickHouse goes now.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    rows = [row for topic in topics for row in await store.rows(_ENDS, topic=topic)]
    return tuple(
        Bound(topic=row["topic"], epoch=row["epoch"], partition=row["partition"], offset=row["offset"]) for row in rows
    )


async def _where(store: Queries, condition: str) -> set[str]:
    """Batch ids of the live events for which the condition holds. It cannot write.

    Raises:
        PlanError: ClickHouse does not take it; the message is its own.
    """
    # On a line of its own, so that a comment at its end does not swallow the parenthesis.
    query = f"SELECT batch_id FROM events WHERE (\n{condition}\n)"  # noqa: S608 (a person's own, asked read-only)
    try:
        answer = await store.raw(query, "JSONCompactEachRow", limit=0)
    except QueryError as error:
        raise PlanError(f"--where: ClickHouse says: {error}") from error
    return {str(json.loads(line)[0]) for line in answer.splitlines() if line.strip()}


async def _with_live(store: Queries, contexts: Sequence[Context]) -> list[Window]:
    """The windows with what live work said of them."""
    if not contexts:
        return []
    cameras = sorted({context.camera_id for context in contexts})
    events = [ids.event_id(context.batch_id) for context in contexts]
    live = {row.pop("batch_id"): row for row in await store.rows(_LIVE, cameras=cameras, events=events)}
    return [Window(context, _live(live.get(context.batch_id))) for context in contexts]


def _live(row: Mapping[str, Any] | None) -> Live | None:
    if row is None:
        return None
    return Live(
        row["event_id"],
        row["prompt_digest"],
        row["verdict_digest"],
        row["model"],
        row["model_digest"],
        row["parameters"],
        dict(row["conditions"]),
        row["risk_score"],
        row["risk_level"],
        row["summary"],
    )


async def _recorded(store: Queries, cameras: Sequence[str], batches: Sequence[str]) -> dict[str, Context]:
    """The contexts of these windows as they were recorded last."""
    if not batches:
        return {}
    rows = await store.rows(_CONTEXTS, cameras=list(cameras), batches=list(batches))
    values = await _values(store, _TOPIC, [_place(row) for row in rows])
    found = {row["batch_id"]: _or_none(_TOPIC, values.get(_place(row))) for row in rows}
    return {batch: context for batch, context in found.items() if isinstance(context, Context)}


async def _judged(store: Queries, units: Mapping[str, str]) -> dict[str, Context]:
    """The contexts that these units gave to be judged, by the batch ids that they are mapped to.

    Where there is no such unit (a shadow judges the live window itself) it is the recorded one.
    """
    if not units:
        return {}
    rows = await store.rows(_UNITS, units=list(units))
    values = await _values(store, "replay_units", [_place(row) for row in rows])
    found: dict[str, Context] = {}
    for row in rows:
        unit = _or_none("replay_units", values.get(_place(row)))
        context = _or_none(_TOPIC, (unit.payload, None)) if isinstance(unit, ReplayUnit) else None
        if isinstance(context, Context):
            found[units[row["unit_id"]]] = context
    others = [batch for batch in units.values() if batch not in found]
    return found | await _recorded(store, _cameras(others), others)


async def _values(
    store: Queries, topic: str, places: Sequence[Place]
) -> dict[Place, tuple[bytes | None, bytes | None]]:
    """The original bytes and fingerprints of these records, where `log` has them."""
    if not places:
        return {}
    epochs, partitions, offsets = zip(*places, strict=True)
    rows = await store.rows(
        _VALUES, topic=topic, epochs=list(epochs), partitions=list(partitions), offsets=list(offsets)
    )
    return {
        _place(row): (
            None if row["value"] is None else bytes.fromhex(row["value"]),
            bytes.fromhex(row["fingerprint"]) or None,
        )
        for row in rows
    }


def _decoded(topic: str, found: tuple[bytes | None, bytes | None] | None, kind: type[Any]) -> Any:
    if found is None:
        raise DecodeError("its bytes are not in ClickHouse any more (table `log`)")
    return codec.decode_bytes(topic, found[0], found[1], kind)


def _or_none(topic: str, found: tuple[bytes | None, bytes | None] | None) -> Record | None:
    """The record, or None where it cannot be read: then what it says is not used."""
    try:
        record: Record | None = _decoded(topic, found, TOPICS[topic].record)
    except DecodeError:
        record = None
    return record


def _place(row: Mapping[str, Any]) -> Place:
    return row["epoch"], row["partition"], row["offset"]


def _cameras(batches: Collection[str]) -> list[str]:
    """The cameras that batch ids begin with, as the tables' primary keys do."""
    return sorted({batch.rpartition(":")[0] for batch in batches})


def span(scope: Scope) -> tuple[int, int]:
    """From when until when a scope reaches, as times that ClickHouse can compare with."""
    since = 0 if scope.since is None else scope.since
    until = LAST_MS if scope.until is None else scope.until
    return min(max(since, 0), LAST_MS), min(max(until, 0), LAST_MS)


def unit_of(replay_id: str, context: Context, prompt_digest: str, at: int) -> ReplayUnit:
    """The unit that has this window judged; `at` in milliseconds since the Unix epoch."""
    payload, _ = codec.encode(_TOPIC, context)
    return ReplayUnit(
        unit_id=str(Unit(replay_id, context.batch_id)),
        replay_id=replay_id,
        camera_id=context.camera_id,
        kind="judge",
        payload=payload,
        created_at=at,
        prompt_digest=prompt_digest,
    )

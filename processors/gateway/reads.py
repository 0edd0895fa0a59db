# ruff: noqa: S608 (every part of a query is a constant of ours; values are bound)
"""What the gateway asks ClickHouse besides the product's common queries: pages of events, cameras, their hours.

Each query begins where a primary key leads (camera, then id), or reads only the narrow columns that it filters by;
the views `events` and `camera_activity` join and fold whole tables, which is theirs to do for people and too slow for
a page of fifty events among a hundred thousand.
"""

import asyncio
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from processors.store.queries import Queries, Row

# Ids go into the URL: 100 of them, percent-encoded, are 8 KB of the 64 KB that servers take.
_CHUNK = 100

# What DateTime64 holds.
_FIRST = datetime(1900, 1, 1, tzinfo=UTC)
_LAST = datetime(2299, 12, 31, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# When a frame was taken, as the view `camera_activity` has it: a clock that runs ahead takes no picture in the future.
_TAKEN = "least(ifNull(captured_at, arrived_at), arrived_at)"

_OF_CAMERA = "camera_id = {camera:String}"
_OF = "({camera:String} = '' OR camera_id = {camera:String})"


class Key(NamedTuple):
    """An event's place in the order of pages: newest first, ties by id."""

    started_at: datetime
    event_id: str


class Arrived(NamedTuple):
    """An event's place in the order in which the sink brought events: exact within a partition."""

    inserted_at: datetime
    epoch: str
    partition: int
    offset: int
    camera_id: str
    event_id: str


class Pauses(NamedTuple):
    """A camera's frames in a span, as the pauses between them."""

    before: datetime | None
    """The last frame before the span."""
    first: datetime | None
    """The first and the last within it."""
    last: datetime | None
    after: datetime | None
    """The first frame behind the span."""
    median: timedelta
    """The usual pause; zero where there are too few frames to tell."""
    long: tuple[tuple[datetime, datetime], ...]
    """Pauses within the span of more than `least` and ten times the median."""


def ms(at: datetime) -> int:
    """Milliseconds since the Unix epoch, held within what ClickHouse's times hold."""
    return (min(max(at, _FIRST), _LAST) - _EPOCH) // timedelta(milliseconds=1)


class Reads:
    """The gateway's questions, over the product's connection. Raises as `Queries` does."""

    def __init__(self, queries: Queries) -> None:
        self._rows = queries.rows

    async def page(
        self,
        *,
        camera: str | None = None,
        levels: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        before: Key | None = None,
        limit: int,
    ) -> list[Key]:
        """Keys of live events, newest first, behind `before`."""
        rows = await self._rows(
            "SELECT started_at, event_id FROM risk_events FINAL WHERE run = 'live' "
            f"AND {_OF} "
            "AND (empty({levels:Array(String)}) OR risk_level IN {levels:Array(String)}) "
            "AND started_at >= fromUnixTimestamp64Milli({since:Int64}) "
            "AND started_at < fromUnixTimestamp64Milli({until:Int64}) "
            "AND (started_at, event_id) < (fromUnixTimestamp64Milli({before_at:Int64}), {before_id:String}) "
            "ORDER BY started_at DESC, event_id DESC LIMIT {limit:UInt32}",
            camera=camera or "",
            levels=list(levels),
            since=ms(since or _FIRST),
            until=ms(until or _LAST),
            before_at=ms(before.started_at if before else _LAST),
            before_id=before.event_id if before else "",
            limit=limit,
        )
        return [Key(row["started_at"], row["event_id"]) for row in rows]

    async def next(self, camera: str, after: Key) -> list[Key]:
        """The key of the live event of a camera that follows on `after`, if one does."""
        rows = await self._rows(
            f"SELECT started_at, event_id FROM risk_events FINAL WHERE run = 'live' AND {_OF_CAMERA} "
            "AND (started_at, event_id) > (fromUnixTimestamp64Milli({after_at:Int64}), {after_id:String}) "
            "ORDER BY started_at, event_id LIMIT 1",
            camera=camera,
            after_at=ms(after.started_at),
            after_id=after.event_id,
        )
        return [Key(row["started_at"], row["event_id"]) for row in rows]

    async def summaries(self, event_ids: Sequence[str]) -> dict[str, Row]:
        """What lists show of these events, by id: the narrow columns of `risk_events`."""
        events = await self._by_ids(
            "SELECT event_id, camera_id, batch_id, started_at, ended_at, judged_at, risk_score, risk_level, summary, "
            "recommended_action, model, frame_ids.size0 AS frames FROM risk_events FINAL "
            "PREWHERE camera_id IN {cameras:Array(String)} AND event_id IN {ids:Array(String)} WHERE run = 'live'",
            event_ids,
        )
        return {row["event_id"]: row for row in events}

    async def names(self, batch_ids: Sequence[str]) -> dict[str, Row]:
        """Camera name and time zone of these windows, as they were then, by batch."""
        rows = await self._by_ids(
            "SELECT batch_id, camera_name, "
            "if(time_zone IN (SELECT time_zone FROM system.time_zones), time_zone, 'UTC') AS time_zone "
            "FROM contexts FINAL PREWHERE camera_id IN {cameras:Array(String)} AND batch_id IN {ids:Array(String)}",
            batch_ids,
        )
        return {row["batch_id"]: row for row in rows}

    async def covers(self, batch_ids: Sequence[str]) -> dict[str, str]:
        """SHA-256 of the frame that stands for each window, by batch: the one with the surest box that is news."""
        chosen = await self._by_ids(
            "SELECT batch_id, frame_ids[indexOf(best, arrayMax(best))] AS frame_id, "
            # By what opens the camera's windows now; of a camera for which nothing was set, everything does.
            "arrayMap((matters, boxes) -> if(matters, arrayMax(arrayConcat([0.], arrayMap(box -> "
            "if(box.stationary OR NOT (empty(opens) OR has(opens, box.label)), 0., box.score), boxes))), -1.), "
            "matter, seen) AS best FROM (SELECT camera_id, batch_id, frames.frame_id AS frame_ids, "
            "frames.matters AS matter, frames.boxes AS seen FROM batches FINAL "
            "PREWHERE camera_id IN {cameras:Array(String)} AND batch_id IN {ids:Array(String)}) AS b "
            "LEFT ANY JOIN (SELECT camera_id, argMax(window_open_on, (updated_at, `offset`)) AS opens FROM cameras "
            "GROUP BY camera_id) AS c ON c.camera_id = b.camera_id WHERE notEmpty(best)",
            batch_ids,
        )
        shas = await self._by_ids(
            "SELECT frame_id, sha256 FROM frames "
            "PREWHERE camera_id IN {cameras:Array(String)} AND frame_id IN {ids:Array(String)} LIMIT 1 BY frame_id",
            [row["frame_id"] for row in chosen],
        )
        sha_of = {row["frame_id"]: row["sha256"] for row in shas}
        return {row["batch_id"]: sha_of[row["frame_id"]] for row in chosen if row["frame_id"] in sha_of}

    async def labels_on(self, event_ids: Sequence[str]) -> list[Row]:
        """Every label given on these events."""
        return await self._by_ids(
            "SELECT * EXCEPT inserted_at FROM labels FINAL "
            "WHERE camera_id IN {cameras:Array(String)} AND ifNull(event_id, '') IN {ids:Array(String)}",
            event_ids,
        )

    async def labels_in(self, camera: str, since: datetime, until: datetime) -> list[Row]:
        """The labels on a camera whose spans touch this one, newest first."""
        return await self._rows(
            f"SELECT * EXCEPT inserted_at FROM labels FINAL WHERE {_OF_CAMERA} "
            "AND ended_at >= fromUnixTimestamp64Milli({since:Int64}) "
            "AND started_at <= fromUnixTimestamp64Milli({until:Int64}) ORDER BY labelled_at DESC, label_id LIMIT 1000",
            camera=camera,
            since=ms(since),
            until=ms(until),
        )

    async def clock(self) -> datetime:
        """ClickHouse's own time: what `inserted_at` is written with."""
        [row] = await self._rows("SELECT now64(3, 'UTC') AS at")
        at: datetime = row["at"]
        return at

    async def arrived(self, since: datetime, *, after: Arrived | None, limit: int) -> list[Arrived]:
        """Live events by when ClickHouse took them, from `since` on, behind `after`."""
        rows = await self._rows(
            "SELECT inserted_at, epoch, `partition`, `offset`, camera_id, event_id FROM risk_events "
            "WHERE run = 'live' AND inserted_at >= fromUnixTimestamp64Milli({since:Int64}) "
            "AND (inserted_at, epoch, `partition`, `offset`) > "
            "(fromUnixTimestamp64Milli({at:Int64}), {epoch:String}, {partition:Int32}, {offset:Int64}) "
            "ORDER BY inserted_at, epoch, `partition`, `offset` LIMIT {limit:UInt32}",
            since=ms(since),
            at=ms(after.inserted_at) if after else 0,
            epoch=after.epoch if after else "",
            partition=after.partition if after else -1,
            offset=after.offset if after else -1,
            limit=limit,
        )
        return [Arrived(**row) for row in rows]

    async def prompt_name(self, digest: str) -> str:
        """A prompt version's name for people; empty where it has none."""
        rows = await self._rows(
            "SELECT name FROM prompts WHERE digest = {digest:String} AND kind = 'version' AND name != '' LIMIT 1",
            digest=digest,
        )
        return str(rows[0]["name"]) if rows else ""

    async def settings_of(self, camera: str) -> list[Row]:
        """Everything that was ever set for the camera, newest first."""
        return await self._rows(
            f"SELECT * EXCEPT inserted_at FROM cameras FINAL WHERE {_OF_CAMERA} "
            "ORDER BY updated_at DESC, `offset` DESC LIMIT 1000",
            camera=camera,
        )

    async def image_place(self, camera: str, sha256: str) -> Row | None:
        """Where a frame's bytes are: `claim`, or the place of its record on `frames`; None: there is no such frame."""
        rows = await self._rows(
            # Ids begin with the camera and half of the hash; what follows, if anything, begins with a colon.
            f"SELECT claim, epoch, `partition`, `offset` FROM frames WHERE {_OF_CAMERA} "
            "AND frame_id >= {begins:String} AND frame_id < concat({begins:String}, ';') AND sha256 = {sha256:String} "
            "ORDER BY inserted_at DESC LIMIT 1",
            camera=camera,
            begins=f"{camera}:{sha256[:32]}",
            sha256=sha256,
        )
        return rows[0] if rows else None

    async def record(self, topic: str, epoch: str, partition: int, offset: int) -> tuple[bytes, bytes | None] | None:
        """A record's original bytes and its schema's fingerprint; None where `log` does not keep it any more."""
        rows = await self._rows(
            "SELECT hex(value) AS value, fingerprint FROM log WHERE topic = {topic:String} AND epoch = {epoch:String} "
            "AND `partition` = {partition:Int32} AND `offset` = {offset:Int64} LIMIT 1",
            topic=topic,
            epoch=epoch,
            partition=partition,
            offset=offset,
        )
        if not rows or rows[0]["value"] is None:
            return None
        return bytes.fromhex(rows[0]["value"]), bytes.fromhex(rows[0]["fingerprint"]) or None

    async def camera_names(self, camera: str | None = None) -> list[Row]:
        """`camera_id`, `name` and `time_zone` of every camera that was ever set or sent a frame, or of one.

        The name is empty where none was set, the zone UTC. Read from projection `newest`, as what follows.
        """
        return await self._rows(
            "SELECT k.camera_id AS camera_id, c.name AS name, "
            "if(c.zone IN (SELECT time_zone FROM system.time_zones), c.zone, 'UTC') AS time_zone FROM "
            f"(SELECT camera_id FROM frames WHERE {_OF} GROUP BY camera_id "
            f"UNION DISTINCT SELECT camera_id FROM cameras WHERE {_OF}) AS k LEFT ANY JOIN "
            "(SELECT camera_id, argMax(name, (updated_at, `offset`)) AS name, "
            f"argMax(time_zone, (updated_at, `offset`)) AS zone FROM cameras WHERE {_OF} GROUP BY camera_id) AS c "
            "ON c.camera_id = k.camera_id",
            camera=camera or "",
        )

    async def newest_frames(self, camera: str | None = None) -> list[Row]:
        """By camera: `last_at` (arrival), that frame's `sha256`, and `pause_ms`, the median of the last 200.

        `taken_at` is when the newest was taken; another frame than the newest to arrive, perhaps.
        """
        return await self._rows(
            "SELECT camera_id, last_at, taken_at, sha256, "
            "if(length(newest) < 2, 0, arrayReduce('medianExact', arrayPopFront(arrayDifference(newest)))) AS pause_ms "
            f"FROM (SELECT camera_id, max(arrived_at) AS last_at, max({_TAKEN}) AS taken_at, "
            "argMax(sha256, arrived_at) AS sha256, "
            "groupArraySorted(200)(-toUnixTimestamp64Milli(arrived_at)) AS newest "
            f"FROM frames WHERE {_OF} GROUP BY camera_id)",
            camera=camera or "",
        )

    async def day(self, since: datetime, camera: str | None = None) -> tuple[dict[str, int], dict[str, Row]]:
        """Frames since then by camera, and `events` and `top_level` since then by camera."""
        frames, events = await asyncio.gather(
            self._rows(
                "SELECT camera_id, uniqExact(frame_id) AS frames FROM frames "
                f"WHERE arrived_at >= fromUnixTimestamp64Milli({{since:Int64}}) AND {_OF} GROUP BY camera_id",
                since=ms(since),
                camera=camera or "",
            ),
            self._rows(
                "SELECT camera_id, uniqExact(event_id) AS events, argMax(risk_level, risk_score) AS top_level "
                "FROM risk_events WHERE run = 'live' "
                f"AND started_at >= fromUnixTimestamp64Milli({{since:Int64}}) AND {_OF} GROUP BY camera_id",
                since=ms(since),
                camera=camera or "",
            ),
        )
        return {row["camera_id"]: row["frames"] for row in frames}, {row["camera_id"]: row for row in events}

    async def hours(self, camera: str, since: datetime, until: datetime, threshold: float) -> dict[datetime, Row]:
        """By hour `frames`, `windows`, `events`, `top_level`, and `detections`: boxes from `threshold` on by class."""
        span = {"camera": camera, "since": ms(since), "until": ms(until)}
        since_ms, until_ms = ("fromUnixTimestamp64Milli({since:Int64})", "fromUnixTimestamp64Milli({until:Int64})")
        # Nothing arrives before it is taken: months that ended before the span are not read.
        taken = f"{_OF_CAMERA} AND arrived_at >= {since_ms} AND {_TAKEN} >= {since_ms} AND {_TAKEN} < {until_ms}"
        began = f"{_OF_CAMERA} AND started_at >= {since_ms} AND started_at < {until_ms}"
        frames, seen, windows, events = await asyncio.gather(
            self._rows(
                f"SELECT toStartOfHour({_TAKEN}) AS hour, uniqExact(frame_id) AS frames FROM frames WHERE {taken} "
                "GROUP BY hour",
                **span,
            ),
            self._rows(
                f"SELECT toStartOfHour({_TAKEN}) AS hour, label, count() AS boxes FROM "
                f"(SELECT captured_at, arrived_at, boxes.label, boxes.score FROM detections FINAL WHERE {taken}) "
                "ARRAY JOIN boxes.label AS label, boxes.score AS score "
                "WHERE score >= {threshold:Float64} GROUP BY hour, label ORDER BY boxes DESC, label",
                **span,
                threshold=threshold,
            ),
            self._rows(
                f"SELECT toStartOfHour(started_at) AS hour, uniqExact(batch_id) AS windows FROM batches WHERE {began} "
                "GROUP BY hour",
                **span,
            ),
            self._rows(
                "SELECT toStartOfHour(started_at) AS hour, uniqExact(event_id) AS events, "
                f"argMax(risk_level, risk_score) AS top_level FROM risk_events WHERE run = 'live' AND {began} "
                "GROUP BY hour",
                **span,
            ),
        )
        found: dict[datetime, Row] = {}
        for row in (*frames, *windows, *events):
            found.setdefault(row["hour"].astimezone(UTC), {}).update(row)
        for row in seen:
            found.setdefault(row["hour"].astimezone(UTC), {}).setdefault("detections", {})[row["label"]] = row["boxes"]
        return found

    async def pauses(self, camera: str, since: datetime, until: datetime, least: timedelta) -> Pauses:
        """The pauses between a camera's frames, by when they were taken."""
        [row] = await self._rows(
            "SELECT before, after, if(empty(at), 0, at[1]) AS first, if(empty(at), 0, at[-1]) AS last, median, "
            "arrayFilter(p -> p.1 > greatest({least:Int64}, 10 * median), "
            "arrayZip(pauses, arrayPopBack(at), arrayPopFront(at))) AS long FROM "
            "(SELECT before, after, at, arrayPopFront(arrayDifference(at)) AS pauses, "
            "if(empty(pauses), 0, arrayReduce('medianExact', pauses)) AS median FROM "
            "(SELECT maxIf(taken, taken < {since:Int64}) AS before, minIf(taken, taken >= {until:Int64}) AS after, "
            "arraySort(groupArrayIf(taken, taken >= {since:Int64} AND taken < {until:Int64})) AS at FROM "
            f"(SELECT toUnixTimestamp64Milli({_TAKEN}) AS taken FROM frames WHERE {_OF_CAMERA})))",
            camera=camera,
            since=ms(since),
            until=ms(until),
            least=least // timedelta(milliseconds=1),
        )
        return Pauses(
            _time(row["before"]),
            _time(row["first"]),
            _time(row["last"]),
            _time(row["after"]),
            timedelta(milliseconds=float(row["median"])),
            tuple((_at(since_ms), _at(until_ms)) for _, since_ms, until_ms in row["long"]),
        )

    async def _by_ids(self, query: str, ids: Iterable[str]) -> list[Row]:
        """The rows of a query that takes `cameras` and `ids`; ids begin with their camera."""
        wanted = list(dict.fromkeys(ids))
        chunks = [wanted[at : at + _CHUNK] for at in range(0, len(wanted), _CHUNK)]
        found = await asyncio.gather(
            *(self._rows(query, cameras=sorted({camera_of(i) for i in chunk}), ids=chunk) for chunk in chunks)
        )
        return [row for rows in found for row in rows]


def camera_of(name: str) -> str:
    """The camera that an id of a frame, a window or an event begins with."""
    return name.split(":", 1)[0]


def _at(at_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=at_ms)


def _time(at_ms: int) -> datetime | None:
    """Zero is what the aggregates give for none: nothing was taken in 1970."""
    return _at(at_ms) if at_ms else None

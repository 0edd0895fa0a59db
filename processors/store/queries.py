"""What the product itself asks ClickHouse: counts, events and their lineage, dead letters. People ask in SQL."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

from clickhouse_connect.driver.exceptions import DatabaseError

from processors.store.connection import Connection, own_words
from processors.store.settings import ClickHouseSettings
from processors.store.times import LAST_MS
from schemas.migrations import migrations, pending
from streams.topics import STORED

Row = dict[str, Any]

_STATUS = """
    SELECT
        origin,
        argMax(status, (at, offset)) AS newest,
        groupUniqArrayIf(by, status IN ('resolved', 'discarded')) AS resolved_by
    FROM dead_letter_status FINAL
    GROUP BY origin
"""
# What a stage has resolved stays so: whoever redrives it once more brings a record of which nothing is made.
_FATE = "multiIf(hasAny(s.resolved_by, [l.stage, 'cli']), 'resolved', s.newest = 'redriven', 'redriven', 'open')"

# Every column of a position, and the hex of what may be binary: clients take a String for text.
_LETTER = f"""
    l.origin AS origin, l.stage AS stage, l.kind AS kind, l.camera_id AS camera_id, l.error AS error,
    l.message AS message, l.attempt AS attempt, l.claim AS claim, {_FATE} AS status,
    if({{bodies:Bool}}, hex(l.key), NULL) AS key, if({{bodies:Bool}}, hex(l.value), NULL) AS value,
    arrayMap(h -> tuple(h.1, hex(h.2)), l.headers) AS headers, l.detail AS detail, l.failed_at AS failed_at
"""
# Their positions first: only of those that are wanted the bytes are read.
_LETTERS = f"""
    SELECT {_LETTER}
    FROM dead_letters AS l FINAL
    LEFT JOIN ({_STATUS}) AS s ON s.origin = l.origin
    WHERE (l.stage, l.origin, l.epoch, l.partition, l.offset) IN
    (
        SELECT l.stage, l.origin, l.epoch, l.partition, l.offset
        FROM
        (
            SELECT stage, origin, epoch, partition, offset, kind, error, message, failed_at
            FROM dead_letters FINAL
            WHERE startsWith(origin, {{origin:String}})
            AND (empty({{origins:Array(String)}}) OR origin IN {{origins:Array(String)}})
            ORDER BY failed_at DESC, offset DESC
            LIMIT {{each:UInt32}} BY stage, origin
        ) AS l
        LEFT JOIN ({_STATUS}) AS s ON s.origin = l.origin
        WHERE ({{stage:String}} = '' OR l.stage = {{stage:String}})
        AND ({{kind:String}} = '' OR l.kind = {{kind:String}})
        AND ({{error:String}} = '' OR positionCaseInsensitive(concat(l.error, ': ', l.message), {{error:String}}) > 0)
        AND l.failed_at >= fromUnixTimestamp64Milli({{since:Int64}})
        AND l.failed_at < fromUnixTimestamp64Milli({{until:Int64}})
        AND ({{status:String}} = '' OR ({_FATE} = 'resolved') = ({{status:String}} = 'resolved'))
        ORDER BY l.failed_at DESC, l.origin
        LIMIT {{limit:UInt32}}
    )
    ORDER BY l.failed_at DESC, l.origin, l.offset DESC
"""  # noqa: S608 (constants)
# Letters of one origin that `every` brings: who redrives more often than that has seen enough of them.
_EVERY = 100

_IDS: Mapping[str, tuple[str, ...]] = {
    "frames": ("frame_id",),
    "detections": ("frame_id",),
    "batches": ("batch_id",),
    "contexts": ("batch_id",),
    "risk_events": ("event_id",),
    "labels": ("label_id",),
    "alerts": ("alert_id",),
    "replay_units": ("unit_id",),
    "replay_events": ("event_id",),
    "gpu_metrics": ("host", "device", "read_at"),
}
"""The columns of typed tables that tell one record from another; of the others their position does."""
_POSITION = ("epoch", "partition", "offset")


class QueryError(ValueError):
    """The engine does not take this query; the message is its own."""


class Lineage(NamedTuple):
    """An event and the rows that it was made from, as their tables have them; None where one is not there."""

    event: Row
    batch: Row | None
    context: Row | None
    frames: Mapping[str, Row]
    """By frame_id."""
    detections: Mapping[str, Row]
    """By frame_id."""


class Model(NamedTuple):
    """A model, as records name it."""

    name: str
    digest: str
    """SHA-256 of its weights; empty where nobody could read them."""


class Count(NamedTuple):
    """What ClickHouse has of a topic, counted by name: rows that came twice count once."""

    records: int
    """Records in `log`, by epoch, partition and offset, ticks left out."""
    ids: int
    """Records in the typed table, by id."""
    undecodable: int
    """Records in `log` that have no typed row."""


class Queries:
    """The read side of the store. Close it with `aclose`.

    Times are aware datetimes in UTC. Its methods raise `UnavailableError` when ClickHouse is away or lacks the tables.
    """

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._connection = Connection(settings)

    async def in_clickhouse(self) -> dict[str, Count]:
        """What ClickHouse has of each stored topic, counted row by row: the audit. View `pipeline_lag` is cheaper."""
        counted = " UNION ALL ".join(
            f"SELECT '{topic}' AS topic, uniqExact(({', '.join(_IDS.get(topic, _POSITION))})) AS ids FROM {topic}"  # noqa: S608 (our names)
            for topic in STORED
        )
        log, typed = await asyncio.gather(
            self.rows(
                "SELECT topic, countIf(NOT tick) AS records, countIf(decode_error != '') AS undecodable "
                "FROM log FINAL GROUP BY topic"
            ),
            self.rows(counted),
        )
        ids = {row["topic"]: row["ids"] for row in typed}
        kept = {row["topic"]: row for row in log}
        return {
            topic: Count(kept[topic]["records"], ids[topic], kept[topic]["undecodable"])
            if topic in kept
            else Count(0, ids[topic], 0)
            for topic in STORED
        }

    async def events(
        self,
        *,
        camera: str | None = None,
        level: str | None = None,
        since: datetime | None = None,
        limit: int,
        order: Literal["time", "risk"] = "time",
    ) -> list[Row]:
        """Live events as the view `events` has them: the newest first, or the riskiest."""
        by = {"time": "started_at DESC", "risk": "risk_score DESC, started_at DESC"}[order]
        return await self.rows(
            "SELECT * FROM events WHERE ({camera:String} = '' OR camera_id = {camera:String}) "  # noqa: S608 (our words)
            "AND ({level:String} = '' OR risk_level = {level:String}) "
            "AND started_at >= fromUnixTimestamp64Milli({since:Int64}) "
            f"ORDER BY {by}, event_id LIMIT {{limit:UInt32}}",
            camera=camera or "",
            level=level or "",
            since=0 if since is None else int(since.timestamp() * 1000),
            limit=limit,
        )

    async def version_and_clock(self) -> tuple[str, int]:
        """The engine's version, and its wall time in milliseconds since the Unix epoch."""
        [row] = await self.rows("SELECT version() AS version, toUnixTimestamp64Milli(now64(3)) AS at")
        return row["version"], row["at"]

    async def pending_migrations(self) -> list[str]:
        """Names of the migrations that the database lacks.

        Raises:
            MigrationError: it has others than this version.
        """
        [there] = await self.rows(
            "SELECT count() AS n FROM system.tables WHERE database = currentDatabase() AND name = 'schema_migrations'"
        )
        applied = await self.rows("SELECT version, sha256 FROM schema_migrations FINAL") if there["n"] else []
        todo = pending(migrations(), {row["version"]: row["sha256"] for row in applied})
        return [f"{migration.version:03d}_{migration.name}" for migration in todo]

    async def counts(self) -> dict[str, int]:
        """Records by topic, each counted once by its id; what could not be decoded is counted by its offset."""
        return {topic: count.ids + count.undecodable for topic, count in (await self.in_clickhouse()).items()}

    async def flow(self) -> dict[str, Row]:
        """By topic `records`, as the sink counted them, and `last_at`, when it last brought some.

        As the view `pipeline_lag` has them, without what that costs: nothing is read but the sink's own notes.
        """
        rows = await self.rows(
            "SELECT topic, sum(rows - ticks) AS records, max(sink_progress.inserted_at) AS last_at "
            "FROM sink_progress FINAL GROUP BY topic"
        )
        return {row["topic"]: row for row in rows}

    async def latency(self) -> dict[str, Row]:
        """Of `detections` and `risk_events`, `p50_s` and `p95_s` from a frame's arrival to the record, newest hour.

        An event is as old as the last frame that it was made from. Missing where there is nothing to tell by.
        """
        newest = "WHERE run = 'live' AND judged_at > (SELECT max(judged_at) FROM risk_events) - INTERVAL 1 HOUR"
        rows = await self.rows(
            "SELECT 'detections' AS topic, "  # noqa: S608 (constants)
            "quantilesExact(0.5, 0.95)(toFloat64(detected_at) - toFloat64(arrived_at)) AS seconds FROM detections "
            "WHERE detected_at > (SELECT max(detected_at) FROM detections) - INTERVAL 1 HOUR HAVING count() > 0 "
            "UNION ALL SELECT 'risk_events', "
            "quantilesExact(0.5, 0.95)(toFloat64(e.judged_at) - toFloat64(f.arrived_at)) FROM "
            f"(SELECT camera_id, frame_ids[-1] AS frame_id, judged_at FROM risk_events {newest}) AS e "
            "ANY INNER JOIN (SELECT camera_id, frame_id, arrived_at FROM frames WHERE (camera_id, frame_id) IN "
            f"(SELECT camera_id, frame_ids[-1] FROM risk_events {newest})) AS f "
            "ON f.camera_id = e.camera_id AND f.frame_id = e.frame_id HAVING count() > 0"
        )
        return {row["topic"]: {"p50_s": row["seconds"][0], "p95_s": row["seconds"][1]} for row in rows}

    async def models(self) -> dict[str, Model]:
        """The `detector` and the `analyst` in force: what the newest records name; missing where there is none."""
        rows = await self.rows(
            # From projection `newest`, which has no count; of no rows the maximum is zero.
            "SELECT 'detector' AS role, argMax((model, model_digest), detected_at) AS made_by FROM detections "
            "HAVING toUnixTimestamp64Milli(max(detected_at)) > 0 UNION ALL "
            "SELECT 'analyst', argMax((model, model_digest), judged_at) FROM risk_events HAVING count() > 0"
        )
        return {row["role"]: Model(*row["made_by"]) for row in rows}

    async def dead_letter_counts(self) -> list[Row]:
        """How many dead letters are open, by stage and kind: one that failed again and again is one."""
        return await self.rows(
            f"SELECT l.stage AS stage, l.kind AS kind, uniqExact(l.origin) AS count FROM dead_letters AS l FINAL "  # noqa: S608 (constants)
            f"LEFT JOIN ({_STATUS}) AS s ON s.origin = l.origin "
            f"WHERE {_FATE} != 'resolved' GROUP BY stage, kind ORDER BY count DESC",
        )

    async def dead_letters(
        self,
        *,
        stage: str | None = None,
        kind: str | None = None,
        error: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        status: Literal["open", "resolved"] | None = None,
        origin: str | None = None,
        origins: Sequence[str] = (),
        every: bool = False,
        bodies: bool = True,
        limit: int,
    ) -> list[Row]:
        """Dead letters, newest first: of each origin and stage the newest, or with `every` those before it too.

        `origin` is a beginning, `origins` are whole; `error` is a part of class and message. Key, value and header
        values are hex; without `bodies` key and value are None. A letter's `status` is open, redriven or resolved;
        asked for open ones, redriven ones are among them.
        """
        return await self.rows(
            _LETTERS,
            stage=stage or "",
            kind=kind or "",
            error=error or "",
            since=0 if since is None else int(since.timestamp() * 1000),
            until=LAST_MS if until is None else int(until.timestamp() * 1000),
            status=status or "",
            origin=origin or "",
            origins=list(origins),
            each=_EVERY if every else 1,
            bodies=bodies,
            limit=limit,
        )

    async def live_event(self, event_id: str) -> Row | None:
        """The live event of exactly this id."""
        found = await self.rows(
            # Ids begin with the camera, as the primary key does.
            "SELECT * EXCEPT inserted_at FROM risk_events FINAL "
            "PREWHERE camera_id = splitByChar(':', {id:String})[1] AND event_id = {id:String} WHERE run = 'live'",
            id=event_id,
        )
        return found[0] if found else None

    async def events_like(self, text: str, *, limit: int) -> list[Row]:
        """Live events whose id begins so, with or without the camera's name before it."""
        return await self.rows(
            # Prompts and completions are read of those found alone.
            "SELECT * EXCEPT inserted_at FROM risk_events FINAL PREWHERE (camera_id, event_id) IN "
            "(SELECT camera_id, event_id FROM risk_events WHERE run = 'live' AND (startsWith(event_id, {id:String}) "
            "OR startsWith(substring(event_id, length(camera_id) + 2), {id:String})) "
            "ORDER BY event_id LIMIT 1 BY event_id LIMIT {limit:UInt32}) WHERE run = 'live' ORDER BY event_id",
            id=text,
            limit=limit,
        )

    async def made_from(self, event: Row) -> Lineage:
        """The rows that the event was made from."""
        of_batch = {"camera": event["camera_id"], "batch": event["batch_id"]}
        of_frames = {"camera": event["camera_id"], "frames": list(event["frame_ids"])}
        # Asked of the keys first: the other columns are read of the rows that are wanted alone.
        by_batch = "PREWHERE camera_id = {camera:String} AND batch_id = {batch:String}"
        by_frame = "PREWHERE camera_id = {camera:String} AND frame_id IN {frames:Array(String)}"
        columns = "SELECT * EXCEPT inserted_at FROM"
        batches, contexts, frames, seen = await asyncio.gather(
            self.rows(f"{columns} batches FINAL {by_batch}", **of_batch),
            self.rows(f"{columns} contexts FINAL {by_batch}", **of_batch),
            self.rows(f"{columns} frames FINAL {by_frame}", **of_frames),
            self.rows(f"{columns} detections FINAL {by_frame}", **of_frames),
        )
        return Lineage(
            event,
            batches[0] if batches else None,
            contexts[0] if contexts else None,
            {row["frame_id"]: row for row in frames},
            {row["frame_id"]: row for row in seen},
        )

    async def rows(self, query: str, **parameters: Any) -> list[Row]:
        """The rows of a query of ours; times are aware."""
        with self._connection.naming():
            found = await (await self._connection.client()).query(query, parameters=parameters)
        return [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]

    async def columns(self, query: str, **parameters: Any) -> dict[str, Sequence[Any]]:
        """The columns of a query of ours, strings as their bytes: for many rows, and for what is no text."""
        with self._connection.naming():
            found = await (await self._connection.client()).query(
                query, parameters=parameters, query_formats={"String": "bytes"}, column_oriented=True
            )
        return dict(zip(found.column_names, found.result_columns, strict=True))

    async def raw(self, query: str, fmt: str, *, limit: int) -> bytes:
        """A person's query, formatted by the engine; it cannot write. `limit` 0 is none.

        Raises:
            QueryError: the query is wrong, or would change something; the message is the engine's own.
        """
        settings = {"limit": limit, "output_format_json_quote_64bit_integers": 0}
        with self._connection.naming():
            client = await self._connection.client()
            # Whom its profile keeps from writing may not even ask for that.
            own = client.server_settings.get("readonly")
            if own is None or own.value == "0":
                settings["readonly"] = 1
            try:
                answer: bytes = await client.raw_query(query, settings=settings, fmt=fmt)
            except DatabaseError as error:
                if error.code is None:
                    raise
                raise QueryError(own_words(error).replace(f"\n FORMAT {fmt}", "")) from error
        return answer

    async def aclose(self) -> None:
        """Close the connection."""
        await self._connection.close()

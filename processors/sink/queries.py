"""What the product itself asks ClickHouse: counts, events and their lineage. People ask in SQL."""

import asyncio
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from processors.sink.core import TABLES
from processors.sink.settings import ClickHouseSettings
from processors.sink.store import Connection

Row = dict[str, Any]


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
            f"SELECT '{topic}' AS topic, uniqExact(({', '.join(table.id)})) AS ids FROM {topic}"  # noqa: S608 (our names)
            for topic, table in TABLES.items()
        )
        log, typed = await asyncio.gather(
            self._select(
                "SELECT topic, countIf(NOT tick) AS records, countIf(decode_error != '') AS undecodable "
                "FROM log FINAL GROUP BY topic"
            ),
            self._select(counted),
        )
        ids = {row["topic"]: row["ids"] for row in typed}
        kept = {row["topic"]: row for row in log}
        return {
            topic: Count(kept[topic]["records"], ids[topic], kept[topic]["undecodable"])
            if topic in kept
            else Count(0, ids[topic], 0)
            for topic in TABLES
        }

    async def events(
        self, *, limit: int = 50, camera_id: str | None = None, order: Literal["time", "risk"] = "time"
    ) -> list[Row]:
        """Rows of the view `events`: the newest first, or the riskiest."""
        by = {"time": "started_at DESC", "risk": "risk_score DESC, started_at DESC"}[order]
        where = "WHERE camera_id = {camera:String}" if camera_id is not None else ""
        return await self._select(
            f"SELECT * FROM events {where} ORDER BY {by}, event_id LIMIT {{limit:UInt64}}",  # noqa: S608 (our words)
            {"camera": camera_id or "", "limit": limit},
        )

    async def event(self, event_id: str) -> Row | None:
        """Everything that is kept of a live event, its names for people too; None where there is no such event."""
        made, shown = await asyncio.gather(
            self._select("SELECT * FROM risk_events FINAL WHERE event_id = {id:String}", {"id": event_id}),
            self._select("SELECT * FROM events WHERE event_id = {id:String}", {"id": event_id}),
        )
        return {**made[0], **shown[0]} if made and shown else None

    async def lineage(self, event_id: str) -> list[Row]:
        """Rows of the view `event_lineage`: the event's frames in order."""
        return await self._select(
            "SELECT * FROM event_lineage WHERE event_id = {id:String} ORDER BY n", {"id": event_id}
        )

    async def aclose(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _select(self, query: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
        with self._connection.naming():
            client = await self._connection.client()
            found = await client.query(query, dict(parameters or {}))
        return list(found.named_results())

"""What ClickHouse has of the log, byte for byte, read on from where an earlier backup ended; and what it forgot."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from infra.backup.packs import Kept
from infra.backup.passes import Marks
from processors.store.connection import Connection
from processors.store.settings import ClickHouseSettings
from streams.messages import Incoming

_RECORDS = 5_000
_BYTES = 16 * 1024 * 1024
"""Of one read, and so of one part: frames may carry 64 KB each."""

Life = tuple[str, str, int]
"""Topic, epoch and partition."""

# String as bytes: values are no text.
_FORMATS = {"String": "bytes", "FixedString": "bytes"}

_LIVES = """
    SELECT toString(topic) AS topic, toString(epoch) AS epoch, partition, max(offset) AS last FROM log
    GROUP BY topic, epoch, partition
"""
_HERE = """
    topic = {topic:String} AND epoch = {epoch:String} AND partition = {partition:Int32}
    AND offset > {after:Int64} AND offset < {upto:Int64}
"""
# FINAL reads all that the condition lets it: so the end is looked up first, along the sorting key.
_PAGE = f"""
    SELECT offset, key, value, headers, decode_error, toUnixTimestamp64Milli(inserted_at) AS at
    FROM log FINAL WHERE {_HERE}
    AND offset <=
    (SELECT max(offset) FROM (SELECT offset FROM log WHERE {_HERE} ORDER BY offset LIMIT {{limit:UInt32}}))
    ORDER BY offset
"""  # noqa: S608 (constants)
_COUNT = f"SELECT uniqExact(offset) AS n FROM log WHERE {_HERE}"  # noqa: S608 (constants)

_PASSES = """
    SELECT g.pass AS name, toString(g.owner) AS owner, toUnixTimestamp64Milli(g.started_at) AS started_at,
        toString(g.state) AS state, g.records AS records, g.images AS images, toUnixTimestamp64Milli(g.at) AS at
    FROM gc_passes AS g FINAL WHERE g.state IN ('deleting', 'done') ORDER BY started_at, name
"""
# Not FINAL: a mark stays this pass's, also where another has marked the same. Of two reasons the later one counts.
_MARKS = """
    SELECT topic, epoch, partition, why, marked_at, arraySort(groupArray(offset)) AS offsets FROM
    (
        SELECT toString(f.topic) AS topic, toString(f.epoch) AS epoch, f.partition AS partition, f.offset AS offset,
            toString(f.why) AS why, toUnixTimestamp64Milli(f.marked_at) AS marked_at
        FROM forgotten AS f WHERE f.pass = {name:String}
        ORDER BY marked_at DESC LIMIT 1 BY topic, epoch, partition, offset
    )
    GROUP BY topic, epoch, partition, why, marked_at ORDER BY topic, epoch, partition, marked_at, why
"""


class History:
    """The table `log`, and what retention took of it; the connection is opened when it is first needed."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._connection = Connection(settings)

    async def lives(self) -> dict[Life, int]:
        """Every partition of every life of every topic that it has anything of, and its last offset.

        Raises:
            UnavailableError: ClickHouse is away.
        """
        rows = await self._rows(_LIVES)
        return {(row["topic"], row["epoch"], row["partition"]): row["last"] for row in rows}

    async def count(self, life: Life, after: int, upto: int) -> int:
        """How many records lie between two offsets, both exclusive; raises as `lives`."""
        [row] = await self._rows(_COUNT, **_where(life, after, upto))
        return int(row["n"])

    async def pages(self, life: Life, after: int, upto: int) -> AsyncIterator[list[Kept]]:
        """The records between two offsets, both exclusive, in order, some at a time; raises as `lives`."""
        topic, epoch, partition = life
        limit = _RECORDS // 20  # nobody knows yet how large they are
        while True:
            rows = await self._rows(_PAGE, formats=_FORMATS, limit=limit, **_where(life, after, upto))
            if not rows:
                return
            yield [
                Kept(
                    Incoming(
                        topic,
                        epoch,
                        partition,
                        row["offset"],
                        row["key"],
                        row["value"],
                        tuple((name.decode(), value) for name, value in map(_pair, row["headers"])),
                    ),
                    inserted_at=row["at"],
                    decode_error=row["decode_error"].decode(),
                )
                for row in rows
            ]
            after = rows[-1]["offset"]
            size = sum(len(row["value"] or b"") for row in rows) // len(rows)
            limit = min(_RECORDS, max(1, _BYTES // max(size, 1)))

    async def passes(self) -> list[dict[str, Any]]:
        """The passes of the collector that have begun to delete: `gc_passes`, times in ms; raises as `lives`."""
        return await self._rows(_PASSES)

    async def marks(self, name: str) -> list[Marks]:
        """What such a pass took, or is about to; raises as `lives`."""
        return [Marks(**row) for row in await self._rows(_MARKS, name=name)]

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _rows(
        self, query: str, *, formats: Mapping[str, str] | None = None, **parameters: Any
    ) -> list[dict[str, Any]]:
        with self._connection.naming():
            client = await self._connection.client()
            found = await client.query(query, parameters=parameters, query_formats=dict(formats) if formats else None)
        return [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]


def _where(life: Life, after: int, upto: int) -> dict[str, Any]:
    topic, epoch, partition = life
    return {"topic": topic, "epoch": epoch, "partition": partition, "after": after, "upto": upto}


def _pair(header: Any) -> tuple[bytes, bytes]:
    """A header, however the client carries a named tuple."""
    name, value = header.values() if isinstance(header, dict) else header
    return name, value

"""What ClickHouse has of the log, byte for byte, read on from where an earlier backup ended."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from infra.backup.packs import Kept
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
    WHERE inserted_at >= fromUnixTimestamp64Milli({since:Int64}) GROUP BY topic, epoch, partition
"""
_HERE = """
    topic = {topic:String} AND epoch = {epoch:String} AND partition = {partition:Int32}
    AND offset > {after:Int64} AND offset < {upto:Int64} AND inserted_at >= fromUnixTimestamp64Milli({since:Int64})
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

FIRST_MS = -2_208_988_800_000
"""1900-01-01, before anything that ClickHouse can have taken."""


class History:
    """The table `log`; the connection is opened when it is first needed."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._connection = Connection(settings)

    async def lives(self, since: int | None) -> dict[Life, int]:
        """Every partition of every life of every topic that it has anything of, and its last offset.

        Raises:
            UnavailableError: ClickHouse is away.
        """
        rows = await self._rows(_LIVES, since=FIRST_MS if since is None else since)
        return {(row["topic"], row["epoch"], row["partition"]): row["last"] for row in rows}

    async def count(self, life: Life, after: int, upto: int, since: int | None) -> int:
        """How many records lie between two offsets, both exclusive; raises as `lives`."""
        [row] = await self._rows(_COUNT, **_where(life, after, upto, since))
        return int(row["n"])

    async def pages(self, life: Life, after: int, upto: int, since: int | None) -> AsyncIterator[list[Kept]]:
        """The records between two offsets, both exclusive, in order, some at a time; raises as `lives`."""
        topic, epoch, partition = life
        limit = _RECORDS // 20  # nobody knows yet how large they are
        while True:
            rows = await self._rows(_PAGE, formats=_FORMATS, limit=limit, **_where(life, after, upto, since))
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


def _where(life: Life, after: int, upto: int, since: int | None) -> dict[str, Any]:
    topic, epoch, partition = life
    where = {"topic": topic, "epoch": epoch, "partition": partition, "after": after, "upto": upto}
    return where | {"since": FIRST_MS if since is None else since}


def _pair(header: Any) -> tuple[bytes, bytes]:
    """A header, however the client carries a named tuple."""
    name, value = header.values() if isinstance(header, dict) else header
    return name, value

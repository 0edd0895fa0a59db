"""Typed tables and views made anew from `log`, row for row, while the sink goes on.

A table is built beside the old one under a name of its own, then the two names are exchanged: readers see the old
rows or the new ones, never a part. What the sink inserts meanwhile is not lost: it writes each record to `log` before
the typed row, so whatever went into the old table until the exchange is in `log` after it, and is filled in from
there. What is then there twice (filled in by us, inserted by the sink) has one id and is one row, as every row that
the sink repeats. So nobody has to be stopped, and nothing has to be remembered: whoever is killed at any instant runs
it again from the beginning, and comes to the same rows. Two at a time have names of their own, and do the same.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import structlog

from processors.sink import core
from processors.sink.core import Block
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from streams.messages import Incoming
from streams.stages import Range

log = structlog.get_logger(__name__)

# One read of `log`, bytes: what the sink's own buffer holds of a partition. Frames may carry 64 KB each.
_READ_BYTES = 16 * 1024 * 1024
_READ_RECORDS = 5000

# Before the exchange the new table is to be this close behind, records: what is filled in after it takes a moment.
_CLOSE = 1000
# Who brings more than that during each of so many passes is never caught; the exchange is right all the same.
_PASSES = 10

_MARK = "__rebuild_"


class Progress(NamedTuple):
    """How far one table has come."""

    table: str
    done: int
    total: int
    """Records in `log` when it began; more may come meanwhile."""


class Rebuilt(NamedTuple):
    """One table, made anew."""

    table: str
    records: int
    """Records of `log` that were read; ticks are none."""
    rows: int
    """Rows that the table has now, each counted once."""
    rows_before: int
    undecodable: int
    """Records that have no row: `log.decode_error` says why."""
    corrected: int
    """Records of which `log.decode_error` said something else before."""


OnProgress = Callable[[Progress], None]


class Rebuild:
    """Makes tables anew, one after another. It belongs to whoever runs it once; the store is the caller's."""

    def __init__(self, store: ClickHouseStore, on_progress: OnProgress = lambda _: None) -> None:
        self._store = store
        self._stage = SinkStage(store)
        self._on_progress = on_progress
        self._run = secrets.token_hex(4)
        # Types of large values come as bytes: they are no text.
        self._bytes = {"String": "bytes", "FixedString": "bytes"}

    async def plan(self, tables: Sequence[str]) -> list[tuple[str, int, int | None]]:
        """Each table, the records that it would be made from, and the rows that it has; None where it is not there."""
        records = {
            row["topic"]: row["n"]
            for row in await self._rows(
                "SELECT toString(topic) AS topic, count() AS n FROM log FINAL WHERE NOT tick GROUP BY topic"
            )
        }
        there = {
            row["name"] for row in await self._rows("SELECT name FROM system.tables WHERE database = currentDatabase()")
        }
        return [
            (table, records.get(table, 0), await self._count(table) if table in there else None) for table in tables
        ]

    async def views(self) -> None:
        """Every view as the migrations have it, and every table that is not there, empty."""
        await self._store.restore()

    async def table(self, topic: str) -> Rebuilt:
        """Make one table anew.

        Raises:
            UnavailableError: ClickHouse is away, or does not do this; the old table stands unless the new one does.
        """
        beside = f"{topic}{_MARK}{self._run}"
        for name in await self._leftovers(topic):
            await self._command(f"DROP TABLE IF EXISTS `{name}` SYNC")
        before = await self._count(topic)
        [found] = await self._rows(
            "SELECT count() AS n FROM log FINAL WHERE topic = {topic:String} AND NOT tick", topic=topic
        )
        work = _Work(topic, beside, found["n"])
        await self._command(f"CREATE TABLE `{beside}` AS {topic}")
        for _ in range(_PASSES):
            if await self._fill(work) < _CLOSE:
                break
        await self._command(f"EXCHANGE TABLES {topic} AND `{beside}`")
        work.into = topic
        # What went into the old table until now was in `log` before.
        await self._fill(work)
        await self._command(f"DROP TABLE IF EXISTS `{beside}` SYNC")
        log.info("rebuilt", table=topic, records=work.done, undecodable=work.undecodable, corrected=work.corrected)
        return Rebuilt(topic, work.done, await self._count(topic), before, work.undecodable, work.corrected)

    async def _leftovers(self, topic: str) -> list[str]:
        """What runs that were killed left beside the table."""
        rows = await self._rows(
            "SELECT name FROM system.tables WHERE database = currentDatabase() AND startsWith(name, {mark:String})",
            mark=f"{topic}{_MARK}",
        )
        return [row["name"] for row in rows]

    async def _fill(self, work: "_Work") -> int:
        """Bring what `log` has behind the point that was reached; how many records that were."""
        before = work.done
        for epoch, partition in await self._partitions(work.topic):
            limit = _READ_RECORDS // 20  # nobody knows yet how large they are
            while records := await self._read(work, epoch, partition, limit):
                await self._bring(work, records)
                size = sum(record.size for record, _, _ in records) // len(records)
                limit = min(_READ_RECORDS, max(1, _READ_BYTES // max(size, 1)))
        return work.done - before

    async def _partitions(self, topic: str) -> list[tuple[str, int]]:
        """Lives of the topic and their partitions, in the order in which they came: the later has the row of an id."""
        rows = await self._rows(
            "SELECT toString(epoch) AS epoch, partition, min(inserted_at) AS first FROM log "
            "WHERE topic = {topic:String} GROUP BY epoch, partition",
            topic=topic,
        )
        began: dict[str, Any] = {}
        for row in rows:
            began[row["epoch"]] = min(began.get(row["epoch"], row["first"]), row["first"])
        return sorted(((row["epoch"], row["partition"]) for row in rows), key=lambda one: (began[one[0]], *one))

    async def _read(self, work: "_Work", epoch: str, partition: int, limit: int) -> list[tuple[Incoming, str, int]]:
        """The next records of a partition: each with its `decode_error`, and when ClickHouse took it."""
        here = (
            "topic = {topic:String} AND epoch = {epoch:String} AND partition = {partition:Int32} "
            "AND offset > {reached:Int64} AND NOT tick"
        )
        rows = await self._rows(
            # FINAL reads all that the condition lets it: so the end is looked up first, along the sorting key.
            "SELECT offset, key, value, headers, decode_error, toUnixTimestamp64Milli(inserted_at) AS at "  # noqa: S608 (ours)
            f"FROM log FINAL WHERE {here} AND offset <= (SELECT max(offset) FROM "
            f"(SELECT offset FROM log WHERE {here} ORDER BY offset LIMIT {{limit:UInt32}})) ORDER BY offset",
            formats=self._bytes,
            topic=work.topic,
            epoch=epoch,
            partition=partition,
            reached=work.reached.get((epoch, partition), -1),
            limit=limit,
        )
        found = {
            row["offset"]: (
                Incoming(
                    work.topic,
                    epoch,
                    partition,
                    row["offset"],
                    row["key"],
                    row["value"],
                    tuple((name.decode(), value) for name, value in map(_pair, row["headers"])),
                ),
                row["decode_error"].decode(),
                row["at"],
            )
            for row in rows
        }
        if found:
            work.reached[epoch, partition] = max(found)
        return list(found.values())

    async def _bring(self, work: "_Work", records: Sequence[tuple[Incoming, str, int]]) -> None:
        """Their rows into the new table, as the sink makes them."""
        incoming = [record for record, _, _ in records]
        taken = {record.offset: at for record, _, at in records}
        first = incoming[0]
        span = Range(first.topic, first.epoch, first.partition, first.offset, incoming[-1].offset)
        made = core.rows(span, incoming)
        typed = made.typed.columns | {"inserted_at": [taken[offset] for offset in made.typed.columns["offset"]]}
        token = f"rebuild:{self._run}:{span.token(work.into)}"
        refused = {
            offset: reason.replace(work.into, work.topic)
            for offset, reason in (await self._stage.typed(Block(work.into, typed), token)).items()
        }
        errors = [
            refused.get(record.offset, error)
            for record, error in zip(incoming, made.log.columns["decode_error"], strict=True)
        ]
        other = [n for n, (_, was, _) in enumerate(records) if errors[n] != was]
        if other:
            # Another version than the sink's of that time can read more, or less.
            again = core.log_rows([incoming[n] for n in other], [errors[n] for n in other], [False] * len(other))
            kept = again.columns | {"inserted_at": [records[n][2] for n in other]}
            await self._store.insert(Block("log", kept), f"{token}:log")
        work.done += len(records)
        work.undecodable += sum(map(bool, errors))
        work.corrected += len(other)
        self._on_progress(Progress(work.topic, work.done, max(work.total, work.done)))

    async def _count(self, table: str) -> int:
        [row] = await self._rows(f"SELECT count() AS n FROM {table} FINAL")  # noqa: S608 (our name)
        return int(row["n"])

    async def _command(self, statement: str) -> None:
        with self._store.connection.naming():
            await (await self._store.connection.client()).command(statement)

    async def _rows(
        self, query: str, *, formats: dict[str, str] | None = None, **parameters: Any
    ) -> list[dict[str, Any]]:
        with self._store.connection.naming():
            client = await self._store.connection.client()
            found = await client.query(query, parameters=parameters, query_formats=formats)
        return [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]


class _Work:
    """One table on its way."""

    def __init__(self, topic: str, into: str, total: int) -> None:
        self.topic = topic
        self.into = into
        self.total = total
        self.reached: dict[tuple[str, int], int] = {}
        """The last offset that was brought, by epoch and partition: the sink brings each in order."""
        self.done = 0
        self.undecodable = 0
        self.corrected = 0


def _pair(header: Any) -> tuple[bytes, bytes]:
    """A header, however the client carries a named tuple."""
    name, value = header.values() if isinstance(header, dict) else header
    return name, value

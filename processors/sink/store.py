"""The store behind the sink: the port, and ClickHouse over its HTTP interface."""

import re
from collections.abc import Mapping
from typing import Protocol

import structlog
from clickhouse_connect.datatypes.base import ClickHouseType
from clickhouse_connect.datatypes.registry import get_from_name
from clickhouse_connect.driver.asyncclient import AsyncClient
from clickhouse_connect.driver.exceptions import DatabaseError

from processors.sink.core import Block
from processors.store.connection import Connection
from processors.store.settings import ClickHouseSettings
from schemas.migrations import Migration, migrations, pending
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

_ALTERS = re.compile(r"ALTER\s+TABLE\s+`?(?P<table>\w+)", re.IGNORECASE)


class Store(Protocol):
    """What the sink needs of a store: inserts that can be repeated."""

    async def insert(self, block: Block, token: str) -> None:
        """Insert the rows unless rows came under this token before: then nothing happens, whatever the rows are.

        Raises:
            RefusedError: at least one value does not fit its column; none of the rows was taken.
            UnavailableError: the store is away or cannot take rows now; whether it took them is not known.
        """

    async def close(self) -> None:
        """Let go of connections."""


class ClickHouseStore:
    """The `Store` over ClickHouse's HTTP interface: Native format, column by column."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        self.connection = Connection(settings)
        self._types: dict[str, Mapping[str, ClickHouseType]] = {}

    async def insert(self, block: Block, token: str) -> None:
        """As `Store.insert`; the answer comes when the rows are on disk."""
        if not len(block):
            return
        with self.connection.naming():
            client = await self.connection.client()
            try:
                if block.table not in self._types:
                    self._types[block.table] = await self._columns(client, block.table)
                types = self._types[block.table]
                await client.insert(
                    block.table,
                    list(block.columns.values()),
                    column_names=list(block.columns),
                    column_types=[types[name] for name in block.columns],
                    column_oriented=True,
                    # Asynchronous inserts are the servers' default since 26.x: they answer before the rows are on
                    # disk and have a deduplication of their own.
                    settings={"insert_deduplication_token": token, "async_insert": 0, "insert_deduplicate": 1},
                )
            except KeyError as missing:
                del self._types[block.table]
                raise UnavailableError(
                    "store", f"table {block.table} has no column {missing}: run `rewatch migrate`"
                ) from missing
            except DatabaseError:
                self._types.pop(block.table, None)  # perhaps a migration changed it
                raise

    async def migrate(self) -> list[Migration]:
        """Make the database if it is not there, and bring its tables to this version; safe to repeat.

        Returns:
            The migrations that were applied now.

        Raises:
            MigrationError: a migration was changed after it was applied, or the database is newer than this version.
            UnavailableError: ClickHouse is away.
        """
        database = self.connection.settings.database
        with self.connection.naming():
            first = await self.connection.open("")
            try:
                # Asked first: whoever may not make databases can still use one that was made for them.
                if not int(str(await first.command(f"EXISTS DATABASE {database}"))):
                    await first.command(f"CREATE DATABASE IF NOT EXISTS {database}")
            finally:
                await first.close()
            client = await self.connection.client()
            todo = pending(migrations(), await self._applied(client))
            for migration in todo:
                for statement in migration.statements:
                    await client.command(statement)
                await client.insert(
                    "schema_migrations",
                    [[migration.version, migration.name, migration.sha256]],
                    column_names=["version", "name", "sha256"],
                    settings={"async_insert": 0},
                )
                log.info("migrated", version=migration.version, name=migration.name, database=database)
        self._types.clear()
        return todo

    async def restore(self) -> None:
        """Make every table that is not there, empty, and every view, as the migrations that were applied have them.

        Raises:
            UnavailableError: ClickHouse is away.
        """
        with self.connection.naming():
            client = await self.connection.client()
            found = await client.query("SELECT name FROM system.tables WHERE database = currentDatabase()")
            there = {str(name) for (name,) in found.result_rows}
            applied = await self._applied(client)
            for migration in migrations():
                for statement in migration.statements if migration.version in applied else ():
                    # What is there has been altered once; to do it again could rewrite all of it.
                    altered = _ALTERS.match(statement)
                    if altered is None or altered["table"] not in there:
                        await client.command(statement)
        self._types.clear()

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()

    async def _columns(self, client: AsyncClient, table: str) -> Mapping[str, ClickHouseType]:
        found = await client.query(
            "SELECT name, type FROM system.columns WHERE database = currentDatabase() AND table = {table:String}",
            {"table": table},
        )
        return {name: get_from_name(kind) for name, kind in found.result_rows}

    async def _applied(self, client: AsyncClient) -> dict[int, str]:
        """Version and SHA-256 of what the database has."""
        if not int(str(await client.command("EXISTS TABLE schema_migrations"))):
            return {}
        found = await client.query("SELECT version, sha256 FROM schema_migrations FINAL")
        return {int(version): str(sha256) for version, sha256 in found.result_rows}

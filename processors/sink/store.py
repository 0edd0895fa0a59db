"""The store behind the sink: the port, and ClickHouse over its HTTP interface."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
import clickhouse_connect
import structlog
from clickhouse_connect.datatypes.base import ClickHouseType
from clickhouse_connect.datatypes.registry import get_from_name
from clickhouse_connect.driver.asyncclient import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, DataError, Error

from processors.sink.core import Block
from processors.sink.settings import ClickHouseSettings
from schemas.migrations import Migration, migrations, pending
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

# ClickHouse's error numbers (src/Common/ErrorCodes.cpp) that blame a value in the rows. All others wait: a missing
# table, a full disk or a wrong password is mended by a person, and then the rows go in.
_REFUSED = frozenset({117, 131, 321, 349, 469, 691})
# 117 INCORRECT_DATA, 131 TOO_LARGE_STRING_SIZE, 321 VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE,
# 349 CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN, 469 VIOLATED_CONSTRAINT, 691 UNKNOWN_ELEMENT_OF_ENUM

_FIXES = {
    16: "run `rewatch migrate`",  # NO_SUCH_COLUMN_IN_TABLE
    47: "run `rewatch migrate`",  # UNKNOWN_IDENTIFIER
    60: "run `rewatch migrate`",  # UNKNOWN_TABLE
    81: "run `rewatch migrate`, or set clickhouse.database",  # UNKNOWN_DATABASE
    192: "set clickhouse.user",  # UNKNOWN_USER
    194: "set REWATCH_CLICKHOUSE__PASSWORD",  # REQUIRED_PASSWORD
    243: "free space on its disk",  # NOT_ENOUGH_SPACE
    497: "grant the user of clickhouse.user what it lacks",  # ACCESS_DENIED
    516: "set clickhouse.user and REWATCH_CLICKHOUSE__PASSWORD",  # AUTHENTICATION_FAILED
}


class RefusedError(Exception):
    """The store does not take these rows and never will; a part of them it may."""


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


class Connection:
    """A connection to ClickHouse, opened when it is first needed. It belongs to one event loop."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        self.settings = settings
        self._client: AsyncClient | None = None
        self._opening = asyncio.Lock()

    async def client(self) -> AsyncClient:
        """The client, its database the settings'. Raises what ClickHouse or the network says."""
        async with self._opening:
            if self._client is None:
                self._client = await self.open(self.settings.database)
            return self._client

    async def open(self, database: str) -> AsyncClient:
        """A new client of the same server, for another database; the caller closes it."""
        s = self.settings
        url = urlsplit(s.url)
        return await clickhouse_connect.get_async_client(
            interface=url.scheme,
            host=url.hostname,
            port=url.port or (8443 if url.scheme == "https" else 8123),
            proxy_path=url.path,
            username=s.user,
            password=s.password.get_secret_value() if s.password else "",
            database=database,
            connect_timeout=s.connect_timeout_s,
            send_receive_timeout=s.read_timeout_s,
            client_name="rewatch",
            tz_mode="aware",
            # The sink has retries of its own, with `waiting_on` for people to see.
            query_retries=0,
        )

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Turn what goes wrong inside into `RefusedError` or `UnavailableError`.

        Raises:
            RefusedError, UnavailableError: as in `Store.insert`.
        """
        try:
            yield
        except DataError as error:  # the client packs the rows, and found one that does not fit
            raise RefusedError(str(error)) from error
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            code = error.code if isinstance(error, Error) else None
            if code in _REFUSED:
                raise RefusedError(str(error)) from error
            where = f"ClickHouse at {self.settings.url}"
            if code is None:
                raise UnavailableError("store", f"{where} does not answer (clickhouse.url): {error}") from error
            fix = f"; {_FIXES[code]}" if code in _FIXES else ""
            raise UnavailableError("store", f"{where}: {error}{fix}") from error

    async def close(self) -> None:
        """Close the client, if there is one."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


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

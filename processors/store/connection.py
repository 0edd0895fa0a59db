"""A connection to ClickHouse over its HTTP interface, and what goes wrong on it in words that name the fix."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import aiohttp
import clickhouse_connect
from clickhouse_connect.driver.asyncclient import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError, DataError, Error

from processors.store.settings import ClickHouseSettings
from streams.errors import UnavailableError

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
            RefusedError: at least one value does not fit its column; none of the rows was taken.
            UnavailableError: the store is away or does not do this now (waiting on `store`).
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

"""A connection to ClickHouse over its HTTP interface, and what goes wrong on it in words that name the fix."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import aiohttp
import clickhouse_connect
from clickhouse_connect.driver.asyncclient import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError, DataError, Error, ProgrammingError

from processors.store.settings import ClickHouseSettings
from streams.errors import UnavailableError

# ClickHouse's error numbers (src/Common/ErrorCodes.cpp) that blame a value in the rows. All others wait: a missing
# table, a full disk or a wrong password is mended by a person, and then the rows go in.
_REFUSED = frozenset({117, 131, 321, 349, 469, 691})
# 117 INCORRECT_DATA, 131 TOO_LARGE_STRING_SIZE, 321 VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE,
# 349 CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN, 469 VIOLATED_CONSTRAINT, 691 UNKNOWN_ELEMENT_OF_ENUM

_CREDENTIALS = "set clickhouse.user and REWATCH_CLICKHOUSE__PASSWORD to those of a user that it has"
_RIGHTS = "set clickhouse.user to one that may (`rewatch migrate --users` makes them), or grant it what it lacks"
_LIMITS = "ask for less, or raise this limit of the user of clickhouse.user"

_FIXES = {
    16: "run `rewatch migrate`",  # NO_SUCH_COLUMN_IN_TABLE
    47: "run `rewatch migrate`",  # UNKNOWN_IDENTIFIER
    60: "run `rewatch migrate`",  # UNKNOWN_TABLE
    81: "run `rewatch migrate`, or set clickhouse.database",  # UNKNOWN_DATABASE
    158: _LIMITS,  # TOO_MANY_ROWS
    159: _LIMITS,  # TIMEOUT_EXCEEDED
    164: _RIGHTS,  # READONLY
    192: _CREDENTIALS,  # UNKNOWN_USER
    193: _CREDENTIALS,  # WRONG_PASSWORD
    194: _CREDENTIALS,  # REQUIRED_PASSWORD
    202: _LIMITS,  # TOO_MANY_SIMULTANEOUS_QUERIES
    241: "ask for less, or give it more memory",  # MEMORY_LIMIT_EXCEEDED
    243: "free space on its disk",  # NOT_ENOUGH_SPACE
    307: _LIMITS,  # TOO_MANY_BYTES
    396: _LIMITS,  # TOO_MANY_ROWS_OR_BYTES
    452: _LIMITS,  # SETTING_CONSTRAINT_VIOLATION
    495: "it stands in the server's own files: change it there",  # ACCESS_STORAGE_READONLY
    497: _RIGHTS,  # ACCESS_DENIED
    514: "it keeps its users in files: put these there (infra/compose/clickhouse/users.xml.in has them)",
    # 514 ACCESS_STORAGE_FOR_INSERTION_NOT_FOUND
    516: _CREDENTIALS,  # AUTHENTICATION_FAILED
}


_BEGINS = "DB::Exception: "


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
    def naming(self, rights: str = _RIGHTS) -> Iterator[None]:
        """Turn what goes wrong inside into `RefusedError` or `UnavailableError`.

        `rights` is what to do where the user may not do this.

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
            if isinstance(error, ProgrammingError):  # the client sees that this user may not change a setting
                raise UnavailableError("store", f"{where}, as {self.settings.user}: {error}; {rights}") from error
            if code is None:
                raise UnavailableError("store", f"{where} does not answer (clickhouse.url): {error}") from error
            known = _FIXES.get(code)
            fix = "" if known is None else f"; {rights if known is _RIGHTS else known}"
            raise UnavailableError("store", f"{where}: {own_words(error)}{fix}") from error

    async def close(self) -> None:
        """Close the client, if there is one."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


def own_words(error: Exception) -> str:
    """What the engine says, without the client's wrapping and the build number."""
    text = str(error)
    begins = text.find(_BEGINS)
    text = text[begins + len(_BEGINS) :] if begins >= 0 else text
    return text.split(" (version ", 1)[0].strip()

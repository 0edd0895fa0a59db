"""The real ClickHouse engine for tests: one process for all, a database of its own, migrated, for each test."""

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing

import clickhouse_connect
import httpx
import pytest
import pytest_asyncio
from anyio.from_thread import start_blocking_portal

from infra.local import clickhouse
from infra.local.process import Process, free_port
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings


@pytest.fixture(scope="session")
def clickhouse_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The HTTP interface of an engine on a temporary directory."""
    directory = tmp_path_factory.mktemp("clickhouse")
    port = free_port()
    process = Process(clickhouse.spec(directory / "data", port), directory)
    with start_blocking_portal() as portal:
        portal.call(process.start)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            portal.call(process.stop)


@pytest_asyncio.fixture
async def database(clickhouse_url: str) -> AsyncIterator[ClickHouseSettings]:
    """Settings of a migrated database that nobody else uses."""
    made = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")
    store = ClickHouseStore(made)
    await store.migrate()
    await store.close()
    yield made
    async with httpx.AsyncClient(timeout=60) as client:
        (await client.post(clickhouse_url, params={"query": f"DROP DATABASE {made.database} SYNC"})).raise_for_status()


@pytest_asyncio.fixture
async def store(database: ClickHouseSettings) -> AsyncIterator[ClickHouseStore]:
    """A store over that database."""
    made = ClickHouseStore(database)
    yield made
    await made.close()


class Reader:
    """Asks a database as a person would, over plain HTTP."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        host, port = settings.url.removeprefix("http://").split(":")
        self.client = clickhouse_connect.get_client(
            host=host, port=int(port), database=settings.database, tz_mode="aware", autogenerate_session_id=False
        )

    def rows(self, query: str) -> list[tuple]:
        return [tuple(row) for row in self.client.query(query).result_rows]

    def dicts(self, query: str) -> list[dict]:
        return list(self.client.query(query).named_results())

    def value(self, query: str):
        return self.rows(query)[0][0]

    def command(self, query: str) -> None:
        self.client.command(query)


@pytest.fixture
def reading() -> Iterator[Callable[[ClickHouseSettings], Reader]]:
    """Makes readers, and closes them."""
    with ExitStack() as stack:

        def read(settings: ClickHouseSettings) -> Reader:
            reader = Reader(settings)
            stack.enter_context(closing(reader.client))
            return reader

        yield read


@pytest.fixture
def ask(database: ClickHouseSettings, reading: Callable[[ClickHouseSettings], Reader]) -> Reader:
    """Asks the test's database."""
    return reading(database)

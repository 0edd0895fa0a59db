"""A ClickHouse with users, as `make-secrets.sh` makes them: one process for a module."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from anyio.from_thread import start_blocking_portal

from infra.local import clickhouse
from infra.local.process import Process, free_port
from tests.clickhouse_users import Guarded, make


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """An engine that asks for passwords; its database is `rewatch`, and not made yet."""
    directory = tmp_path_factory.mktemp("guarded")
    make(directory / "secrets")
    port = free_port()
    spec = clickhouse.spec(directory / "data", port)
    users = str(directory / "secrets" / "clickhouse_users.xml")
    argv = [sys.executable, "-m", "tests.clickhouse_users", *spec.argv[3:], "--users", users]
    process = Process(replace(spec, argv=argv), directory)
    with start_blocking_portal() as portal:
        portal.call(process.start)
        try:
            yield Guarded(f"http://127.0.0.1:{port}", directory / "secrets")
        finally:
            portal.call(process.stop)

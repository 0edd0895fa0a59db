"""`rewatch migrate --wait`: a job that is started beside the services that it sets up."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError

from infra.cli import migrate
from processors.sink.store import ClickHouseStore
from streams.errors import UnavailableError
from streams.kafka import Kafka
from streams.prompts import Prompts
from tests.infra.cli_kit import invoke


class Services:
    """A broker and a store that are away for the first few times that they are asked."""

    def __init__(self, broker_away: int, store_away: int) -> None:
        self.broker_away = broker_away
        self.store_away = store_away
        self.registered = 0

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Any]:
        self.broker_away -= 1
        if self.broker_away >= 0:
            raise KafkaConnectionError("nobody at redpanda:9092")

        class Admin:
            async def list_topics(self) -> list[str]:
                return []

        yield Admin()

    async def ensure_topics(self, _: Kafka) -> dict[str, Any]:
        return {"frames": None}

    async def register(self, *_: object) -> None:
        self.registered += 1

    async def migrate(self) -> list[Any]:
        self.store_away -= 1
        if self.store_away >= 0:
            raise UnavailableError("store", "nobody at clickhouse:8123")
        return []


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Services:
    services = Services(broker_away=3, store_away=2)
    monkeypatch.setattr(Kafka, "admin", services.admin)
    monkeypatch.setattr("streams.admin.ensure_topics", services.ensure_topics)
    monkeypatch.setattr(Prompts, "register", services.register)
    monkeypatch.setattr(ClickHouseStore, "migrate", services.migrate)
    monkeypatch.setattr(migrate, "_PAUSE_S", 0.001)
    return services


def test_it_waits_for_the_broker_and_the_store_says_so_once_each_and_then_sets_up(services: Services) -> None:
    result = invoke("migrate", "--wait")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("waiting: KafkaConnectionError: nobody at redpanda:9092") == 1
    assert result.stderr.count("waiting: nobody at clickhouse:8123") == 1
    assert services.registered
    assert "made frames" in result.stdout


def test_without_it_what_is_away_ends_it(services: Services) -> None:
    result = invoke("migrate")
    assert result.exit_code == 3
    assert "waiting" not in result.stderr
    assert not services.registered

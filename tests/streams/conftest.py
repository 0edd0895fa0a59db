"""A broker, its topics, and the fresh names that keep tests on it apart."""

import secrets
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import settings

from infra.local.broker import Broker
from streams.admin import ensure_topics
from streams.kafka import Kafka, KafkaSettings

# How long an example takes says something of the machine's other work, nothing of the code.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

PARTITIONS = 4

# Short, so that what is left behind by a kill is noticed soon; long against the hiccups of a busy machine.
SESSION_MS = 4000


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def bootstrap(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A broker's address; the catalogue's topics are there."""
    broker = Broker(tmp_path_factory.mktemp("kafka"), port=0)
    await broker.start()
    try:
        await ensure_topics(Kafka(KafkaSettings(bootstrap_servers=broker.bootstrap_servers, partitions=PARTITIONS)))
        yield broker.bootstrap_servers
    finally:
        await broker.stop()


@pytest.fixture
def kafka(bootstrap: str) -> Kafka:
    """The broker, with group names and transactional ids of this test's own."""
    return Kafka(
        KafkaSettings(
            bootstrap_servers=bootstrap,
            system=f"t{secrets.token_hex(4)}",
            partitions=PARTITIONS,
            session_timeout_ms=SESSION_MS,
        )
    )


@pytest.fixture(params=["raw", "faust"])
def host(request: pytest.FixtureRequest) -> str:
    """The name of each host in turn."""
    return str(request.param)

"""The shared broker with its topics, and the fresh names that keep tests on it apart."""

import secrets

import pytest
import pytest_asyncio
from hypothesis import settings

from infra.local.stack import LocalStack
from streams.admin import ensure_topics
from streams.kafka import Kafka, KafkaSettings
from tests.conftest import PARTITIONS

# How long an example takes says something of the machine's other work, nothing of the code.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

# Short, so that what is left behind by a kill is noticed soon; long against the hiccups of a busy machine.
SESSION_MS = 4000


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def bootstrap(stack: LocalStack) -> str:
    """The shared broker's address; the catalogue's topics are there."""
    await ensure_topics(Kafka(KafkaSettings(bootstrap_servers=stack.bootstrap_servers, partitions=PARTITIONS)))
    return stack.bootstrap_servers


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

"""What many tests share: the real Kafka, ClickHouse engine and llama.cpp server, started once."""

import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from infra.config import Settings, load
from infra.local.llama import LlamaSettings
from infra.local.stack import LocalStack
from infra.models.library import DEMO
from streams.admin import ensure_topics
from streams.kafka import Kafka, KafkaSettings

PARTITIONS = 4

# pytest-xdist tells its workers a terminal's width; what is tested is a pipe's.
os.environ.pop("COLUMNS", None)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStack]:
    """The three servers on free ports, below a temporary directory."""
    llama = LlamaSettings(model=DEMO / "analyst.gguf", port=0, ctx=2048, parallel=2)
    async with LocalStack(tmp_path_factory.mktemp("stack"), kafka_port=0, clickhouse_port=0, llama=llama) as servers:
        yield servers


@pytest_asyncio.fixture(loop_scope="session")
async def kafka(stack: LocalStack) -> Kafka:
    """The broker as a new installation of the product: groups and transactional ids of its own, topics made."""
    settings = KafkaSettings(
        bootstrap_servers=stack.bootstrap_servers,
        system=f"t{secrets.token_hex(4)}",
        partitions=PARTITIONS,
    )
    kafka = Kafka(settings)
    await ensure_topics(kafka)
    return kafka


@pytest.fixture
def settings(stack: LocalStack, kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that point at the running servers, as a person with services of their own would write them."""
    for name in [name for name in os.environ if name.startswith("REWATCH_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "DATA_DIR": str(tmp_path / "data"),
        "KAFKA__BOOTSTRAP_SERVERS": stack.bootstrap_servers,
        "KAFKA__SYSTEM": kafka.settings.system,
        "KAFKA__PARTITIONS": str(PARTITIONS),
        "CLICKHOUSE__URL": stack.clickhouse_url,
        "LLM__URL": stack.llm_url,
    }.items():
        monkeypatch.setenv(f"REWATCH_{name}", value)
    return load()

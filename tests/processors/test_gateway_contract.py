"""Whatever is asked of the API, right or wrong, its answer is one that its description names: never a 500.

Schemathesis makes the requests from `/api/openapi.json`; behind the API are the real ClickHouse engine, the real
broker, and ingest's own endpoint.
"""

import hashlib
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from infra.config import Settings, load
from infra.local.stack import LocalStack
from processors.gateway.app import build_app
from processors.gateway.settings import GatewaySettings
from processors.gateway.upload import Uploads
from processors.ingest.fakes import MemoryLog
from processors.ingest.http import build_app as build_ingest
from processors.ingest.settings import UploadSettings
from streams.admin import ensure_topics
from streams.kafka import Kafka
from tests.conftest import PARTITIONS
from tests.processors import gateway_kit as kit
from tests.processors.gateway_kit import AT, camera, event_id, window
from tests.processors.ingest_kit import appenders

pytestmark = pytest.mark.real

KEY = "contract"

# 30 examples and the cases at the edges of each value, by operation: about a minute in all on two cores.
_EXAMPLES = 30


@asynccontextmanager
async def running(settings: Settings, directory: Path) -> AsyncIterator[str]:
    """The gateway and an ingest, behind real sockets; gives the gateway's address."""
    await ensure_topics(Kafka(settings.kafka))
    made = window("front", AT)
    await kit.store(settings, [camera("front"), *made])
    taking = appenders(MemoryLog(), directory)
    async with kit.source_of(settings) as source, kit.served(build_ingest(taking, UploadSettings())) as ingest:
        uploads = Uploads(ingest, at_once=8, timeout_s=5)
        async with kit.served(build_app(source, GatewaySettings(api_key=KEY), uploads)) as url:
            yield url
        await uploads.close()
    await taking.close()


@pytest.fixture(scope="module")
def api(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.schemas.BaseSchema]:
    """The description of a running gateway with a little data, in which there are ids that exist."""
    directory = tmp_path_factory.mktemp("contract")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "DATA_DIR": str(directory),
            "KAFKA__BOOTSTRAP_SERVERS": stack.bootstrap_servers,
            "KAFKA__SYSTEM": f"t{secrets.token_hex(4)}",
            "KAFKA__PARTITIONS": str(PARTITIONS),
            "CLICKHOUSE__URL": stack.clickhouse_url,
            "CLICKHOUSE__DATABASE": f"gw_{secrets.token_hex(4)}",
        }.items():
            environment.setenv(f"REWATCH_{name}", value)
        settings = load()
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "generation": {"max-examples": _EXAMPLES, "database": "none"},
            "headers": {"X-API-Key": KEY},
            "dictionaries": {
                "cameras": {"values": ["front", "back"]},
                "events": {"values": [event_id(window("front", AT)), "front:", "a/b"]},
                "images": {"values": [hashlib.sha256(kit.image("front", AT, 0)).hexdigest()]},
            },
        }
    )
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running(settings, directory)) as url:
        yield schemathesis.openapi.from_url(
            f"{url}/api/openapi.json", headers={"X-API-Key": KEY}, config=config
        ).exclude(path="/api/events/stream")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@pytest.mark.timeout(300)
def test_every_answer_is_one_that_is_described(case: schemathesis.Case) -> None:
    # What fits the description can still name nothing: no schema says which cursors were given out.
    case.call_and_validate(headers={"X-API-Key": KEY}, excluded_checks=[positive_data_acceptance], timeout=30)

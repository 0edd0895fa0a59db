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
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from infra.config import Settings, load
from infra.local.stack import LocalStack
from processors.gateway import throttle as throttles
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

_MADE = window("front", AT)
_CONFIG = {
    "seed": 1,
    "auth": {"openapi": {"bearer": {"bearer": KEY}}},
    # With the cases at the edges of each value: about a minute in all on two cores.
    "generation": {"max-examples": 30, "database": "none"},
    # Stateful runs follow links, and the description has none.
    "phases": {"stateful": {"enabled": False}},
    # What fits the description can still name nothing: no schema says which cursors were given out.
    "checks": {"positive_data_acceptance": {"enabled": False}},
    "request-timeout": 30,
    "dictionaries": {
        "cameras": {"values": ["front", "back"]},
        "events": {"values": [event_id(_MADE), "front:", "a/b"]},
        "images": {"values": [hashlib.sha256(kit.image("front", AT, 0)).hexdigest()]},
    },
    "parameters": {
        "path.camera_id": {"dictionary": "cameras"},
        "query.camera": {"dictionary": "cameras"},
        "path.event_id": {"dictionary": "events"},
        "path.sha256": {"dictionary": "images"},
    },
}


@asynccontextmanager
async def running(settings: Settings, directory: Path) -> AsyncIterator[str]:
    """The gateway and an ingest, behind real sockets; gives the gateway's address."""
    await ensure_topics(Kafka(settings.kafka))
    await kit.store(settings, [camera("front"), *_MADE])
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
    with (
        pytest.MonkeyPatch.context() as throttle,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(settings, directory)) as url,
    ):
        # It sends hundreds of wrong keys a minute, and each is to be answered as such.
        throttle.setattr(throttles, "_TRIES", 1_000_000)
        throttle.setattr(throttles, "_TRIES_TOGETHER", 1_000_000)
        config = SchemathesisConfig.from_dict(_CONFIG)
        headers = {"X-API-Key": KEY}
        described = schemathesis.openapi.from_url(f"{url}/api/openapi.json", headers=headers, config=config)
        yield described.exclude(path="/api/events/stream")  # it has no end; its tests are its own


@pytest.mark.timeout(300)
def test_every_answer_is_one_that_is_described(api: schemathesis.schemas.BaseSchema) -> None:
    asked = 0
    wrong: dict[str, None] = {}
    for event in engine.from_schema(api).execute():
        match event:
            case events.ScenarioFinished(recorder=recorder):
                asked += len(recorder.interactions)
                failures = [
                    check.failure_info.failure
                    for checks in recorder.checks.values()
                    for check in checks
                    if check.failure_info
                ]
                wrong |= dict.fromkeys(f"{recorder.label}: {failure.title}: {failure.message}" for failure in failures)
            case events.NonFatalError() | events.FatalError():
                wrong[str(event)] = None
    assert not wrong, "\n\n".join(wrong)
    assert asked > 500

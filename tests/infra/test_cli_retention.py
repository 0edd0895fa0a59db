"""`rewatch hold` and `rewatch gc` on the real broker and the real ClickHouse engine, in one life of two events."""

import asyncio
import secrets
from datetime import UTC, datetime

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from infra.config import Settings
from infra.retention.kafka_log import KafkaLog
from infra.retention.work import alone
from processors.sink.store import ClickHouseStore
from schemas.records import RiskEvent
from streams.admin import read_meta
from streams.claims import ClaimStore
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.survey import READS
from tests.infra.cli_kit import answer, invoke
from tests.processors import gateway_kit as kit

pytestmark = pytest.mark.real


@pytest.fixture
def own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings with a database of their own; commands of this test read the same from the environment."""
    mine = kit.own_database(settings)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", mine.clickhouse.database)
    for name, value in {"LOW": "30d", "MEDIUM": "30d", "HIGH": "30d", "TRASH": "1h"}.items():
        monkeypatch.setenv(f"REWATCH_RETENTION__{name}", value)
    return mine


async def caught_up(settings: Settings) -> None:
    """Every stage stands at the end of the log, as if it had read what other tests left there."""
    kafka = Kafka(settings.kafka)
    metas = await read_meta(kafka)
    for stage, topics in READS.items():
        tps = [TopicPartition(topic, part) for topic in topics for part in range(metas[topic].partitions)]
        ends = {tp: OffsetAndMetadata(end, metas[tp.topic].epoch) for tp, (_, end) in (await kafka.bounds(tps)).items()}
        producer = FencedProducer(kafka, kafka.transactional_id("test", stage))
        await producer.open()
        try:
            await producer.transact([], offsets=(kafka.group(stage), ends))
        finally:
            await producer.close()


async def aged(settings: Settings, days: int) -> None:
    """ClickHouse took everything so long ago."""
    store = ClickHouseStore(settings.clickhouse)
    try:
        client = await store.connection.client()
        for table in ("log", "frames", "detections", "batches", "contexts", "risk_events"):
            await client.command(
                f"ALTER TABLE {table} UPDATE inserted_at = inserted_at - INTERVAL {days} DAY WHERE 1 "
                "SETTINGS mutations_sync = 2"
            )
    finally:
        await store.close()


def test_an_event_that_is_held_stays_and_another_goes(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(_: KafkaLog) -> tuple[list, list]:
        return [], []

    monkeypatch.setattr(KafkaLog, "replays", none)  # other tests leave replays on the shared broker that never end
    tag = secrets.token_hex(3)
    gate, yard = f"gate-{tag}", f"yard-{tag}"
    claims = ClaimStore(own.images_root)
    claim = asyncio.run(claims.put(b"a large image")).removeprefix("sha256:")
    at = int(datetime.now(UTC).timestamp() * 1000)
    windows = [kit.window(gate, at), kit.window(yard, at, claim=claim)]
    asyncio.run(kit.store(own, [record for window in windows for record in window]))
    asyncio.run(aged(own, 40))
    events = [record.event_id for window in windows for record in window if isinstance(record, RiskEvent)]

    refused = invoke("hold", events[0], "--why", " ")
    assert refused.exit_code == 2
    assert "say why" in refused.output
    assert "no event" in invoke("hold", f"nobody-{tag}:1", "--why", "w").output
    held = answer("hold", f"{gate}:", "--why", "the insurance asks", "--author", "maria")
    assert (held["event_id"], held["state"], held["author"]) == (events[0], "held", "maria")
    assert [one["why"] for one in answer("hold", "ls") if one["event_id"] == events[0]] == ["the insurance asks"]

    monkeypatch.setattr("infra.retention.kafka_log.CATCH_UP_S", 0.0)
    behind = invoke("gc", "--yes")
    assert behind.exit_code == 3, "nothing is deleted while ClickHouse lacks what is on the log"
    assert "rewatch status" in behind.output
    asyncio.run(caught_up(own))
    assert invoke("gc", "--json").exit_code == 2, "it deletes: it asks, or is told"
    with alone(own):
        assert invoke("gc", "--yes").exit_code == 3
        assert "another `rewatch gc`" in invoke("rebuild", "--yes").output
    would = answer("gc", "--dry-run")
    assert would["windows"] == {"high": 1}
    assert {one["topic"] for one in would["taken"]} == {"frames", "detections", "batches", "contexts", "risk_events"}
    assert would["images"]["trashed"] == 1
    assert "high" in invoke("gc", "--dry-run").output
    assert {event["event_id"] for event in answer("events", "ls")} == set(events)
    done = answer("gc", "--yes")
    assert done["records"] == would["records"] == 9
    assert done["images"] == {"trashed": 1, "bytes": len(b"a large image"), "put_back": 0}
    assert [event["event_id"] for event in answer("events", "ls")] == [events[0]]
    assert "no event" in invoke("explain", events[1]).output
    assert len(answer("explain", events[0])["frames"]) == 3
    assert answer("gc", "--yes")["records"] == 0

    assert "is not held" in invoke("hold", "release", events[1]).output
    assert answer("hold", "release", events[0], "--why", "settled")["state"] == "released"
    assert events[0] not in {one["event_id"] for one in answer("hold", "ls")}
    asyncio.run(caught_up(own))
    assert answer("gc", "--yes")["windows"] == {}
    assert answer("events", "ls") == []

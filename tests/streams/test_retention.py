"""How long the real broker keeps topics: what it is told, and what it is not told otherwise."""

import pytest

from streams.kafka import Kafka
from streams.retention import SHORTENED, retain, retention
from streams.topics import FOREVER, TOPICS

DAY_MS = 86_400_000


@pytest.mark.real
async def test_only_what_is_asked_for_changes_and_the_rest_of_the_topic_stays(kafka: Kafka) -> None:
    before = await retention(kafka)
    assert before.keys() == TOPICS.keys()
    try:
        [change] = await retain(kafka, {"gpu_metrics": 3 * DAY_MS})
        assert change == ("gpu_metrics", before["gpu_metrics"], 3 * DAY_MS)
        assert await retain(kafka, {"gpu_metrics": 3 * DAY_MS}) == [], "said once"
        assert await retention(kafka) == before | {"gpu_metrics": 3 * DAY_MS}
        async with kafka.admin() as admin:
            from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

            [answer] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, "gpu_metrics")])
        [(_, _, _, _, entries)] = answer.resources
        values = {entry[0]: entry[1] for entry in entries}
        assert values["max.message.bytes"] == str(4 * 1024 * 1024), "this request replaces what it does not name"
        assert values["cleanup.policy"] == "delete"
    finally:
        await retain(kafka, {"gpu_metrics": before["gpu_metrics"]})
    assert await retention(kafka) == before


@pytest.mark.parametrize("topic", ["ingest_state", "meta", "labels", "holds", "prompts", "dead_letter_status"])
async def test_what_is_kept_for_ever_is_never_shortened(topic: str) -> None:
    assert TOPICS[topic].retention_ms == FOREVER
    assert topic not in SHORTENED
    with pytest.raises(ValueError, match="for ever"):
        await retain(None, {topic: DAY_MS})  # type: ignore[arg-type]

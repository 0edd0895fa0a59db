"""How long the broker keeps topics: what it is told now, and telling it otherwise."""

from collections.abc import Mapping
from typing import NamedTuple

import structlog
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, for_code

from streams.kafka import Kafka
from streams.topics import FOREVER, TOPICS

log = structlog.get_logger(__name__)

SHORTENED: tuple[str, ...] = tuple(name for name, topic in TOPICS.items() if topic.retention_ms != FOREVER)
"""Topics that the broker may forget. Of the others the history is the product, or a stage's memory."""

_KEY = "retention.ms"
# Where a topic's setting is from: its own (DescribeConfigs v1 and later); others are the broker's, or defaults.
_OWN = 1


class Change(NamedTuple):
    """What the broker is told of a topic."""

    topic: str
    was_ms: int
    now_ms: int


async def retention(kafka: Kafka) -> dict[str, int]:
    """How long the broker keeps each of our topics, milliseconds; -1 is for ever.

    Raises:
        KafkaError or OSError: the broker is away.
    """
    return {name: int(configs[_KEY]) for name, configs in (await _described(kafka, list(TOPICS), own=False)).items()}


async def retain(kafka: Kafka, wanted: Mapping[str, int]) -> list[Change]:
    """Tell the broker how long to keep these topics, milliseconds; what it was told before stays otherwise.

    Raises:
        ValueError: a topic that must never be shortened.
        KafkaError or OSError: the broker is away, or refuses.
    """
    if never := [name for name in wanted if name not in SHORTENED]:
        raise ValueError(f"{never[0]} is kept for ever")
    if not wanted:
        return []
    now = await retention(kafka)
    changes = [Change(name, now[name], ms) for name, ms in wanted.items() if name in now and now[name] != ms]
    if not changes:
        return []
    # This request replaces all that was told of the topic itself, so all of it is said again.
    own = await _described(kafka, [change.topic for change in changes], own=True)
    async with kafka.admin() as admin:
        answers = await admin.alter_configs(
            [
                ConfigResource(ConfigResourceType.TOPIC, change.topic, own[change.topic] | {_KEY: str(change.now_ms)})
                for change in changes
            ]
        )
    for answer in answers:
        for code, why, _, name in answer.resources:
            if code:
                raise KafkaError(f"cannot set {_KEY} of topic {name}: {for_code(code).__name__}: {why}")
    for change in changes:
        log.info("retention set", topic=change.topic, was_ms=change.was_ms, now_ms=change.now_ms)
    return changes


async def _described(kafka: Kafka, topics: list[str], *, own: bool) -> dict[str, dict[str, str]]:
    """Settings of the topics that are there; with `own` only those that were set on the topic itself."""
    async with kafka.admin() as admin:
        there = set(await admin.list_topics())
        wanted = [ConfigResource(ConfigResourceType.TOPIC, name) for name in topics if name in there]
        answers = await admin.describe_configs(wanted) if wanted else []
    found: dict[str, dict[str, str]] = {}
    for answer in answers:
        for code, why, _, name, entries in answer.resources:
            if code:
                raise KafkaError(f"cannot read the settings of topic {name}: {for_code(code).__name__}: {why}")
            found[name] = {entry[0]: entry[1] for entry in entries if not own or entry[3] == _OWN}
    return found

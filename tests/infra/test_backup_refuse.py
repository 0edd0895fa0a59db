"""Where a restore refuses: whatever is on the broker is somebody's, but for what a restore of the same backup began."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from infra.backup import restore
from infra.backup.manifest import Manifest
from infra.backup.restore import NotEmptyError, _Restore
from infra.backup.target import Target
from infra.config import Settings
from schemas.records import TopicMeta
from streams.topics import TOPICS

METAS = {name: TopicMeta(topic=name, epoch=f"e-{name}", status="ready", partitions=1, created_at=0) for name in TOPICS}
MANIFEST = Manifest(
    made_at=1,
    version="1",
    partitions=1,
    topics=tuple(METAS.values()),
    starts={},
    positions={"sink": {"frames": {0: 10}}, "detect": {"frames": {0: 10}}},
    history=(),
    tail=(),
    passes=(),
    images=0,
    missing=(),
    digest="d",
)


class Broker:
    """A broker that answers for what is on it, and remembers what was asked of it."""

    def __init__(self) -> None:
        self.topics = [*TOPICS]
        self.epochs = {name: meta.epoch for name, meta in METAS.items()}
        self.end = 1000
        self.positions: dict[str, dict[TopicPartition, OffsetAndMetadata]] = {}
        self.members: dict[str, int] = {}
        self.deleted: list[list[str]] = []

    def position(self, group: str, epoch: str = "e-frames") -> None:
        self.positions[group] = {TopicPartition("frames", 0): OffsetAndMetadata(10, epoch)}

    async def list_topics(self) -> list[str]:
        return [*self.topics]

    async def describe_topics(self, names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"topic": name, "partitions": [0]} for name in names]

    async def list_consumer_groups(self) -> list[tuple[str, str]]:
        return [(group, "") for group in {*self.positions, *self.members}]

    async def list_consumer_group_offsets(self, group: str) -> dict[TopicPartition, OffsetAndMetadata]:
        return self.positions.get(group, {})

    async def describe_consumer_groups(self, groups: Sequence[str]) -> list[Any]:
        members = [object()] * self.members.get(groups[0], 0)
        return [SimpleNamespace(groups=[(0, groups[0], "Stable", "", "", members)])]

    async def create_topics(self, topics: Sequence[Any]) -> Any:
        self.topics += [topic.name for topic in topics]
        return SimpleNamespace(topic_errors=[(topic.name, 0, None) for topic in topics])

    async def delete_topics(self, names: Sequence[str]) -> None:
        self.deleted.append([*names])
        self.topics = [name for name in self.topics if name not in names]


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    made = Broker()

    @asynccontextmanager
    async def admin(_: Any) -> AsyncIterator[Broker]:
        yield made

    async def bounds(_: Any, tps: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        return dict.fromkeys(tps, (made.end, made.end))  # retention took what was there

    async def read_meta(_: Any) -> dict[str, TopicMeta]:
        return {
            name: TopicMeta(topic=name, epoch=made.epochs[name], status="ready", partitions=1, created_at=0)
            for name in made.epochs
        }

    monkeypatch.setattr("streams.kafka.Kafka.admin", admin)
    monkeypatch.setattr("streams.kafka.Kafka.bounds", bounds)
    monkeypatch.setattr(restore, "read_meta", read_meta)
    return made


def restoring(system: str = "rewatch", *, database: str = "one", digest: str = "d") -> _Restore:
    plain = {"kafka": {"system": system, "partitions": 1}, "clickhouse": {"database": database}}
    manifest = Manifest(**{name: getattr(MANIFEST, name) for name in MANIFEST.__struct_fields__} | {"digest": digest})
    return _Restore(Settings.model_validate(plain), Target("memory://x"), manifest, lambda *_: None)


@pytest.mark.parametrize("system", ["rewatch", "rehearsal"])
async def test_an_installation_is_somebodys_whatever_system_it_is_and_though_its_lives_are_the_backups(
    broker: Broker, system: str
) -> None:
    broker.position("rewatch-sink")
    with pytest.raises(NotEmptyError, match=r"an installation already \(rewatch-sink"):
        await restoring(system)._refuse_broker()
    broker.members["rewatch-sink"] = 1
    with pytest.raises(NotEmptyError, match="rewatch-sink runs"):
        await restoring(system)._refuse_broker()
    broker.positions.clear()
    broker.members.clear()
    with pytest.raises(NotEmptyError, match="has records on frames already"):
        await restoring(system)._refuse_broker()


async def test_topics_that_were_only_made_are_taken_though_groups_of_earlier_lives_are_there(broker: Broker) -> None:
    broker.end = 0
    broker.position("rewatch-sink", "an-earlier-life")
    assert await restoring()._refuse_broker()
    broker.topics.clear()
    broker.epochs.clear()
    assert not await restoring()._refuse_broker()


async def test_a_half_restore_is_known_by_its_mark_until_it_is_settled(broker: Broker) -> None:
    half = restoring()
    await half._begin()
    broker.position("rewatch-detect")
    assert await half._refuse_broker()
    broker.positions.clear()
    for other in (restoring(digest="another"), restoring(database="another")):
        with pytest.raises(NotEmptyError, match="a restore was begun there, of another backup"):
            await other._refuse_broker()
    broker.position("other-detect")
    with pytest.raises(NotEmptyError, match="other-detect"):
        await half._refuse_broker()
    del broker.positions["other-detect"]
    for stage in ("sink", "detect"):
        broker.position(f"rewatch-{stage}")
    with pytest.raises(NotEmptyError, match="already"):
        await half._refuse_broker()
    broker.positions.clear()
    await half._settle()
    with pytest.raises(NotEmptyError, match="has records"):
        await half._refuse_broker()


async def test_topics_of_a_half_restore_go_before_meta_by_which_they_are_known(broker: Broker) -> None:
    await restoring()._forget_topics()
    assert broker.deleted[1:] == [["meta"]]
    assert broker.topics == []


async def test_records_of_whoever_came_while_a_restore_filled_clickhouse_are_not_deleted(broker: Broker) -> None:
    half = restoring()
    await half._begin()
    broker.epochs = dict.fromkeys(TOPICS, "new")
    with pytest.raises(NotEmptyError, match="has records on"):
        await half._refuse_broker()

"""What the collector has to know of the log, from the broker: who has come how far, what is held, what still runs."""

import asyncio
import re
from collections.abc import Callable, Mapping
from itertools import starmap

from aiokafka import TopicPartition

from infra.retention.collector import NotNowError
from infra.retention.holds import Holds
from processors.replay.plan import ENDED, Plan, PlanError, Scope
from processors.store.audit_sql import Reach
from processors.store.queries import Queries
from schemas.records import Replay
from streams.control import ControlTable
from streams.kafka import Kafka
from streams.survey import Position, Survey, survey

CATCH_UP_S = 120.0
"""How long the sink may take to bring what was on the log when it was looked at: half a second, when all is well."""

TAIL = 5000
"""Records that ClickHouse may not have yet and that are read for what they claim; more of them take too long."""

_READERS = {"frames": "detect", "detections": "batch", "batches": "enrich", "contexts": "analyze"}
_LOOK_S = 1.0
_CLAIM = re.compile(rb"sha256:([0-9a-f]{64})")
# Topics whose records claim images.
_CLAIMING = ("frames", "dead_letters")


class KafkaLog:
    """The collector's `Log` on the broker."""

    def __init__(self, kafka: Kafka, store: Queries, *, catch_up_s: float = CATCH_UP_S) -> None:
        self._kafka = kafka
        self._store = store
        self._catch_up_s = catch_up_s

    async def settled(self, told: Callable[[str], None]) -> Mapping[str, Reach]:
        """As `Log.settled`."""
        look = await survey(self._kafka, count=False)
        if missing := [topic for topic in (*_READERS, "holds") if topic not in look.metas]:
            raise NotNowError(f"there is no topic {missing[0]}: run `rewatch migrate`")
        # The ends of a second look: a position can be seen before the results that were committed with it.
        now = await survey(self._kafka, count=False)
        ends = {p.partition: p.end for p in now.positions["sink"]}
        deadline = asyncio.get_running_loop().time() + self._catch_up_s
        while behind := sum(starmap(_missing, ((p, ends) for p in now.positions["sink"]))):
            if asyncio.get_running_loop().time() > deadline:
                raise NotNowError(
                    f"ClickHouse lacks {behind} records that are on the log, and does not catch up: nothing is deleted "
                    "until it has; `rewatch status` says what the sink waits on"
                )
            told(f"waiting until ClickHouse has {behind} records more")
            await asyncio.sleep(_LOOK_S)
            now = await survey(self._kafka, count=False)
        return {topic: _reach(look, stage, topic) for topic, stage in _READERS.items()}

    async def held(self) -> Mapping[str, str]:
        """As `Log.held`."""
        return {hold.event_id: hold.batch_id for hold in await Holds(self._kafka, self._store).all()}

    async def replays(self) -> tuple[list[Scope], list[str]]:
        """As `Log.replays`."""
        table = ControlTable(self._kafka, "replays", Replay)
        await table.load()
        if table.skipped:
            raise NotNowError("a replay's record cannot be read: a newer version wrote it; upgrade rewatch")
        scopes, names = [], []
        for replay in table.all().values():
            if replay.state in ENDED:
                continue
            try:
                plan = Plan.decode(replay.plan)
            except PlanError as error:
                raise NotNowError(f"replay {replay.replay_id}: {error}; `rewatch replay cancel` ends it") from error
            names += [replay.replay_id, *([plan.baseline] if plan.baseline else [])]
            if plan.kind != "shadow":  # it judges live windows as they come, and reads no history
                scopes.append(plan.scope)
        return scopes, names

    async def unstored(self) -> set[str]:
        """As `Log.unstored`."""
        look = await survey(self._kafka, count=False)
        found: set[str] = set()
        since, until = {}, {}
        for p in look.positions["sink"]:
            if p.partition.topic in _CLAIMING and p.behind.records:
                if not p.behind.exact or p.behind.records > TAIL:
                    raise NotNowError(
                        f"ClickHouse lacks {p.behind.records} records of {p.partition.topic}: images stay until it has "
                        "them; `rewatch status` says what the sink waits on"
                    )
                since[p.partition], until[p.partition] = max(p.start, p.committed or p.start), p.end
        if since:
            for record in await self._kafka.read(list(since), since=since, until=until):
                found |= {sha.decode() for sha in _CLAIM.findall(record.value or b"")}
        return found


def _missing(position: Position, ends: Mapping[TopicPartition, int]) -> int:
    """Records before these ends that the sink has before it; markers at the end are none."""
    end = ends.get(position.partition, 0)
    if position.committed is not None and position.committed >= end:
        return 0
    return position.behind.records


def _reach(look: Survey, stage: str, topic: str) -> Reach:
    positions = [p for p in look.positions[stage] if p.partition.topic == topic]
    return Reach(
        look.metas[topic].epoch, {p.partition.partition: max(p.start, p.committed or p.start) for p in positions}
    )

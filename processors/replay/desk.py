"""What a planner holds of the broker: the topics of its replay, fenced, and the steps of the replay's life."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition

from processors.replay.plan import Bound, Plan, State
from schemas.records import Replay
from streams.client import stop
from streams.control import ControlTable
from streams.delivery import FencedProducer
from streams.errors import FencedError, UncertainError
from streams.kafka import Kafka, incoming
from streams.messages import Emit, Incoming

TOPICS = ("replay_units", "replay_events", "dead_letters")
"""What a planner reads and, but for the last, appends to."""

_QUIET_S = 0.25
"""How long a look for records waits where there is none."""


class Log(Protocol):
    """The topics of replays, as one planner holds them."""

    forgotten: bool
    """Whether it does not reach back to the replay's beginning any more: ClickHouse has to tell the rest."""

    async def open(self) -> None:
        """Fence every other planner of this replay, and begin to read at the beginning of the replay.

        Raises:
            FencedError: another one was opened meanwhile.
            KafkaError, TimeoutError or OSError: the broker is away.
        """

    def history(self) -> AsyncIterator[list[Incoming]]:
        """What is there: every record up to the end as it was when `open` returned."""

    async def news(self, wait_s: float) -> list[Incoming]:
        """What has come since; waits so long for the first."""

    async def append(self, emits: Sequence[Emit]) -> None:
        """Append, all or nothing.

        Raises:
            FencedError: another planner took over.
            UncertainError: whether they were appended is unknown.
        """

    async def close(self) -> None:
        """Let go."""


class KafkaLog:
    """The log of one replay on the broker."""

    def __init__(self, kafka: Kafka, replay_id: str, since: Sequence[Bound], epoch: Callable[[str], str]) -> None:
        self._kafka = kafka
        self._name = kafka.transactional_id("replay", replay_id)
        self._since = since
        self._epoch = epoch
        self._producer: FencedProducer | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._ends: dict[TopicPartition, int] = {}
        self.forgotten = False

    async def open(self) -> None:
        """Fence; then take the ends up to which `history` reads."""
        await self.close()
        self._producer = FencedProducer(self._kafka, self._name)
        await self._producer.open()
        tps = [TopicPartition(topic, p) for topic in TOPICS for p in range(self._kafka.settings.partitions)]
        bounds = await self._kafka.bounds(tps)
        starts = {tp: self._start(tp, first) for tp, (first, _) in bounds.items()}
        self.forgotten = any(start is None for start in starts.values())
        self._ends = {tp: end for tp, (_, end) in bounds.items()}
        self._consumer = self._kafka.consumer()
        await self._consumer.start()
        self._consumer.assign(tps)
        for tp in tps:  # no await between assign and seek: aiokafka's own reset would win
            start = starts[tp]
            self._consumer.seek(tp, bounds[tp][0] if start is None else start)

    def _start(self, tp: TopicPartition, first: int) -> int | None:
        """Where the replay began there; None where that is forgotten, or was another life of the topic."""
        mine = [bound for bound in self._since if (bound.topic, bound.partition) == (tp.topic, tp.partition)]
        here = next((bound.offset for bound in mine if bound.epoch == self._epoch(tp.topic)), None)
        return here if here is not None and here >= first else None

    async def history(self) -> AsyncIterator[list[Incoming]]:
        """Up to the ends; open transactions of others are waited for, for one of ours may stand behind them."""
        assert self._consumer is not None, "opened before it is read"
        todo = dict(self._ends)
        while todo := {tp: end for tp, end in todo.items() if await self._consumer.position(tp) < end}:
            yield await self.news(_QUIET_S)

    async def news(self, wait_s: float) -> list[Incoming]:
        """Committed records, as they come."""
        assert self._consumer is not None, "opened before it is read"
        found = await self._consumer.getmany(timeout_ms=int(wait_s * 1000), max_records=2000)
        return [incoming(record, self._epoch(tp.topic)) for tp, records in found.items() for record in records]

    async def append(self, emits: Sequence[Emit]) -> None:
        """In one transaction."""
        assert self._producer is not None, "opened before it is used"
        await self._producer.transact(emits)

    async def close(self) -> None:
        """Let go of the broker."""
        producer, self._producer = self._producer, None
        consumer, self._consumer = self._consumer, None
        if producer is not None:
            await producer.close()
        if consumer is not None:
            await stop(consumer)


class States(Protocol):
    """The steps of a replay's life."""

    def latest(self) -> Replay | None:
        """The last one, as far as it was read."""

    async def load(self) -> None:
        """Read on to the last one.

        Raises:
            KafkaError, TimeoutError or OSError: the broker is away.
        """

    async def say(self, state: State, detail: str) -> None:
        """Append one.

        Raises:
            UncertainError, KafkaError, TimeoutError or OSError: not now.
        """


class ControlStates:
    """The steps on the topic `replays`. The table is followed by whoever made it."""

    def __init__(
        self,
        table: ControlTable[Replay],
        replay_id: str,
        name: str,
        plan: Plan,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._clock = clock
        self._id = replay_id
        self._name = name
        self.plan = plan

    def latest(self) -> Replay | None:
        """What everyone knows of it."""
        return self._table.get(self._id)

    async def load(self) -> None:
        """Not to wait for the table's follower."""
        await self._table.load()

    async def say(self, state: State, detail: str) -> None:
        """Append a step, with the plan as it is."""
        step = Replay(
            replay_id=self._id,
            name=self._name,
            state=state,
            plan=self.plan.encode(),
            updated_at=int(self._clock() * 1000),
            detail=detail,
        )
        try:
            await self._table.append(step)
        except FencedError as error:  # by writers of other replays: nobody took this one over
            raise UncertainError(str(error)) from error

"""Whether a consumer that polls is brought what is there: its place against the end of the log.

A consumer can poll and heartbeat for ever and get nothing: its fetches ended, it stands where it does not read, its
group has forgotten it, or whoever hands on what it fetched has returned. Then nothing is in hand, and nothing else
tells such a worker from one that has nothing to do. So the log's end is asked for now and then.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.protocol.group import MemberAssignment

from streams.kafka import Kafka

LOOK_S = 10.0
"""Between two questions for the log's ends, seconds: one request a process, 1 ms."""

# A rebalance takes up to 10 s, a fetch after a lost broker's return a second. What is not noticed at one look is at the
# next: a worker is restarted within 10 + 30 s and what the supervisor takes, against the 60 s that are promised.
DEAF_S = 30.0

_BETWEEN = ("PreparingRebalance", "CompletingRebalance")


class Place(NamedTuple):
    """How far one partition is read, in offsets."""

    end: int
    """The end that a read_committed reader sees: what stands behind an open transaction is not there yet."""
    at: int | None
    """What the consumer reads next; None: it does not know."""
    brought: int | None = None
    """The last that it fetched, where it is handed on by a way of its own."""
    fed: int | None = None
    """The last that came to the partition's worker."""


class Hearing:
    """Remembers since when what is there has not come."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._missing: dict[tuple[str, str], tuple[int | None, float]] = {}

    def look(self, places: Mapping[TopicPartition, Place]) -> str | None:
        """What has not come for too long, or None; `places`: the partitions that could be read now, and only these."""
        missing: dict[tuple[str, str], int | None] = {}
        said: dict[tuple[str, str], str] = {}
        for tp, place in places.items():
            name = f"{tp.topic}-{tp.partition}"
            if (place.at or 0) < place.end:
                missing[name, "read"] = place.at
                said[name, "read"] = f"{name} ends at offset {place.end} and is not read on from {place.at or 0}"
            if place.brought != place.fed and place.brought is not None:
                missing[name, "fed"] = place.fed
                said[name, "fed"] = f"{name} was read to offset {place.brought} and that did not reach its worker"
        return self._since(missing, said)

    def wanted(self, told: str | None) -> str | None:
        """The same of a member without partitions; `told`: why it should have some."""
        return self._since({} if told is None else {("group", "wanted"): None}, {("group", "wanted"): str(told)})

    def _since(self, missing: Mapping[tuple[str, str], int | None], said: Mapping[tuple[str, str], str]) -> str | None:
        now = self._clock()
        was, self._missing = self._missing, {}
        for what, how_far in missing.items():
            before, since = was.get(what, (how_far, now))
            self._missing[what] = (how_far, since if before == how_far else now)
        late = [(since, what) for what, (_, since) in self._missing.items() if now - since >= DEAF_S]
        if not late:
            return None
        since, what = min(late)
        return f"{said[what]} for {now - since:.0f} s"


def position(consumer: AIOKafkaConsumer, tp: TopicPartition) -> int | None:
    """What the consumer reads next of the partition, from any thread; None: not assigned, or it does not know."""
    subscription = consumer._subscription.subscription  # noqa: SLF001 (aiokafka is pinned below 0.15)
    assignment = subscription.assignment if subscription is not None else None
    if assignment is None or tp not in assignment.tps:
        return None
    state = assignment.state_value(tp)
    return state.position if state.has_valid_position else None


async def wanted_by_group(kafka: Kafka, group: str, consumer: AIOKafkaConsumer) -> str | None:
    """Why a consumer that has no partitions should have some, as the group sees it; None: there are none for it.

    Raises:
        KafkaError or OSError: nobody can say now.
    """
    async with kafka.admin() as admin:
        (answer,) = await admin.describe_consumer_groups([group])
    (failed, _, state, _, _, members, *_) = answer.groups[0]
    settled = not failed and state not in _BETWEEN
    given = {member: assignment for member, _, _, _, assignment in members}
    return wanted_in(given, consumer._coordinator.member_id) if settled else None  # noqa: SLF001


def wanted_in(members: Mapping[str, bytes], member: str) -> str | None:
    """The same, of a group that is settled: what it gave each member, as MemberAssignment."""
    if member not in members:
        return "the group does not know this member"
    given = members[member] and MemberAssignment.decode(members[member]).assignment
    count = sum(len(partitions) for _, partitions in given or ())
    return f"the group gave this member {count} partitions, and it has none" if count else None

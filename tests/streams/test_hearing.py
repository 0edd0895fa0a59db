"""A consumer that polls and is brought nothing is noticed; one that has nothing to read, or no room, is left alone."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from aiokafka import TopicPartition
from aiokafka.protocol.group import MemberAssignment

from streams.hearing import DEAF_S, LOOK_S, Hearing, Place, position, wanted_by_group, wanted_in
from streams.kafka import Kafka

IN = TopicPartition("in", 0)
OTHER = TopicPartition("in", 1)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def looks(hearing: Hearing, clock: Clock, *places: Place | None) -> list[str | None]:
    """What each look says, `LOOK_S` apart; None: there is no room in the partition."""
    said = []
    for place in places:
        said.append(hearing.look({} if place is None else {IN: place}))
        clock.now += LOOK_S
    return said


def test_a_consumer_that_stands_before_the_end_is_deaf_after_a_while() -> None:
    clock = Clock()
    said = looks(Hearing(clock), clock, *[Place(end=9, at=4)] * 4)
    assert said[:3] == [None] * 3
    assert said[3] == f"in-0 ends at offset 9 and is not read on from 4 for {DEAF_S:.0f} s"


def test_one_that_is_read_on_however_slowly_is_not() -> None:
    clock = Clock()
    assert not any(looks(Hearing(clock), clock, *[Place(end=900, at=at) for at in range(20)]))


def test_one_at_the_end_is_not_and_what_comes_then_is_waited_for_anew() -> None:
    clock = Clock()
    hearing = Hearing(clock)
    assert not any(looks(hearing, clock, *[Place(end=4, at=4)] * 20))
    assert not any(looks(hearing, clock, *[Place(end=9, at=4)] * 3))


def test_one_without_a_place_is_deaf_where_there_is_something() -> None:
    clock = Clock()
    assert looks(Hearing(clock), clock, *[Place(end=1, at=None)] * 4)[-1] is not None
    assert not any(looks(Hearing(clock), clock, *[Place(end=0, at=None)] * 9))


def test_no_room_or_no_answer_of_the_broker_ends_the_waiting() -> None:
    clock = Clock()
    missing = Place(end=9, at=4)
    assert not any(looks(Hearing(clock), clock, missing, missing, missing, None, missing, missing, missing))


def test_what_was_fetched_and_never_came_is_missed_though_more_is_fetched() -> None:
    clock = Clock()
    said = looks(Hearing(clock), clock, *[Place(at, at, brought=at - 1, fed=2) for at in range(5, 9)])
    assert said[:3] == [None] * 3
    assert said[3] == f"in-0 was read to offset 7 and that did not reach its worker for {DEAF_S:.0f} s"


def test_what_comes_late_but_comes_is_not_missed() -> None:
    clock = Clock()
    assert not any(looks(Hearing(clock), clock, *[Place(at, at, brought=at - 1, fed=at - 4) for at in range(5, 30)]))


def test_one_deaf_partition_among_others_is_named() -> None:
    clock = Clock()
    hearing = Hearing(clock)
    said = None
    for at in range(4):
        said = hearing.look({IN: Place(end=50, at=at), OTHER: Place(end=7, at=3)})
        clock.now += LOOK_S
    assert said is not None
    assert said.startswith("in-1 ends at offset 7")


def test_a_member_without_partitions_is_left_alone_where_the_group_has_none_for_it() -> None:
    def given(*topics: tuple[str, list[int]]) -> bytes:
        return bytes(MemberAssignment(0, list(topics), b"").encode())

    assert wanted_in({"me": given(), "other": given(("in", [0, 1]))}, "me") is None
    assert wanted_in({"me": b""}, "me") is None
    assert wanted_in({"other": given()}, "me") == "the group does not know this member"
    assert wanted_in({}, "") == "the group does not know this member"
    assert wanted_in({"me": given(("in", [0, 1]))}, "me") == "the group gave this member 2 partitions, and it has none"


@pytest.mark.parametrize(
    ("failed", "state", "told"),
    [(0, "Stable", True), (0, "Empty", True), (0, "PreparingRebalance", False), (16, "Dead", False)],
)
async def test_nothing_is_concluded_from_a_group_in_a_rebalance_or_one_that_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, failed: int, state: str, told: bool
) -> None:
    answer = SimpleNamespace(groups=[(failed, "g", state, "consumer", "", [])])
    admin = SimpleNamespace(describe_consumer_groups=AsyncMock(return_value=[answer]))
    kafka: Any = SimpleNamespace(admin=lambda: nullcontext(admin))
    consumer: Any = SimpleNamespace(_coordinator=SimpleNamespace(member_id="me"))
    assert (await wanted_by_group(kafka, "g", consumer) is not None) is told


def test_a_member_that_the_group_does_not_know_for_a_moment_joins_again() -> None:
    clock = Clock()
    hearing = Hearing(clock)
    for told in ("unknown", "unknown", "unknown", None, "unknown", "unknown", "unknown"):
        assert hearing.wanted(told) is None
        clock.now += LOOK_S
    assert hearing.wanted("unknown") == f"unknown for {DEAF_S:.0f} s"


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="session")
async def test_what_stands_behind_an_open_transaction_is_not_missed(kafka: Kafka) -> None:
    tp = TopicPartition("batches", 1)
    async with kafka.reading(auto_offset_reset="none") as consumer:
        consumer.assign([tp])
        before = (await consumer.end_offsets([tp]))[tp]
        assert position(consumer, tp) is None
        consumer.seek(tp, before)
        assert position(consumer, tp) == before
        assert position(consumer, TopicPartition("batches", 2)) is None
        producer = kafka.producer(transactional_id=kafka.transactional_id("hearing"))
        await producer.start()
        try:
            async with producer.transaction():
                await producer.send_and_wait(tp.topic, b"x", partition=tp.partition)
                assert (await consumer.end_offsets([tp]))[tp] == before
            while (await consumer.end_offsets([tp]))[tp] == before:
                await consumer.getmany(timeout_ms=10)
        finally:
            await producer.stop()


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="session")
async def test_a_group_tells_of_its_members_whether_they_should_have_partitions(kafka: Kafka) -> None:
    group = kafka.group("hearing")
    members = [kafka.consumer(group_id=group) for _ in range(2)]
    for member in members:
        member.subscribe(["dead_letter_status"])  # one partition: one of them gets it
    await asyncio.gather(*(member.start() for member in members))
    try:
        async with asyncio.timeout(60):
            while sum(len(member.assignment()) for member in members) != 1 or await between(kafka, group):
                await asyncio.gather(*(member.getmany(timeout_ms=100) for member in members))
        idle, busy = sorted(members, key=lambda member: len(member.assignment()))
        assert await wanted_by_group(kafka, group, idle) is None
        assert "gave this member 1 partitions" in str(await wanted_by_group(kafka, group, busy))
    finally:
        await asyncio.gather(*(member.stop() for member in members))
    assert await wanted_by_group(kafka, group, idle) == "the group does not know this member"


async def between(kafka: Kafka, group: str) -> bool:
    """Whether the group is in a rebalance."""
    async with kafka.admin() as admin:
        (answer,) = await admin.describe_consumer_groups([group])
    return answer.groups[0][2] != "Stable"

"""Slots that go round, whoever queues for how many."""

import asyncio

import pytest

from streams.turns import Turns


async def test_one_that_queues_for_a_single_slot_waits_a_round_and_not_for_all_before_it() -> None:
    turns = Turns(1)
    order: list[str] = []

    async def work(who: str) -> None:
        await turns.acquire(who)
        order.append(who)
        await asyncio.sleep(0)
        turns.release()

    tasks = [asyncio.create_task(work(who)) for who in ("a",) * 16 + ("b",) * 16 + ("c",)]
    await asyncio.gather(*tasks)
    assert order.index("c") <= 3
    assert [order.count(who) for who in "abc"] == [16, 16, 1]
    assert "".join(order[4:32]) in {"ab" * 14, "ba" * 14}


@pytest.mark.parametrize("given", [False, True], ids=["in the queue", "at the moment it is given"])
async def test_a_slot_that_is_waited_for_no_longer_goes_to_the_next(given: bool) -> None:
    turns = Turns(1)
    await turns.acquire("a")
    gone = asyncio.create_task(turns.acquire("b"))
    other = asyncio.create_task(turns.acquire("c"))
    await asyncio.sleep(0)
    if given:
        turns.release()
        gone.cancel()
    else:
        gone.cancel()
        await asyncio.sleep(0)
        turns.release()
    async with asyncio.timeout(1):
        await other
    turns.release()
    async with asyncio.timeout(1):
        await turns.acquire("d")

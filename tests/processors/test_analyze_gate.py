"""The gate alone: order, priorities, places, and who gives way."""

import asyncio
from collections.abc import Callable

import pytest

from processors.analyze.gate import BusyError, ClosedError, Gate, Held, Priority, Urgency

LIVE, SHADOW, REPLAY = Priority


def gate_of(*, live_alone: bool = False, **slots: int) -> Gate:
    gate = Gate(lambda: 0.0, live_alone=live_alone)
    for name, count in slots.items():
        gate.expect(name, count)
        gate.open(name, count)
    return gate


class Calls:
    """Calls by name, each at work until told to end."""

    def __init__(self, gate: Gate, among: str = "a") -> None:
        self.gate = gate
        self.among = among
        self.began: list[str] = []
        self.at: dict[str, str] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}
        self._end: dict[str, asyncio.Event] = {}

    async def call(self, name: str, priority: Priority | Urgency = LIVE, *, among: str = "", **wants) -> None:
        self._end[name] = asyncio.Event()
        run = self.gate.run(self._work(name), among=among or self.among, priority=priority, **wants)
        self.tasks[name] = asyncio.create_task(run)
        await settle()

    async def end(self, *names: str) -> None:
        for name in names:
            self._end[name].set()
            await settle()

    def _work(self, name: str) -> Callable:
        async def work(held: Held) -> str:
            self.began.append(name)
            self.at[name] = held.place
            try:
                await self._end[name].wait()
            finally:
                self.at.pop(name)
            return name

        return work


async def settle():
    for _ in range(12):
        await asyncio.sleep(0)


async def test_who_comes_first_is_served_first_and_one_alone_waits_for_all_slots():
    calls = Calls(gate_of(a=2))
    await calls.call("1")
    await calls.call("2", alone=True)
    await calls.call("3")
    await calls.call("4")
    assert calls.began == ["1"], "2 wants every slot, and 3 and 4 do not overtake it"
    await calls.end("1")
    assert calls.began == ["1", "2"]
    await calls.end("2")
    assert calls.began == ["1", "2", "3", "4"]
    await calls.end("3", "4")
    assert [await task for task in calls.tasks.values()] == ["1", "2", "3", "4"]
    assert calls.gate.busy == 0


async def test_live_comes_before_shadow_and_shadow_before_replay():
    calls = Calls(gate_of(a=1))
    await calls.call("first")
    for name, priority in (("r1", REPLAY), ("s1", SHADOW), ("r2", REPLAY), ("l1", LIVE), ("s2", SHADOW), ("l2", LIVE)):
        await calls.call(name, priority)
    await calls.end("first", "l1", "l2", "s1", "s2", "r1", "r2")
    assert calls.began == ["first", "l1", "l2", "s1", "s2", "r1", "r2"]


async def test_a_live_call_without_a_slot_cancels_the_youngest_replay_call_which_begins_anew():
    calls = Calls(gate_of(a=2))
    await calls.call("old", REPLAY)
    await calls.call("young", REPLAY)
    await calls.call("later", REPLAY)
    await calls.call("live")
    assert set(calls.at) == {"old", "live"}
    await calls.end("live")
    assert set(calls.at) == {"old", "young"}, "it stands where it stood: before who came later"
    await calls.end("old", "young", "later")
    assert [await calls.tasks[name] for name in ("live", "old", "young", "later")] == ["live", "old", "young", "later"]
    assert calls.began.count("young") == 2


async def test_each_live_call_cancels_one_and_no_more_than_it_needs():
    calls = Calls(gate_of(a=3))
    for name in ("r1", "r2", "r3"):
        await calls.call(name, REPLAY)
    for name in ("l1", "l2"):
        calls._end[name] = asyncio.Event()
        calls.tasks[name] = asyncio.create_task(calls.gate.run(calls._work(name), among="a"))
    await settle()
    assert set(calls.at) == {"r1", "l1", "l2"}
    await calls.end("r1", "l1", "l2", "r2", "r3")


@pytest.mark.parametrize("other", [LIVE, SHADOW])
async def test_only_replay_gives_way_and_only_to_live(other):
    calls = Calls(gate_of(a=1))
    await calls.call("first", other)
    await calls.call("live")
    assert set(calls.at) == {"first"}
    await calls.end("first", "live")
    await calls.call("replay", REPLAY)
    await calls.call("shadow", SHADOW)
    assert set(calls.at) == {"replay"}
    await calls.end("replay", "shadow")


async def test_where_slots_share_a_cpu_replays_leave_the_place_to_live_calls_also_where_there_are_slots():
    gate = gate_of(a=4, b=4, live_alone=True)
    calls = Calls(gate, "ab")
    for name, priority in (("first", REPLAY), ("second", REPLAY), ("shadow", SHADOW)):
        await calls.call(name, priority, among="a")
    await calls.call("elsewhere", REPLAY, among="b")
    await calls.call("live", among="a")
    assert calls.at == {"shadow": "a", "elsewhere": "b", "live": "a"}
    await calls.call("third", REPLAY)
    assert calls.at["third"] == "b", "another server has room for it"
    await calls.call("more", among="a")
    await calls.end("live")
    assert set(calls.at) == {"shadow", "elsewhere", "third", "more"}
    await calls.end("more")
    assert set(calls.at) == {"shadow", "elsewhere", "third", "first", "second"}
    assert gate.busy == 5
    await calls.end("first", "second", "third", "shadow", "elsewhere")
    assert gate.busy == 0


async def test_a_replay_call_that_gives_way_before_it_began_begins_later():
    gate = gate_of(a=1)
    calls = Calls(gate)
    for name, priority in (("replay", REPLAY), ("live", LIVE)):  # both before either runs
        calls._end[name] = asyncio.Event()
        calls.tasks[name] = asyncio.create_task(gate.run(calls._work(name), among="a", priority=priority))
    await settle()
    assert calls.began == ["live"]
    await calls.end("live", "replay")
    assert calls.began == ["live", "replay"]


async def test_a_live_call_alone_has_all_replay_of_its_place_give_way():
    calls = Calls(gate_of(a=2))
    await calls.call("r1", REPLAY)
    await calls.call("r2", REPLAY)
    await calls.call("live", alone=True)
    assert set(calls.at) == {"live"}
    await calls.end("live", "r1", "r2")
    assert await asyncio.gather(*calls.tasks.values()) == ["r1", "r2", "live"]


async def test_cancelling_the_caller_of_a_replay_call_that_gives_way_ends_it():
    calls = Calls(gate_of(a=1))
    await calls.call("replay", REPLAY)
    running = asyncio.create_task(calls.gate.run(calls._work("replay"), among="a"))
    await asyncio.sleep(0)  # it has told the replay call to give way
    calls.tasks["replay"].cancel()
    await settle()
    assert calls.tasks["replay"].cancelled()
    assert calls.began == ["replay", "replay"]
    await calls.end("replay")
    assert await running == "replay"


async def test_the_least_busy_place_is_taken_and_among_equals_the_one_that_holds_the_prefix():
    calls = Calls(gate_of(a=2, b=4), among="ab")
    await calls.call("1", prefix="p")
    assert calls.at == {"1": "a"}
    await calls.call("2", prefix="q")
    assert calls.at["2"] == "b"
    await calls.call("3", prefix="p")
    assert calls.at["3"] == "b", "1 of 4 is less than 1 of 2"
    await calls.end("1", "2", "3")
    for name, prefix in (("4", "q"), ("5", "p")):
        await calls.call(name, prefix=prefix)
        assert calls.at[name] == {"q": "b", "p": "a"}[prefix]
        await calls.end(name)


async def test_one_that_can_go_elsewhere_does_not_wait_behind_one_that_cannot():
    calls = Calls(gate_of(a=1, b=1), among="ab")
    await calls.call("1", among="a")
    await calls.call("2", among="a")
    await calls.call("3")
    assert calls.at == {"1": "a", "3": "b"}
    await calls.call("4", alone=True)
    await calls.end("3")
    assert calls.at == {"1": "a", "4": "b"}
    await calls.end("1", "2", "4")


async def test_a_closed_place_gets_no_calls_and_who_could_use_no_other_is_told():
    calls = Calls(gate_of(a=1, b=1), among="ab")
    for name, among in (("1", "a"), ("2", "b"), ("only-a", "a"), ("any", "ab")):
        await calls.call(name, among=among)
    calls.gate.close("a")
    await settle()
    with pytest.raises(ClosedError, match="a"):
        await calls.tasks["only-a"]
    with pytest.raises(ClosedError):
        await calls.gate.run(calls._work("1"), among="a")
    await calls.end("1")
    assert calls.at == {"2": "b"}, "who works at a closed place goes on, and nobody follows"
    calls.gate.open("a", 1)
    await settle()
    assert calls.at == {"2": "b", "any": "a"}
    await calls.end("2", "any")


async def test_fewer_slots_than_are_held_are_made_up_for_before_any_is_given():
    calls = Calls(gate_of(a=3))
    for name in "1234":
        await calls.call(name)
    calls.gate.open("a", 1)
    await calls.end("1", "2")
    assert set(calls.at) == {"3"}
    await calls.end("3")
    assert set(calls.at) == {"4"}
    await calls.end("4")


async def test_a_waiter_cancelled_in_the_moment_of_its_turn_gives_it_on():
    calls = Calls(gate_of(a=1))
    for name in "123":
        await calls.call(name)
    calls._end["1"].set()
    while len(calls.gate._waiting) == 2:
        await asyncio.sleep(0)
    calls.tasks["2"].cancel()  # its turn was given; it has not run since
    await settle()
    assert calls.tasks["2"].cancelled()
    assert calls.at == {"3": "a"}
    await calls.end("3")
    assert calls.gate.busy == 0


async def test_a_cancelled_waiter_for_all_slots_lets_those_behind_it_in():
    calls = Calls(gate_of(a=2))
    await calls.call("1")
    await calls.call("2", alone=True)
    await calls.call("3")
    calls.tasks["2"].cancel()
    await settle()
    assert set(calls.at) == {"1", "3"}
    await calls.end("1", "3")


async def test_what_the_work_raises_is_raised_and_the_slot_is_free():
    gate = gate_of(a=1)

    async def fails(_):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await gate.run(fails, among="a")
    assert gate.busy == 0


async def test_a_call_with_patience_says_when_no_slot_came_and_leaves_nothing_behind():
    calls = Calls(gate_of(a=1))
    await calls.call("live")
    with pytest.raises(BusyError, match=r"no slot for 0\.01 s"):
        await calls.gate.run(calls._work("replay"), among="a", priority=REPLAY, patience_s=0.01)
    assert not calls.gate._waiting
    await calls.end("live")
    assert calls.gate.busy == 0
    calls._end["replay"] = asyncio.Event()
    calls._end["replay"].set()
    assert await calls.gate.run(calls._work("replay"), among="a", priority=REPLAY, patience_s=0.01) == "replay"


async def test_a_call_that_is_hastened_stands_where_its_new_priority_does_and_gives_way_no_more():
    calls = Calls(gate_of(a=1))
    urgency = Urgency(REPLAY)
    await calls.call("first")
    await calls.call("hastened", urgency)
    await calls.call("shadow", SHADOW)
    calls.gate.hasten(urgency, LIVE)
    calls.gate.hasten(urgency, SHADOW)
    assert urgency.priority is LIVE, "it is never made less urgent"
    await calls.end("first")
    assert calls.at == {"hastened": "a"}
    await calls.call("live")
    assert calls.at == {"hastened": "a"}
    await calls.end("hastened", "live", "shadow")
    assert calls.began == ["first", "hastened", "live", "shadow"]


async def test_one_that_is_hastened_gets_the_slot_of_a_replay_call():
    calls = Calls(gate_of(a=1))
    urgency = Urgency(REPLAY)
    await calls.call("replay", REPLAY)
    await calls.call("hastened", urgency)
    calls.gate.hasten(urgency, LIVE)
    await settle()
    assert calls.at == {"hastened": "a"}
    await calls.end("hastened", "replay")


async def test_patience_is_for_the_slot_and_not_for_the_work():
    gate = gate_of(a=1)

    async def work(_: Held) -> str:
        await asyncio.sleep(0.05)
        return "done"

    assert await gate.run(work, among="a", patience_s=0.01) == "done"

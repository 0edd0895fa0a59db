"""The stage replay: units judged again, live windows judged by shadows, and nothing of it anywhere else."""

import asyncio
import itertools
import json

import pytest
from aiokafka.errors import KafkaConnectionError
from msgspec.structs import replace as changed

from processors.analyze.fakes import FakeLlm
from processors.analyze.gate import Priority
from processors.analyze.judge import ATTEMPTS, Judge
from processors.analyze.settings import LlmSettings
from processors.analyze.stage import AnalyzeStage
from processors.replay import stage as module
from processors.replay.plan import Bound, Change, Llm, Scope
from processors.replay.stage import ReplayStage, covers
from schemas import ids
from schemas.records import DeadLetter, ReplayEvent
from streams import codec
from streams.errors import UnavailableError, UnprocessableError
from streams.messages import SOURCE
from tests.processors.analyze_samples import answer, hang
from tests.processors.replay_kit import (
    DEFAULT,
    STRICT,
    Known,
    judge_of,
    plan,
    read,
    replay,
    stage_of,
    unit,
    window,
)
from tests.processors.test_analyze_judge import about, died

SHADOW = plan("shadow")


async def well(_) -> str:
    return answer(90)


def events(emits) -> list[ReplayEvent]:
    assert {emit.topic for emit in emits} <= {"replay_events"}
    return [codec.decode_bytes(emit.topic, emit.value, None, ReplayEvent) for emit in emits]


def letters(emits) -> list[DeadLetter]:
    return [
        codec.decode_bytes(emit.topic, emit.value, None, DeadLetter) for emit in emits if emit.topic == "dead_letters"
    ]


def unit_of(name: str, number: int = 0, *, prompt=STRICT, **changes):
    return read("replay_units", unit(name, window(number), prompt, **changes), 7 + number)


async def test_a_unit_is_judged_with_the_prompt_that_it_names_in_the_run_of_its_replay():
    stage = stage_of(judge_of(well), Known(replay("r1", plan())))
    [found] = events(await stage.handle(unit_of("r1")))
    batch = window(0).batch_id
    assert (found.replay_id, found.unit_id, found.event_id) == ("r1", f"r1:{batch}", ids.event_id(batch, "r1"))
    assert (found.event.run, found.event.prompt_digest, found.event.risk_level) == ("r1", STRICT.digest, "critical")
    assert not found.reused
    assert STRICT.templates.system in found.event.rendered_prompt


async def test_units_of_a_cancelled_replay_give_nothing_also_where_it_is_cancelled_while_they_are_judged():
    known = Known(replay("r1", plan(), "cancelled"), replay("r2", plan()))

    asked = []

    async def cancel(_) -> str:
        asked.append(1)
        known.say(replay("r2", plan(), "cancelled"))
        return answer()

    stage = stage_of(judge_of(cancel), known)
    assert await stage.handle(unit_of("r1")) == []
    assert asked == []
    assert await stage.handle(unit_of("r2")) == []
    assert asked == [1]


@pytest.mark.parametrize("state", ["paused", "done", "failed"])
async def test_a_unit_that_is_there_is_judged_whatever_became_of_its_replay_but_a_cancel(state):
    stage = stage_of(judge_of(well), Known(replay("r1", plan(), state)))
    assert len(events(await stage.handle(unit_of("r1")))) == 1


async def test_what_another_detector_saw_is_for_no_judge():
    stage = stage_of(judge_of(well), Known())
    assert await stage.handle(unit_of("r1", kind="detect", payload=b"detections")) == []


async def test_a_replay_and_a_prompt_that_were_written_just_now_are_read():
    known = Known(replay("r1", plan()))
    known.replays, known.prompts = {}, {}
    assert len(events(await stage_of(judge_of(well), known).handle(unit_of("r1")))) == 1
    assert known.loads == 1
    assert len(events(await stage_of(judge_of(well), known).handle(unit_of("r1")))) == 1
    assert known.loads == 1, "what is known is not read again"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replay_id": "r9", "unit_id": "r9:x"}, "there is no replay r9"),
        ({"prompt_digest": "f" * 32}, "there is no prompt version 'ffff"),
        ({"payload": b"\0\0\0\0\0garbage"}, "not a record of contexts"),
        ({"unit_id": "r1:another"}, "unit r1:another holds window door:"),
        ({"replay_id": "bad", "unit_id": f"bad:{window(0).batch_id}"}, "not a replay's plan"),
    ],
)
async def test_a_unit_that_can_never_be_judged_is_a_dead_letter_and_holds_up_nobody(changes, words):
    bad = replay("bad", plan())
    known = Known(replay("r1", plan()), changed(bad, plan="{"))
    with pytest.raises(UnprocessableError, match=words):
        await stage_of(judge_of(well), known).handle(unit_of("r1", **changes))


async def test_while_the_broker_does_not_say_what_a_unit_belongs_to_it_waits():
    known = Known(replay("r1", plan()))
    known.replays, known.away = {}, KafkaConnectionError("gone")
    with pytest.raises(UnavailableError, match="replays and prompts cannot be read") as caught:
        await stage_of(judge_of(well), known).handle(unit_of("r1"))
    assert caught.value.waiting_on == "broker"


async def test_a_plans_own_llm_is_asked_and_the_shared_one_is_not():
    other = Llm(url="http://127.0.0.1:9", model="other")

    async def never(_) -> str:
        raise AssertionError("this one judges live windows")

    async def low(_) -> str:
        return answer(10)

    other_llm = changed(plan(), change=Change(prompt=STRICT.digest, llm=other))
    judge, another = judge_of(never), judge_of(low)
    stage = stage_of(judge, Known(replay("r1", other_llm)), {other: another})
    [found] = events(await stage.handle(unit_of("r1")))
    assert found.event.risk_score == 10
    assert another.gate.busy == judge.gate.busy == 0


OWN = Llm(url="http://127.0.0.1:9", model_path="/models/other.gguf")
OWNS = changed(plan(), change=Change(prompt=STRICT.digest, llm=OWN))
"""A plan with an LLM of its own."""


class Absent(FakeLlm):
    """Nobody listens there, until somebody does."""

    away = True

    async def server(self):
        if self.away:
            raise UnavailableError("llm", "connection refused")
        return await super().server()


def with_own(*replays, state="running", here=well):
    """A stage, its control records and another LLM that is away, of which the replay r1 says it is its own."""
    llm, known = Absent(well), Known(replay("r1", OWNS, state), *replays)
    stage = stage_of(judge_of(here), known, {OWN: Judge([llm], LlmSettings(), wall=lambda: 42)})
    return stage, known, llm


async def gives_up(stage, record) -> str:
    """What the dead letter says that a record ends in; it is asked again and again, as a host does."""
    async with asyncio.timeout(20):
        while True:
            try:
                await stage.handle(record)
            except UnprocessableError as error:
                return str(error)
            except UnavailableError:
                await asyncio.sleep(0)


async def test_a_replay_whose_own_llm_stays_away_is_dead_letters_after_a_while_and_others_go_on(monkeypatch):
    monkeypatch.setattr(module, "_AWAY_S", 0.2)
    stage, _, llm = with_own(replay("r2", plan()))
    with pytest.raises(UnavailableError, match="connection refused") as caught:
        await stage.handle(unit_of("r1"))
    assert caught.value.waiting_on == "llm"
    said = await gives_up(stage, unit_of("r1"))
    assert "http://127.0.0.1:9, the LLM of replay the r1, is away: connection refused" in said
    assert "`rewatch replay resume the r1` serves it again" in said
    with pytest.raises(UnprocessableError):
        await stage.handle(unit_of("r1", 1))  # it does not wait anew for each
    assert len(events(await stage.handle(unit_of("r2")))) == 1
    llm.away = False
    assert len(events(await stage.handle(unit_of("r1", 1)))) == 1
    llm.away = True
    stage._judges.of(OWN)._endpoints.set_aside(stage._judges.of(OWN)._endpoints.all[0], caught.value)
    with pytest.raises(UnavailableError):
        await stage.handle(unit_of("r1", 2))


async def test_time_in_which_nobody_asked_a_replays_own_llm_is_not_held_against_it(monkeypatch):
    monkeypatch.setattr(module, "_AWAY_S", 0.05)
    stage, *_ = with_own()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await stage.handle(unit_of("r1"))
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("state", ["paused", "done", "failed"])
async def test_where_nobody_serves_a_replays_own_llm_any_more_its_units_are_dead_letters_at_once(state):
    stage, known, _ = with_own(state=state)
    with pytest.raises(UnprocessableError, match="`rewatch replay resume the r1`"):
        await stage.handle(unit_of("r1"))
    known.on_log["r1"] = replay("r1", OWNS)  # it was resumed, and the stage has not heard of it
    with pytest.raises(UnavailableError):
        await stage.handle(unit_of("r1"))


async def test_a_server_of_somebody_else_is_theirs_to_start():
    theirs = Llm(url="http://10.0.0.9:8080")
    known = Known(replay("r1", changed(OWNS, change=Change(prompt=STRICT.digest, llm=theirs)), "paused"))
    stage = stage_of(judge_of(well), known, {theirs: Judge([Absent(well)], LlmSettings(), wall=lambda: 42)})
    with pytest.raises(UnprocessableError, match="start that server, then `rewatch replay resume the r1`"):
        await stage.handle(unit_of("r1"))


async def test_the_llm_of_live_windows_is_waited_for_without_limit(monkeypatch):
    monkeypatch.setattr(module, "_AWAY_S", 0.0)
    shared = Judge([Absent(well)], LlmSettings(), wall=lambda: 42)
    stage = stage_of(shared, Known(replay("r1", plan(), "paused"), replay("r2", plan())))
    for _ in range(20):
        for name in ("r1", "r2"):
            with pytest.raises(UnavailableError, match="connection refused"):
                await stage.handle(unit_of(name))


async def test_a_live_window_takes_the_slot_of_a_unit_which_is_judged_afterwards():
    began: list[str] = []
    held = asyncio.Event()

    async def once_held(messages) -> str:
        began.append(about(messages))
        if not held.is_set() and about(messages) == "door":
            held.set()
            await hang()
        return answer()

    judge = judge_of(once_held, slots=1)
    live = AnalyzeStage(judge, lambda _: DEFAULT, deadline_s=30.0)
    replays = stage_of(judge.share(), Known(replay("r1", plan())))
    judging = asyncio.create_task(replays.handle(unit_of("r1")))
    await held.wait()
    assert judge.gate.busy == 1
    [made] = await asyncio.wait_for(live.handle(read("contexts", window(0, "live"))), 5)
    assert made.topic == "risk_events"
    assert len(events(await asyncio.wait_for(judging, 5))) == 1
    assert began == ["door", "live", "door"], "its attempt was cancelled, and begun anew"


async def test_a_unit_that_gets_no_slot_says_that_live_windows_come_first(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    judge = judge_of(hang, slots=1)
    live = asyncio.create_task(judge.judge(window(1, "live"), DEFAULT, key="live"))
    await asyncio.sleep(0)
    stage = stage_of(judge, Known(replay("r1", plan()), replay("s1", SHADOW)))
    for record in (unit_of("r1"), read("contexts", window(0))):
        with pytest.raises(UnavailableError, match="windows that come first have every slot") as caught:
            await stage.handle(record)
        assert caught.value.waiting_on == "live"
    live.cancel()
    await asyncio.gather(live, return_exceptions=True)
    assert judge.gate.busy == 0


async def test_units_have_their_replays_share_of_the_slots_and_live_windows_are_counted_apart():
    known = Known(replay("r1", plan(share=0.5)), replay("s1", SHADOW), replay("r2", plan(share=1.0), "paused"))
    judge = judge_of(well, slots=8)
    stage = stage_of(judge, known)
    await judge.judge(window(0), DEFAULT, key="k")  # it knows its slots then
    assert (stage.at_once("replay_units"), stage.at_once("contexts"), stage.concurrency) == (4, 8, 12)
    known.say(replay("r2", plan(share=0.1)))
    assert stage.at_once("replay_units") == 5
    known.say(replay("r2", plan(share=1.0)))
    assert stage.at_once("replay_units") == 8, "no more than there are"
    for name in ("r1", "r2"):
        known.say(replay(name, plan(), "done"))
    assert stage.at_once("replay_units") == 1


async def test_each_replay_has_its_own_share_also_beside_one_whose_planner_died(monkeypatch):
    holding, release = asyncio.Semaphore(0), asyncio.Event()

    async def held(_) -> str:
        holding.release()
        await release.wait()
        return answer()

    known = Known(replay("dead", plan()), replay("r1", plan(share=0.25)))
    judge = judge_of(held, slots=8)
    stage = stage_of(judge, known)
    release.set()
    await judge.judge(window(0), DEFAULT, key="k")  # it knows its slots then
    await holding.acquire()
    release.clear()
    mine = [asyncio.create_task(stage.handle(unit_of("r1", number))) for number in range(8)]
    for _ in range(2):
        await holding.acquire()
    for _ in range(50):
        await asyncio.sleep(0)
    assert judge.gate.busy == 2, "a quarter of 8, though the other's slots are free"
    assert stage.at_once("replay_units") == 8 + 6, "who waits for a turn keeps nobody else out"
    others = [asyncio.create_task(stage.handle(unit_of("dead", number))) for number in range(6)]
    for _ in range(6):
        await holding.acquire()
    assert judge.gate.busy == 8
    known.say(replay("r1", plan(share=0.5)))
    release.set()
    assert len(await asyncio.wait_for(asyncio.gather(*mine, *others), 5)) == 14
    assert stage.at_once("replay_units") == 8
    release.clear()
    mine = [asyncio.create_task(stage.handle(unit_of("r1", number))) for number in range(8, 16)]
    for _ in range(6 + 4):
        await holding.acquire()
    for _ in range(50):
        await asyncio.sleep(0)
    assert judge.gate.busy == 4, "the share that it was given since"
    stage.patience_s = 0.03
    with pytest.raises(UnavailableError, match="units that come first have the whole share") as caught:
        await stage.handle(unit_of("r1", 16))
    assert caught.value.waiting_on == "live"
    release.set()
    await asyncio.wait_for(asyncio.gather(*mine), 5)
    assert judge.gate.busy == 0


async def test_without_a_shadow_a_live_window_is_not_even_decoded(monkeypatch):
    monkeypatch.setattr(codec, "decode", None)
    known = Known(replay("r1", plan()), replay("s1", SHADOW, "done"), replay("s2", SHADOW, "planned"))
    garbage = read("contexts", window(0))._replace(value=b"garbage")
    assert await stage_of(judge_of(well), known).handle(garbage) == []


async def test_each_shadow_that_runs_judges_a_live_window_with_its_own_version():
    other = changed(plan("shadow"), change=Change(prompt=DEFAULT.digest))
    stage = stage_of(judge_of(well), Known(replay("s1", SHADOW), replay("s2", other), replay("r1", plan())))
    found = events(await stage.handle(read("contexts", window(0))))
    assert [(one.replay_id, one.event.prompt_digest) for one in found] == [
        ("s1", STRICT.digest),
        ("s2", DEFAULT.digest),
    ]
    assert {one.event_id for one in found} == {ids.event_id(window(0).batch_id, name) for name in ("s1", "s2")}


async def test_a_shadow_judges_only_what_came_after_it_began_of_its_cameras():
    since = (Bound(topic="contexts", epoch="e1", partition=0, offset=10),)
    chosen = plan("shadow", since=since, scope=Scope(cameras=("door",)))
    stage = stage_of(judge_of(well), Known(replay("s1", chosen)))

    async def judged(number: int, camera: str = "door", **place) -> int:
        return len(events(await stage.handle(read("contexts", window(0, camera), number, **place))))

    assert [await judged(9), await judged(10), await judged(10, "yard")] == [0, 1, 0]
    assert await judged(0, epoch="e2") == 1, "a later life of the topic came after it, whole"
    assert await judged(0, partition=1) == 1


def test_a_share_is_of_windows_by_name_and_so_the_same_for_every_shadow():
    windows = [window(number) for number in range(400)]
    fifth = {w.batch_id for w in windows if covers(plan("shadow", share=0.2), w)}
    half = {w.batch_id for w in windows if covers(plan("shadow", share=0.5), w)}
    assert 50 < len(fifth) < 110
    assert 160 < len(half) < 240
    assert fifth < half
    assert all(covers(plan("shadow", share=1.0), w) for w in windows)


async def test_a_shadow_that_fails_costs_another_nothing_and_is_a_dead_letter_under_its_own_name():
    async def by_prompt(messages) -> str:
        judging = about(messages) != "canary"
        return "no JSON" if STRICT.templates.system in messages[0].content and judging else answer(80)

    good = changed(plan("shadow"), change=Change(prompt=DEFAULT.digest))
    missing = changed(plan("shadow"), change=Change(prompt="f" * 32))
    known = Known(replay("s1", SHADOW), replay("s2", good), replay("s3", missing))
    emits = await stage_of(judge_of(by_prompt), known).handle(read("contexts", window(0)))
    [found] = events([emit for emit in emits if emit.topic == "replay_events"])
    assert found.replay_id == "s2"
    first, second = letters(emits)
    assert (first.origin, first.stage, first.camera_id) == (f"s1:{window(0).batch_id}", "replay", "door")
    assert json.loads(first.detail)["prompt_digest"] == STRICT.digest
    assert "no prompt version" in second.message
    assert ids.place(first.origin) is None, "nobody redrives the window to analyze by it"
    assert all(dict(emit.headers)[SOURCE].startswith(b"s") for emit in emits if emit.topic == "dead_letters"), (
        "nor does it seem to be analyze's failure"
    )


async def test_a_shadow_whose_server_is_away_does_not_lose_anothers_verdict_nor_has_it_judged_twice():
    other = Llm(url="http://127.0.0.1:9")
    away = True
    asked = []

    async def elsewhere(_) -> str:
        if away:
            raise died()
        return answer(20)

    async def here(messages) -> str:
        asked.append(about(messages))
        return answer(80)

    elsewhere_too = changed(plan("shadow"), change=Change(prompt=STRICT.digest, llm=other))
    known = Known(replay("s1", SHADOW), replay("s2", elsewhere_too))
    stage = stage_of(judge_of(here), known, {other: judge_of(elsewhere)})
    record = read("contexts", window(0))
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await stage.handle(record)
    away = False
    deadline = asyncio.get_running_loop().time() + 20
    while True:
        try:
            found = events(await stage.handle(record))
            break
        except UnavailableError:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)
    assert [(one.replay_id, one.event.risk_score) for one in found] == [("s1", 80), ("s2", 20)]
    assert asked == ["door"]
    assert not stage._kept


async def test_a_prompt_that_no_server_can_judge_with_is_at_fault_and_holds_up_no_other_replay():
    canaries = 0

    async def refused(messages) -> str:
        nonlocal canaries
        canaries += about(messages) == "canary" and STRICT.templates.system in messages[0].content
        return "no JSON" if STRICT.templates.system in messages[0].content else answer()

    hours = itertools.count()
    judge = judge_of(refused, clock=lambda: next(hours) * 3600.0)
    stage = stage_of(judge, Known(replay("r1", plan()), replay("s1", SHADOW)))
    for record in (unit_of("r1"), read("contexts", window(1))):
        for _ in range(20):
            try:
                [letter] = letters(await stage.handle(record))
                words = letter.message
                break
            except UnavailableError:
                continue
            except UnprocessableError as error:
                words = str(error)
                break
        assert "does not judge the canary with prompt deliveries-strict-nights" in words
        assert canaries >= 2 * ATTEMPTS, "one that failed once, its repair too, can be chance"
    [found] = events(await stage.handle(unit_of("r1", 2, prompt=DEFAULT)))
    assert found.event.risk_score == 71


async def test_while_the_servers_judge_with_no_prompt_at_all_nothing_is_blamed():
    async def refused(_) -> str:
        return "no JSON"

    hours = itertools.count()
    judge = judge_of(refused, clock=lambda: next(hours) * 3600.0)
    stage = stage_of(judge, Known(replay("r1", plan())))
    for _ in range(10):
        with pytest.raises(UnavailableError):
            await stage.handle(unit_of("r1"))


async def test_a_window_that_cannot_be_read_is_analyzes_dead_letter_and_not_a_shadows():
    stage = stage_of(judge_of(well), Known(replay("s1", SHADOW)))
    assert await stage.handle(read("contexts", window(0))._replace(value=b"garbage")) == []


async def test_a_shadow_waits_behind_live_windows_and_before_replays():
    priorities = {}

    class Noting:
        gate = judge_of(well).gate

        async def judge(self, *_, priority, run, **__):
            priorities[run] = priority
            raise UnprocessableError("noted")

    stage = stage_of(Noting(), Known(replay("r1", plan()), replay("s1", SHADOW)))
    with pytest.raises(UnprocessableError, match="noted"):
        await stage.handle(unit_of("r1"))
    assert len(letters(await stage.handle(read("contexts", window(0))))) == 1
    assert priorities == {"r1": Priority.REPLAY, "s1": Priority.SHADOW}


async def test_the_servers_are_let_go_of_once_by_the_last_who_uses_them():
    closed = []
    judge = judge_of(well)

    async def close() -> None:
        closed.append(1)

    judge._endpoints.close = close
    live = AnalyzeStage(judge, lambda _: DEFAULT, deadline_s=30.0)
    stage = stage_of(judge.share(), Known())
    await live.close()
    assert closed == []
    await stage.close()
    assert closed == [1]


def test_it_may_append_to_replay_events_alone():
    assert ReplayStage.outputs == ("replay_events",)

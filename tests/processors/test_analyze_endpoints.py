"""Several servers, scripted: who gets the work, who is set aside, and whose fault it is."""

import asyncio
import itertools
import json

import pytest

from processors.analyze import endpoints
from processors.analyze.endpoints import Caller
from processors.analyze.fakes import FakeLlm
from processors.analyze.gate import Priority
from processors.analyze.judge import Judge
from schemas import prompts
from schemas.prompts import PromptVersion
from schemas.records import RiskEvent
from streams.errors import UnavailableError, UnprocessableError
from tests.processors.analyze_samples import answer, context, hang, seen
from tests.processors.test_analyze_judge import Script, died, settings, until_done

DEFAULT = prompts.default()
AWAY = UnavailableError("llm", "connection refused")


def windows(count: int):
    return [context((seen("person"),) * n, camera="item") for n in range(1, count + 1)]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Site:
    """A judge and its servers `a`, `b`, ..., each with a script."""

    def __init__(self, *scripts: Script, **changes) -> None:
        self.scripts = scripts
        self.llms = [FakeLlm(script, name=name) for script, name in zip(scripts, "abc", strict=False)]
        self.clock = Clock()
        self.judge = Judge(self.llms, settings(**changes), wall=lambda: 42, clock=self.clock)
        self.held: asyncio.Task[RiskEvent] | None = None

    async def judged(self, item, prompt=DEFAULT) -> RiskEvent:
        return await self.judge.judge(item, prompt, key=item.batch_id)

    def counts(self, what="item") -> list[int]:
        return [script.asked.count(what) for script in self.scripts]


async def slow(_):
    await asyncio.sleep(0.005)
    return answer()


async def test_work_is_shared_and_each_event_names_who_judged_it():
    site = Site(Script(item=[slow]), Script(item=[slow]), deadline_s=5)
    events = await asyncio.gather(*map(site.judged, windows(8)))
    assert site.counts() == [4, 4]
    assert sorted(event.conditions["endpoint"] for event in events) == ["a"] * 4 + ["b"] * 4


async def test_a_server_with_more_slots_gets_more_and_the_setting_bounds_each():
    site = Site(Script(item=[slow]), Script(item=[slow]), slots=None, deadline_s=5)
    site.llms[0].slots, site.llms[1].slots = 6, 2
    await asyncio.gather(*map(site.judged, windows(8)))
    assert [llm.most_running for llm in site.llms] == [6, 2]
    assert site.judge.gate.slots == 8
    bounded = Site(Script(item=[slow]), slots=3, deadline_s=5)
    bounded.llms[0].slots = 8
    await asyncio.gather(*map(bounded.judged, windows(8)))
    assert bounded.llms[0].most_running == 3


async def test_with_one_away_the_others_do_the_work_and_it_is_asked_again_ever_less_often_until_it_is_back():
    away, fine = Script(item=[AWAY]), Script()
    site = Site(away, fine)
    for _ in range(4):
        assert (await site.judged(*windows(1))).conditions["endpoint"] == "b"
    assert site.counts() == [1, 4]
    away.said["item"] = [answer()]
    asked = []

    async def server(ask=site.llms[0].server):
        asked.append(site.clock.now)
        if site.clock.now < 10:
            raise AWAY
        return await ask()

    site.llms[0].server = server
    while site.counts()[0] < 2:
        site.clock.now += 0.5
        await site.judged(*windows(1))
        await asyncio.sleep(0)
    pauses = [after - before for before, after in itertools.pairwise(asked)]
    assert asked[0] == 1.0
    assert pauses[:3] == [2.0, 4.0, 8.0]


async def test_only_when_all_are_away_is_it_unavailable_and_it_names_them():
    site = Site(Script(item=[AWAY]), Script(item=[AWAY]))
    with pytest.raises(UnavailableError, match="connection refused") as caught:
        await site.judged(*windows(1))
    assert caught.value.waiting_on == "llm"
    assert site.counts() == [1, 1]
    for script in site.scripts:
        script.said["item"] = [answer()]
    assert (await site.judged(*windows(1))).risk_score == 71, "all are asked at once, whatever their time"


async def test_a_window_waits_for_no_answer_of_one_that_hangs_while_another_is_there():
    site = Site(Script(), Script(), deadline_s=60)
    site.llms[0].server = hang
    event = await asyncio.wait_for(site.judged(*windows(1)), 5)
    assert event.conditions["endpoint"] == "b"
    await site.judge.close()


async def test_the_canary_runs_where_the_attempt_failed():
    site = Site(Script(item=[died()]), Script())
    [item] = windows(1)
    event = await site.judged(item)
    assert [script.asked for script in site.scripts] == [["item", "canary"], ["item"]]
    assert event.conditions["endpoint"] == "b", "it is tried again elsewhere: twice on one proves less"


async def test_a_sick_server_is_set_aside_and_not_the_item():
    sick = Script(item=["gibberish"], canary=["gibberish"])
    site = Site(sick, Script())
    events = [await site.judged(item) for item in windows(6)]
    assert {event.conditions["endpoint"] for event in events} == {"b"}
    assert sick.asked == ["item", "item", "canary", "canary"], "an answer and its repair, once"
    sick.said = {"item": [answer()], "canary": [answer()]}
    site.clock.now = 1.0
    while site.counts()[0] == 2:
        await site.judged(*windows(1))
        await asyncio.sleep(0)
    assert sick.asked.count("canary") == 3, "it came back by a good canary"


async def test_a_server_that_fails_one_prompt_only_is_set_aside_for_that_one():
    mine = PromptVersion(
        template=json.dumps({"system": "mine", "user": "camera: {{ camera }}\ntime: 11:00 day", "repair": "r"}),
        output_schema=DEFAULT.output_schema,
        parameters="{}",
    )

    async def dislikes(messages):
        return "gibberish" if messages[0].content == "mine" else answer()

    site = Site(Script(item=[dislikes], canary=[dislikes]), Script())
    assert (await site.judged(*windows(1), mine)).conditions["endpoint"] == "b"
    assert (await site.judged(*windows(1))).conditions["endpoint"] == "a"


async def test_an_item_that_kills_every_server_it_meets_is_found():
    up = {0: True, 1: True, 2: True}

    def server(index):
        async def kill(_):
            up[index] = False
            raise died()

        async def canary(_):
            was, up[index] = up[index], True  # the supervisor has it back for the next call
            if not was:
                raise UnavailableError("llm", "connection refused")
            return answer()

        return Script(item=[kill], canary=[canary])

    site = Site(server(0), server(1), server(2))
    with pytest.raises(UnprocessableError, match="died") as caught:
        await until_done(site.judge)
    assert sum(site.counts()) <= 4, "what it failed in is not forgotten while a server is restarted"
    assert {attempt["endpoint"] for attempt in json.loads(caught.value.detail)["attempts"]} == {"a", "b", "c"}


async def test_an_item_that_killed_a_server_for_good_is_found_on_the_other():
    async def gone():
        raise AWAY

    async def kill(_):
        site.llms[0].server = gone
        raise died()

    site = Site(Script(item=[kill]), Script(item=[died()]))
    with pytest.raises(UnprocessableError, match="died") as caught:
        await until_done(site.judge)
    assert [attempt["endpoint"] for attempt in json.loads(caught.value.detail)["attempts"]] == ["b"] * 3
    assert site.counts() == [1, 3]


async def test_an_item_whose_last_server_is_away_asks_whether_another_is_back():
    async def gone():
        raise AWAY

    async def kill(_):
        site.llms[0].server = gone
        raise died()

    site = Site(Script(item=[kill]), Script())
    back, site.llms[1].server = site.llms[1].server, gone
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await site.judged(*windows(1))
    site.llms[1].server = back
    assert (await site.judged(*windows(1))).conditions["endpoint"] == "b"


async def test_a_prompt_that_no_server_judges_has_its_canary_judged_ever_less_often():
    script = Script(item=["gibberish"], canary=["gibberish"])
    site = Site(script)
    began = []
    for _ in range(80):
        before = site.counts("canary")
        for item in windows(3):
            with pytest.raises(UnavailableError, match="does not judge the canary"):
                await site.judged(item)
        if site.counts("canary") != before:
            began.append(site.clock.now)
        site.clock.now += 1
    assert began == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 61.0]
    assert site.counts("canary") == [2 * len(began)], "an answer and its repair"


async def test_a_prompt_that_fails_on_a_server_delays_it_for_no_other_prompt():
    mine = PromptVersion(
        template=json.dumps({"system": "mine", "user": "camera: {{ camera }}\ntime: 11:00 day", "repair": "r"}),
        output_schema=DEFAULT.output_schema,
        parameters="{}",
    )

    async def dislikes(messages):
        return "gibberish" if messages[0].content == "mine" else answer()

    site = Site(Script(item=[dislikes], canary=[dislikes]))
    for _ in range(6):
        with pytest.raises(UnavailableError):
            await site.judged(*windows(1), mine)
        site.clock.now += 30
    [endpoint] = site.judge._endpoints.all
    assert endpoint.due(DEFAULT, site.clock.now - 30)
    assert not endpoint.due(mine, site.clock.now - 30)
    assert endpoint.pause.failures == 0


def test_an_outage_of_thousands_of_failures_has_its_longest_pause_and_no_longer():
    pause, pauses = endpoints.Pause(), []
    for _ in range(2000):
        now = pause.until
        pause.longer(now)
        pauses.append(pause.until - now)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0] + [30.0] * 1995


async def test_one_outage_is_one_failure_however_many_requests_it_ended():
    fall = asyncio.Event()

    async def refuse(_):
        await fall.wait()
        raise AWAY

    site = Site(Script(item=[refuse]), slots=4, deadline_s=60)
    calls = asyncio.gather(*map(site.judged, windows(4)), return_exceptions=True)
    while site.llms[0].running < 4:
        await asyncio.sleep(0)
    fall.set()
    assert all(isinstance(error, UnavailableError) for error in await calls)
    [endpoint] = site.judge._endpoints.all
    assert endpoint.pause.failures == 1
    assert endpoint.pause.until == 1.0


async def test_a_server_that_says_who_it_is_and_refuses_work_comes_back_by_a_canary():
    refusing = Script(item=[AWAY], canary=[AWAY])
    site = Site(refusing, Script())
    for _ in range(60):
        assert (await site.judged(*windows(1))).conditions["endpoint"] == "b"
        for _ in range(10):
            await asyncio.sleep(0)
        site.clock.now += 1
    assert site.counts() == [1, 60], "it has no window before it judged a canary"
    assert site.counts("canary")[0] <= 6, "ever less often"
    refusing.said = {"canary": [answer()], "item": [answer()]}
    site.clock.now += 30
    while site.counts()[0] == 1:
        await site.judged(*windows(1))
        await asyncio.sleep(0)


async def test_an_item_that_hangs_one_of_two_servers_for_ever_is_judged_by_the_other():
    site = Site(Script(item=[hang], canary=[hang]), Script())
    event = await until_done(site.judge)
    assert event.conditions["endpoint"] == "b"


async def test_an_item_tried_again_has_one_server_to_itself_while_the_other_works_on():
    release = asyncio.Event()
    beside: list[int] = []

    async def alone(_):
        beside.append(site.llms[1].running - 1)
        return answer()

    async def long(_):
        await release.wait()
        return answer()

    site = Site(Script(item=[died()]), Script(other=[long], item=[alone]), deadline_s=60)
    item = asyncio.create_task(site.judged(*windows(1)))
    other = asyncio.create_task(site.judged(context((seen("dog"),), camera="other")))
    third = await asyncio.wait_for(site.judged(context((seen("cat"),), camera="third")), 5)
    while site.counts("canary") != [1, 0]:
        await asyncio.sleep(0)
    fourth = await asyncio.wait_for(site.judged(context((seen("cat"),), camera="fourth")), 5)
    assert not item.done()
    release.set()
    assert [(await task).conditions["endpoint"] for task in (item, other)] == ["b", "b"]
    assert third.risk_score == fourth.risk_score == 71
    assert fourth.conditions["endpoint"] == "a"
    assert beside == [0]


async def test_live_work_cancels_a_replay_call_which_is_judged_later_and_blamed_for_nothing():
    flying = asyncio.Event()

    async def fly(_):
        flying.set()
        await hang()

    script = Script(other=[fly, answer(40)])
    site = Site(script, slots=1, deadline_s=60)
    other = context((seen("dog"),), camera="other")
    replay = asyncio.create_task(
        site.judge.judge(other, DEFAULT, key="other", run="replay-1", priority=Priority.REPLAY)
    )
    await flying.wait()
    assert (await asyncio.wait_for(site.judged(*windows(1)), 5)).run == "live"
    assert (await asyncio.wait_for(replay, 5)).risk_score == 40
    assert script.asked == ["other", "item", "other"]


MINE = PromptVersion(
    template=json.dumps(
        {"system": "mine", "user": "camera: {{ camera }}\ntime: {{ time }} {{ day_or_night }}", "repair": "r"}
    ),
    output_schema=DEFAULT.output_schema,
    parameters="{}",
)


@pytest.mark.parametrize("live_alone", [False, True])
async def test_a_replays_canary_gives_way_to_a_live_window_as_its_windows_do(live_alone):
    flying = asyncio.Event()

    async def fly(_):
        flying.set()
        await hang()

    script = Script(other=[died(), answer(40)], canary=[fly, answer()])
    site = Site(script, slots=1, deadline_s=60, live_alone=live_alone)
    other = context((seen("dog"),), camera="other")
    replay = asyncio.create_task(
        site.judge.judge(other, DEFAULT, key="other", run="replay-1", priority=Priority.REPLAY)
    )
    await flying.wait()
    assert (await asyncio.wait_for(site.judged(*windows(1)), 5)).run == "live"
    assert (await asyncio.wait_for(replay, 5)).risk_score == 40
    assert script.asked == ["other", "canary", "item", "canary", "other"]


async def test_a_live_windows_canary_is_at_nobodys_expense_but_replays():
    flying, release = asyncio.Event(), asyncio.Event()

    async def fly(_):
        flying.set()
        await release.wait()
        return answer()

    script = Script(item=[died(), answer()], canary=[fly])
    site = Site(script, slots=1, deadline_s=60)
    live = asyncio.create_task(site.judged(*windows(1)))
    await flying.wait()
    other = asyncio.create_task(site.judged(context((seen("dog"),), camera="other")))
    await asyncio.sleep(0)
    release.set()
    await asyncio.wait_for(asyncio.gather(live, other), 5)
    assert script.asked.count("canary") == 1, "it is live work, which none displaces"


async def busy(site: Site) -> asyncio.Event:
    """Have a live window hold the only slot, until the event is set."""
    release = asyncio.Event()

    async def held(_):
        await release.wait()
        return answer()

    site.scripts[0].said["held"] = [held]
    site.held = asyncio.create_task(site.judged(context((seen("cat"),), camera="held")))
    while not site.counts("held")[0]:
        await asyncio.sleep(0)
    return release


@pytest.mark.parametrize("prompt", [DEFAULT, MINE], ids=["its own", "another's, which is judged after it"])
async def test_a_replays_canary_that_live_work_waits_for_is_live_work(prompt):
    site = Site(Script(), slots=1, deadline_s=60)
    release = await busy(site)
    [endpoint] = site.judge._endpoints.all
    prove = site.judge._endpoints.prove
    replay = asyncio.create_task(prove(endpoint, DEFAULT, site.judge._endpoints.tick(), Caller(Priority.REPLAY)))
    await asyncio.sleep(0)
    shadow = site.judge.judge(context((seen("dog"),), camera="shadow"), DEFAULT, key="s", priority=Priority.SHADOW)
    shadow = asyncio.create_task(shadow)
    live = asyncio.create_task(prove(endpoint, prompt, 0))
    for _ in range(10):
        await asyncio.sleep(0)
    release.set()
    await asyncio.wait_for(asyncio.gather(replay, live, shadow, site.held), 5)
    # Another prompt's canary stands in no queue yet when the slot is free again.
    assert site.scripts[0].asked == ["held", "canary", "shadow", *["canary"][: prompt is MINE]]
    assert not endpoint.waits


async def test_a_live_window_that_waits_for_what_a_replay_is_finding_out_does_so_as_live_work():
    site = Site(Script(), slots=1, deadline_s=60)
    release = await busy(site)
    [endpoint] = site.judge._endpoints.all
    endpoint.doubt = "refused work"
    replay = asyncio.create_task(
        site.judge.judge(context((seen("dog"),), camera="r"), MINE, key="r", priority=Priority.REPLAY)
    )
    shadow = asyncio.create_task(site.judge.gate.run(noted(site), among="a", priority=Priority.SHADOW))
    for _ in range(10):
        await asyncio.sleep(0)
    live = asyncio.create_task(site.judged(*windows(1), MINE))
    for _ in range(10):
        await asyncio.sleep(0)
    release.set()
    await asyncio.wait_for(asyncio.gather(replay, live, shadow, site.held), 5)
    assert site.scripts[0].asked == ["held", "canary", "shadow", "item", "r"], "the canary was before the shadow"
    assert not endpoint.waits


def noted(site: Site):
    async def work(_) -> None:
        site.scripts[0].asked.append("shadow")

    return work


async def test_a_canary_that_gets_no_slot_says_that_live_windows_come_first_and_blames_nobody():
    site = Site(Script(), slots=1, deadline_s=60)
    release = await busy(site)
    [endpoint] = site.judge._endpoints.all
    impatient = Caller(Priority.REPLAY, 0.01)
    with pytest.raises(UnavailableError, match="windows that come first have every slot") as caught:
        await site.judge._endpoints.prove(endpoint, DEFAULT, 0, impatient)
    assert caught.value.waiting_on == "live"
    endpoint.doubt = "refused work"
    with pytest.raises(UnavailableError) as caught:
        await site.judge._endpoints.find(DEFAULT, impatient)
    assert caught.value.waiting_on == "live"
    assert not endpoint.pauses
    assert not endpoint.canaries
    assert endpoint.away is None
    release.set()
    await asyncio.wait_for(site.held, 5)
    assert await site.judge._endpoints.find(DEFAULT, impatient) == [endpoint]


async def test_closing_ends_what_is_being_asked():
    site = Site(Script(), Script())
    site.llms[0].server = hang
    await site.judged(*windows(1))
    await asyncio.wait_for(site.judge.close(), 5)
    assert endpoints.Endpoints([], lambda told: told, hang, site.clock).all == []

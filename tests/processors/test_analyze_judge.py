"""Judging with a scripted LLM: slots, repair, deadlines, and whose fault it is."""

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from unittest.mock import AsyncMock

import httpx
import pytest

from processors.analyze.fakes import FakeLlm
from processors.analyze.judge import CANARY, Judge
from processors.analyze.port import AttemptError, Completion
from processors.analyze.settings import LlmSettings
from processors.analyze.stage import build
from schemas import prompts
from schemas.prompts import Message, PromptVersion
from schemas.records import RiskEvent
from streams import codec
from streams.errors import UnavailableError, UnprocessableError
from streams.messages import Incoming
from tests.processors.analyze_samples import answer, context, hang, section, seen

DEFAULT = prompts.default()
CANARY_TIME = "time: 11:00 day"
ITEM = context((seen("person"),), camera="item")
OTHER = context((seen("dog"),), camera="other")


def settings(**changes) -> LlmSettings:
    return LlmSettings(**({"deadline_s": 0.05, "slots": 2} | changes))


def about(messages: Sequence[Message]) -> str:
    """Which window this chat is about: its camera's name, or the canary."""
    text = messages[1].content
    return "canary" if CANARY_TIME in text else text.splitlines()[0].removeprefix("camera: ")


class Script:
    """What to say about each window: one thing a call, the last one for ever. An exception is raised."""

    def __init__(self, **said):
        self.said = {about: list(steps) for about, steps in ({"canary": [answer()]} | said).items()}
        self.asked: list[str] = []

    async def __call__(self, messages):
        what = about(messages)
        self.asked.append(what)
        steps = self.said.get(what, [answer()])
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        if isinstance(step, Exception):
            raise step
        if callable(step):
            return await step(messages)
        return step


HOUR_S = 3600
"""Between two looks at the clock: each pause is over."""


def judge_with(llm, tick_s=0.001, **changes) -> Judge:
    ticks = itertools.count()
    return Judge([llm], settings(**changes), wall=lambda: 42, clock=lambda: next(ticks) * tick_s)


def died():
    return AttemptError("died", "the connection broke")


def broken(status=500):
    return AttemptError("error" if status >= 500 else "refused", f"HTTP {status}", "raw words")


async def until_done(judge: Judge, item=ITEM, prompt=DEFAULT, tries=20) -> RiskEvent:
    """As a host does it: again and again while something is away."""
    for _ in range(tries):
        try:
            return await judge.judge(item, prompt, key=item.batch_id)
        except UnavailableError:
            continue
    raise AssertionError("it waits still")


async def test_a_good_answer_is_an_event_with_its_lineage():
    script = Script(item=[answer()])
    llm = FakeLlm(script)
    event = await judge_with(llm).judge(ITEM, DEFAULT, key="k", run="replay-1")
    assert event.event_id == f"{ITEM.batch_id}:replay-1"
    assert (event.risk_score, event.risk_level, event.judged_at) == (71, "high", 42)
    assert (event.model, event.model_digest) == ("fake", "f" * 64)
    assert event.queued_ms > 0
    assert event.conditions == {
        "endpoint": "fake",
        "slots": "2",
        "context_size": "4096",
        "prompt_cache": "on",
        "seed": "0",
        "server_build": "fake-1",
    }
    assert json.loads(event.parameters) == {
        "seed": 0,
        "max_tokens": 400,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert json.loads(event.rendered_prompt) == [m._asdict() for m in llm.asked[0]]
    assert script.asked == ["item"], "nobody needs a canary while all is well"


async def test_an_unusable_answer_is_sent_back_once_with_what_is_wrong():
    llm = FakeLlm(Script(item=[answer(101), answer(60)]))
    event = await judge_with(llm).judge(ITEM, DEFAULT, key="k")
    assert event.repaired
    assert event.risk_score == 60
    assert event.raw_completion == answer(60)
    assert event.inference_ms == 2.0
    roles = [message.role for message in llm.asked[1]]
    assert roles == ["system", "user", "assistant", "user"]
    assert llm.asked[1][2].content == answer(101)
    assert "101 is greater than the maximum" in llm.asked[1][3].content


async def test_twice_unusable_is_a_dead_letter_with_the_raw_text_and_never_a_score():
    script = Script(item=["gibberish one", "gibberish two"])
    with pytest.raises(UnprocessableError, match=r"unusable: it holds no JSON object") as caught:
        await judge_with(FakeLlm(script)).judge(ITEM, DEFAULT, key="k")
    assert script.asked == ["item", "item", "canary"]
    detail = json.loads(caught.value.detail)
    assert caught.value.camera_id == "item"
    assert detail["batch_id"] == ITEM.batch_id
    assert detail["attempts"][0]["raw"] == "gibberish one\ngibberish two"
    assert "camera: item" in detail["rendered_prompt"]


async def test_cut_off_twice_is_a_dead_letter():
    cut = Completion(
        answer()[:50], cut_off=True, prompt_tokens=1, completion_tokens=400, cached_tokens=0, inference_ms=1
    )
    with pytest.raises(UnprocessableError, match="cut off after 50 characters"):
        await judge_with(FakeLlm(Script(item=[cut]))).judge(ITEM, DEFAULT, key="k")


async def test_garbage_for_everyone_blames_nobody():
    script = Script(item=["gibberish"], canary=["gibberish"])
    judge = judge_with(FakeLlm(script), HOUR_S)
    for _ in range(5):
        with pytest.raises(UnavailableError, match="does not judge the canary"):
            await judge.judge(ITEM, DEFAULT, key="k")
    assert script.asked.count("item") == 2, "while the canary fails, the item itself is left alone"
    script.said["canary"] = [answer()]
    with pytest.raises(UnprocessableError, match="unusable"):
        await judge.judge(ITEM, DEFAULT, key="k")
    assert script.asked.count("item") == 2, "the earlier attempt counts, now that the canary is good"


@pytest.mark.parametrize("failure", [broken(), died(), hang, AttemptError("garbage", "not a chat completion")])
async def test_three_failures_beside_good_canaries_are_a_dead_letter(failure):
    script = Script(item=[failure])
    with pytest.raises(UnprocessableError) as caught:
        await judge_with(FakeLlm(script)).judge(ITEM, DEFAULT, key="k")
    assert script.asked == ["item", "canary"] * 3
    assert len(json.loads(caught.value.detail)["attempts"]) == 3


async def test_a_hang_says_which_deadline_it_missed():
    with pytest.raises(UnprocessableError, match=r"hung: no answer within 0\.045 s \(llm\.deadline_s"):
        await judge_with(FakeLlm(Script(item=[hang]))).judge(ITEM, DEFAULT, key="k")


async def test_the_deadline_covers_every_attempt_of_a_window_that_hangs():
    judge = Judge([FakeLlm(Script(item=[hang]))], settings(deadline_s=2.0))
    began = time.monotonic()
    with pytest.raises(UnprocessableError) as caught:
        await judge.judge(ITEM, DEFAULT, key="k")
    took = time.monotonic() - began
    limits = [failure["message"].split()[3] for failure in json.loads(caught.value.detail)["attempts"]]
    assert limits == ["1.8", "0.2", "0.2"]
    assert took < 2.2 + 0.5


async def test_on_a_slow_server_a_window_that_hung_by_chance_has_the_time_that_it_needs():
    async def slow(_):
        await asyncio.sleep(0.1)
        return answer()

    async def slower(_):
        await asyncio.sleep(0.3)
        return answer()

    script = Script(item=[hang, slower], canary=[slow])
    assert (await Judge([FakeLlm(script)], settings(deadline_s=1.0)).judge(ITEM, DEFAULT, key="k")).risk_score == 71


async def test_a_prompt_promoted_after_a_window_hung_judges_it():
    script = Script(item=[hang, UnavailableError("llm", "connection refused"), answer()])
    judge = judge_with(FakeLlm(script))
    with pytest.raises(UnavailableError):
        await judge.judge(ITEM, DEFAULT, key="k")
    promoted = PromptVersion(
        template=DEFAULT.template, output_schema=DEFAULT.output_schema, parameters=f"{DEFAULT.parameters} "
    )
    assert promoted.digest != DEFAULT.digest
    assert (await judge.judge(ITEM, promoted, key="k")).risk_score == 71


async def test_a_refused_request_is_not_repeated():
    script = Script(item=[broken(400)])
    with pytest.raises(UnprocessableError, match="refused: HTTP 400"):
        await judge_with(FakeLlm(script)).judge(ITEM, DEFAULT, key="k")
    assert script.asked == ["item", "canary"]


async def test_two_failures_and_an_answer_are_an_event():
    script = Script(item=[broken(), died(), answer()])
    assert (await judge_with(FakeLlm(script)).judge(ITEM, DEFAULT, key="k")).risk_score == 71


async def test_a_server_that_hangs_for_everyone_is_waited_for_without_limit():
    script = Script(item=[hang], canary=[hang])
    judge = judge_with(FakeLlm(script), HOUR_S, deadline_s=0.01)
    for _ in range(6):
        with pytest.raises(UnavailableError) as caught:
            await judge.judge(ITEM, DEFAULT, key="k")
        assert caught.value.waiting_on == "llm"
    script.said = {"canary": [answer()], "item": [answer()]}
    assert (await judge.judge(ITEM, DEFAULT, key="k")).risk_score == 71


async def test_a_server_that_is_away_is_no_attempt():
    away = UnavailableError("llm", "connection refused")
    script = Script(item=[away] * 10 + [answer()])
    judge = judge_with(FakeLlm(script))
    for _ in range(10):
        with pytest.raises(UnavailableError):
            await judge.judge(ITEM, DEFAULT, key="k")
    assert (await judge.judge(ITEM, DEFAULT, key="k")).risk_score == 71


async def test_what_failed_under_a_version_that_judges_nothing_is_not_held_against_the_window_under_another():
    async def version(messages):
        return "gibberish" if messages[0].content == "broken" else answer()

    template = json.dumps({"system": "broken", "user": "camera: {{ camera }}\ntime: 11:00 day", "repair": "r"})
    broken_version = PromptVersion(template=template, output_schema=DEFAULT.output_schema, parameters="{}")
    judge = judge_with(FakeLlm(version))
    with pytest.raises(UnavailableError, match="does not judge the canary"):
        await judge.judge(ITEM, broken_version, key="k")
    assert (await judge.judge(ITEM, DEFAULT, key="k")).risk_score == 71


@pytest.mark.parametrize("mistake", [OverflowError("too large"), RecursionError(), httpx.StreamClosed()])
async def test_what_nobody_foresaw_is_the_windows_fault_only_beside_a_good_canary(mistake):
    with pytest.raises(UnprocessableError, match=type(mistake).__name__):
        await judge_with(FakeLlm(Script(item=[mistake]))).judge(ITEM, DEFAULT, key="k")
    script = Script(item=[mistake], canary=[mistake])
    judge = judge_with(FakeLlm(script), HOUR_S)
    for _ in range(5):
        with pytest.raises(UnavailableError, match=type(mistake).__name__):
            await judge.judge(ITEM, DEFAULT, key="k")
    script.said = {"canary": [answer()], "item": [answer()]}
    assert (await judge.judge(ITEM, DEFAULT, key="k")).risk_score == 71


async def test_a_server_that_is_away_while_tokens_are_counted_is_waited_for():
    item = context((seen("person"),), camera="item", sections=BULK)
    llm = FakeLlm(Script(), context_size=400 + 200, tokens_per_byte=0.1)
    count, llm.count_tokens = llm.count_tokens, AsyncMock(side_effect=UnavailableError("llm", "connection refused"))
    judge = judge_with(llm)
    with pytest.raises(UnavailableError, match="connection refused"):
        await judge.judge(item, DEFAULT, key="k")
    llm.count_tokens = count
    event = await until_done(judge, item)
    assert (event.risk_score, len(event.dropped_sections)) == (71, 1)


async def test_an_item_that_kills_the_server_is_found_although_the_server_needs_time_to_come_back():
    up = True

    async def kill(_):
        nonlocal up
        up = False
        raise died()

    async def canary(_):
        nonlocal up
        was, up = up, True  # the supervisor has it back for the next call
        if not was:
            raise UnavailableError("llm", "connection refused")
        return answer()

    script = Script(item=[kill], canary=[canary])
    with pytest.raises(UnprocessableError, match="died"):
        await until_done(judge_with(FakeLlm(script)))
    assert script.asked.count("item") == 3


async def test_who_was_in_flight_with_a_killer_is_tried_again_alone_and_lives():
    flying = asyncio.Event()
    release = asyncio.Event()
    beside: list[int] = []

    async def kill(_):
        if not release.is_set():
            flying.set()
            await release.wait()
        else:
            beside.append(llm.running - 1)
        raise died()

    async def innocent(_):
        if not release.is_set():
            await flying.wait()
            release.set()
            raise died()
        beside.append(llm.running - 1)
        return answer()

    llm = FakeLlm(Script(item=[kill], other=[innocent]))
    judge = judge_with(llm, deadline_s=5)
    killed, judged = await asyncio.gather(until_done(judge, ITEM), until_done(judge, OTHER), return_exceptions=True)
    assert isinstance(killed, UnprocessableError)
    assert isinstance(judged, RiskEvent)
    assert beside == [0, 0, 0]


async def test_waiters_share_one_canary():
    script = Script(item=[hang], canary=[hang])
    judge = judge_with(FakeLlm(script), slots=4, deadline_s=0.05)
    items = [context((seen("person"),) * n, camera="item") for n in range(1, 5)]
    await asyncio.gather(*(judge.judge(i, DEFAULT, key=i.batch_id) for i in items), return_exceptions=True)
    assert script.asked.count("item") == 4
    # One that began after the last of them failed speaks for all; the first to fail may have begun one already.
    assert script.asked.count("canary") <= 2


async def test_a_good_canary_speaks_for_all_who_failed_before_it():
    async def fall(_):
        await asyncio.sleep(0)
        raise died()

    script = Script(item=[fall, answer()], other=[fall, answer()], canary=["gibberish"])
    judge = judge_with(FakeLlm(script), HOUR_S)
    calls = (judge.judge(item, DEFAULT, key=item.batch_id) for item in (ITEM, OTHER))
    for failed in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(failed, UnavailableError)
    script.asked.clear()
    script.said["canary"] = [answer()]
    for item in (ITEM, OTHER):
        await judge.judge(item, DEFAULT, key=item.batch_id)
    assert script.asked == ["canary", "item", "other"]


async def test_while_the_canary_fails_no_other_item_is_tried():
    script = Script(item=[died()], canary=["gibberish"])
    judge = judge_with(FakeLlm(script))
    for item in (ITEM, OTHER):
        with pytest.raises(UnavailableError):
            await judge.judge(item, DEFAULT, key=item.batch_id)
    assert "other" not in script.asked


async def test_the_canary_is_judged_with_the_same_prompt_schema_and_limits():
    template = json.dumps(
        {"system": "mine", "user": "camera: {{ camera }}\ntime: {{ time }} {{ day_or_night }}", "repair": "r"}
    )
    mine = PromptVersion(template=template, output_schema=DEFAULT.output_schema, parameters='{"temperature": 0.5}')
    llm = FakeLlm(Script(item=[broken(400)]))
    with pytest.raises(UnprocessableError):
        await judge_with(llm).judge(ITEM, mine, key="k")
    assert [messages[0].content for messages in llm.asked] == ["mine", "mine"]
    assert llm.parameters[0] == llm.parameters[1]
    assert llm.parameters[0]["temperature"] == 0.5


async def test_a_prompt_that_fails_for_the_canary_too_does_not_hold_up_others():
    template = json.dumps({"system": "s", "user": "{{ nowhere }}", "repair": "r"})
    bad = PromptVersion(template=template, output_schema=DEFAULT.output_schema, parameters="{}", name="bad")
    judge = judge_with(FakeLlm(Script()))
    with pytest.raises(UnavailableError, match="'nowhere' is undefined"):
        await judge.judge(ITEM, bad, key="k")
    assert (await judge.judge(OTHER, DEFAULT, key="l")).risk_score == 71


async def test_the_deadline_begins_with_the_slot_not_with_the_wait_for_it():
    async def slow(_):
        await asyncio.sleep(0.06)
        return answer()

    judge = judge_with(FakeLlm(Script(item=[slow])), slots=1, deadline_s=0.1)
    items = [context((seen("person"),) * n, camera="item") for n in range(1, 5)]
    events = await asyncio.gather(*(judge.judge(i, DEFAULT, key=i.batch_id) for i in items))
    assert len(events) == 4


async def test_no_more_requests_than_slots():
    async def slow(_):
        await asyncio.sleep(0.001)
        return answer()

    llm = FakeLlm(Script(item=[slow]))
    judge = judge_with(llm, slots=3, deadline_s=5)
    items = [context((seen("person"),) * n, camera="item") for n in range(1, 12)]
    await asyncio.gather(*(judge.judge(i, DEFAULT, key=i.batch_id) for i in items))
    assert llm.most_running == 3


async def test_cancelling_frees_the_slot_and_holds_nothing_against_the_item():
    flying = asyncio.Event()

    async def fly(_):
        flying.set()
        await hang()

    judge = judge_with(FakeLlm(Script(item=[fly, answer()])), slots=1, deadline_s=60)
    task = asyncio.create_task(judge.judge(ITEM, DEFAULT, key="k"))
    await flying.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await judge.judge(ITEM, DEFAULT, key="k")).risk_score == 71


BULK = (section("captions", "c" * 600), section("memory", "m" * 600), section("zones", "z" * 600))


async def test_sections_are_dropped_until_the_prompt_fits_beside_the_answer():
    item = context((seen("person"),), camera="item", sections=BULK)
    # A token a byte. The default prompt has 139 + 90 bytes; each section 600 and its name.
    llm = FakeLlm(Script(), context_size=400 + 1200)
    event = await judge_with(llm).judge(item, DEFAULT, key="k")
    assert event.dropped_sections == ("memory", "captions")
    assert 'zones: "z' in llm.asked[0][1].content
    assert "memory" not in llm.asked[0][1].content


async def test_the_servers_own_count_keeps_sections_that_the_bound_would_drop():
    item = context((seen("person"),), camera="item", sections=BULK)
    llm = FakeLlm(Script(), context_size=400 + 1200, tokens_per_byte=0.25)
    assert (await judge_with(llm).judge(item, DEFAULT, key="k")).dropped_sections == ()


async def test_a_context_too_small_for_any_prompt_is_waited_on_and_says_so():
    judge = judge_with(FakeLlm(Script(), context_size=500))
    with pytest.raises(UnavailableError, match=r"raise llm\.context_size"):
        await judge.judge(ITEM, DEFAULT, key="k")


async def test_a_repair_sends_back_what_there_is_room_for():
    llm = FakeLlm(Script(item=["x" * 3000, answer()]), context_size=400 + 1000)
    assert (await judge_with(llm).judge(ITEM, DEFAULT, key="k")).repaired
    assert 0 < len(llm.asked[1][2].content) < 1000


async def test_a_time_zone_that_is_none_is_the_items_own_fault():
    with pytest.raises(UnprocessableError, match="Atlantis"):
        await judge_with(FakeLlm(Script())).judge(context(zone="Atlantis/Capital"), DEFAULT, key="k")


async def test_dead_letters_keep_raw_text_within_what_a_record_holds():
    script = Script(item=[AttemptError("garbage", "not a completion", "g" * 1_000_000)])
    with pytest.raises(UnprocessableError) as caught:
        await judge_with(FakeLlm(script)).judge(ITEM, DEFAULT, key="k")
    assert len(caught.value.detail) < 200_000


def incoming(value: bytes) -> Incoming:
    return Incoming("contexts", "e", 0, 5, b"item", value, ())


async def test_the_stage_judges_with_the_cameras_prompt():
    template = json.dumps({"system": "mine", "user": "camera: {{ camera }}", "repair": "r"})
    mine = PromptVersion(template=template, output_schema=DEFAULT.output_schema, parameters="{}")
    llm = FakeLlm(Script())
    stage = build(settings(slots=3), llm=llm, prompt_of=lambda c: mine if c == "item" else DEFAULT, clock=lambda: 1.5)
    assert (stage.name, stage.inputs, stage.outputs, stage.concurrency) == (
        "analyze",
        ("contexts",),
        ("risk_events",),
        3,
    )
    (emit,) = await stage.handle(incoming(codec.encode("contexts", ITEM)[0]))
    event = codec.decode_bytes("risk_events", emit.value, None, RiskEvent)
    assert (emit.topic, emit.key) == ("risk_events", b"item")
    assert (event.prompt_digest, event.judged_at) == (mine.digest, 1500)
    assert event.event_id == f"{ITEM.batch_id}:live"
    await stage.close()


async def test_bytes_that_are_no_context_are_a_dead_letter():
    with pytest.raises(UnprocessableError, match="Confluent"):
        await build(settings(), llm=FakeLlm(Script())).handle(incoming(b"nonsense"))


def test_the_canary_is_news_at_noon():
    assert CANARY.batch.frames[0].boxes[0].label == "person"

"""analyze against llama.cpp's own server: a random model for what can go wrong, the demo analyst for what is right."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from infra import models
from infra.local.process import free_port
from infra.models import analyst_data
from processors.analyze import core
from processors.analyze import llm as llm_module
from processors.analyze.gate import Priority
from processors.analyze.judge import CANARY, Judge
from processors.analyze.llm import OpenAiLlm
from processors.analyze.port import AttemptError
from processors.analyze.settings import LlmSettings
from processors.analyze.weights import WeightsDigest
from schemas import prompts
from schemas.prompts import Message, sampling
from schemas.records import RiskEvent
from streams.errors import UnavailableError
from tests.infra.tiny_gguf import write_tiny_gguf
from tests.processors.analyze_samples import context, section, seen

pytestmark = pytest.mark.real

ANALYST = Path(models.__file__).parent / "weights" / "analyst.gguf"
SLOTS, CTX = 2, 4096
CHAT = (Message("system", "s"), Message("user", "u"))


@asynccontextmanager
async def served(model: Path, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A llama.cpp server of this model, answering; it is killed in the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "infra.local.llama", "--model", str(model), "--port", str(port)),
        *("--ctx", str(CTX), "--parallel", str(SLOTS), "--threads", "1"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"http://127.0.0.1:{port}/health", timeout=2)).is_success:
                        break
                assert process.returncode is None, "the server did not start"
                await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def settings(port: int, **changes) -> LlmSettings:
    return LlmSettings(**({"url": f"http://127.0.0.1:{port}", "slots": SLOTS, "deadline_s": 60.0} | changes))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


async def test_the_grammar_holds_a_random_model_to_the_schema_and_the_scores_range(tiny):
    port = free_port()
    default = prompts.default().schema["properties"]
    names = ("recommended_action", "risk_score")
    schema = {"type": "object", "properties": {name: default[name] for name in names}, "required": list(names)}
    async with served(tiny, port):
        llm = OpenAiLlm(settings(port), WeightsDigest(tiny))
        server = await llm.server()
        assert (server.model, server.slots, server.context_size) == ("tiny", SLOTS, CTX // SLOTS)
        assert server.model_digest == hashlib.sha256(tiny.read_bytes()).hexdigest()
        found = [
            json.loads((await llm.complete(CHAT, schema, {"temperature": 2, "seed": seed, "max_tokens": 200})).text)
            for seed in range(40)
        ]
        cut = await llm.complete(CHAT, schema, {"temperature": 0, "max_tokens": 5})
        await llm.close()
    assert all(list(verdict) == list(names) for verdict in found)
    scores = {verdict["risk_score"] for verdict in found}
    assert len(scores) > 5
    assert scores <= set(range(101))
    assert {verdict["recommended_action"] for verdict in found} <= {"none", "review", "notify", "call"}
    assert (cut.cut_off, cut.completion_tokens) == (True, 5)


async def test_what_the_servers_own_parser_trips_over_is_waited_out_where_the_canary_trips_too(tiny):
    """Random weights write bytes that are no UTF-8; the server then answers 500, or is cut off, for everyone."""
    port = free_port()
    async with served(tiny, port):
        chosen = settings(port)
        llm = OpenAiLlm(chosen, WeightsDigest(tiny))
        with pytest.raises(UnavailableError, match="does not judge the canary"):
            await Judge([llm], chosen).judge(context(), prompts.default(), key="k")
        await llm.close()


async def test_the_bound_on_tokens_holds_and_a_prompt_too_long_is_refused(tiny):
    port = free_port()
    async with served(tiny, port):
        llm = OpenAiLlm(settings(port))
        messages = next(core.renderings(context(sections=(section("captions", "Tür, 日本, 🚪"),)), prompts.default()))[
            0
        ]
        counted = await llm.count_tokens(messages, {})
        found = await llm.complete(messages, {"type": "object"}, {"max_tokens": 8, "temperature": 0})
        # Its tokens are bytes: the worst tokenizer there is.
        assert found.prompt_tokens == counted
        assert counted <= core.token_bound(messages)
        with pytest.raises(AttemptError, match="exceeds the available context size") as caught:
            await llm.complete((Message("user", "x" * CTX),), {"type": "object"}, {"max_tokens": 8})
        assert caught.value.kind == "refused"
        await llm.close()


def training_window(seed: int) -> analyst_data.Window:
    """A window that no training has seen, with something in it, of two frames at least."""
    for attempt in range(100):
        window = analyst_data.sample(10**9 + 1000 * seed + attempt, held_out=True).window
        if window.seen and window.frames > 1:
            return window
    raise AssertionError


def as_context(window: analyst_data.Window):
    """Boxes that say the same as the window's words."""
    first = min(window.seen, key=analyst_data.importance)
    (x, height) = {"stays": (102.0, 50.0), "passes": (300.0, 50.0), "approaches": (300.0, 90.0)}[window.moves]
    frames: list[tuple] = [()] * window.frames
    for index, (at, tall) in {0: (100.0, 50.0), window.frames - 1: (x, height)}.items():
        frames[index] = tuple(
            seen(label, score, x=at, height=tall if label == first else 50.0)
            for label, (count, score) in window.seen.items()
            for _ in range(count)
        )
    return context(
        *frames,
        camera=window.camera,
        started_at=1_790_294_400_000 + (window.hour * 60 + window.minute) * 60_000,
        seconds=window.duration_s,
        zone="UTC",
    )


async def test_the_demo_analyst_judges_windows_that_it_never_saw_and_the_lineage_is_whole():
    port = free_port()
    windows = [training_window(seed) for seed in range(24)]
    async with served(ANALYST, port):
        chosen = settings(port)
        llm = OpenAiLlm(chosen, WeightsDigest(ANALYST))
        judge = Judge([llm], chosen)
        events = await asyncio.gather(
            *(judge.judge(as_context(w), prompts.default(), key=str(i)) for i, w in enumerate(windows))
        )
        assert (await judge.judge(CANARY, prompts.default(), key="canary")).repaired is False
        await llm.close()
    right = [core.risk_level(int(str(analyst_data.verdict(w, analyst_data.Policy())["risk_score"]))) for w in windows]
    agreed = sum(event.risk_level == level for event, level in zip(events, right, strict=True))
    assert agreed >= 20, f"{agreed} of {len(windows)} levels right"
    event = events[0]
    assert event.model == "analyst"
    assert event.model_digest == hashlib.sha256(ANALYST.read_bytes()).hexdigest()
    assert event.prompt_tokens > 0 < event.completion_tokens
    assert event.inference_ms > 0
    assert max(event.cached_tokens for event in events) > 0, "the system message is the same for all"
    assert event.conditions["slots"] == "2"
    assert event.conditions["server_build"]
    assert event.rendered_prompt.count("camera: ") == 1


async def judged(judge: Judge, item) -> RiskEvent:
    """As a host does it."""
    while True:
        try:
            return await judge.judge(item, prompts.default(), key=item.batch_id)
        except UnavailableError:
            await asyncio.sleep(0.05)


async def test_a_server_killed_with_a_request_in_hand_is_waited_for_and_the_item_is_judged():
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(ANALYST, port))
        chosen = settings(port, connect_timeout_s=1.0)
        llm = OpenAiLlm(chosen, WeightsDigest(ANALYST))
        judge = Judge([llm], chosen)
        await judged(judge, CANARY)
        items = [as_context(training_window(seed)) for seed in (1, 2)]
        os.kill(server.pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(judged(judge, item)) for item in items]
        await asyncio.sleep(0.3)  # both requests lie in the stopped server's socket
        os.kill(server.pid, signal.SIGKILL)
        await server.wait()
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in tasks)
        await stack.enter_async_context(served(ANALYST, port))
        events = await asyncio.gather(*tasks)
        await llm.close()
    assert [event.batch_id for event in events] == [item.batch_id for item in items]


async def test_a_server_that_stops_answering_is_waited_for():
    port = free_port()
    async with served(ANALYST, port) as server:
        chosen = settings(port, deadline_s=1.0, connect_timeout_s=0.3)
        llm = OpenAiLlm(chosen, WeightsDigest(ANALYST))
        judge = Judge([llm], chosen)
        await judged(judge, CANARY)
        os.kill(server.pid, signal.SIGSTOP)
        item = as_context(training_window(random.Random(0).randrange(100)))
        for _ in range(3):
            with pytest.raises(UnavailableError) as caught:
                await judge.judge(item, prompts.default(), key="k")
            assert caught.value.waiting_on == "llm"
        os.kill(server.pid, signal.SIGCONT)
        event = await asyncio.wait_for(judged(judge, item), 30)
        await llm.close()
    assert event.batch_id == item.batch_id


async def busy_slots(port: int) -> int:
    async with httpx.AsyncClient(trust_env=False) as client:
        slots = (await client.get(f"http://127.0.0.1:{port}/slots")).json()
    return sum(slot["is_processing"] for slot in slots)


async def test_hanging_up_frees_the_slot_at_once_and_what_was_said_is_known():
    port = free_port()
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 300}
    endless = {"type": "object", "properties": {"a": numbers}, "required": ["a"]}
    async with served(ANALYST, port):
        llm = OpenAiLlm(settings(port))
        heard: list[str] = []
        asking = [
            asyncio.create_task(llm.complete(CHAT, endless, {"max_tokens": 900, "temperature": 0}, heard.append))
            for _ in range(SLOTS)
        ]
        while len(heard) < 20 or await busy_slots(port) < SLOTS:
            assert not any(task.done() for task in asking)
            await asyncio.sleep(0.001)
        for task in asking:
            task.cancel()
        began = time.perf_counter()
        await asyncio.gather(*asking, return_exceptions=True)
        cancelled = time.perf_counter() - began
        while await busy_slots(port):
            await asyncio.sleep(0.001)
        freed = time.perf_counter() - began
        await llm.close()
    print(f"\ncancelled in {cancelled * 1000:.1f} ms, slots free after {freed * 1000:.0f} ms")
    assert cancelled < 0.5
    assert freed < 2.0
    assert "".join(heard)


async def test_a_replay_call_gives_its_slot_to_live_work_on_the_real_server():
    port = free_port()
    items = [as_context(training_window(seed)) for seed in range(SLOTS + 1)]
    async with served(ANALYST, port):
        judge = Judge([OpenAiLlm(settings(port))], settings(port))
        await judged(judge, CANARY)
        replays = [
            asyncio.create_task(
                judge.judge(item, prompts.default(), key=item.batch_id, run="r", priority=Priority.REPLAY)
            )
            for item in items[:SLOTS]
        ]
        while await busy_slots(port) < SLOTS:
            await asyncio.sleep(0.001)
        live = await judge.judge(items[SLOTS], prompts.default(), key="live")
        assert live.queued_ms < 2000
        assert not all(task.done() for task in replays)
        assert [event.run for event in await asyncio.gather(*replays)] == ["r"] * SLOTS
        await judge.close()


async def test_every_sampling_parameter_is_taken_by_the_server_and_holds():
    port = free_port()
    asked = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.01,
        "seed": 7,
        "max_tokens": 60,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "stop": ["factors"],
        "cache_prompt": False,
    }
    assert sampling.problem(asked) is None
    messages = next(core.renderings(as_context(training_window(3)), prompts.default())).messages
    async with served(ANALYST, port):
        llm = OpenAiLlm(settings(port))
        found = [
            await llm.complete(messages, prompts.default().schema, asked | changes)
            for changes in ({}, {}, {"max_tokens": 3})
        ]
        async with httpx.AsyncClient(trust_env=False) as client:
            slots = (await client.get(f"http://127.0.0.1:{port}/slots")).json()
        await llm.close()
    held = next(slot["params"] for slot in slots if "params" in slot)
    assert {name: round(held[name], 3) for name in ("top_p", "top_k", "min_p", "presence_penalty")} == {
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.01,
        "presence_penalty": 0.5,
    }
    assert found[0].text == found[1].text
    assert found[2].completion_tokens == 3
    assert not found[0].cut_off
    assert found[0].text.endswith('"risk_'), "it stopped before what it was to stop at"


async def test_streamed_and_whole_answers_say_the_same_and_count_the_same(monkeypatch):
    port = free_port()
    messages = next(core.renderings(as_context(training_window(3)), prompts.default())).messages
    parameters = {"temperature": 0, "max_tokens": 400, "cache_prompt": False}
    async with served(ANALYST, port):
        found = []
        for quick_s in (0.0, 60.0):
            monkeypatch.setattr(llm_module, "_QUICK_S", quick_s)
            llm = OpenAiLlm(settings(port))
            pieces: list[str] = []
            await llm.complete(CHAT, {"type": "object"}, {"max_tokens": 4, "temperature": 0})
            found.append(await llm.complete(messages, prompts.default().schema, parameters, pieces.append))
            assert "".join(pieces) == found[-1].text
            assert (len(pieces) > 10) == (quick_s == 0.0), "the first was streamed, the second came whole"
            await llm.close()
    streamed, whole = (one._replace(inference_ms=0.0) for one in found)
    assert streamed == whole
    assert streamed.prompt_tokens > 0 < streamed.completion_tokens


async def test_of_two_servers_one_is_killed_under_load_and_every_window_has_one_event():
    ports = [free_port(), free_port()]
    items = [as_context(training_window(seed)) for seed in range(40)]
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(served(ANALYST, port)) for port in ports]
        chosen = settings(0, url=[f"http://127.0.0.1:{port}" for port in ports], slots=None, connect_timeout_s=2.0)
        judge = Judge([OpenAiLlm(chosen, url=url) for url in chosen.urls], chosen)
        tasks = [asyncio.create_task(judged(judge, item)) for item in items]
        while sum(task.done() for task in tasks) < 8:  # 32 more wait for a slot: both servers are at work
            await asyncio.sleep(0.01)
        assert not all(task.done() for task in tasks)
        servers[0].kill()
        events = await asyncio.gather(*tasks)
        assert judge.gate.slots == 2 * SLOTS
        names = [event.conditions["endpoint"] for event in events]
        assert set(names) == set(chosen.urls), "both judged"
        assert [event.batch_id for event in events] == [item.batch_id for item in items]
        await stack.enter_async_context(served(ANALYST, ports[0]))
        async with asyncio.timeout(60):
            while (await judged(judge, items[0])).conditions["endpoint"] != chosen.urls[0]:
                await asyncio.sleep(0.05)
        await judge.close()

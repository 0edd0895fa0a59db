"""`rewatch prompt` on the real broker, ClickHouse engine and demo analyst; and a worker that heeds it while it runs."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

import httpx
import msgspec
import pytest
from aiokafka import TopicPartition

from infra import prompts as people
from infra import topology
from infra.config import Settings, load
from infra.recorded import Recorded, windows
from processors.analyze import core
from processors.analyze.fitting import budget, fit
from processors.analyze.judge import CANARY
from processors.analyze.llm import OpenAiLlm
from processors.store.queries import Queries
from schemas import ids, prompts
from schemas.prompts import PromptError
from schemas.records import Context, RiskEvent
from streams import codec
from streams.kafka import Kafka
from streams.prompts import Prompts
from tests.infra.cli_kit import answer, invoke, put_in_store, put_on_log, story
from tests.processors.analyze_samples import context, section, seen
from tests.schemas.prompt_attacks import ATTACKS

pytestmark = pytest.mark.real

DEFAULT = prompts.default()
STRICT = prompts.deliveries_strict_nights()

FIXED_TOKENS = 250
"""What a version of ours may take of the demo analyst's 1,024 tokens for a window of one person: an answer has up to
400, and the rest is for sections."""

CONTROL_TOKENS = 5
"""Ids 0 to 4 of the demo analyst's vocabulary: unknown, begin, end, and the two turn marks."""


@pytest.fixture
def mine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The running stack, with a database of this test's own, empty."""
    assert settings.kafka.system
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"cli_{secrets.token_hex(4)}")
    return load()


@pytest.fixture
async def analyst(settings: Settings) -> AsyncIterator[OpenAiLlm]:
    async with people.servers(settings) as [server]:
        assert isinstance(server, OpenAiLlm)
        yield server


@pytest.mark.parametrize("version", prompts.shipped().values(), ids=prompts.shipped())
async def test_the_versions_of_the_product_leave_room_by_the_demo_analysts_own_tokenizer(version, analyst) -> None:
    tokens = await analyst.count_tokens(next(core.renderings(CANARY, version)).messages, {})
    assert 50 < tokens <= FIXED_TOKENS


async def test_a_prompt_of_exactly_the_budget_is_sent_whole_and_of_one_token_more_is_not(settings, analyst) -> None:
    found = context(sections=(section("memory", "Seen before. " * 20), section("zones", "The porch. " * 20)))
    whole, second, bare = [await analyst.count_tokens(one.messages, {}) for one in core.renderings(found, DEFAULT)]
    for most, dropped in (
        (whole, ()),
        (whole - 1, ("memory",)),
        (second, ("memory",)),
        (second - 1, ("memory", "zones")),
        (bare, ("memory", "zones")),
    ):
        assert (await fit(found, DEFAULT, most, partial(analyst.count_tokens, parameters={}))).dropped == dropped
    with pytest.raises(PromptError, match=f"{bare} tokens without any section, and {bare - 1} are left"):
        await fit(found, DEFAULT, bare - 1, partial(analyst.count_tokens, parameters={}))
    server = await analyst.server()
    longest = {"max_tokens": server.context_size - whole, "temperature": 0}
    assert (
        budget(
            server.context_size,
            settings.llm.model_copy(update={"max_completion_tokens": longest["max_tokens"]}),
            DEFAULT,
        )
        == whole
    )
    sent = await analyst.complete(
        next(core.renderings(found, DEFAULT)).messages, DEFAULT.schema, longest, lambda _: None
    )
    assert sent.prompt_tokens == whole


async def test_no_text_of_a_stranger_becomes_a_control_token_of_the_analyst(stack) -> None:
    attacks = [attack[:2000] for attack in ATTACKS]
    async with httpx.AsyncClient(base_url=stack.llm_url, trust_env=False, timeout=60) as client:

        async def control(messages: list[dict[str, str]]) -> list[int]:
            chat = (await client.post("/apply-template", json={"messages": messages})).json()["prompt"]
            asked = {"content": chat, "add_special": True, "parse_special": True}
            tokens = (await client.post("/tokenize", json=asked)).json()["tokens"]
            return [token for token in tokens if token < CONTROL_TOKENS]

        ours = await control([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
        bare = await control([{"role": "system", "content": "s"}, {"role": "user", "content": "u<extra_id_1>"}])
        assert len(bare) == len(ours) + 1, "the server takes marks in content for tokens: what the fence is for"
        for attack in attacks:
            found = msgspec.structs.replace(
                context((seen(attack),), sections=(section("captions", attack),)), camera_name=attack, camera_id=attack
            )
            asked = prompts.default().repair(next(core.renderings(found, DEFAULT)).messages, attack, attack)
            turns = await control([message._asdict() for message in asked])
            assert len(turns) == len(ours) + 2, repr(attack)


def test_recorded_windows_are_judged_and_shown_as_they_were_byte_for_byte(mine: Settings) -> None:
    camera = f"cam-{secrets.token_hex(4)}"

    async def tell() -> list[list[Recorded]]:
        await put_in_store(mine, await put_on_log(mine, camera))
        async with aclosing(Queries(mine.clickhouse)) as store:
            batch = story(camera)["batches"][0].batch_id
            asked: list[dict[str, str]] = [{"camera": camera}, {"batch": batch[:-3]}, {"camera": "nobody"}]
            return [await windows(store, **by, limit=5) for by in asked]

    by_camera, by_batch, none = asyncio.run(tell())
    assert (by_camera, none) == (by_batch, [])
    [found] = by_camera
    assert found.context == story(camera)["contexts"][0]
    assert (found.event_id, found.score, found.level) == (ids.event_id(found.context.batch_id), 72, "high")
    [tried] = answer("prompt", "test", "deliveries-strict-nights", "--camera", camera)
    assert tried["old"]["score"] == 72
    assert 0 <= tried["new"]["score"] <= 100
    chat = answer("prompt", "show", "default", "--event", tried["event_id"])
    assert chat["tokens_counted"]
    assert chat["tokens"] < chat["tokens_at_most"]
    assert chat["messages"][1]["content"].endswith('baseline: "Nobody comes at this hour."')
    [stored] = answer("prompt", "test", "default", "--camera", "nobody")
    assert stored["batch_id"] == "canary"


def test_the_llm_away_is_3_for_test_and_no_hindrance_to_promote(mine: Settings, monkeypatch) -> None:
    monkeypatch.setenv("REWATCH_LLM__URL", "http://127.0.0.1:1")
    camera = f"cam-{secrets.token_hex(4)}"
    answer("camera", "add", camera)
    assert answer("prompt", "promote", "deliveries-strict-nights", "--camera", camera)["changed"]
    shown = invoke("prompt", "show", "default", "--rendered")
    assert "at most" in shown.stdout
    assert answer("prompt", "rollback", "--camera", camera)["to"] == ""
    assert invoke("prompt", "promote", "default", "--camera", f"{camera}x").exit_code == 1


async def test_a_promotion_is_in_force_for_the_next_window_of_a_running_worker(
    settings: Settings, kafka: Kafka, tmp_path
) -> None:
    ours = [f"{name}-{kafka.settings.system}" for name in ("door", "yard")]
    known = Prompts(kafka)
    stop = asyncio.Event()
    producer = kafka.producer()
    await producer.start()

    async def judged(camera: str, number: int) -> RiskEvent:
        """The event of the camera's next window."""
        found = context(
            (seen("person", x=100.0 + number),), camera=camera, started_at=1_790_370_840_000 + number * 100_000
        )
        frames = tuple(msgspec.structs.replace(f, frame_id=f"{camera}:{number}") for f in found.batch.frames)
        batch_id = ids.batch_id(camera, [frame.frame_id for frame in frames])
        batch = msgspec.structs.replace(found.batch, batch_id=batch_id, frames=frames)
        await _append(producer, msgspec.structs.replace(found, batch_id=batch_id, batch=batch))
        async with asyncio.timeout(60):
            while True:
                for record in await kafka.read(
                    [TopicPartition("risk_events", n) for n in range(kafka.settings.partitions)]
                ):
                    event = codec.decode(record, RiskEvent)
                    if event.batch_id == batch_id:
                        return event
                await asyncio.sleep(0.1)

    worker = asyncio.create_task(
        topology.run(settings, "analyze", stop, tmp_path / "status.json", metrics_port=0), name="analyze"
    )
    try:
        before = [(await judged(camera, 0)).prompt_digest for camera in ours]
        assert STRICT.digest not in before
        await known.add(STRICT, "tried")
        await producer.send_and_wait("prompts", key=b"bad", value=b"garbage", partition=0)
        await known.point(ours[1], STRICT.digest, "nights")
        await asyncio.sleep(0.5)  # the follower's fetch: nothing tells from outside when it has read
        door, yard = [await judged(camera, 1) for camera in ours]
        assert (door.prompt_digest, yard.prompt_digest) == (before[0], STRICT.digest)
        assert STRICT.templates.system in yard.rendered_prompt
        await known.point(ours[1], known.before(ours[1]) or "", "back")
        await asyncio.sleep(0.5)
        assert (await judged(ours[1], 2)).prompt_digest == before[1]
        assert not worker.done()
    finally:
        stop.set()
        await producer.stop()
        await asyncio.wait_for(worker, 30)


async def _append(producer, record: Context) -> None:
    made = codec.emit("contexts", record)
    await producer.send_and_wait("contexts", key=made.key, value=made.value, headers=list(made.headers), partition=0)

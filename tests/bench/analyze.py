"""analyze_vs_bare: the analyze stage on its host against a bare client of the same llama.cpp server.

The stage is the production process: contexts on the log in, risk events out, exactly once. The bare client sends the
same prompts, schema and parameters over as many connections as there are slots, and parses the answers: what judging
a backlog takes at least. Everything was judged once before, so that neither finds a colder prompt cache.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from aiokafka import AIOKafkaConsumer

from infra.local.stack import LocalStack
from processors.analyze import core
from processors.analyze.settings import LlmSettings
from schemas import ids, prompts
from schemas.records import Batch, BatchFrame, Context, RiskEvent, SeenBox
from streams import codec
from streams.topics import partition_of
from tests.bench import kit
from tests.bench.figure import Figure, rate

NAMES: tuple[str, ...] = ("analyze_vs_bare",)

WINDOWS = 160
"""Of one half of a pair: some ten seconds of judging on two cores."""
PAIRS = 5

QUICK_WINDOWS = 8

_CAMERAS = 16
# Per half: ten times what it takes on two cores.
_TIMEOUT_S = 120.0


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """Windows a second of the stage against those of the bare client.

    Raises:
        AssertionError: the stage did not send what the bare client sends, or made no event of a window.
    """
    async with httpx.AsyncClient(base_url=stack.llm_url, trust_env=False) as client:
        slots = int((await client.get("/props")).raise_for_status().json()["total_slots"])
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
    windows = contexts(QUICK_WINDOWS if quick else WINDOWS)
    bodies = [body(window, model) for window in windows]

    async def bare() -> float:
        return await bare_rate(stack.llm_url, bodies, slots)

    await bare()
    home = await kit.install(stack)
    await kit.begin_at_the_end(home, "analyze", ["contexts"])
    llm = {"url": stack.llm_url, "slots": slots}
    async with kit.running(home, "analyze", llm=llm), _events(home) as events:
        await _judged(home, events, _first_of_each_partition(windows))  # the stage takes its partitions

        async def product() -> float:
            took, found = await _judged(home, events, windows)
            asked = {event.rendered_prompt for event in found}
            assert asked == {_chat(body) for body in bodies}, "the stage and the bare client asked different things"
            return len(windows) / took

        pairs = await kit.in_pairs(product, bare, 1 if quick else PAIRS, progress)
    return [rate(NAMES[0], pairs, "windows/s", 0.95)]


def contexts(count: int) -> list[Context]:
    """Windows of 1 to 12 frames with 1 to 4 boxes each, of 16 cameras; the same ones each time."""
    chance = random.Random("analyze")
    return [_context(chance, number) for number in range(count)]


def _context(chance: random.Random, number: int) -> Context:
    camera = f"camera-{number % _CAMERAS}"
    started = 1_780_000_000_000 + chance.randrange(86_400_000)
    label = chance.choice(("person", "person", "car", "dog"))
    frames = tuple(
        BatchFrame(
            frame_id=f"{camera}:{number}:{index}",
            offset=index,
            event_at=started + 1000 * index,
            width=640,
            height=360,
            matters=True,
            late=False,
            boxes=tuple(
                SeenBox(
                    label=label,
                    score=round(chance.uniform(0.5, 0.99), 2),
                    x=chance.randrange(500),
                    y=chance.randrange(180),
                    width=60,
                    height=160,
                    stationary=False,
                )
                for _ in range(chance.randint(1, 4))
            ),
        )
        for index in range(chance.randint(1, 12))
    )
    batch = Batch(
        batch_id=ids.batch_id(camera, [frame.frame_id for frame in frames]),
        camera_id=camera,
        started_at=frames[0].event_at,
        ended_at=frames[-1].event_at,
        frames=frames,
        closed_by="idle",
        closed_at_offset=number,
        partition=partition_of(camera, kit.PARTITIONS),
        epoch="bench",
        settings_digest="",
    )
    return Context(
        batch_id=batch.batch_id, camera_id=camera, batch=batch, camera_name=camera, time_zone="UTC", sections=()
    )


def _first_of_each_partition(windows: Sequence[Context]) -> list[Context]:
    return list({window.batch.partition: window for window in windows}.values())


def body(window: Context, model: str) -> dict[str, Any]:
    """The request that the stage sends for this window."""
    prompt, defaults = prompts.default(), LlmSettings()
    messages = next(core.renderings(window, prompt)).messages
    return {
        "seed": defaults.seed,
        "max_tokens": defaults.max_completion_tokens,
        **prompt.sampling,
        "model": model,
        "messages": [message._asdict() for message in messages],
        "stream": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": prompt.schema},
        },
    }


def _chat(body: dict[str, Any]) -> str:
    return json.dumps(body["messages"], ensure_ascii=False)


async def bare_rate(url: str, bodies: Sequence[dict[str, Any]], slots: int) -> float:
    """Windows a second of a client that does nothing else."""
    waiting = iter(bodies)

    async def one(client: httpx.AsyncClient) -> None:
        for body in waiting:
            answer = await client.post("/v1/chat/completions", json=body)
            json.loads(answer.raise_for_status().json()["choices"][0]["message"]["content"])

    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(slots)))
        return len(bodies) / (time.perf_counter() - began)


async def _judged(
    home: kit.Installation, events: AIOKafkaConsumer, windows: Sequence[Context]
) -> tuple[float, list[RiskEvent]]:
    """How long it takes from contexts that readers see to events that readers see, seconds; and the events."""
    emits = [codec.emit("contexts", window)._replace(partition=window.batch.partition) for window in windows]
    found: list[Any] = []
    async with kit.backlog(home.kafka, emits) as backlog, asyncio.timeout(_TIMEOUT_S):
        began = time.perf_counter()
        await backlog.show()
        while len(found) < len(windows):
            for records in (await events.getmany(timeout_ms=1000)).values():
                found += records
        took = time.perf_counter() - began
    return took, [codec.decode_bytes("risk_events", record.value, None, RiskEvent) for record in found]


@asynccontextmanager
async def _events(home: kit.Installation) -> AsyncIterator[AIOKafkaConsumer]:
    """A reader of the risk events that come from now on."""
    async with home.kafka.reading(auto_offset_reset="latest") as reader:
        reader.assign(kit.partitions_of("risk_events"))
        await reader.seek_to_end()
        yield reader

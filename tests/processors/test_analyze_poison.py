"""One window among a hundred on which the LLM hangs: what it costs the others, on the real broker."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence

import pytest
from aiokafka import TopicPartition

from processors.analyze.fakes import FakeLlm
from processors.analyze.settings import LlmSettings
from processors.analyze.stage import build
from schemas.prompts import Message
from schemas.records import DeadLetter, RiskEvent
from streams import codec
from streams.host_raw import RawHost
from streams.kafka import Kafka
from streams.lives import Lives
from tests.conftest import PARTITIONS
from tests.processors.analyze_samples import answer, context, hang
from tests.streams.conformance.harness import hosting, until

pytestmark = pytest.mark.real

COUNT = 100
POISON = "poison"
DEADLINE_S = 4.0

# Each window takes so long in one of two slots: a hundred take about 2.5 s.
EACH_S = 0.05


class Hundred:
    """A stage on the real broker, and hundreds of windows for it."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._answers = [TopicPartition("risk_events", number) for number in range(PARTITIONS)]
        self._letters = [TopicPartition("dead_letters", number) for number in range(PARTITIONS)]

    async def seconds(self, poison: int | None = None) -> tuple[float, list[DeadLetter]]:
        """Feed a hundred windows over all partitions; the LLM hangs on the one of that number.

        How long it took until all others had their event committed, once, and the dead letters.
        """
        run = secrets.token_hex(4)
        cameras = [f"{run}-{POISON if number == poison else number}" for number in range(COUNT)]
        producer = self._kafka.producer()
        await producer.start()
        began = time.monotonic()
        for number, camera in enumerate(cameras):
            made = codec.emit("contexts", context(camera=camera))
            await producer.send(
                made.topic, made.value, key=made.key, headers=list(made.headers), partition=number % PARTITIONS
            )
        others = sorted(camera for camera in cameras if POISON not in camera)
        judged: list[str] = []
        letters: list[DeadLetter] = []

        async def over() -> bool:
            events = [codec.decode(record, RiskEvent) for record in await self._kafka.read(self._answers)]
            judged[:] = sorted(event.camera_id for event in events if event.camera_id.startswith(run))
            return len(judged) >= len(others)

        async def explained() -> bool:
            found = [codec.decode(record, DeadLetter) for record in await self._kafka.read(self._letters)]
            letters[:] = [letter for letter in found if letter.camera_id.startswith(run)]
            return len(letters) >= COUNT - len(others)

        await until(over, within=120)
        took = time.monotonic() - began
        await producer.stop()
        await until(explained)
        assert judged == others
        return took, letters


async def test_one_poison_window_among_a_hundred_delays_the_others_by_its_deadline_at_most(kafka: Kafka) -> None:
    async def says(messages: Sequence[Message]) -> str:
        await (hang() if POISON in messages[1].content else asyncio.sleep(EACH_S))
        return answer()

    stage = build(LlmSettings(deadline_s=DEADLINE_S, slots=2), llm=FakeLlm(says))
    async with Lives(kafka).following() as lives, hosting(RawHost(kafka, stage, epochs=lives).run):
        hundred = Hundred(kafka)
        await hundred.seconds()  # it joins its group, and judges what other tests left
        clean, none = await hundred.seconds()
        slowed, letters = await hundred.seconds(poison=10)
    print(f"\n100 windows: {clean:.2f} s; 99 beside one that hangs until {DEADLINE_S:g} s: {slowed:.2f} s")
    assert none == []
    assert [len(json.loads(letter.detail)["attempts"]) for letter in letters] == [3]
    # Its partition's results wait for its own: for all attempts, and the canary after each of them.
    assert slowed <= clean + DEADLINE_S + 1.0

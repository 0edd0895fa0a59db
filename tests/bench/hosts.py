"""Records a second through the two hosts: 1 KB in, 1 KB out, transactional.

The Faust host against the raw one: what the project's stream framework costs a stage that does nothing else. It is
shown without an aim; it tells which stages should take the raw host.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiokafka.admin import NewTopic

from infra.local.stack import LocalStack
from streams.host_faust import FaustHost
from streams.host_raw import RawHost
from streams.kafka import Kafka
from streams.messages import Emit, Incoming
from tests.bench import kit
from tests.bench.figure import Figure, rate

NAMES = ("faust_vs_raw",)
PAIRS = 3
RECORDS = 40_000
QUICK_RECORDS = 500
VALUE_BYTES = 1024


class Echo:
    """A map stage that gives back what it gets."""

    name = "echo"
    concurrency = 64

    def __init__(self, source: str, target: str) -> None:
        self.inputs: tuple[str, ...] = (source,)
        self.outputs: tuple[str, ...] = (target,)

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        return [Emit(self.outputs[0], record.key or b"", record.value)]

    async def close(self) -> None:
        pass


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """Both hosts, each time as a new group with the same number of records."""
    count = QUICK_RECORDS if quick else RECORDS
    pairs = await kit.in_pairs(
        lambda: _rate(stack, FaustHost, count),
        lambda: _rate(stack, RawHost, count),
        1 if quick else PAIRS,
        progress,
    )
    return [rate(NAMES[0], pairs, "records/s")]


async def _rate(stack: LocalStack, host: type[RawHost | FaustHost], count: int) -> float:
    kafka: Kafka = (await kit.install(stack)).kafka
    name = secrets.token_hex(4)
    async with kafka.admin() as admin:
        await admin.create_topics([NewTopic(f"{way}-{name}", kit.PARTITIONS, 1) for way in ("in", "out")])
    value = secrets.token_bytes(VALUE_BYTES)

    def records(number: int) -> list[Emit]:
        return [Emit(f"in-{name}", b"k", value, partition=n % kit.PARTITIONS) for n in range(number)]

    running: Any = host(kafka, Echo(f"in-{name}", f"out-{name}"), epochs=lambda _: "epoch")
    stop = asyncio.Event()
    task = asyncio.create_task(running.run(stop))
    try:
        async with kit.backlog(kafka, records(kit.PARTITIONS)) as warm_up:
            await warm_up.show()
            await kit.reached(running.workers.liveness, warm_up.positions)
        async with kit.backlog(kafka, records(count)) as work:
            await work.show()
            began = time.perf_counter()
            await kit.reached(running.workers.liveness, work.positions)
            return count / (time.perf_counter() - began)
    finally:
        stop.set()
        await task

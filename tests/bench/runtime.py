"""runtime_vs_quixstreams: the product's stream runtime against quixstreams, Avro in and out, exactly once.

A backlog lies on 16 partitions; one process of either runtime works it off into a topic of its own. The rate is
taken from the outside, the same way for all: from the first output that a read_committed reader sees to the last, so
start-up counts for nobody. Both outputs are then held against what they must be, record by record.
"""

import asyncio
import secrets
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic

from infra.local.stack import LocalStack
from streams.kafka import Kafka
from streams.messages import FINGERPRINT
from streams.topics import partition_of
from tests.bench import kit, sightings
from tests.bench.figure import Figure, rate

NAMES: tuple[str, ...] = ("runtime_vs_quixstreams", "runtime_raw_vs_quixstreams")

PARTITIONS = 16
CAMERAS_PER_PARTITION = 2
RECORDS = 48_000
"""Five seconds of work and more, so that what both do once (the last commit, the first fetch) weighs little."""
PAIRS = 3

QUICK_RECORDS = 3_200

_SIDES = ("quixstreams", "faust", "raw")

# Faust joins its group in about 10 s on a busy machine, then the backlog; ten times what it takes.
_TIMEOUT_S = 180.0


class _Backlog(NamedTuple):
    topic: str
    records: int
    expected: dict[bytes, list[bytes]]
    """The output that must come of it: values by key, in order."""


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """Rates of the default (Faust) host and of the raw host, each against quixstreams.

    Raises:
        AssertionError: an output is not what it must be: then a rate says nothing.
    """
    pairs = 1 if quick else PAIRS
    kafka = (await kit.install(stack)).kafka
    backlog = await _backlog(kafka, QUICK_RECORDS if quick else RECORDS)
    rates: dict[str, list[float]] = {side: [] for side in _SIDES}
    for number in range(pairs):
        # Turn about, so that whatever the one before leaves behind (the broker's writes) meets each alike.
        for step, side in enumerate(_SIDES[number % 3 :] + _SIDES[: number % 3]):
            rates[side].append(await _run(kafka, side, backlog))
            progress((number * len(_SIDES) + step + 1) / (pairs * len(_SIDES)))
    return [
        rate(name, list(zip(rates[host], rates["quixstreams"], strict=True)), "records/s", aim)
        for name, host, aim in zip(NAMES, ("faust", "raw"), (1.0, None), strict=True)
    ]


async def _backlog(kafka: Kafka, count: int) -> _Backlog:
    topic = await _new_topic(kafka, "in")
    cameras = _cameras()
    expected: dict[bytes, list[bytes]] = {}
    producer = kafka.producer(linger_ms=20)
    await producer.start()
    try:
        for camera, partition in cameras.items():
            made = list(sightings.inputs(camera, count // len(cameras)))
            expected[camera.encode()] = [sightings.expected(*one) for one in made]
            await _append(producer, topic, partition, camera, made)
    finally:
        await producer.stop()
    return _Backlog(topic, sum(map(len, expected.values())), expected)


def _cameras() -> dict[str, int]:
    """The same number of cameras on each partition, by the keys' own hash: both runtimes keep them there."""
    found: dict[str, int] = {}
    room = dict.fromkeys(range(PARTITIONS), CAMERAS_PER_PARTITION)
    number = 0
    while any(room.values()):
        camera = f"camera-{number}"
        partition = partition_of(camera, PARTITIONS)
        if room[partition]:
            room[partition] -= 1
            found[camera] = partition
        number += 1
    return found


async def _append(
    producer: AIOKafkaProducer, topic: str, partition: int, camera: str, made: list[tuple[bytes, bytes]]
) -> None:
    await asyncio.gather(
        *[
            await producer.send(
                topic, value, key=camera.encode(), partition=partition, headers=[(FINGERPRINT, fingerprint)]
            )
            for value, fingerprint in made
        ]
    )


async def _new_topic(kafka: Kafka, name: str) -> str:
    topic = f"bench-{name}-{secrets.token_hex(4)}"
    async with kafka.admin() as admin:
        await admin.create_topics([NewTopic(topic, PARTITIONS, 1)])
    return topic


async def _run(kafka: Kafka, side: str, backlog: _Backlog) -> float:
    """Records a second of one process of the runtime, from its first visible output to its last."""
    target = await _new_topic(kafka, side)
    name = f"bench{secrets.token_hex(4)}"
    what = ["runtime_quixstreams"] if side == "quixstreams" else ["runtime_rewatch", side]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"tests.bench.{what[0]}", *what[1:]),
        *(kafka.settings.bootstrap_servers, name, backlog.topic, target),
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _watch(kafka, target, backlog)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def _watch(kafka: Kafka, target: str, backlog: _Backlog) -> float:
    found: dict[bytes, list[bytes]] = {key: [] for key in backlog.expected}
    seen = first = 0
    began = ended = 0.0
    # Fetches of some size: the reader must take no more of the machine than it must.
    async with kafka.reading(fetch_max_wait_ms=50) as reader:
        reader.assign([TopicPartition(target, number) for number in range(PARTITIONS)])
        while seen < backlog.records:
            batches = await reader.getmany(timeout_ms=1000)
            now = time.perf_counter()
            for records in batches.values():
                seen += len(records)
                for record in records:
                    found[record.key].append(record.value)
            if seen and not first:
                began, first = now, seen
            ended = now
    assert found == backlog.expected, f"{target} is not what it must be: {seen} records"
    # The few records of a smoke test can come at one glance, and leave no time between the first and the last.
    return max(1, seen - first) / max(0.001, ended - began)

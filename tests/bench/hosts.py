"""Records a second through the two hosts: 1 KB in, 1 KB out, transactional, on the embedded broker.

Baseline: the raw host in the same run; what counts is the ratio, in pairs, since the machine is noisy.
"""

import asyncio
import logging
import secrets
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from aiokafka.admin import NewTopic

from infra.local.broker import Broker
from streams.admin import ensure_topics
from streams.host_faust import FaustHost
from streams.host_raw import RawHost
from streams.kafka import Kafka, KafkaSettings
from streams.messages import Emit, Incoming

PARTITIONS = 16
RECORDS = 10_000
PAIRS = 3


class Echo:
    """A map stage that gives back what it gets."""

    name = "echo"
    concurrency = 64

    def __init__(self, source: str, target: str) -> None:
        self.inputs: tuple[str, ...] = (source,)
        self.outputs: tuple[str, ...] = (target,)
        self.first_at = 0.0

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        self.first_at = self.first_at or time.perf_counter()
        return [Emit(self.outputs[0], record.key or b"", record.value)]

    async def close(self) -> None:
        pass


async def rate(base: KafkaSettings, host: type[RawHost | FaustHost]) -> tuple[float, float]:
    """Records a second from the first record on, and CPU microseconds a record."""
    name = secrets.token_hex(4)
    kafka = Kafka(base.model_copy(update={"system": f"bench{name}"}))
    async with kafka.admin() as admin:
        await admin.create_topics([NewTopic(f"{way}-{name}", PARTITIONS, 1) for way in ("in", "out")])
    producer = kafka.producer(linger_ms=20)
    await producer.start()
    value = secrets.token_bytes(1024)
    await asyncio.gather(
        *[await producer.send(f"in-{name}", value, key=b"k", partition=n % PARTITIONS) for n in range(RECORDS)]
    )
    await producer.stop()
    stage = Echo(f"in-{name}", f"out-{name}")
    running = host(kafka, stage, epochs=lambda _: "epoch")
    stop = asyncio.Event()
    cpu = time.process_time()
    task = asyncio.create_task(running.run(stop))
    while sum(worker.ownership.position for worker, _ in running.workers._running.values()) < RECORDS:
        await asyncio.sleep(0.02)
    result = RECORDS / (time.perf_counter() - stage.first_at), (time.process_time() - cpu) / RECORDS * 1e6
    stop.set()
    await task
    return result


async def main() -> None:
    """Print each pair, then the medians."""
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory:
        broker = Broker(Path(directory), port=0)
        await broker.start()
        try:
            base = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, partitions=PARTITIONS)
            await ensure_topics(Kafka(base))  # dead_letters among them
            pairs = [[await rate(base, host) for host in (RawHost, FaustHost)] for _ in range(PAIRS)]
        finally:
            await broker.stop()
    for number, ((raw, raw_cpu), (faust, faust_cpu)) in enumerate(pairs, start=1):
        print(
            f"pair {number}: raw {raw:6.0f}/s {raw_cpu:4.0f} us CPU, "
            f"faust {faust:6.0f}/s {faust_cpu:4.0f} us CPU, ratio {faust / raw:.2f}"
        )
    print(f"median ratio faust/raw: {statistics.median(pair[1][0] / pair[0][0] for pair in pairs):.2f}")


if __name__ == "__main__":
    asyncio.run(main())

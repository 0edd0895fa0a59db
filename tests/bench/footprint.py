"""What a frame costs while everything runs and keeps up: `python -m tests.bench.footprint`. For docs/sizing.md.

Every stage is the production process, the models sleep (`sleeping_models.py`), and 16 cameras send an image each at a
steady rate by HTTP, in which somebody is always seen: a window is open at each of them all the time. Told: CPU of each
process for a frame, beyond what it takes while nothing comes; memory; and transactions, by their markers.
"""

import argparse
import asyncio
import logging
import secrets
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import structlog
from aiokafka import TopicPartition

from infra.config import Settings
from infra.installation import Installation
from infra.local.broker import SETTINGS
from infra.local.process import free_port
from infra.local.stack import LocalStack
from infra.local.supervisor import running
from streams.kafka import Kafka
from tests.bench import kit, latency

CAMERAS = PARTITIONS = 16
PER_SECOND, SECONDS = 8.0, 30.0


class Cost(NamedTuple):
    """Of one process."""

    idle: float
    """Cores that it takes while no frame comes."""
    frame_ms: float
    """CPU beyond that, of one frame."""
    memory_mb: float


class Footprint(NamedTuple):
    """Of a whole installation at a steady rate."""

    costs: dict[str, Cost]
    transactions: float
    """Of one frame, all stages together."""


async def measure(stack: LocalStack, per_second: float, seconds: float) -> Footprint:
    """Start everything, look at it while it is idle, feed it, look again."""
    home = await kit.install(stack, PARTITIONS)
    models = f"http://127.0.0.1:{free_port()}"
    with latency._settings(home, stack, models) as (settings, config):
        installation = Installation(settings, config)
        async with installation:
            await installation.stack.supervisor.add(latency._models(models))
            names = _processes(stack.data_dir) | _processes(settings.data_dir)
            images = kit.scenes(8)
            await _send(settings, images, per_second, 10.0)  # each camera's way is open, each partition taken
            await asyncio.sleep(10)
            before, at = _cpu(names), time.monotonic()
            await asyncio.sleep(10)
            idle = {name: (_cpu(names)[name] - before[name]) / (time.monotonic() - at) for name in names}
            count, before, at = await _transactions(home.kafka), _cpu(names), time.monotonic()
            frames = await _send(settings, images, per_second, seconds)
            await asyncio.sleep(2)  # what is in hand is committed
            lasted = time.monotonic() - at
            after, memory = _cpu(names), {name: one.memory_info().rss / 1e6 for name, one in names.items()}
            count = await _transactions(home.kafka) - count
    costs = {
        name: Cost(idle[name], 1000 * (after[name] - before[name] - idle[name] * lasted) / frames, memory[name])
        for name in names
    }
    return Footprint(costs, count / frames)


def _processes(data_dir: Path) -> dict[str, psutil.Process]:
    return {name: psutil.Process(one["pid"]) for name, one in running(data_dir).items()}


def _cpu(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


async def _transactions(kafka: Kafka) -> int:
    """So far: a commit of a group's offsets is a record and a marker; ingest commits none, and marks `frames`."""
    offsets = [TopicPartition("__consumer_offsets", n) for n in range(SETTINGS["offsets.topic.num.partitions"])]
    commits = sum(end for _, end in (await kafka.bounds(offsets)).values()) // 2
    frames = kit.partitions_of("frames", partitions=PARTITIONS)
    ends = sum(end for _, end in (await kafka.bounds(frames)).values())
    return commits + ends - len(await kafka.read(frames))


async def _send(settings: Settings, images: list[bytes], per_second: float, seconds: float) -> int:
    """Frames at a steady rate, one camera after the other; returns how many."""
    count = round(per_second * seconds)
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=settings.ingest.upload.url, timeout=300, trust_env=False) as client:

        async def one(number: int) -> None:
            content = kit.distinct(images[number % len(images)], secrets.randbits(64))
            where = {"camera": f"camera-{number % CAMERAS}"}
            while (answer := await client.post("/api/upload", params=where, content=content)).status_code in {429, 503}:
                await asyncio.sleep(float(answer.headers["retry-after"]))
            answer.raise_for_status()

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, start + number / per_second - time.monotonic()))
                group.create_task(one(number))
    return count


async def _show(per_second: float, seconds: float) -> None:
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-") as directory:
        async with LocalStack(Path(directory), kafka_port=0, clickhouse_port=0) as stack:
            found = await measure(stack, per_second, seconds)
    print(f"{per_second:g} frames/s of {CAMERAS} cameras: {found.transactions:.1f} transactions a frame")
    print(f"{'':12}  idle cores  CPU ms a frame  memory MB")
    for name, cost in found.costs.items():
        print(f"{name:12} {cost.idle:11.3f} {cost.frame_ms:15.1f} {cost.memory_mb:10.0f}")


def main() -> None:
    """Measure and print."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    parser = argparse.ArgumentParser(prog="python -m tests.bench.footprint", description=__doc__.splitlines()[0])
    parser.add_argument("--per-second", type=float, default=PER_SECOND)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    arguments = parser.parse_args()
    asyncio.run(_show(arguments.per_second, arguments.seconds))


if __name__ == "__main__":
    main()

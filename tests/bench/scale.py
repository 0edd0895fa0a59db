"""scale_*_workers: detect with 2, 4 and 8 processes on 16 partitions against so many times one; and the log's bound.

Every worker is the production process, its model sleeps 20 ms an image (`sleeping_detector.py`): a card of its own,
which takes nothing of the two cores. What eight of them do not reach of eight times one, the road took. The bound is
a bare program that reads the same frames and appends a result for each, under one transactional id a partition.
`python -m tests.bench.scale` shows what each step cost: CPU by process, transactions, busy cores.
"""

import argparse
import asyncio
import json
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.local.stack import LocalStack
from infra.local.supervisor import running
from schemas.records import Detections
from streams import codec
from streams.messages import Emit
from tests.bench import bare_log, kit
from tests.bench.figure import Figure, rate
from tests.bench.sleeping_detector import SLEEP_S

NAMES: tuple[str, ...] = ("scale_2_workers", "scale_4_workers", "scale_8_workers", "scale_of_log")

AIM = 0.9
PARTITIONS = 16
STEPS = (1, 2, 4, 8)
ROUNDS = 3
SECONDS = 5.0
"""Of work in each step, at the rate that the model alone would give."""

QUICK_STEPS, QUICK_SECONDS = (1, 2), 0.5

SMALL, LARGE = (160, 90), (640, 360)
"""Pixels, 3 and 46 KB. A large one takes 1 ms to decode: eight times 50 a second are half of what two cores can do, and
no other machine has eight cards on two cores. So the figures are of small ones, and the table has both."""

# The most that the product puts into one transaction; and how many of one record are timed, of each partition.
_AT_ONCE, _SINGLES = 500, 40

# Ten times what a step takes, and what eight processes need to start on a machine that does much else.
_TIMEOUT_S = 180.0


class Step(NamedTuple):
    """So many workers, one backlog."""

    workers: int
    frames: int
    seconds: float
    """From frames that readers see to the last detection that readers see."""
    transactions: int
    """Of all partitions: offsets of `detections` that hold a marker, not a record."""
    worker_cpu: float
    """CPU seconds of all workers together; of the broker; of what measures here."""
    broker_cpu: float
    own_cpu: float
    busy: float
    """Share of the machine's cores that did anything, for other programs too, 0..1."""

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds


class Round(NamedTuple):
    """The log alone, and an installation that grew."""

    steps: list[Step]
    singles: float
    """Frames a second of the bare program that commits each by itself: how many transactions the log takes."""
    bound: float
    """The same, with transactions as large as the product's may become, on the last step's backlog."""


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """Rates of 2, 4 and 8 workers against so many times that of one, and the last against the log's bound.

    Raises:
        AssertionError: a frame has not exactly one detection, in order: then a rate says nothing.
    """
    if quick:
        return _figures([await _round(stack, kit.PARTITIONS, QUICK_STEPS, progress, seconds=QUICK_SECONDS)])
    async with _broker() as broker:
        return _figures(
            [
                await _round(broker, PARTITIONS, STEPS, lambda done, n=n: progress((n + done) / ROUNDS))
                for n in range(ROUNDS)
            ]
        )


@asynccontextmanager
async def _broker() -> AsyncIterator[LocalStack]:
    """One of its own: the others' topics have four partitions, fixed at their creation."""
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-scale-") as directory:
        async with LocalStack(Path(directory), kafka_port=0, without=("clickhouse",)) as stack:
            yield stack


def _figures(rounds: Sequence[Round]) -> list[Figure]:
    by_workers: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for one, *more in (found.steps for found in rounds):
        for step in more:
            by_workers[step.workers].append((step.rate, step.workers * one.rate))
    found = [rate(f"scale_{workers}_workers", pairs, "frames/s", AIM) for workers, pairs in by_workers.items()]
    return [*found, rate("scale_of_log", [(one.steps[-1].rate, one.bound) for one in rounds], "frames/s")]


async def _round(
    stack: LocalStack,
    partitions: int,
    workers: Sequence[int],
    progress: Callable[[float], None],
    *,
    seconds: float = SECONDS,
    size: tuple[int, int] = SMALL,
) -> Round:
    home = await kit.install(stack, partitions)
    images = kit.scenes(8, size)
    counts = [round(number * seconds / SLEEP_S / partitions) * partitions for number in workers]
    parts = len(workers) + 1
    # First, for it warms the broker up as well.
    singles = await bare_log.rate(home, images, _SINGLES * partitions, 1)
    progress(0.5 / parts)
    bound = await bare_log.rate(home, images, counts[-1], _AT_ONCE)
    progress(1 / parts)
    await kit.begin_at_the_end(home, "detect", ["frames"])
    steps: list[Step] = []
    async with AsyncExitStack() as up, _watching(home, stack) as watch:
        reports: list[Path] = []
        for number, count in zip(workers, counts, strict=True):
            more = [up.enter_async_context(_worker(home)) for _ in range(number - len(reports))]
            reports += [config.with_name("status.json") for config in await asyncio.gather(*more)]
            await _share(watch, reports, images)
            steps.append(await _step(watch, reports, images, count))
            progress((1 + len(steps)) / parts)
    return Round(steps, singles, bound)


@asynccontextmanager
async def _worker(home: kit.Installation) -> AsyncIterator[Path]:
    # One image an inference: with batches the model's time of an image would depend on how many wait.
    detector = {"batch_size": 1, "wait_ms": 0}
    async with kit.running(home, "detect", module="tests.bench.sleeping_detector", detector=detector) as config:
        yield config


class _Watch(NamedTuple):
    """What a round looks at: an installation, its broker's process, and the detections that come from now on."""

    home: kit.Installation
    broker: psutil.Process
    reader: AIOKafkaConsumer
    outputs: list[TopicPartition]


@asynccontextmanager
async def _watching(home: kit.Installation, stack: LocalStack) -> AsyncIterator[_Watch]:
    outputs = kit.partitions_of("detections", partitions=home.kafka.settings.partitions)
    broker = psutil.Process(running(stack.data_dir)["kafka"]["pid"])
    # It looks ten times a second: the cores are for those who are measured.
    async with home.kafka.reading(auto_offset_reset="latest", fetch_max_wait_ms=100, fetch_min_bytes=10**6) as reader:
        reader.assign(outputs)
        await reader.seek_to_end()
        yield _Watch(home, broker, reader, outputs)


async def _share(watch: _Watch, reports: Sequence[Path], images: Sequence[bytes]) -> None:
    """Return when each worker has as many partitions as the others, and has done a frame of each."""
    partitions = len(watch.outputs)
    fair = [partitions // len(reports)] * len(reports)
    async with asyncio.timeout(2 * _TIMEOUT_S):
        while True:
            await _step(watch, reports, images, partitions)
            for _ in range(3):  # reports come each second: the first may be older than the frames
                if [len(_said(path)["partitions"]) for path in reports] == fair:
                    return
                await asyncio.sleep(0.5)


def _said(report: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.read_text())
    return found


async def _step(watch: _Watch, reports: Sequence[Path], images: Sequence[bytes], count: int) -> Step:
    """Frames that appear together, until readers have seen all their detections."""
    kafka, partitions = watch.home.kafka, len(watch.outputs)
    expected: dict[int, list[str]] = defaultdict(list)
    emits: list[Emit] = []
    for partition, frame in kit.frames(images, count, partitions):
        expected[partition].append(frame.frame_id)
        emits.append(codec.emit("frames", frame, partition))
    whose = [[psutil.Process(_said(path)["pid"]) for path in reports], [watch.broker], [psutil.Process()]]
    found: dict[int, list[str]] = defaultdict(list)
    before = await kafka.bounds(watch.outputs)
    async with kit.backlog(kafka, emits) as backlog:
        emits.clear()
        cpu, machine, began = [_cpu(processes) for processes in whose], psutil.cpu_times(), time.perf_counter()
        await backlog.show()
        seen = 0
        while seen < count:
            batches = await watch.reader.getmany(timeout_ms=1000)
            took = time.perf_counter() - began
            assert took < _TIMEOUT_S, f"{seen} detections of {count} frames after {took:.0f} s: see dead letters"
            for tp, records in batches.items():
                seen += len(records)
                found[tp.partition] += [
                    codec.decode_bytes("detections", one.value, None, Detections).frame_id for one in records
                ]
        used = [_cpu(processes) - earlier for processes, earlier in zip(whose, cpu, strict=True)]
        busy = _busy(machine, psutil.cpu_times())
    assert found == expected, "each frame has one detection, in order"
    after = await kafka.bounds(watch.outputs)
    markers = sum(after[tp][1] - before[tp][1] for tp in before) - count
    return Step(len(reports), count, took, markers, *used, busy)


def _cpu(processes: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _busy(before: Any, after: Any) -> float:
    idle = after.idle + after.iowait - before.idle - before.iowait
    return float(1 - idle / (sum(after) - sum(before)))


def _table(found: Round) -> None:
    print("workers  frames/s  of linear  records/txn  txn/s   CPU ms a frame: worker  broker  reader   busy cores")
    one = found.steps[0].rate
    for step in found.steps:
        worker, broker, own = (1000 * cpu / step.frames for cpu in (step.worker_cpu, step.broker_cpu, step.own_cpu))
        print(
            f"{step.workers:7} {step.rate:9.1f} {step.rate / step.workers / one:10.2f} "
            f"{step.frames / step.transactions:12.1f} {step.transactions / step.seconds:6.1f} "
            f"{worker:24.2f} {broker:7.2f} {own:7.2f} {step.busy * (psutil.cpu_count() or 1):12.2f}"
        )
    print(
        f"the log alone: {found.alike:,.0f} frames/s in transactions of the last size, {found.bound:,.0f} in large ones"
    )


async def _show(workers: Sequence[int], seconds: float, rounds: int) -> None:
    async with _broker() as stack:
        for size in (SMALL, LARGE):
            for _ in range(rounds):
                print(f"frames of {size[0]} x {size[1]}")
                _table(await _round(stack, PARTITIONS, workers, lambda _: None, seconds=seconds, size=size))


def main() -> None:
    """Measure both sizes and print what each step cost."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", nargs="+", type=int, default=STEPS, help="each a divisor of 16, upwards")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each step")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    asyncio.run(_show(arguments.workers, arguments.seconds, arguments.rounds))


if __name__ == "__main__":
    main()

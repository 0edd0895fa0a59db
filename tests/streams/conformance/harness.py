"""What the cases share: topics of their own, processes, load, and audits from outside, by id."""

import asyncio
import json
import secrets
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import NewTopic

from schemas.records import DeadLetter
from streams import codec
from streams.kafka import Kafka
from streams.messages import Incoming
from tests.conftest import PARTITIONS


class Road:
    """One input topic, one output topic, and what the test wrote and reads there."""

    def __init__(self, kafka: Kafka, directory: Path) -> None:
        name = secrets.token_hex(4)
        self.kafka = kafka
        self.source = f"in-{name}"
        self.target = f"out-{name}"
        self.epoch = name
        self.control = directory
        self.sent: list[str] = []
        self.producer = kafka.producer(linger_ms=5)
        self._workers = 0

    async def create(self) -> None:
        async with self.kafka.admin() as admin:
            answer = await admin.create_topics([NewTopic(t, PARTITIONS, 1) for t in (self.source, self.target)])
        assert all(code == 0 for _, code, *_ in answer.topic_errors), answer
        await self.producer.start()

    def settings(self, host: str, stage: str, **more: Any) -> dict[str, Any]:
        """What a worker process is told."""
        self._workers += 1
        return {
            "kafka": self.kafka.settings.model_dump(mode="json", exclude_none=True),
            "host": host,
            "stage": stage,
            "source": self.source,
            "target": self.target,
            "epoch": self.epoch,
            "control": str(self.control),
            "status": str(self.control / f"status-{stage}-{self._workers}.json"),
            **more,
        }

    async def send(self, count: int, partition: int | None = None, value: bytes | None = None) -> None:
        """Append records, each with an id of its own unless `value` is given."""
        futures = []
        for _ in range(count):
            number = len(self.sent)
            to = number % PARTITIONS if partition is None else partition
            self.sent.append(f"{to}/{number:06d}")
            data = self.sent[-1].encode() if value is None else value
            futures.append(await self.producer.send(self.source, data, key=f"camera-{to}".encode(), partition=to))
        for future in futures:
            await future

    @asynccontextmanager
    async def load(self, per_second: int = 400) -> AsyncIterator[None]:
        """A steady load, until the end of the block."""
        ending = asyncio.Event()

        async def run() -> None:
            while not ending.is_set():
                await self.send(per_second // 10)
                await asyncio.sleep(0.1)

        running = asyncio.create_task(run())
        try:
            yield
        finally:
            ending.set()
            await running

    def partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, partition) for partition in range(PARTITIONS)]

    async def output(self) -> list[Incoming]:
        """Every committed output, in order within its partition."""
        return await self.kafka.read(self.partitions(self.target))

    async def dead_letters(self) -> list[DeadLetter]:
        """The dead letters of this road's records."""
        found = await self.kafka.read(self.partitions("dead_letters"))
        letters = [codec.decode(record, DeadLetter) for record in found]
        return [letter for letter in letters if letter.origin.startswith(f"{self.source}:")]

    async def until_echoed(self, within: float = 30) -> None:
        """Wait for every record that was sent, then hold the whole output against it."""
        await until(self._all_echoed, within)
        await self.check_echoed()

    async def _all_echoed(self) -> bool:
        return len({record.value for record in await self.output()}) >= len(self.sent)

    async def check_echoed(self) -> None:
        """0 lost, 0 doubled, each partition in order."""
        output = await self.output()
        counts = Counter((record.value or b"").decode() for record in output)
        assert [i for i in self.sent if not counts[i]] == [], "lost"
        assert [i for i, n in counts.items() if n > 1] == [], "doubled"
        for tp in self.partitions(self.target):
            mine = [record.value or b"" for record in output if record.partition == tp.partition]
            assert mine == sorted(mine), "out of order"


async def until(condition: Callable[[], Awaitable[bool]], within: float = 30) -> None:
    """Wait until it holds.

    Raises:
        TimeoutError: it did not in time.
    """
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.1)


async def until_file(path: Path, within: float = 30) -> None:
    """Wait until the file is there."""

    async def there() -> bool:
        return path.exists()

    await until(there, within)


@asynccontextmanager
async def road(kafka: Kafka, directory: Path) -> AsyncIterator[Road]:
    """A road, created."""
    made = Road(kafka, directory)
    await made.create()
    try:
        yield made
    finally:
        await made.producer.stop()


@asynccontextmanager
async def hosting(run: Callable[[asyncio.Event], Awaitable[None]]) -> AsyncIterator[asyncio.Event]:
    """A host in this process; what ends it before its time fails the test."""
    stop = asyncio.Event()
    running = asyncio.ensure_future(run(stop))
    try:
        yield stop
        assert not running.done() or stop.is_set(), "the host ended by itself"
    finally:
        stop.set()
        async with asyncio.timeout(15):
            await running


class Worker:
    """A worker process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with (Path(self.settings["control"]) / "workers.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.streams.conformance.worker",
                json.dumps(self.settings),
                stdout=log,
                stderr=log,
            )

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads(Path(self.settings["status"]).read_text()))
        except FileNotFoundError:
            return {}

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL; nothing of it is left when this returns."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def terminate(self, within: float) -> None:
        """SIGTERM, and the orderly end."""
        self.process.terminate()
        async with asyncio.timeout(within):
            code = await self.process.wait()
        assert code == 0, code


@asynccontextmanager
async def worker(settings: dict[str, Any]) -> AsyncIterator[Worker]:
    """A worker process, killed at the end."""
    made = Worker(settings)
    await made.start()
    try:
        yield made
    finally:
        if made.process.returncode is None:
            made.signal(signal.SIGCONT)
        await made.kill()

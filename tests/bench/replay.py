"""Replays: units judged against a bare client of the same server, frames cut anew, and what live windows notice of it.

The planner is the one of `rewatch replay run`, the process that judges is analyze's, which judges units beside live
windows, behind the same gate. Nothing is reused: no sink runs, so ClickHouse knows of no verdict.
"""

import asyncio
import contextlib
import io
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import fastavro
import httpx
import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import ConsumerRecord

from infra import replays
from infra.config import load
from infra.local.stack import LocalStack
from infra.replays import Office
from processors.batch.settings import WindowsSettings
from processors.replay.cut import Cut
from processors.replay.plan import Bound, Change, Plan, Scope
from processors.replay.planner import EndedError
from processors.sink.stage import SinkStage
from processors.store.queries import Queries
from schemas import avro_schemas, ids, prompts
from schemas.records import Box, Context, Detections, RiskEvent
from streams import codec
from streams.messages import Incoming, Tick
from streams.stages import Range
from streams.topics import partition_of
from tests.bench import analyze, kit
from tests.bench.figure import Figure, Pair, rate

NAMES = ("replay_vs_bare", "threshold_replay", "replay_live_p95")


class Size(NamedTuple):
    """How much is measured."""

    frames: int
    """Of one cut: some six hours of four cameras at one frame a second."""
    windows: int
    """Of one replay: twenty seconds of judging on two cores; a short one would measure its beginning."""
    live: int
    """Live windows of one half."""
    pairs: int


FULL = Size(frames=80_000, windows=800, live=60, pairs=3)
QUICK = Size(frames=400, windows=12, live=6, pairs=1)

# Live windows come at a fifth of what the server can do on two cores: the installation is not busy, and is replaying.
_LIVE_EVERY_S = 0.2
# Windows that the replay beside them never comes to the end of.
_BESIDE = 20
_BESIDE_PREFIX = "beside"
_TIMEOUT_S = 300.0
_CAMERAS = kit.PARTITIONS


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """The three figures.

    Raises:
        AssertionError: a window was not judged, or the cut has not the windows that it must have.
    """
    size = QUICK if quick else FULL
    cut = await _cut(stack, size, lambda done: progress(0.3 * done))
    home = await kit.install(stack)
    async with httpx.AsyncClient(base_url=stack.llm_url, trust_env=False) as client:
        slots = int((await client.get("/props")).raise_for_status().json()["total_slots"])
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
    await kit.begin_at_the_end(home, "analyze", ["contexts"])
    await kit.begin_at_the_end(home, "replay", ["replay_units", "contexts"])
    windows = analyze.contexts(size.windows)
    async with kit.database(stack) as store:
        beside_them = [other for number in range(_BESIDE) for other in _others(windows, f"{_BESIDE_PREFIX}{number}")]
        await _keep(SinkStage(store), [*windows, *beside_them])
        sections = {
            # As the embedded server has it where there is no GPU.
            "llm": {"url": stack.llm_url, "slots": slots, "live_alone": True},
            "clickhouse": {"url": stack.clickhouse_url, "database": store.connection.settings.database},
        }
        async with kit.running(home, "analyze", **sections) as config, _office(config) as office:
            bench = _Bench(home, office, windows, beside_them)
            await bench.replay(min(8, size.windows // 2))  # the process takes its partitions, and knows the prompt
            bodies = [analyze.body(window, model) for window in windows]
            await analyze.bare_rate(stack.llm_url, bodies, slots)
            pairs = await kit.in_pairs(
                lambda: bench.replay(size.windows),
                lambda: analyze.bare_rate(stack.llm_url, bodies, slots),
                size.pairs,
                lambda done: progress(0.3 + 0.35 * done),
            )
            await bench.live(min(4, size.live))
            beside = await kit.in_pairs(
                lambda: bench.live(size.live),
                lambda: bench.live_beside_a_replay(size.live),
                size.pairs,
                lambda done: progress(0.65 + 0.35 * done),
            )
    return [rate("replay_vs_bare", pairs, "windows/s", 0.95), cut, _latency(beside)]


def _latency(pairs: Sequence[Pair]) -> Figure:
    """Of pairs without and with a replay; at most half as long again is wanted."""
    alone = statistics.median(alone for alone, _ in pairs)
    beside = statistics.median(beside for _, beside in pairs)
    ratio = statistics.median(alone / beside for alone, beside in pairs)
    return Figure("replay_live_p95", beside, alone, ratio, "ms", 1 / 1.5, tuple(pairs))


# Cutting.


async def _cut(stack: LocalStack, size: Size, progress: Callable[[float], None]) -> Figure:
    """Frames a second from ClickHouse to contexts; the baseline has them in memory, and only decodes them."""
    log = list(_footage(size.frames))
    async with kit.database(stack) as store, aclosing(Queries(store.connection.settings)) as queries:
        sink = SinkStage(store)
        for partition in range(kit.PARTITIONS):
            mine = [record for record in log if record.partition == partition]
            for start in range(0, len(mine), 5000):
                part = mine[start : start + 5000]
                await sink.insert(Range("detections", "bench", partition, part[0].offset, part[-1].offset), part)
        upto = tuple(
            Bound(topic="detections", epoch="bench", partition=partition, offset=len(log))
            for partition in range(kit.PARTITIONS)
        )
        plan = Plan(kind="change", change=Change(threshold=0.6), scope=Scope(), upto=upto)
        values = [record.value for record in log if record.value is not None]
        schema = avro_schemas.current("detections")

        async def product() -> float:
            cut = Cut(queries, plan, WindowsSettings().record())
            began = time.perf_counter()
            count = 0
            async with aclosing(cut.windows()) as windows:
                async for _ in windows:
                    count += 1
            took = time.perf_counter() - began
            assert count
            assert (cut.records, cut.skipped.count) == (len(log), 0)
            return size.frames / took

        async def bare() -> float:
            began = time.perf_counter()
            for value in values:
                body = io.BytesIO(value)
                body.seek(5)
                fastavro.schemaless_reader(body, schema, None)
            return size.frames / (time.perf_counter() - began)

        pairs = await kit.in_pairs(product, bare, size.pairs, progress)
    return rate("threshold_replay", pairs, "frames/s")


def _footage(count: int) -> Iterator[Incoming]:
    """Detections of a camera a partition, a frame a second: a parked car, now and then somebody for half a minute."""
    chance = random.Random("footage")
    begins, offset = 1_780_000_000_000, 0
    until = [0] * _CAMERAS
    for number in range(count // _CAMERAS):
        for camera in range(_CAMERAS):
            if chance.random() < 1 / 300:
                until[camera] = number + 30
            boxes = [_box("car", 0.8, 400)]
            if number < until[camera]:
                boxes += [_box("person", round(chance.uniform(0.4, 0.99), 4), chance.randrange(300)) for _ in range(2)]
            boxes += [_box("chair", round(chance.uniform(0.1, 0.4), 4), chance.randrange(500)) for _ in range(3)]
            at = begins + 1000 * number
            name = f"camera-{camera}"
            made = codec.emit(
                "detections",
                Detections(
                    frame_id=f"{ids.frame_id(name, f'{number:064x}', at)}",
                    camera_id=name,
                    captured_at=at,
                    arrived_at=at + 500,
                    width=640,
                    height=360,
                    boxes=tuple(boxes),
                    model="bench",
                    model_digest="0" * 64,
                    runtime="torch-cpu",
                    inference_ms=15.0,
                    detected_at=at + 600,
                ),
            )
            yield Incoming("detections", "bench", camera, offset, made.key, made.value, made.headers)
            offset += 1
    for camera in range(_CAMERAS):
        tick = Tick(begins + 1000 * count, f"camera-{camera}").emit("detections")
        yield Incoming("detections", "bench", camera, offset, tick.key, None, tick.headers)
        offset += 1


def _box(label: str, score: float, x: float) -> Box:
    return Box(label=label, score=score, x=float(x), y=50.0, width=60.0, height=160.0)


# Judging.


class _Bench:
    """Replays and live windows of one installation."""

    def __init__(
        self, home: kit.Installation, office: Office, windows: Sequence[Context], beside: Sequence[Context]
    ) -> None:
        self._home = home
        self._office = office
        self._windows = windows
        self._beside = beside
        self._number = 0

    async def replay(self, count: int) -> float:
        """Units judged a second, from the first result that readers see to the last."""
        sample = count if count < len(self._windows) else None
        plan = await self._plan(1.0, self._windows, sample)
        async with self._reader("replay_events") as reader, asyncio.timeout(_TIMEOUT_S):
            running = asyncio.create_task(self._run(plan, asyncio.Event()))
            times: list[float] = []
            while len(times) < count:
                found = await _some(reader)
                times += [time.perf_counter()] * len(found)
                assert not running.done() or len(times) == count or not running.exception()
            await running
        later = count - times.count(times[0])
        assert later, "all results became visible at once: judge more windows"
        return later / (times[-1] - times[0])

    async def live(self, count: int) -> float:
        """95th percentile of the time from a window on the log to its event, milliseconds."""
        self._number += 1
        windows = _others(self._windows[:count], f"live{self._number}")
        seen: dict[str, float] = {}
        sent: dict[str, float] = {}
        async with self._reader("risk_events") as reader, asyncio.timeout(_TIMEOUT_S):
            sending = asyncio.create_task(self._send(windows, sent))
            while len(seen) < len(windows):
                for record in await _some(reader):
                    seen.setdefault(_batch_of(record), time.perf_counter())
            await sending
        waits = sorted(1000 * (seen[batch] - at) for batch, at in sent.items())
        return waits[min(len(waits) - 1, int(0.95 * len(waits)))]

    async def live_beside_a_replay(self, count: int) -> float:
        """The same, while a replay holds half of the slots."""
        stop = asyncio.Event()
        async with self._reader("replay_events") as reader:
            running = asyncio.create_task(self._run(await self._plan(0.5, self._beside), stop))
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    while not await _some(reader):
                        assert not running.done()
                found = await self.live(count)
                assert not running.done(), "the replay came to its end before the live windows"
            finally:
                stop.set()
                with contextlib.suppress(EndedError):
                    await running
        return found

    async def _plan(self, share: float, windows: Sequence[Context], sample: int | None = None) -> Plan:
        """A replay of these windows, or of so many of them."""
        scope = Scope(cameras=tuple(sorted({window.camera_id for window in windows})), sample=sample)
        change = Change(prompt=prompts.default().digest)
        return await self._office.drawn(Plan(kind="change", share=share, change=change, scope=scope))

    async def _run(self, plan: Plan, stop: asyncio.Event) -> None:
        self._number += 1
        made = await self._office.make(f"bench-{self._number}", plan)
        planner, _, _ = await self._office.planner(made, workers=1, show=lambda _: None, stop=stop)
        await planner.run()

    @asynccontextmanager
    async def _reader(self, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
        async with self._home.kafka.reading(auto_offset_reset="latest") as reader:
            reader.assign(kit.partitions_of(topic))
            await reader.seek_to_end()
            await asyncio.gather(*map(reader.position, kit.partitions_of(topic)))
            yield reader

    async def _send(self, windows: Sequence[Context], sent: dict[str, float]) -> None:
        producer = self._home.kafka.producer(linger_ms=0)
        await producer.start()
        try:
            for window in windows:
                made = codec.emit("contexts", window)
                sent[window.batch_id] = time.perf_counter()
                await producer.send_and_wait(
                    made.topic, made.value, key=made.key, partition=window.batch.partition, headers=list(made.headers)
                )
                await asyncio.sleep(_LIVE_EVERY_S)
        finally:
            await producer.stop()


async def _some(reader: AIOKafkaConsumer) -> "list[ConsumerRecord[bytes, bytes]]":
    return [record for records in (await reader.getmany(timeout_ms=200)).values() for record in records]


def _batch_of(record: "ConsumerRecord[bytes, bytes]") -> str:
    return codec.decode_bytes("risk_events", record.value, None, RiskEvent).batch_id


def _others(windows: Sequence[Context], prefix: str) -> list[Context]:
    """The same windows of other cameras."""
    return [_of_camera(window, f"{prefix}-{window.camera_id}") for window in windows]


def _of_camera(window: Context, camera: str) -> Context:
    batch = window.batch
    made = msgspec.structs.replace(
        batch,
        batch_id=ids.batch_id(camera, [frame.frame_id for frame in batch.frames]),
        camera_id=camera,
        partition=partition_of(camera, kit.PARTITIONS),
    )
    return msgspec.structs.replace(window, batch_id=made.batch_id, camera_id=camera, batch=made)


async def _keep(sink: SinkStage, windows: Sequence[Context]) -> None:
    """Store contexts as the sink does."""
    for partition in range(kit.PARTITIONS):
        made = [codec.emit("contexts", window) for window in windows if window.batch.partition == partition]
        records = [
            Incoming("contexts", "bench", partition, offset, emit.key, emit.value, emit.headers)
            for offset, emit in enumerate(made)
        ]
        for start in range(0, len(records), 1000):
            part = records[start : start + 1000]
            await sink.insert(Range("contexts", "bench", partition, part[0].offset, part[-1].offset), part)


@asynccontextmanager
async def _office(config: Path) -> AsyncIterator[Office]:
    async with replays.office(load(config)) as office:
        yield office

"""Records a second from the log into ClickHouse: the sink on its host against a bare consumer of the same records.

The records are frames with their image inside and the detections made of them, the two kinds that are by far the most.
Either side is up and has caught up when the backlog appears; the clock stops at the last committed position.
"""

import asyncio
import io
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import fastavro
from aiokafka import AIOKafkaConsumer, TopicPartition
from clickhouse_connect.datatypes.registry import get_from_name
from clickhouse_connect.driver.asyncclient import AsyncClient

from infra.local.stack import LocalStack
from processors.sink.stage import LINGER_S, SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from schemas import avro_schemas
from schemas.records import Box, Detections
from streams import codec
from streams.host_raw import RawHost
from streams.messages import Emit
from streams.partition import BUFFER_BYTES, BUFFER_RECORDS
from streams.stages import Range
from tests.bench import kit
from tests.bench.figure import Figure, rate

NAMES = ("sink_vs_bare",)
AIM = 0.8
PAIRS = 5

TOPICS = ("frames", "detections")

# Of each topic: 100 MB of frames, some thirty ranges of 8 MB, a few seconds of work.
RECORDS = 3000
QUICK_RECORDS = 40

_Rows = dict[str, list[Any]]


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """The stage as it is shipped, on the raw host, against a consumer without fence, pending ranges or retries."""
    count = QUICK_RECORDS if quick else RECORDS
    images = kit.scenes(8)
    pairs = await kit.in_pairs(
        lambda: _half(stack, _product, images, count),
        lambda: _half(stack, _bare, images, count),
        1 if quick else PAIRS,
        progress,
    )
    return [rate("sink_vs_bare", pairs, "records/s", AIM)]


class _Side(NamedTuple):
    reached: Callable[[Mapping[TopicPartition, int]], Any]
    """Waits until these positions are committed."""


async def _half(stack: LocalStack, side: Any, images: Sequence[bytes], count: int) -> float:
    home = await kit.install(stack)
    async with _database(stack) as database, side(home, database) as running:
        async with kit.backlog(home.kafka, _records(images, 4 * kit.PARTITIONS)) as warm_up:
            await warm_up.show()
            await running.reached(warm_up.positions)
        async with kit.backlog(home.kafka, _records(images, count)) as work:
            await work.show()
            began = time.perf_counter()
            await running.reached(work.positions)
            seconds = time.perf_counter() - began
        await _check(database, count + 4 * kit.PARTITIONS)
    return 2 * count / seconds


@asynccontextmanager
async def _database(stack: LocalStack) -> AsyncIterator[ClickHouseSettings]:
    """A migrated database for one half, so that each inserts into tables of the same size: empty ones."""
    settings = ClickHouseSettings(url=stack.clickhouse_url, database=f"bench_{secrets.token_hex(4)}")
    store = ClickHouseStore(settings)
    await store.migrate()
    try:
        yield settings
    finally:
        await (await store.connection.client()).command(f"DROP DATABASE {settings.database} SYNC")
        await store.close()


async def _check(database: ClickHouseSettings, count: int) -> None:
    """A rate says nothing unless every row is there, once."""
    store = ClickHouseStore(database)
    client = await store.connection.client()
    for topic in TOPICS:
        for query in (f"SELECT count() FROM {topic}", f"SELECT count() FROM log WHERE topic = '{topic}'"):
            found = int(str(await client.command(query)))
            assert found == count, f"{query}: {found}, not {count}"
    await store.close()


def _records(images: Sequence[bytes], count: int) -> list[Emit]:
    emits: list[Emit] = []
    for partition, frame in kit.frames(images, count):
        seen = Detections(
            frame_id=frame.frame_id,
            camera_id=frame.camera_id,
            captured_at=frame.captured_at,
            arrived_at=frame.arrived_at,
            width=640,
            height=360,
            boxes=tuple(
                Box(label="person", score=0.9 - i / 10, x=10.5 * i, y=20.0, width=80.0, height=160.0) for i in range(8)
            ),
            model="demo",
            model_digest="d" * 64,
            runtime="torch-cpu",
            inference_ms=12.5,
            detected_at=frame.arrived_at + 100,
        )
        emits += [codec.emit("frames", frame, partition), codec.emit("detections", seen, partition)]
    return emits


@asynccontextmanager
async def _product(home: kit.Installation, database: ClickHouseSettings) -> AsyncIterator[_Side]:
    stage = SinkStage(ClickHouseStore(database))
    await kit.begin_at_the_end(home, stage.name, stage.inputs)
    host = RawHost(home.kafka, stage, epochs=home.epochs)
    stop = asyncio.Event()
    running = asyncio.create_task(host.run(stop))
    try:
        yield _Side(lambda positions: kit.reached(host.workers.liveness, positions))
    finally:
        stop.set()
        await running


@asynccontextmanager
async def _bare(home: kit.Installation, database: ClickHouseSettings) -> AsyncIterator[_Side]:
    begin = await kit.begin_at_the_end(home, "bare", TOPICS)
    store = ClickHouseStore(database)
    client = await store.connection.client()
    consumer = home.kafka.consumer(group_id=home.kafka.group("bare"))
    await consumer.start()
    consumer.assign(list(begin))
    for tp, offset in begin.items():
        consumer.seek(tp, offset)
    types = {table: await _types(client, table) for table in ("log", "sink_progress", *TOPICS)}
    partitions = {tp: _BarePartition(consumer, client, types, tp, home.epochs(tp.topic)) for tp in begin}
    tasks = [asyncio.create_task(partition.run()) for partition in partitions.values()]

    async def reached(positions: Mapping[TopicPartition, int]) -> None:
        while any(partitions[tp].position < at for tp, at in positions.items()):
            for task in tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.005)

    try:
        yield _Side(reached)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await consumer.stop()
        await store.close()


async def _types(client: AsyncClient, table: str) -> dict[str, Any]:
    found = await client.query(
        "SELECT name, type FROM system.columns WHERE database = currentDatabase() AND table = {table:String}",
        {"table": table},
    )
    return {name: get_from_name(kind) for name, kind in found.result_rows}


class _BarePartition:
    """Fetch, decode, insert, commit; ranges are cut as the sink cuts them: 1,000 records, 8 MB, or half a second."""

    def __init__(
        self, consumer: AIOKafkaConsumer, client: AsyncClient, types: Mapping[str, Any], tp: TopicPartition, epoch: str
    ) -> None:
        self._consumer = consumer
        self._client = client
        self._types = types
        self._tp = tp
        self._epoch = epoch
        self._schema = avro_schemas.current(tp.topic)
        self._fingerprint = avro_schemas.fingerprint(tp.topic)
        self.position = 0

    async def run(self) -> None:
        topic, partition = self._tp.topic, self._tp.partition
        while True:
            records = await self._take()
            if not records:
                continue
            plain = [self._decode(record) for record in records]
            span = Range(topic, self._epoch, partition, records[0].offset, records[-1].offset)
            await self._insert("log", self._log(records), span)
            await self._insert(topic, {**self._typed(plain), **self._where(records)}, span)
            progress = {**span._asdict(), "rows": len(records), "ticks": 0, "undecodable": 0}
            await self._insert("sink_progress", {name: [value] for name, value in progress.items()}, span)
            await self._consumer.commit({self._tp: span.hi + 1})
            self.position = span.hi + 1

    async def _take(self) -> list[Any]:
        records: list[Any] = []
        until = None
        size = 0
        while len(records) < BUFFER_RECORDS and size < BUFFER_BYTES:
            left = 1.0 if until is None else until - time.monotonic()
            if left <= 0:
                break
            found = await self._consumer.getmany(
                self._tp, timeout_ms=int(left * 1000), max_records=BUFFER_RECORDS - len(records)
            )
            for record in found.get(self._tp, ()):
                records.append(record)
                size += len(record.value)
            if records and until is None:
                until = time.monotonic() + LINGER_S
        return records

    def _decode(self, record: Any) -> dict[str, Any]:
        fingerprint = next(value for name, value in record.headers if name == "fp")
        assert fingerprint == self._fingerprint, "the schema that it was written with"
        body = io.BytesIO(record.value)
        body.seek(5)
        plain: dict[str, Any] = fastavro.schemaless_reader(body, self._schema, None)  # type: ignore[assignment]
        return plain

    def _where(self, records: Sequence[Any]) -> _Rows:
        n = len(records)
        return {
            "epoch": [self._epoch] * n,
            "partition": [self._tp.partition] * n,
            "offset": [record.offset for record in records],
        }

    def _log(self, records: Sequence[Any]) -> _Rows:
        n = len(records)
        return {
            "topic": [self._tp.topic] * n,
            **self._where(records),
            "key": [record.key for record in records],
            "value": [record.value for record in records],
            "headers": [list(record.headers) for record in records],
            "fingerprint": [self._fingerprint.hex()] * n,
            "source": [b""] * n,
            "tick": [False] * n,
            "decode_error": [""] * n,
        }

    def _typed(self, plain: Sequence[dict[str, Any]]) -> _Rows:
        columns: _Rows = {}
        for name in plain[0]:
            if name == "image":
                columns["inline"] = [record["image"] is not None for record in plain]
            elif name == "boxes":
                for field in ("label", "score", "x", "y", "width", "height"):
                    columns[f"boxes.{field}"] = [[box[field] for box in record["boxes"]] for record in plain]
            else:
                columns[name] = [record[name] for record in plain]
        return columns

    async def _insert(self, table: str, rows: _Rows, span: Range) -> None:
        types = self._types[table]
        await self._client.insert(
            table,
            list(rows.values()),
            column_names=list(rows),
            column_types=[types[name] for name in rows],
            column_oriented=True,
            settings={"insert_deduplication_token": span.token(table), "async_insert": 0, "insert_deduplicate": 1},
        )

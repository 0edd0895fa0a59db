"""What the matrix of bad input is made of: images that are none, a look at a running installation, and its audit."""

import asyncio
import io
import itertools
import re
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import clickhouse_connect
import httpx
from aiokafka import AIOKafkaProducer, TopicPartition
from PIL import Image

from infra.config import Settings
from infra.installation import Installation
from schemas.records import Camera, DeadLetter, Detections, Record, RiskEvent
from streams import codec
from streams.admin import read_meta
from streams.control import Cameras
from streams.kafka import Kafka, incoming
from streams.messages import Headers, Incoming, Tick
from streams.topics import STORED, TOPICS, partition_of
from tests.e2e.installation import PARTITIONS, Audit, pictures, stamped

KEY = "the-matrix-s-key"
MAX_BYTES = 400_000
PATIENCE_S = 20.0


def jpeg(size: tuple[int, int] = (320, 180), mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG of one colour."""
    out = io.BytesIO()
    Image.new(mode, size, 90).save(out, "JPEG", **options) if mode == "L" else Image.new(mode, size).save(
        out, "JPEG", **options
    )
    return out.getvalue()


def resized(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG, its header (SOF0, ITU T.81 B.2.2) claiming another size."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def exif(body: bytes, data: bytes) -> bytes:
    """The same JPEG with these bytes as its EXIF, in as many APP1 segments as they need."""
    parts = [b"Exif\0\0" + body[i : i + 65_000] for i in range(0, len(body), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
    return data[:2] + segments + data[2:]


def exif_bomb(data: bytes) -> bytes:
    """20,000 EXIF entries that each claim to be 260 KB long: 5 GB, were they believed."""
    count, size = 20_000, 260_000
    entries = b"".join(struct.pack("<HHLL", 0x1000 + number, 1, size, 0) for number in range(count))
    return exif((b"II*\0" + struct.pack("<LH", 8, count) + entries).ljust(size, b"A"), data)


def exif_loop(data: bytes) -> bytes:
    """An EXIF directory that is its own sub-directory, and its own successor."""
    return exif(b"II*\0" + struct.pack("<LHHHLLL", 8, 1, 0x8769, 4, 1, 8, 8), data)


def scans(data: bytes, count: int) -> bytes:
    """The same picture with its one scan again and again: a few kilobytes that ask for minutes."""
    at = data.index(b"\xff\xda")
    return data[:at] + data[at:-2] * count + data[-2:]


class Watch:
    """A running installation as a sceptic looks at it: its doors, its log, its tables, its processes.

    Rows register what they expect (`expect_letter`, `expect_unreadable`); at the end `unexplained` says what nobody
    expected, what was expected and did not come, and what was lost or doubled.
    """

    def __init__(self, installation: Installation, shots: Sequence[bytes]) -> None:
        self.settings: Settings = installation.settings
        self.installation = installation
        self.kafka = Kafka(self.settings.kafka)
        self.http = httpx.AsyncClient(
            base_url=self.settings.ingest.upload.url, timeout=30, headers={"X-API-Key": KEY}
        )
        self.inbox: Path = self.settings.ingest.folder.root
        self.records: dict[str, list[Incoming]] = {topic: [] for topic in STORED}
        self.accepted: dict[str, str] = {}
        """Frames that a door said it took: frame_id to camera."""
        self.letters: set[str] = set()
        """Origins of the dead letters that rows expect."""
        self.unreadable: set[tuple[str, int, int]] = set()
        """Positions of the records that rows made unreadable."""
        self.refused: set[tuple[str, int, int]] = set()
        """Positions of the records that a stage must refuse, readable or not."""
        self._shots = itertools.cycle(shots)
        self._clock = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
        self._news = asyncio.Condition()
        self._epochs: dict[str, str] = {}
        self._pids: dict[str, int | None] = {}
        self.producer: AIOKafkaProducer

    @asynccontextmanager
    async def looking(self) -> AsyncIterator["Watch"]:
        """Follow the log until exit."""
        self._epochs = {topic: meta.epoch for topic, meta in (await read_meta(self.kafka)).items()}
        self._pids = self._processes()
        self.producer = self.kafka.producer()
        await self.producer.start()
        follower = asyncio.create_task(self._follow())
        try:
            yield self
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
            await self.producer.stop()
            await self.http.aclose()

    async def _follow(self) -> None:
        tps = [
            TopicPartition(topic, number)
            for topic in STORED
            for number in range(1 if TOPICS[topic].single else PARTITIONS)
        ]
        async with self.kafka.reading(fetch_max_wait_ms=50) as consumer:
            consumer.assign(tps)
            for tp in tps:
                consumer.seek(tp, 0)
            while True:
                found = await consumer.getmany(timeout_ms=1000)
                async with self._news:
                    for tp, records in found.items():
                        self.records[tp.topic] += [incoming(record, self._epochs[tp.topic]) for record in records]
                    self._news.notify_all()

    def _processes(self) -> dict[str, int | None]:
        state = self.installation.stack.supervisor.state()["processes"]
        return {name: process["pid"] for name, process in state.items()}

    # Doors

    def good(self) -> bytes:
        """A good frame: a person, a second after the last one."""
        self._clock += timedelta(seconds=1)
        return stamped(next(self._shots), self._clock)

    async def upload(self, camera: str, body: bytes, **parameters: str) -> httpx.Response:
        """Upload; what is taken is held against the installation at the end."""
        answer = await self.http.post("/api/upload", params={"camera": camera, **parameters}, content=body)
        return self.taken(camera, answer)

    def taken(self, camera: str, answer: httpx.Response) -> httpx.Response:
        """Note a frame that was taken."""
        if answer.status_code == 200:
            self.accepted[answer.json()["frame_id"]] = camera
        return answer

    def drop(self, camera: str, name: str, body: bytes) -> Path:
        """Put a file into a camera's folder, whole at once."""
        path = self.inbox / camera / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(body)
        return part.rename(path)

    async def produce(
        self, topic: str, value: bytes | None, *, camera: str, key: bytes | None = b"", headers: Headers = ()
    ) -> Incoming:
        """Append a record as a stranger would, to the camera's partition; `key` is the camera's unless given."""
        partition = 0 if TOPICS[topic].single else self.partition(camera)
        key = camera.encode() if key == b"" else key
        done = await self.producer.send_and_wait(topic, value, key=key, headers=list(headers), partition=partition)
        return Incoming(topic, self._epochs[topic], partition, done.offset, key, value, headers)

    def partition(self, camera: str) -> int:
        """The camera's partition on every topic."""
        return partition_of(camera, PARTITIONS)

    async def forge(self, topic: str, record: Record, *, camera: str, key: bytes | None = b"") -> Incoming:
        """Append a readable record that no stage of ours would make."""
        made = codec.emit(topic, record)
        return await self.produce(topic, made.value, camera=camera, key=key, headers=made.headers)

    # What became of it

    async def until(self, found: Callable[[], Any], what: str, *, within: float = PATIENCE_S) -> Any:
        """What `found` finds on the log, as soon as it finds something."""
        deadline = time.monotonic() + within
        async with self._news:
            while not (result := found()):
                left = deadline - time.monotonic()
                assert left > 0, f"{what} did not come within {within:g} s; {self.state()}"
                try:
                    async with asyncio.timeout(min(left, 1.0)):
                        await self._news.wait()
                except TimeoutError:
                    continue
        return result

    async def eventually(self, found: Callable[[], Any], what: str, *, within: float = PATIENCE_S) -> Any:
        """What `found` finds elsewhere (files, tables, logs), looked for again and again."""
        deadline = time.monotonic() + within
        while not (result := await asyncio.to_thread(found)):
            assert time.monotonic() < deadline, f"{what} did not come within {within:g} s; {self.state()}"
            await asyncio.sleep(0.1)
        return result

    def decoded(self, topic: str, kind: type[Any]) -> list[Any]:
        """A topic's readable records so far."""
        found = []
        for record in self.records[topic]:
            if Tick.of(record) is None:
                try:
                    found.append(codec.decode(record, kind))
                except codec.DecodeError:
                    continue
        return found

    async def letter(self, record: Incoming, stage: str) -> DeadLetter:
        """The record's dead letter by that stage, which must name its origin and keep its bytes."""
        self.refused.add((record.topic, record.partition, record.offset))
        self.letters.add(record.origin)
        letter: DeadLetter = await self.until(
            lambda: next((one for one in self.decoded("dead_letters", DeadLetter) if one.origin == record.origin), None),
            f"the dead letter of {record.origin}",
        )
        assert (letter.stage, letter.kind, letter.attempt) == (stage, "error", 1), letter
        if letter.claim is None:
            assert (letter.key, letter.value) == (record.key, record.value)
            assert tuple(letter.headers.items()) == record.headers
        else:
            assert letter.claim == f"log:{record.origin}", "the log itself keeps the bytes"
        return letter

    async def rejection(self, camera: str, name: str) -> DeadLetter:
        """The dead letter of a file that was rejected."""
        start = f"folder:{camera}/{name}@"
        letter: DeadLetter = await self.until(
            lambda: next((x for x in self.decoded("dead_letters", DeadLetter) if x.origin.startswith(start)), None),
            f"the dead letter of {camera}/{name}",
        )
        self.letters.add(letter.origin)
        return letter

    async def unread(self, *records: Incoming) -> list[str]:
        """The records' `log.decode_error` in ClickHouse, beside bytes, key and headers as they were sent."""
        rows = []
        for record in records:
            self.unreadable.add((record.topic, record.partition, record.offset))
            row = await self.eventually(lambda record=record: self.log_row(record), f"log row of {record.origin}")
            key, value, headers, error = row
            assert (key, value) == (record.key, record.value)
            assert [tuple(header) for header in headers] == list(record.headers)
            assert error
            rows.append(error)
        return rows

    def log_row(self, record: Incoming) -> tuple[Any, ...] | None:
        """Key, value, headers and decode_error of one record in ClickHouse's log, bytes as bytes."""
        found = self.sql(
            "SELECT hex(key), isNull(key), hex(value), isNull(value), "
            "arrayMap(h -> (h.1, hex(h.2)), headers), decode_error FROM log FINAL "
            "WHERE topic = {topic:String} AND partition = {partition:Int32} AND offset = {offset:Int64}",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
        )
        if not found:
            return None
        key, no_key, value, no_value, headers, error = found[0]
        return (
            None if no_key else bytes.fromhex(key),
            None if no_value else bytes.fromhex(value),
            [(name, bytes.fromhex(text)) for name, text in headers],
            error,
        )

    def sql(self, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of a question to ClickHouse."""
        client = clickhouse_connect.get_client(
            dsn=self.settings.clickhouse.url, database=self.settings.clickhouse.database
        )
        try:
            return [tuple(row) for row in client.query(query, parameters).result_rows]
        finally:
            client.close()

    def said(self, process: str, pattern: str) -> bool:
        """Whether the process's log has a line that matches."""
        text = (self.settings.data_dir / "logs" / f"{process}.log").read_text(errors="replace")
        return re.search(pattern, text) is not None

    def state(self) -> dict[str, Any]:
        """What stages wait on, for whoever reads a failure."""
        found = {}
        for path in (self.settings.data_dir / "status").glob("*.json"):
            found[path.stem] = path.read_text(errors="replace")[:300]
        return found

    # Going on

    async def goes_on(self, camera: str, *, judged: bool = False) -> None:
        """A good frame of the camera is detected, with `judged` its window judged too, and nothing was restarted."""
        answer = await self.upload(camera, await asyncio.to_thread(self.good))
        assert answer.status_code == 200, answer.text
        frame_id = answer.json()["frame_id"]
        await self.until(
            lambda: any(seen.frame_id == frame_id for seen in self.decoded("detections", Detections)),
            f"the detections of a good frame of {camera}",
        )
        if judged:
            await self.end(camera)
            await self.until(
                lambda: any(frame_id in event.frame_ids for event in self.decoded("risk_events", RiskEvent)),
                f"the verdict on a good frame of {camera}",
                within=60,
            )
        assert self._processes() == self._pids, "a process was restarted"

    async def end(self, *cameras: str) -> None:
        """No more will come of these cameras: their windows close."""
        for camera in cameras:
            tick = Tick(int(time.time() * 1000), camera).emit("frames", self.partition(camera))
            await self.producer.send_and_wait(
                tick.topic, key=tick.key, value=None, headers=list(tick.headers), partition=tick.partition
            )

    async def camera(self, camera: str) -> Camera:
        """What is set for the camera; made if it is not there."""
        cameras = Cameras(self.kafka, self.settings.windows.record(), self.settings.time_zone)
        return await cameras.ensure(camera)

    async def unexplained(self) -> list[str]:
        """Everything on the log and in ClickHouse that no row explains, and everything that is missing there."""
        audit = _Audit(self)
        await audit.read()
        letters = [letter.origin for letter in audit.decoded("dead_letters")]
        found = [f"dead letter of {origin} that no row expects" for origin in letters if origin not in self.letters]
        found += [f"no dead letter of {origin}" for origin in sorted(self.letters - set(letters))]
        found += [f"{letters.count(origin)} dead letters of {origin}" for origin in self.letters & set(letters) if letters.count(origin) > 1]
        found += audit.violations(self.accepted)
        rows = await asyncio.to_thread(
            self.sql, "SELECT topic, partition, offset, decode_error FROM log FINAL WHERE decode_error != ''"
        )
        found += [f"unreadable in `log`: {row}" for row in rows if row[:3] not in self.unreadable]
        found += await asyncio.to_thread(audit.violations_in_clickhouse)
        return found


class _Audit(Audit):
    """The audit of an installation that was fed with bad records: what a stage refused made nothing."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(watch.settings)
        self._watch = watch
        self._leave_out = watch.unreadable

    def decoded(self, topic: str) -> list[Any]:
        return [
            codec.decode(record, TOPICS[topic].record)
            for record in self.records[topic]
            if (topic, record.partition, record.offset) not in self._leave_out
        ]

    def violations(self, accepted: dict[str, str]) -> list[str]:
        self._leave_out = self._watch.unreadable | self._watch.refused
        try:
            return super().violations(accepted)
        finally:
            self._leave_out = self._watch.unreadable


def shots() -> list[bytes]:
    """The good frames."""
    return pictures(6)

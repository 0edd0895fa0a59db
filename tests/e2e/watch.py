"""A running installation as a sceptic looks at it: its doors, its log, its tables, its processes; and its audit."""

import asyncio
import contextlib
import hashlib
import io
import re
import time
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import clickhouse_connect
import httpx
from aiokafka import AIOKafkaProducer, TopicPartition
from PIL import Image, ImageChops

from infra.cli.show import collect
from infra.config import Settings
from infra.installation import Installation
from schemas.records import Camera, DeadLetter, Frame, Record, RiskEvent
from streams import codec
from streams.admin import read_meta
from streams.control import Cameras
from streams.kafka import Kafka, incoming
from streams.messages import Headers, Incoming, Tick
from streams.topics import STORED, TOPICS, partition_of
from tests.e2e.installation import PARTITIONS, Audit, stamped

PATIENCE_S = 20.0
"""How long a result may take on a busy machine; rows ask for it by events, so none waits this long."""


class Watch:
    """What a test may do to a running installation, and see of it.

    `letter`, `rejection` and `unread` note what a test expected; at the end `unexplained` says what nobody expected,
    what was expected and did not come, and what was lost or doubled.
    """

    def __init__(self, installation: Installation, shots: Sequence[bytes], key: str) -> None:
        self.settings: Settings = installation.settings
        self.installation = installation
        self.kafka = Kafka(self.settings.kafka)
        self.http = httpx.AsyncClient(base_url=self.settings.ingest.upload.url, timeout=30, headers={"X-API-Key": key})
        self.inbox: Path = self.settings.ingest.folder.root
        self.records: dict[str, list[Incoming]] = {topic: [] for topic in STORED}
        self._read: dict[str, list[Any]] = {topic: [] for topic in STORED}
        self.accepted: dict[str, str] = {}
        """Frames that a door said it took: frame_id to camera."""
        self.letters: set[str] = set()
        """Origins of the dead letters that rows expect."""
        self.unreadable: set[tuple[str, int, int]] = set()
        """Positions of the records that rows made unreadable."""
        self.refused: set[tuple[str, int, int]] = set()
        """Positions of the records that a stage must refuse, readable or not."""
        self._shots = shots
        self._shot = 0
        self._clock = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
        self._news = asyncio.Condition()
        self._epochs: dict[str, str] = {}
        self._pids: dict[str, int | None] = {}
        self.producer: AIOKafkaProducer
        self.slow_head: asyncio.Task[tuple[bytes, float]]
        """What became of a connection that began with the module."""
        self.second: httpx.AsyncClient
        """The upload endpoint of a second ingest, where there is one."""

    @asynccontextmanager
    async def looking(self) -> AsyncIterator["Watch"]:
        """Follow the log until exit."""
        self._epochs = await self.epochs()
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
                for tp, records in found.items():
                    for record in records:
                        self._take(incoming(record, self._epochs[tp.topic]))
                async with self._news:
                    self._news.notify_all()

    def _take(self, record: Incoming) -> None:
        self.records[record.topic].append(record)
        if Tick.of(record) is None:
            with contextlib.suppress(codec.DecodeError):
                self._read[record.topic].append(codec.decode(record, TOPICS[record.topic].record))

    def _processes(self) -> dict[str, int | None]:
        state = self.installation.stack.supervisor.state()["processes"]
        return {name: process["pid"] for name, process in state.items()}

    # Doors

    def good(self) -> bytes:
        """A good frame: a person, a second after the last one and elsewhere (who has not moved opens no window)."""
        self._shot += 1
        self._clock += timedelta(seconds=1)
        # By the golden section no two of twenty frames show the same place.
        shot = _turned(self._shots[self._shot % len(self._shots)], self._shot * 0.381966 % 1)
        return stamped(shot, self._clock)

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

    async def append(
        self, topic: str, camera: str, *, key: bytes | None, value: bytes | None, headers: Headers = ()
    ) -> Incoming:
        """Append a record as a stranger would, to the camera's partition."""
        partition = 0 if TOPICS[topic].single else self.partition(camera)
        done = await self.producer.send_and_wait(topic, value, key=key, headers=list(headers), partition=partition)
        return Incoming(topic, self._epochs[topic], partition, done.offset, key, value, headers)

    async def forge(self, topic: str, camera: str, record: Record) -> Incoming:
        """Append a record that can be read, though no stage of ours would make it."""
        made = codec.emit(topic, record)
        return await self.append(topic, camera, key=made.key, value=made.value, headers=made.headers)

    def partition(self, camera: str) -> int:
        """The camera's partition on every topic."""
        return partition_of(camera, PARTITIONS)

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

    def decoded(self, topic: str) -> list[Any]:
        """A topic's readable records so far."""
        return self._read[topic]

    async def record_of(self, topic: str, **fields: Any) -> Any:
        """The first record of a topic with these fields."""
        return await self.until(
            lambda: next(
                (one for one in self._read[topic] if all(getattr(one, name) == fields[name] for name in fields)), None
            ),
            f"a record of {topic} with {fields}",
        )

    async def letter(self, record: Incoming, stage: str) -> DeadLetter:
        """The record's dead letter by that stage, which must name its origin and keep its bytes."""
        self.refused.add((record.topic, record.partition, record.offset))
        self.letters.add(record.origin)
        letter: DeadLetter = await self.record_of("dead_letters", origin=record.origin)
        assert (letter.stage, letter.kind, letter.attempt) == (stage, "error", 1), letter
        if letter.claim is None:
            assert (letter.key, letter.value) == (record.key, record.value)
            assert tuple(letter.headers.items()) == record.headers
        else:
            assert letter.claim == f"log:{record.origin}", "the log itself keeps the bytes"
        return letter

    async def taken_from_folder(self, camera: str, name: str) -> Frame:
        """The frame of a file; it is held against the installation at the end."""
        frame: Frame = await self.record_of("frames", camera_id=camera, source="folder", source_name=name)
        self.accepted[frame.frame_id] = camera
        return frame

    async def rejection(self, camera: str, name: str) -> DeadLetter:
        """The dead letter of a file that was rejected."""
        start = f"folder:{camera}/{name}@"
        letter: DeadLetter = await self.until(
            lambda: next((x for x in self.decoded("dead_letters") if x.origin.startswith(start)), None),
            f"the dead letter of {camera}/{name}",
        )
        self.letters.add(letter.origin)
        return letter

    async def unread(self, *records: Incoming) -> list[str]:
        """The records' `log.decode_error` in ClickHouse, beside their bytes, key and headers as they were sent."""
        assert len({record.topic for record in records}) == 1
        wanted = {(record.partition, record.offset): record for record in records}
        self.unreadable |= {(record.topic, *position) for position, record in wanted.items()}
        rows = await self.eventually(
            lambda: len(found := self._log_rows(records[0].topic, wanted)) == len(wanted) and found, "rows of `log`"
        )
        for position, (bytes_, error) in rows.items():
            assert bytes_ == _sums(wanted[position])
            assert error, f"{wanted[position].origin} has no decode_error"
        return [rows[record.partition, record.offset][1] for record in records]

    def _log_rows(self, topic: str, positions: Container[tuple[int, int]]) -> dict[tuple[int, int], tuple[Any, str]]:
        """SHA-256 of key, value and headers, and decode_error, by position."""
        rows = self.sql(
            "SELECT partition, offset, if(key IS NULL, '', hex(SHA256(assumeNotNull(key)))), "
            "if(value IS NULL, '', hex(SHA256(assumeNotNull(value)))), "
            "arrayMap(h -> (h.1, hex(SHA256(h.2))), headers), decode_error FROM log FINAL WHERE topic = {topic:String}",
            topic=topic,
        )
        return {
            (partition, offset): ((key, value, [tuple(header) for header in headers]), error)
            for partition, offset, key, value, headers, error in rows
            if (partition, offset) in positions
        }

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
        """A good frame of the camera is detected, with `judged` its window judged too, and no process was restarted."""
        answer = await self.upload(camera, await asyncio.to_thread(self.good))
        assert answer.status_code == 200, answer.text
        await self.record_of("detections", frame_id=answer.json()["frame_id"])
        if judged:
            await self.end(camera)
            await self.judged(answer.json()["frame_id"])
        assert self._processes() == self._pids, "a process was restarted"

    async def restart(self, *processes: str) -> None:
        """Stop these processes in order and start them again."""
        await asyncio.gather(*(self.installation.stack.supervisor.restart(name) for name in processes))
        self._pids = self._processes()

    async def judged(self, frame_id: str) -> RiskEvent:
        """The verdict on the window that the frame is in."""
        found: RiskEvent = await self.until(
            lambda: next((event for event in self.decoded("risk_events") if frame_id in event.frame_ids), None),
            f"the verdict on {frame_id}",
            within=60,
        )
        return found

    async def eventually_answers(self, camera: str, status: int) -> httpx.Response:
        """The answer to a good frame, once it is this one: what is set for a camera reaches ingest by the log."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = await self.upload(camera, await asyncio.to_thread(self.good))
            if answer.status_code == status:
                return answer
            assert time.monotonic() < deadline, answer.text
            await asyncio.sleep(0.1)

    async def end(self, *cameras: str) -> None:
        """No more will come of these cameras: their windows close."""
        for camera in cameras:
            tick = Tick(int(time.time() * 1000), camera).emit("frames", self.partition(camera))
            await self.producer.send_and_wait(
                tick.topic, key=tick.key, value=None, headers=list(tick.headers), partition=tick.partition
            )

    async def epochs(self) -> dict[str, str]:
        """Each topic's epoch, as `meta` has it now."""
        return {topic: meta.epoch for topic, meta in (await read_meta(self.kafka)).items()}

    def epoch(self, topic: str) -> str:
        """The topic's epoch as it was at the start."""
        return self._epochs[topic]

    async def camera(self, camera: str) -> Camera:
        """What is set for the camera; made if it is not there."""
        cameras = Cameras(self.kafka, self.settings.windows.record(), self.settings.time_zone)
        return await cameras.ensure(camera)

    async def drained(self, *, within: float = 60.0) -> None:
        """Every stage has done everything, and everything is in ClickHouse."""
        deadline = time.monotonic() + within
        while True:
            state = await collect(self.settings)
            lags = {stage["stage"]: stage["lag"] for stage in state["stages"] if stage["lag"] != 0}
            missing = [
                (topic["topic"], topic["records"], topic["in_clickhouse"])
                for topic in state["topics"]
                if topic["records"] != topic["in_clickhouse"]
            ]
            if not lags and not missing and not state["problems"]:
                return
            assert time.monotonic() < deadline, f"not drained: {lags} {missing} {state['problems']}"
            await asyncio.sleep(0.5)

    async def unexplained(self) -> list[str]:
        """Everything on the log and in ClickHouse that no row explains, and everything that is missing there."""
        audit = _Audit(self)
        await audit.read()
        letters = [letter.origin for letter in audit.decoded("dead_letters")]
        found = [f"dead letter of {origin} that no row expects" for origin in letters if origin not in self.letters]
        found += [f"no dead letter of {origin}" for origin in sorted(self.letters - set(letters))]
        found += [
            f"{letters.count(origin)} dead letters of {origin}"
            for origin in self.letters & set(letters)
            if letters.count(origin) > 1
        ]
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
        expected = {
            ("dead_letters", record.partition, record.offset)
            for record in self.records["dead_letters"]
            if (record.topic, record.partition, record.offset) not in self._watch.unreadable
            and codec.decode(record, DeadLetter).origin in self._watch.letters
        }
        self._leave_out = self._watch.unreadable | self._watch.refused | expected
        try:
            return super().violations(accepted)
        finally:
            self._leave_out = self._watch.unreadable

    def _order(self, topic: str) -> list[str]:
        """Frames come by several doors here, with any capture time or none: order is `test_kills.py`'s."""
        return []


def _sums(record: Incoming) -> tuple[str, str, list[tuple[str, str]]]:
    def sum_of(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest().upper()

    return (
        "" if record.key is None else sum_of(record.key),
        "" if record.value is None else sum_of(record.value),
        [(name, sum_of(value)) for name, value in record.headers],
    )


def _turned(shot: bytes, by: float) -> bytes:
    """The picture turned sideways by a share of its width."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(shot)) as image:
        ImageChops.offset(image, round(by * image.width), 0).save(out, "JPEG", quality=80)
    return out.getvalue()

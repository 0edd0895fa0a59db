"""Backup and restore on real servers: a broker with holes, gaps and an old life behind it, and ClickHouse beside it."""

import hashlib
import random
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.structs import OffsetAndMetadata

from infra.backup import check, history, manifest
from infra.backup.make import backup
from infra.backup.manifest import ManifestError
from infra.backup.restore import ROAD, NotEmptyError, restore
from infra.backup.target import BusyError, Target
from infra.config import Settings
from infra.local.stack import LocalStack
from infra.retention.collector import Collector, Report, Store
from infra.retention.settings import RetentionSettings
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store import audit
from processors.store.audit_sql import Reach
from processors.store.queries import Queries, Row
from schemas.records import Frame
from streams import codec
from streams.admin import ensure_topics, read_meta
from streams.claims import ClaimStore
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.messages import Emit, Incoming, Tick
from streams.stages import Range
from streams.survey import READS
from streams.topics import STORED, TOPICS
from tests import examples
from tests.processors.audit_kit import CAMERAS, WINDOWS, History, detections_of, found, frame_of

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

_LOG = """
    SELECT topic, epoch, partition, offset, hex(key) AS k, hex(value) AS v,
        arrayMap(h -> (h.1, hex(h.2)), headers) AS h, fingerprint, source, tick, decode_error, inserted_at
    FROM log FINAL ORDER BY topic, epoch, partition, offset
"""
PARTITIONS = 2
IMAGE = b"\xff\xd8" + bytes(range(256)) * 300
"""Above what a record holds inline."""
SHA256 = hashlib.sha256(IMAGE).hexdigest()
GONE = hashlib.sha256(b"an image that the store has lost").hexdigest()
UNTAKEN = TopicPartition("detections", 1)
"""Of this the sink has taken nothing yet."""
OLD = "01d01d01"
"""An earlier life of the topics: only ClickHouse has it."""


@asynccontextmanager
async def installation(directory: Path, clickhouse: str, name: str) -> AsyncIterator[Settings]:
    """An installation of its own: an empty broker, an empty database, an empty image store."""
    async with LocalStack(directory / name, kafka_port=0, clickhouse_port=0, without=["clickhouse"]) as stack:
        yield Settings.model_validate(
            {
                "data_dir": directory / name,
                "kafka": {"bootstrap_servers": stack.bootstrap_servers, "partitions": PARTITIONS},
                "clickhouse": {"url": clickhouse, "database": f"t_{secrets.token_hex(6)}"},
            }
        )


class Source:
    """An installation with a past."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.kafka = Kafka(settings.kafka)
        self.producer = FencedProducer(self.kafka, self.kafka.transactional_id("source"))
        self._taken: dict[TopicPartition, int] = {}
        self._rng = random.Random(5)

    async def append(self, emits: Sequence[Emit], *, aborted: bool = False) -> None:
        """One transaction; an aborted one leaves a hole of two offsets and more."""
        if not aborted:
            await self.producer.transact(emits)
            return
        made = self.producer._producer
        await made.begin_transaction()
        for emit in emits:
            await made.send(emit.topic, emit.value, emit.key, emit.partition, headers=list(emit.headers))
        await made.flush()
        await made.abort_transaction()

    async def live(self) -> None:
        """Some of every topic, in transactions of one and several, some of them aborted; the oldest is forgotten."""
        await ensure_topics(self.kafka)
        await self.producer.open()
        for _ in range(5):
            for topic in STORED:
                partition = 0 if TOPICS[topic].single else self._rng.randrange(PARTITIONS)
                emits = [codec.emit(topic, examples.RECORDS[topic], partition)] * self._rng.randrange(1, 4)
                await self.append(emits, aborted=self._rng.random() < 0.3)
        tick = Tick(examples.AT).emit("frames", 0)
        await self.append([tick, *(self.frame(sha256) for sha256 in (SHA256, GONE))])
        odd = [
            Emit("detections", b"gate", b"\x00torn", (("odd", b"\xff"), ("odd", b"")), 1),
            Emit("labels", b"k", None, (), 1),
        ]
        await self.append(odd)
        states = [
            codec.emit("batch_state", examples.RECORDS["batch_state"], 1),
            Emit("batch_state", b"gone", None, (), 1),
        ]
        await self.append(states)
        async with self.kafka.admin() as admin:
            await admin.delete_records({TopicPartition("frames", 0): RecordsToDelete(before_offset=3)})
        await ClaimStore(self.settings.images_root).put(IMAGE)

    def frame(self, sha256: str) -> Emit:
        """A frame whose image is in the store, or was."""
        plain = {name: getattr(examples.frame, name) for name in Frame.__struct_fields__}
        frame = Frame(**plain | {"frame_id": f"gate:{sha256}", "camera_id": "gate", "sha256": sha256, "image": None})
        frame = Frame(
            **{name: getattr(frame, name) for name in Frame.__struct_fields__} | {"claim": f"sha256:{sha256}"}
        )
        return codec.emit("frames", frame, 0)

    async def taken(self, share: float) -> None:
        """The sink and every stage have come so far, and what the sink has passed is in ClickHouse."""
        metas = await read_meta(self.kafka)
        store = ClickHouseStore(self.settings.clickhouse)
        await store.migrate()
        sink = SinkStage(store)
        if not self._taken:
            for topic in STORED:
                record = examples.incoming(topic, examples.RECORDS[topic], offset=7)._replace(epoch=OLD)
                await sink.insert(Range(topic, OLD, record.partition, 7, 7), [record])
        for stage, topics in READS.items():
            positions = {}
            for topic in topics:
                for part in range(metas[topic].partitions):
                    tp = TopicPartition(topic, part)
                    records = await self.kafka.read([tp], epoch=metas[topic].epoch)
                    done = records[: int(len(records) * (share if stage == "sink" else 0.9))]
                    if not done or (stage == "sink" and tp == UNTAKEN):
                        continue
                    positions[tp] = OffsetAndMetadata(done[-1].offset + 1, metas[topic].epoch)
                    if stage == "sink":
                        new = [record for record in done if record.offset >= self._taken.get(tp, 0)]
                        if new:
                            span = Range(topic, metas[topic].epoch, part, new[0].offset, new[-1].offset)
                            await sink.insert(span, new)
                        self._taken[tp] = done[-1].offset + 1
            if positions:
                await self.producer.transact([], offsets=(self.kafka.group(stage), positions))
        await sink.close()


async def on_log(kafka: Kafka) -> dict[TopicPartition, list[Incoming]]:
    """Everything that a reader sees."""
    metas = await read_meta(kafka)
    return {
        tp: await kafka.read([tp], epoch=metas[topic].epoch)
        for topic in STORED
        for tp in (TopicPartition(topic, part) for part in range(metas[topic].partitions))
    }


async def tables(settings: Settings) -> dict[str, list[Row]]:
    """Every row of `log`, with when it was taken, and which rows the typed tables have."""
    async with aclosing(Queries(settings.clickhouse)) as store:
        found = {"log": await store.rows(_LOG)}
        for topic in STORED:
            found[topic] = await store.rows(f"SELECT epoch, partition, offset FROM {topic} FINAL ORDER BY ALL")
    return found


async def test_what_is_restored_is_what_was_there_record_by_record_and_offset_by_offset(
    clickhouse_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(str(tmp_path / "backup"))
    async with installation(tmp_path, clickhouse_url, "one") as one:
        source = Source(one)
        await source.live()
        await source.taken(0.5)
        with monkeypatch.context() as patch:
            patch.setattr("infra.backup.manifest.write", killed)
            with pytest.raises(KilledError):
                await backup(one, target)
        with pytest.raises(ManifestError, match="begun here and not finished: run it again"):
            manifest.read(target)
        history = {*target.names("history")}
        done = await backup(one, target)
        assert {*target.names("history")} == history, "what was whole is not copied again"
        assert (done.manifest.images, done.manifest.missing) == (2, (GONE,))
        assert target.read(manifest.image_name(SHA256)) == IMAGE

        await source.taken(0.8)
        held = target.lock()
        with pytest.raises(BusyError):
            await backup(one, Target(target.root))
        assert held is not None
        held.release()
        more = await backup(one, target)
        assert {*target.names("history")} > history, "only what is new is added"
        assert more.manifest.history[: len(done.manifest.history)] == done.manifest.history
        nothing = await backup(one, target)
        assert nothing.manifest.history == more.manifest.history
        assert nothing.images == 0
        assert check.check(target).wrong == 0
        with pytest.raises(NotEmptyError, match="already"):
            await restore(one, target, nothing.manifest)
        await source.producer.close()
        was, rows = await on_log(source.kafka), await tables(one)
        await refused_on_a_live_broker(one, target, nothing.manifest, monkeypatch)
        assert await on_log(source.kafka) == was
        metas = await read_meta(source.kafka)
        positions = {stage: await committed(source.kafka, stage) for stage in READS}

    async with installation(tmp_path, clickhouse_url, "two") as two:
        kafka = Kafka(two.kafka)
        await ensure_topics(kafka)  # as `rewatch migrate` does it
        with monkeypatch.context() as patch:
            patch.setattr("infra.backup.restore._Restore._remember", killed)
            with pytest.raises(KilledError):
                await restore(two, target, nothing.manifest)
        told = await restore(two, target, nothing.manifest)
        assert told.rows == nothing.manifest.records - sum(pack.records for pack in nothing.manifest.tail)
        async with kafka.admin() as admin:
            assert {*await admin.list_topics()} >= {*TOPICS}
            assert not [name for name in await admin.list_topics() if "restoring" in name], "it is no half restore now"
        again = await read_meta(kafka)
        assert {name: meta.epoch for name, meta in again.items()} == {name: meta.epoch for name, meta in metas.items()}
        now = await on_log(kafka)
        for tp, records in was.items():
            readers = [stage for stage, topics in READS.items() if tp.topic in topics and stage != "replay"]
            at = min(positions[stage][tp].offset if tp in positions[stage] else 0 for stage in readers)
            wanted = [record for record in records if record.offset >= at] if tp.topic in ROAD else records
            assert now[tp] == wanted, tp
        for stage in READS:
            found = await committed(kafka, stage)
            for tp, position in positions[stage].items():
                behind = [record.offset for record in was[tp] if record.offset >= position.offset]
                assert [record.offset for record in now[tp] if record.offset >= found[tp].offset] == behind
                start, end = (await kafka.bounds([tp]))[tp]
                assert start <= found[tp].offset <= end, "nobody finds a gap"
        restored = await tables(two)
        for table in rows:
            assert restored[table] == rows[table], table
        assert await ClaimStore(two.images_root).get(f"sha256:{SHA256}", SHA256) == IMAGE
        with pytest.raises(NotEmptyError, match="already"):
            await restore(two, target, nothing.manifest)


async def refused_on_a_live_broker(
    live: Settings, target: Target, made: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its topics have the backup's epochs; the settings are those of a rehearsal beside it."""
    rehearsal = Settings.model_validate(
        {
            "data_dir": live.data_dir / "rehearsal",
            "kafka": live.kafka.model_dump() | {"system": "rehearsal"},
            "clickhouse": {"url": live.clickhouse.url, "database": f"t_{secrets.token_hex(6)}"},
        }
    )
    with pytest.raises(NotEmptyError, match=r"an installation already \(rewatch-"):
        await restore(rehearsal, target, made)
    with monkeypatch.context() as patch:

        async def nobody(*_: Any) -> list[str]:
            return []

        patch.setattr("infra.backup.restore._groups", nobody)  # as before any stage has a position
        with pytest.raises(NotEmptyError, match="has records on"):
            await restore(rehearsal, target, made)
    async with Kafka(live.kafka).admin() as admin:
        assert not [name for name in await admin.list_topics() if "restoring" in name]
    store = ClickHouseStore(live.clickhouse)
    client = await store.connection.client()
    assert not int(str(await client.command(f"EXISTS DATABASE {rehearsal.clickhouse.database}"))), "nothing is changed"
    await store.close()


class Quiet:
    """A log on which nothing goes on, nothing is held and nothing replayed."""

    async def settled(self, _: Any) -> dict[str, Reach]:
        return dict.fromkeys(("frames", "detections", "batches", "contexts"), Reach())

    async def held(self) -> dict[str, str]:
        return {}

    async def replays(self) -> tuple[list[Any], list[str]]:
        return [], []

    async def unstored(self) -> set[str]:
        return set()


async def collect(settings: Settings, *, until: str = "", **keep: str) -> Report:
    """A run of the collector a year from now; it is killed when it says `until`."""

    def told(what: str) -> None:
        if what == until:
            raise KilledError

    async def later() -> datetime:
        return datetime.now(UTC) + timedelta(days=400)

    store = ClickHouseStore(settings.clickhouse)
    asked = Store(store.connection)
    asked.now = later
    collector = Collector(
        asked,
        Quiet(),
        ClaimStore(settings.images_root),
        RetentionSettings(**keep),
        owner="here",
        clock=lambda: datetime.now(UTC) + timedelta(days=400),
        told=told,
    )
    try:
        return await collector.run()
    finally:
        await store.close()


def restated(past: History, record: Incoming, **changes: Any) -> None:
    """The record says something else."""
    made = msgspec.structs.replace(codec.decode(record, TOPICS[record.topic].record), **changes)
    records = past.records[record.topic]
    records[records.index(record)] = record._replace(value=codec.emit(record.topic, made).value)


def unnoticed(past: History, partition: int, n: int, **changes: Any) -> list[Incoming]:
    """A frame in which nothing was seen, and what was seen in it."""
    camera = CAMERAS[partition]
    frame = past.add("frames", partition, msgspec.structs.replace(frame_of(camera, n), **changes))
    return [
        frame,
        past.add("detections", partition, msgspec.structs.replace(detections_of(camera, n), boxes=()), frame),
    ]


def images(settings: Settings) -> set[str]:
    return {path.name for path in Path(settings.images_root).rglob("*") if path.is_file()}


async def audited(settings: Settings) -> audit.Report:
    async with aclosing(Queries(settings.clickhouse)) as queries:
        return await audit.audit(queries, Kafka(settings.kafka), WINDOWS)


async def test_what_retention_took_stays_taken_and_a_pass_that_was_half_way_is_finished(
    clickhouse_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(str(tmp_path / "backup"))
    async with installation(tmp_path, clickhouse_url, "one") as one:
        metas = await ensure_topics(Kafka(one.kafka))
        store = ClickHouseStore(one.clickhouse)
        await store.migrate()
        claims = ClaimStore(one.images_root)
        alone, shared = await claims.put(b"an image"), await claims.put(b"an image of two frames")
        past = History()  # of an earlier life of the topics
        restated(past, past.of("risk_events", 0)[0], risk_level="low")
        restated(past, past.of("frames", 1)[0], claim=shared, image=None)
        unnoticed(past, 0, 100, claim=alone, image=None)
        unnoticed(past, 0, 101, claim=shared, image=None)
        await past.keep(store)
        first = await backup(one, target)
        assert first.manifest.passes == ()

        async def came(records: list[Incoming]) -> None:
            for record in records:
                await SinkStage(store).insert(Range(*record[:3], record.offset, record.offset), [record])

        await came(unnoticed(past, 1, 102))
        pages = history.History.pages
        reports = []

        async def slow(*args: Any) -> AsyncIterator[Any]:
            async for page in pages(*args):
                yield page
                if not reports:  # its detections are read, the frame not yet
                    reports.append(await collect(one, low="1d", quiet="1d"))

        with monkeypatch.context() as patch:
            patch.setattr(history.History, "pages", slow)
            second = await backup(one, target)
        [report] = reports
        assert {part.topic for pack in second.manifest.history[1:] for part in pack.parts} == {"detections"}
        assert [one.state for one in second.manifest.passes] == ["done"]

        await came(unnoticed(past, 1, 103))
        with pytest.raises(KilledError):
            await collect(one, until="deleting from log", quiet="1d")
        # A mark beyond what the backup knows: after a restore that offset is another record's.
        at = datetime.now(UTC)
        ahead = [["labels", metas["labels"].epoch, 0, 5, "ahead", "low"]]
        names = ["topic", "epoch", "partition", "offset", "pass", "why"]
        await Store(store.connection).insert("forgotten", names, ahead)
        names = ["pass", "owner", "started_at", "state", "records", "images", "at"]
        await Store(store.connection).insert("gc_passes", names, [["ahead", "here", at, "done", 1, 0, at]])
        await Store(store.connection).insert("gc_passes", names, [["marks", "here", at, "marking", 0, 0, at]])
        third = await backup(one, target)
        assert sorted(one.state for one in third.manifest.passes) == ["deleting", "done", "done"]
        assert next(iter(third.manifest.files.items())) in second.manifest.files.items()
        assert {one.file: one.sha256 for one in second.manifest.passes}.items() <= third.manifest.files.items()
        assert check.check(target).wrong == 0
        was = await audited(one)
        assert (found(was), was.forgotten) == (set(), report.records + 3)

        two = Settings.model_validate(
            {
                "data_dir": tmp_path / "two",
                "kafka": one.kafka.model_dump(),
                "clickhouse": {"url": clickhouse_url, "database": f"t_{secrets.token_hex(6)}"},
            }
        )
        with monkeypatch.context() as patch:
            patch.setattr("infra.backup.restore._Restore._images", killed)
            with pytest.raises(KilledError):
                await restore(two, target, third.manifest)
        await restore(two, target, third.manifest)
        now = await audited(two)
        assert (found(now), now.forgotten) == (set(), report.records + 2)
        assert images(two) == images(one) == {shared.removeprefix("sha256:")}
        for settings in (one, two):
            assert (await collect(settings, quiet="1d")).finished == 1
        assert await tables(two) == await tables(one)
        assert found(await audited(two)) == set()
        await store.close()


class KilledError(Exception):
    """The process ends here."""


def killed(*_: Any) -> Any:
    raise KilledError


async def committed(kafka: Kafka, stage: str) -> dict[TopicPartition, OffsetAndMetadata]:
    async with kafka.admin() as admin:
        return dict(await admin.list_consumer_group_offsets(kafka.group(stage)))

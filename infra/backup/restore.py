"""An installation made again from a backup, in servers that hold nothing: ClickHouse, images, and last the log.

ClickHouse gets its `log` back row by row, and the typed tables as the sink makes them. The topics get their lives back
before they are made, their records the offsets that they had, and the stages their positions, the sink's last: so a
restore that was killed is told from an installation, and can be run again.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import structlog
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import OffsetAndMetadata

from infra.backup.cut import LAST_FIRST
from infra.backup.manifest import Manifest, image_name
from infra.backup.packs import Kept, Pack, Part, claims_of, read_part
from infra.backup.refill import Refill, runs
from infra.backup.target import Target
from infra.config import Settings
from processors.sink import core
from processors.sink.core import Block
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from schemas import prompts
from schemas.records import PromptRecord
from streams import codec
from streams.admin import read_meta, revive_topics
from streams.claims import ClaimStore
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.messages import Emit, Incoming
from streams.stages import Range
from streams.survey import READS, group_offsets
from streams.topics import STORED, TOPICS

log = structlog.get_logger(__name__)

ROAD = ("frames", "detections", "batches", "contexts", "gpu_metrics")
"""Topics of which only what is still to be done goes on the log again: what was done is read in ClickHouse. All others
are small, and read whole by somebody: prompts, cameras, replays and their results, dead letters and what became of
them."""

STATES = ("batch_state", "ingest_state")
"""What stages remember. The sink's needs no place here: it begins behind what it was done with."""

_SIDE_BY_SIDE = 8
"""Partitions that are filled at once; each waits for the broker most of the time."""

_GONE_S = 60.0
"""A broker takes a moment to forget a topic."""

_LIVES = "SELECT DISTINCT toString(topic) AS topic, toString(epoch) AS epoch FROM log"

OnProgress = Callable[[str, int, int], None]
Place = tuple[Pack, Part]


class NotEmptyError(Exception):
    """There is something already where a backup was to be restored; the message says what and where."""


class Done(NamedTuple):
    """What a restore did."""

    rows: int
    """Records in ClickHouse's `log`."""
    undecodable: int
    """Those among them that have no typed row."""
    images: int
    on_log: int
    """Records on the broker."""
    todo: Mapping[str, int]
    """Records on the broker before each stage, ticks included."""
    took_s: float


async def restore(settings: Settings, target: Target, manifest: Manifest, told: OnProgress = lambda *_: None) -> Done:
    """Make an installation of a backup that was checked.

    Raises:
        NotEmptyError: the broker or ClickHouse holds something else.
        RefillError: somebody else appends to the topics.
        PackError: a file is not what the manifest says.
        UnavailableError: ClickHouse, the image store or the directory cannot be used now.
        TopicsError: `kafka.partitions` is not the backup's.
        KafkaError, TimeoutError or OSError: the broker is away.
    """
    return await _Restore(settings, target, manifest, told).run()


class _Restore:
    def __init__(self, settings: Settings, target: Target, manifest: Manifest, told: OnProgress) -> None:
        self._settings = settings
        self._kafka = Kafka(settings.kafka)
        self._store = ClickHouseStore(settings.clickhouse)
        self._target = target
        self._manifest = manifest
        self._told = told
        self._metas = {meta.topic: meta for meta in manifest.topics}

    async def run(self) -> Done:
        began = time.monotonic()
        try:
            await self._store.migrate()
            begun = await self._refuse()
            rows, undecodable = await self._tables()
            images = await self._images()
            if begun:
                await self._forget_topics()
            await self._topics()
            kept, ends = await self._refill()
            await self._remember()
            todo = await self._positions(kept, ends)
        finally:
            await self._store.close()
        return Done(rows, undecodable, images, sum(map(len, kept.values())), todo, time.monotonic() - began)

    async def _refuse(self) -> bool:
        """Refuse whatever this backup did not put there; whether topics are there, empty or half filled."""
        manifest, kafka = self._manifest, self._kafka
        if manifest.partitions != kafka.settings.partitions:
            raise NotEmptyError(
                f"the backup has {manifest.partitions} partitions, kafka.partitions says {kafka.settings.partitions}: "
                f"set it to {manifest.partitions} (REWATCH_KAFKA__PARTITIONS), for it decides where a camera lives"
            )
        with self._store.connection.naming():
            client = await self._store.connection.client()
            lives = {(str(topic), str(epoch)) for topic, epoch in (await client.query(_LIVES)).result_rows}
        newer = {part.topic for pack in (*manifest.history, *manifest.tail) for part in pack.parts} - TOPICS.keys()
        if newer:
            raise NotEmptyError(
                f"the backup has topics that this version does not know ({', '.join(newer)}): use a newer one"
            )
        ours = {(part.topic, part.epoch) for pack in manifest.history for part in pack.parts}
        if lives - ours:
            raise NotEmptyError(
                f"ClickHouse at {self._settings.clickhouse.url} (clickhouse.url) has records that are not of this "
                f"backup, of {', '.join(sorted({topic for topic, _ in lives - ours}))}: restore into an empty one, "
                "or name another database (clickhouse.database)"
            )
        async with kafka.admin() as admin:
            names = [name for name in await admin.list_topics() if name in TOPICS]
            taken = [stage for stage in READS if await _committed(admin, kafka.group(stage))]
            at_work = [stage for stage in READS if await _members(admin, kafka.group(stage))]
        if at_work:
            raise NotEmptyError(f"{', '.join(at_work)} runs: stop every stage, then restore")
        where = f"the broker at {kafka.settings.bootstrap_servers} (kafka.bootstrap_servers)"
        if names and any(manifest.positions.values()) and {s for s, at in manifest.positions.items() if at} <= {*taken}:
            raise NotEmptyError(f"{where} has an installation already: restore into an empty one")
        if names:
            await self._refuse_records(where, names)
        return bool(names)

    async def _refuse_records(self, where: str, names: Sequence[str]) -> None:
        """Topics may be there, as `rewatch migrate` makes them, or as a restore of this backup left them."""
        metas = await read_meta(self._kafka) if "meta" in names else {}
        half = all(metas[name].epoch == meta.epoch for name, meta in self._metas.items() if name in metas)
        if metas and half:
            return
        there = [name for name in names if name in STORED and name in metas]
        tps = [TopicPartition(name, part) for name in there for part in range(metas[name].partitions)]
        for tp, (start, end) in (await self._kafka.bounds(tps)).items():
            if start == end or (tp.topic == "prompts" and await self._is_default(tp)):
                continue
            raise NotEmptyError(f"{where} has records on {tp.topic} already: restore into an empty one")

    async def _is_default(self, tp: TopicPartition) -> bool:
        """Whether nothing is there but the prompt version that comes with the product."""
        for record in await self._kafka.read([tp]):
            found = codec.decode_state(record, PromptRecord)
            if found is None or found.digest != prompts.default().digest:
                return False
        return True

    async def _tables(self) -> tuple[int, int]:
        """Every record of the history into `log`, and its row as the sink makes it."""
        stage = SinkStage(self._store)
        total, rows, undecodable = sum(pack.records for pack in self._manifest.history), 0, 0
        for pack, part in _in_order(self._manifest.history):
            kept = read_part(self._target, pack, part)
            undecodable += await self._rows(stage, part, kept)
            rows += len(kept)
            self._told("ClickHouse", rows, total)
        return rows, undecodable

    async def _rows(self, stage: SinkStage, part: Part, kept: Sequence[Kept]) -> int:
        """One part; how many of its records have no row. The same rows each time it is tried, under the same tokens."""
        records = [one.record for one in kept]
        span = Range(part.topic, part.epoch, part.partition, part.lo, part.hi)
        made = core.rows(span, records)
        token = f"restore:{self._manifest.made_at}"
        taken = {one.record.offset: one.inserted_at or self._manifest.made_at for one in kept}
        typed = made.typed.columns | {"inserted_at": [taken[offset] for offset in made.typed.columns["offset"]]}
        refused = await stage.typed(Block(part.topic, typed), f"{token}:{span.token(part.topic)}")
        errors = [
            refused.get(record.offset, error)
            for record, error in zip(records, made.log.columns["decode_error"], strict=True)
        ]
        rows = core.log_rows(records, errors, made.log.columns["tick"])
        rows = Block("log", rows.columns | {"inserted_at": list(taken.values())})
        await self._store.insert(rows, f"{token}:{span.token('log')}")
        ticks, bad = sum(made.log.columns["tick"]), sum(map(bool, errors))
        progress = core.progress_row(span, rows=len(records), ticks=ticks, undecodable=bad)
        progress = Block(progress.table, progress.columns | {"inserted_at": [max(taken.values())]})
        await self._store.insert(progress, f"{token}:{span.token('sink_progress')}")
        return bad

    async def _images(self) -> int:
        """Every image that the backup has, into the image store."""
        packs = (*self._manifest.history, *self._manifest.tail)
        todo = sorted({claim for pack in packs for claim in claims_of(self._target, pack)} - {*self._manifest.missing})
        store = ClaimStore(self._settings.images_root)
        turns = asyncio.Semaphore(_SIDE_BY_SIDE)
        done = 0

        async def put(sha256: str) -> None:
            nonlocal done
            async with turns:
                await store.put(await asyncio.to_thread(self._target.read, image_name(sha256)))
            done += 1
            self._told("images", done, len(todo))

        for at in range(0, len(todo), 1000):
            await asyncio.gather(*map(put, todo[at : at + 1000]))
        return len(todo)

    async def _forget_topics(self) -> None:
        """Delete topics that are empty, or that a restore of this backup has half filled: offsets begin anew."""
        async with self._kafka.admin() as admin:
            names = [name for name in await admin.list_topics() if name in TOPICS]
            await admin.delete_topics(names)
            async with asyncio.timeout(_GONE_S):
                while {*names} & {*await admin.list_topics()}:  # noqa: ASYNC110 (the broker tells nobody)
                    await asyncio.sleep(0.2)

    async def _topics(self) -> None:
        """Make the topics with the lives that they had; what this version has besides is new."""
        await revive_topics(self._kafka, [meta for meta in self._manifest.topics if meta.topic in TOPICS])

    async def _refill(self) -> tuple[dict[TopicPartition, list[int]], dict[TopicPartition, int]]:
        """Put on the log what belongs there; the offsets of each partition's records, and where it ends."""
        todo = {
            tp: self._plan(tp)
            for topic in STORED
            if topic in self._metas
            for tp in (TopicPartition(topic, part) for part in range(self._metas[topic].partitions))
        }
        kept: dict[TopicPartition, list[int]] = {}
        ends: dict[TopicPartition, int] = {}
        total = sum(part.records for _, places in todo.values() for _, part in places)
        waiting = sorted(todo, key=lambda tp: -sum(part.records for _, part in todo[tp][1]))
        done = 0

        async def work(number: int) -> None:
            nonlocal done
            async with Refill(self._kafka, number) as refill:
                while waiting:
                    tp = waiting.pop(0)
                    first, places = todo[tp]
                    kept[tp] = []
                    end = 0
                    for run in runs(self._records(places, first)):
                        if not kept[tp]:
                            await refill.skip(tp, run.records[0].offset)
                        await refill.fill(tp, run)
                        kept[tp] += [record.offset for record in run.records]
                        end = run.records[-1].offset + 1
                        done += len(run.records)
                        self._told("log", done, max(done, total))
                    if not kept[tp]:
                        end = self._next(tp)
                        await refill.skip(tp, end)
                    ends[tp] = end

        await asyncio.gather(*(work(number) for number in range(_SIDE_BY_SIDE)))
        return kept, ends

    def _plan(self, tp: TopicPartition) -> tuple[int, list[Place]]:
        """The first offset that is wanted of a partition, and the parts that have what is wanted."""
        epoch = self._metas[tp.topic].epoch
        first = self._manifest.starts.get(tp.topic, {}).get(tp.partition, 0)
        if tp.topic in ROAD:
            at = {stage: self._manifest.positions[stage].get(tp.topic, {}).get(tp.partition) for stage in LAST_FIRST}
            # Who never committed has all of it to do; but of a shadow that never was, nothing is to be done.
            readers = [s for s in LAST_FIRST if tp.topic in READS[s] and (at[s] is not None or s != "replay")]
            first = min(
                (position if (position := at[stage]) is not None else first for stage in readers), default=first
            )
        packs = (*self._manifest.history, *self._manifest.tail)
        places = [
            (pack, part)
            for pack in packs
            for part in pack.parts
            if part.life == (tp.topic, epoch, tp.partition) and part.hi >= first
        ]
        return first, sorted(places, key=lambda place: place[1].lo)

    def _next(self, tp: TopicPartition) -> int:
        """The offset behind all that was ever known of a partition."""
        life = (tp.topic, self._metas[tp.topic].epoch, tp.partition)
        last = [part.hi + 1 for pack in self._manifest.history for part in pack.parts if part.life == life]
        return max([*last, self._manifest.starts.get(tp.topic, {}).get(tp.partition, 0)])

    def _records(self, places: Sequence[Place], first: int) -> Iterator[Incoming]:
        for pack, part in places:
            for kept in read_part(self._target, pack, part):
                if kept.record.offset >= first:
                    yield kept.record

    async def _remember(self) -> None:
        """What stages remember, as it was."""
        producer = FencedProducer(self._kafka, self._kafka.transactional_id("restore", "state"))
        try:
            await producer.open()
            for pack in self._manifest.tail:
                for part in pack.parts:
                    if part.topic in STATES:
                        records = [kept.record for kept in read_part(self._target, pack, part)]
                        await producer.transact(
                            [Emit(r.topic, r.key, r.value, r.headers, r.partition) for r in records]
                        )
        finally:
            await producer.close()

    async def _positions(
        self, kept: Mapping[TopicPartition, Sequence[int]], ends: Mapping[TopicPartition, int]
    ) -> dict[str, int]:
        """Where each stage goes on; the sink's last, for it says that a restore is complete."""
        todo: dict[str, int] = {}
        for stage in reversed(LAST_FIRST):
            positions: dict[TopicPartition, OffsetAndMetadata] = {}
            todo[stage] = 0
            for topic, by_partition in self._manifest.positions.get(stage, {}).items():
                for partition, was in by_partition.items():
                    position = was
                    tp = TopicPartition(topic, partition)
                    todo[stage] += sum(offset >= position for offset in kept[tp])
                    first = kept[tp][0] if kept[tp] else ends[tp]
                    if position >= self._manifest.starts[topic][partition]:
                        # Nothing lay between: what was below the first record now, nobody had to read.
                        position = min(max(position, first), ends[tp])
                    positions[tp] = OffsetAndMetadata(position, self._metas[topic].epoch)
            if positions:
                producer = FencedProducer(self._kafka, self._kafka.transactional_id("restore", "state"))
                try:
                    await producer.open()
                    await producer.transact([], offsets=(self._kafka.group(stage), positions))
                finally:
                    await producer.close()
        return todo


def _in_order(packs: Sequence[Pack]) -> list[Place]:
    """Every part as ClickHouse took it, earlier lives first: of two records with one id the later one has the row."""
    began: dict[tuple[str, str], int] = {}
    for pack in packs:
        for part in pack.parts:
            life = part.topic, part.epoch
            began[life] = min(began.get(life, part.first_at or 0), part.first_at or 0)

    def place(one: Place) -> tuple[str, int, int, int]:
        part = one[1]
        return part.topic, began[part.topic, part.epoch], part.first_at or 0, part.lo

    return sorted(((pack, part) for pack in packs for part in pack.parts), key=place)


async def _committed(admin: AIOKafkaAdminClient, group: str) -> bool:
    """Whether the group has a position anywhere."""
    return any(at.offset >= 0 for at in (await group_offsets(admin, group)).values())


async def _members(admin: AIOKafkaAdminClient, group: str) -> bool:
    """Whether the group has members: a stage runs."""
    described = await admin.describe_consumer_groups([group])
    return any(members for response in described for _, _, _, _, _, members, *_ in response.groups)

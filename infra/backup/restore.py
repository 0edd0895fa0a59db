"""An installation made again from a backup, in servers that hold nothing: ClickHouse, images, and last the log.

ClickHouse gets its `log` back row by row, and the typed tables as the sink makes them. The topics get their lives back
before they are made, their records the offsets that they had, and the stages their positions, the sink's last.

A restore that was killed can be run again. It is known by a mark that it makes before anything else, and takes away
last: an empty topic whose name tells which backup goes where. Without it whatever is there is somebody's, and stays.

What retention had taken by the backup's moment stays taken, also where an earlier backup into the same place has it.
"""

import asyncio
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import structlog
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    TopicAlreadyExistsError,
    for_code,
)
from aiokafka.structs import OffsetAndMetadata

from infra.backup.cut import LAST_FIRST
from infra.backup.manifest import Manifest, image_name
from infra.backup.packs import Kept, Pack, Part, claims_of, read_part
from infra.backup.passes import read_marks
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

_MARK = "rewatch-restoring-"
"""How the names of marks begin."""

_LIVES = "SELECT DISTINCT toString(topic) AS topic, toString(epoch) AS epoch FROM {}.log"

_MARKS = 100_000
"""Marks of one insert: 20 MB while they are packed."""

_FORGOTTEN = """
    SELECT DISTINCT offset FROM forgotten
    WHERE topic = {topic:String} AND epoch = {epoch:String} AND partition = {partition:Int32}
    AND offset BETWEEN {lo:Int64} AND {hi:Int64}
    AND pass IN (SELECT pass FROM gc_passes FINAL WHERE state IN ('deleting', 'done'))
"""

_CLAIM = re.compile(rb"sha256:([0-9a-f]{64})")
_CLAIMING = ("frames", "dead_letters")
"""Topics whose records claim images, by bytes that can be found in them: a dead letter may hold a frame."""

OnProgress = Callable[[str, int, int], None]
Place = tuple[Pack, Part]


class NotEmptyError(Exception):
    """There is something already where a backup was to be restored; the message says what and where."""


class Done(NamedTuple):
    """What a restore did."""

    rows: int
    """Records in ClickHouse's `log`; what retention had taken is not put back."""
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
        database = settings.clickhouse.database
        self._mark = _MARK + hashlib.sha256(f"{manifest.digest} {database}".encode()).hexdigest()[:32]
        self._left_out: set[str] = set()
        """Images, by SHA-256, that records name which were not put back."""
        self._named: set[str] = set()
        """Those that records name which were."""

    async def run(self) -> Done:
        began = time.monotonic()
        try:
            await self._refuse()
            await self._begin()
            await self._store.migrate()
            await self._passes()
            rows, undecodable = await self._tables()
            images = await self._images()
            if await self._refuse_broker():  # again: it was long, and somebody may have come
                await self._forget_topics()
            await self._topics()
            kept, ends = await self._refill()
            await self._remember()
            todo = await self._positions(kept, ends)
            await self._settle()
        finally:
            await self._store.close()
        return Done(rows, undecodable, images, sum(map(len, kept.values())), todo, time.monotonic() - began)

    async def _refuse(self) -> None:
        """Refuse whatever this backup did not put there; nothing is changed here."""
        manifest, kafka = self._manifest, self._kafka
        if manifest.partitions != kafka.settings.partitions:
            raise NotEmptyError(
                f"the backup has {manifest.partitions} partitions, kafka.partitions says {kafka.settings.partitions}: "
                f"set it to {manifest.partitions} (REWATCH_KAFKA__PARTITIONS), for it decides where a camera lives"
            )
        newer = {part.topic for pack in (*manifest.history, *manifest.tail) for part in pack.parts} - TOPICS.keys()
        if newer:
            raise NotEmptyError(
                f"the backup has topics that this version does not know ({', '.join(newer)}): use a newer one"
            )
        await self._refuse_broker()
        async with kafka.admin() as admin:
            half = self._mark in await admin.list_topics()
        ours = {(part.topic, part.epoch) for pack in manifest.history for part in pack.parts}
        lives = await self._lives()
        alien = lives - ours if half else lives
        if alien:
            raise NotEmptyError(
                f"ClickHouse at {self._settings.clickhouse.url} (clickhouse.url) has records already, "
                f"of {', '.join(sorted({topic for topic, _ in alien}))}: restore into an empty one, "
                "or name another database (clickhouse.database)"
            )

    async def _lives(self) -> set[tuple[str, str]]:
        """The lives of topics of which ClickHouse has anything; it need not be migrated."""
        database = self._settings.clickhouse.database
        with self._store.connection.naming():
            client = await self._store.connection.open("")
            try:
                if not int(str(await client.command(f"EXISTS TABLE {database}.log"))):
                    return set()
                rows = (await client.query(_LIVES.format(database))).result_rows
            finally:
                await client.close()
        return {(str(topic), str(epoch)) for topic, epoch in rows}

    async def _refuse_broker(self) -> bool:
        """Refuse a broker that is somebody's; whether topics are there, empty or half filled by a restore of this."""
        kafka = self._kafka
        where = f"the broker at {kafka.settings.bootstrap_servers} (kafka.bootstrap_servers)"
        async with kafka.admin() as admin:
            listed = await admin.list_topics()
            names = [name for name in listed if name in TOPICS]
            metas = await read_meta(kafka) if "meta" in names else {}
            epochs = {name: metas[name].epoch for name in names if name in metas}
            at_work: list[str] = []
            positioned: list[str] = []
            for group in await _groups(admin, [kafka.group(stage) for stage in READS]):
                reads = await _reads(admin, group, epochs)
                positioned += [group] if reads else []
                at_work += [group] if (reads or _stage(group)) and await _members(admin, group) else []
            found = await admin.describe_topics(names) if names else []
        if at_work:
            raise NotEmptyError(f"{', '.join(at_work)} runs on {where}: stop every stage, then restore")
        taken = {group for group in positioned if _stage(group)}
        wanted = {kafka.group(stage) for stage, at in self._manifest.positions.items() if at}
        half = self._mark in listed
        if taken and not (half and taken < wanted):
            raise NotEmptyError(
                f"{where} has an installation already ({', '.join(sorted(taken))} have positions): restore into an "
                "empty one"
            )
        same = epochs and all(epochs[meta.topic] == meta.epoch for meta in self._metas.values() if meta.topic in epochs)
        if not (half and same):
            others = any(name.startswith(_MARK) and name != self._mark for name in listed)
            partitions = {one["topic"]: len(one["partitions"]) for one in found}
            await self._refuse_records(where, partitions, begun_by_another=others)
        return bool(names)

    async def _refuse_records(self, where: str, partitions: Mapping[str, int], *, begun_by_another: bool) -> None:
        """Topics may be there as `rewatch migrate` makes them: nothing was ever appended but its prompt."""
        tps = [TopicPartition(name, part) for name, n in partitions.items() for part in range(n) if name != "meta"]
        for tp, (_, end) in (await self._kafka.bounds(tps)).items() if tps else ():
            if not end or (tp.topic == "prompts" and await self._is_default(tp)):
                continue
            why = "; a restore was begun there, of another backup or with another database" if begun_by_another else ""
            raise NotEmptyError(f"{where} has records on {tp.topic} already{why}: restore into an empty one")

    async def _begin(self) -> None:
        """Set the mark: from here on what is there is this restore's."""
        async with self._kafka.admin() as admin:
            response = await admin.create_topics([NewTopic(self._mark, 1, self._kafka.settings.replication_factor)])
            for name, code, *_ in response.topic_errors:
                error = for_code(code)
                if code and error is not TopicAlreadyExistsError:
                    raise KafkaError(f"cannot create topic {name}: {error.__name__}")
            async with asyncio.timeout(_GONE_S):
                while self._mark not in await admin.list_topics():  # noqa: ASYNC110 (the broker tells nobody)
                    await asyncio.sleep(0.2)

    async def _settle(self) -> None:
        """Take the mark away, and those of restores that were given up: from here on it is an installation."""
        async with self._kafka.admin() as admin:
            await _delete(admin, [name for name in await admin.list_topics() if name.startswith(_MARK)])

    async def _is_default(self, tp: TopicPartition) -> bool:
        """Whether nothing is there but the prompt version that comes with the product."""
        for record in await self._kafka.read([tp]):
            found = codec.decode_state(record, PromptRecord)
            if found is None or found.digest != prompts.default().digest:
                return False
        return True

    async def _passes(self) -> None:
        """What retention had taken: the marks, and then the passes that made them, by which marks count."""
        for one in self._manifest.passes:
            token = f"restore:{self._manifest.made_at}:{one.name}"
            for number, marks in enumerate(read_marks(self._target, one)):
                upto = self._upto(marks.topic, marks.epoch, marks.partition)
                offsets = [offset for offset in marks.offsets if offset < upto]
                for at in range(0, len(offsets), _MARKS):
                    some = offsets[at : at + _MARKS]
                    same = {"topic": marks.topic, "epoch": marks.epoch, "partition": marks.partition}
                    same |= {"pass": one.name, "why": marks.why, "marked_at": marks.marked_at}
                    columns = {name: [value] * len(some) for name, value in same.items()} | {"offset": some}
                    await self._store.insert(Block("forgotten", columns), f"{token}:{number}:{at}")
            row = {"pass": one.name, "owner": one.owner, "started_at": one.started_at, "state": one.state}
            row |= {"records": one.records, "images": one.images, "at": one.at}
            await self._store.insert(Block("gc_passes", {name: [value] for name, value in row.items()}), token)

    def _upto(self, topic: str, epoch: str, partition: int) -> int:
        """Where the history of a partition ends. Offsets beyond are given anew, to records that nobody has marked."""
        meta = self._metas.get(topic)
        if meta is None or meta.epoch != epoch:
            return sys.maxsize
        start = self._manifest.starts.get(topic, {}).get(partition, 0)
        return self._manifest.positions.get("sink", {}).get(topic, {}).get(partition, start)

    async def _forgotten(self, part: Part) -> set[int]:
        """The offsets of a part's records that retention had taken."""
        if not self._manifest.passes:
            return set()
        where = {"topic": part.topic, "epoch": part.epoch, "partition": part.partition, "lo": part.lo, "hi": part.hi}
        with self._store.connection.naming():
            client = await self._store.connection.client()
            return {offset for (offset,) in (await client.query(_FORGOTTEN, where)).result_rows}

    async def _tables(self) -> tuple[int, int]:
        """Every record of the history into `log`, and its row as the sink makes it, but for what retention took."""
        stage = SinkStage(self._store)
        total, done, rows, undecodable = sum(pack.records for pack in self._manifest.history), 0, 0, 0
        for pack, part in _in_order(self._manifest.history):
            kept = read_part(self._target, pack, part)
            offsets = await self._forgotten(part)
            gone = [one for one in kept if one.record.offset in offsets]
            here = [one for one in kept if one.record.offset not in offsets]
            if self._manifest.passes:
                self._left_out |= _images_in(gone)
                self._named |= _images_in(here)
            undecodable += await self._rows(stage, part, here, gone)
            rows, done = rows + len(here), done + len(kept)
            self._told("ClickHouse", done, total)
        return rows, undecodable

    async def _rows(self, stage: SinkStage, part: Part, kept: Sequence[Kept], gone: Sequence[Kept]) -> int:
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
        # The sink brought them all, those too that retention took since.
        bad = sum(map(bool, errors))
        progress = core.progress_row(
            span,
            rows=len(kept) + len(gone),
            ticks=sum(one.tick for one in (*kept, *gone)),
            undecodable=bad + sum(bool(one.decode_error) for one in gone),
        )
        last = max(one.inserted_at or self._manifest.made_at for one in (*kept, *gone))
        progress = Block(progress.table, progress.columns | {"inserted_at": [last]})
        await self._store.insert(progress, f"{token}:{span.token('sink_progress')}")
        return bad

    async def _images(self) -> int:
        """Every image that the backup has, into the image store, but for those that only what is left out claims."""
        packs = (*self._manifest.history, *self._manifest.tail)
        there = {claim for pack in packs for claim in claims_of(self._target, pack)} - {*self._manifest.missing}
        for pack in self._manifest.tail if self._left_out else ():
            for part in pack.parts:
                self._named |= _images_in(read_part(self._target, pack, part))
        wanted = sorted(there - (self._left_out - self._named))
        store = ClaimStore(self._settings.images_root)
        turns = asyncio.Semaphore(_SIDE_BY_SIDE)
        done = 0

        async def put(sha256: str) -> None:
            nonlocal done
            async with turns:
                await store.put(await asyncio.to_thread(self._target.read, image_name(sha256)))
            done += 1
            self._told("images", done, len(wanted))

        for at in range(0, len(wanted), 1000):
            await asyncio.gather(*map(put, wanted[at : at + 1000]))
        return len(wanted)

    async def _forget_topics(self) -> None:
        """Delete topics that are empty, or that a restore of this backup has half filled: offsets begin anew.

        `meta` goes last: by it a half restore is known while others are still there.
        """
        async with self._kafka.admin() as admin:
            names = [name for name in await admin.list_topics() if name in TOPICS]
            await _delete(admin, [name for name in names if name != "meta"])
            await _delete(admin, [name for name in names if name == "meta"])

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


def _images_in(records: Iterable[Kept]) -> set[str]:
    """The images that records name anywhere, by SHA-256."""
    values = (one.record.value or b"" for one in records if one.record.topic in _CLAIMING)
    return {sha256.decode() for value in values for sha256 in _CLAIM.findall(value)}


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


def _stage(group: str) -> bool:
    """Whether a group is a stage's, of whatever `kafka.system`."""
    return any(group.endswith(f"-{stage}") for stage in READS)


async def _groups(admin: AIOKafkaAdminClient, ours: Sequence[str]) -> list[str]:
    """Every group that the broker knows, and ours, which it may not show."""
    await group_offsets(admin, ours[0])  # a new broker has no place for groups until it is asked
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        try:
            listed = await admin.list_consumer_groups()
        except (GroupCoordinatorNotAvailableError, GroupLoadInProgressError):
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.25)
        else:
            return sorted({*ours, *(name for name, *_ in listed)})


async def _reads(admin: AIOKafkaAdminClient, group: str, epochs: Mapping[str, str]) -> bool:
    """Whether the group has a position in a life of a topic that is there."""
    found = await group_offsets(admin, group)
    return any(at.offset >= 0 and at.metadata == epochs.get(tp.topic) for tp, at in found.items())


async def _delete(admin: AIOKafkaAdminClient, names: Sequence[str]) -> None:
    """Delete topics, and wait until they are gone."""
    if names:
        await admin.delete_topics(list(names))
        async with asyncio.timeout(_GONE_S):
            while {*names} & {*await admin.list_topics()}:  # noqa: ASYNC110 (the broker tells nobody)
                await asyncio.sleep(0.2)


async def _members(admin: AIOKafkaAdminClient, group: str) -> bool:
    """Whether the group has members: a stage runs."""
    described = await admin.describe_consumer_groups([group])
    return any(members for response in described for _, _, _, _, _, members, *_ in response.groups)

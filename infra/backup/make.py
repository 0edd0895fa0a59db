"""Making a backup while everything goes on: history first, for it is long; then a moment of the log; then the rest.

History is copied from ClickHouse up to where the sink stands, in packs that never change: a later backup into the same
place begins where this one ended, and so does one that was killed. What the sink has not taken yet is read from the
broker, each time anew, and is small. What retention took is asked when all history is read: so whatever was gone when
its turn came is told of.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

import msgspec
import structlog
from aiokafka import TopicPartition

from infra.backup import manifest as manifests
from infra.backup.cut import TornError, belongs, check, read_as
from infra.backup.history import History, Life
from infra.backup.looking import Seen, beyond, partitions, quiet_ends, see
from infra.backup.manifest import Manifest, ManifestError
from infra.backup.packs import Kept, Pack, Packer, claims_of
from infra.backup.passes import Pass, write_marks
from infra.backup.target import Target
from infra.config import Settings
from processors.ingest.core import Memory
from schemas.records import DeadLetter, Frame, IngestState
from streams import codec
from streams.claims import ClaimStore
from streams.errors import UnavailableError, UnprocessableError
from streams.kafka import Kafka
from streams.messages import Incoming
from streams.topics import STORED

log = structlog.get_logger(__name__)

# A result that shows before its position does so for milliseconds; a broker that is in trouble, for a second.
_ATTEMPTS = 5

_COPIES = 4
"""Images that are copied at once: reading, hashing and writing one take turns."""

_CLAIM = "sha256:"

OnProgress = Callable[[str, int, int], None]
"""Told what is copied, how much of it is done, and of how much."""


class DivergedError(Exception):
    """The directory holds the backup of something else, or of a later state."""


class Done(NamedTuple):
    """What a backup did."""

    manifest: Manifest
    records: int
    """Records that it added to the history, and that it took from the broker."""
    images: int
    """Images that it copied."""
    bytes: int
    """Bytes that it wrote, images included."""


async def backup(settings: Settings, target: Target, told: OnProgress = lambda *_: None) -> Done:
    """Bring the backup in the directory up to now; begin one where there is none.

    Args:
        settings: where everything is.
        target: the directory.
        told: is given the progress.

    Raises:
        DivergedError: the directory holds something that this would not continue.
        ManifestError: what it holds is damaged.
        BusyError: another backup writes there.
        UnavailableError: ClickHouse, the image store or the directory cannot be used now.
        KafkaError, TimeoutError or OSError: the broker is away.
    """
    lock = target.lock()
    try:
        return await _Backup(settings, target, told).run()
    finally:
        if lock is not None:
            lock.release()


class _Backup:
    def __init__(self, settings: Settings, target: Target, told: OnProgress) -> None:
        self._kafka = Kafka(settings.kafka)
        self._history = History(settings.clickhouse)
        self._images = ClaimStore(settings.images_root)
        self._target = target
        self._told = told
        self._before = _previous(target)
        self._packs = [*(self._before.history if self._before is not None else ())]
        self._reached: dict[Life, int] = {}

    async def run(self) -> Done:
        try:
            self._target.sweep()
            self._continues()
            old = len(self._packs)
            for part in (part for pack in self._packs for part in pack.parts):
                self._reached[part.life] = max(self._reached.get(part.life, -1), part.hi)
            unfinished = _unfinished(self._target, self._packs)
            seen = await see(self._kafka)
            await self._refuse_others(seen, unfinished)
            self._adopt(unfinished)
            await self._copy_history(seen)
            seen, starts, tail, notes = await self._moment()
            passes, marked = await self._copy_passes()
            new = [*self._packs[old:], *tail]
            images, copied, missing = await self._copy_images(new, tail)
            manifest = Manifest(
                made_at=int(time.time() * 1000),
                version=version("rewatch"),
                partitions=self._kafka.settings.partitions,
                topics=tuple(seen.look.metas.values()),
                starts=_nested(starts),
                positions={stage: _nested(at) for stage, at in seen.look.positions.items()},
                history=tuple(self._packs),
                tail=tuple(tail),
                passes=tuple(passes),
                images=images,
                missing=tuple(sorted(missing)),
                notes=tuple(notes),
            )
            manifest = manifests.write(self._target, manifest)
            self._forget_tail(manifest)
        finally:
            await self._history.close()
        written = marked + sum(pack.size for pack in new)
        return Done(manifest, sum(pack.records for pack in new), copied[0], written + copied[1])

    def _continues(self) -> None:
        """Refuse what would make one backup of two things."""
        before = self._before
        if before is None:
            return
        if before.partitions != self._kafka.settings.partitions:
            raise DivergedError(
                f"{self._target.root} is of an installation with {before.partitions} partitions (kafka.partitions)"
            )

    async def _refuse_others(self, seen: Seen, unfinished: Iterable[Pack]) -> None:
        """Refuse a directory that has nothing of this installation, or a pack that is none of it.

        Epochs are random: two that have one in common have a past in common.
        """
        ours = {life[:2] for life in await self._history.lives()}
        ours |= {(meta.topic, meta.epoch) for meta in seen.look.metas.values()}
        theirs = [{part.life[:2] for part in pack.parts} for pack in unfinished]
        if self._before is not None:
            parts = (part for pack in self._before.history for part in pack.parts)
            theirs.append({part.life[:2] for part in parts} | {(one.topic, one.epoch) for one in self._before.topics})
        if any(lives and not lives & ours for lives in theirs):
            raise DivergedError(f"{self._target.root} is of another installation: give another directory")

    def _adopt(self, unfinished: Sequence[Pack]) -> None:
        """Go on behind packs that a killed backup wrote: all of them, or none where they do not follow what is there.

        Where two wrote at a time, what one left may overlap; to take some of it would leave a hole behind.
        """
        todo, taken, reached = [*unfinished], [], dict(self._reached)
        while todo:
            firsts: dict[Life, int] = {}
            for part in (part for pack in todo for part in pack.parts):
                firsts[part.life] = min(firsts.get(part.life, part.lo), part.lo)
            turn = next((pack for pack in todo if _leads(pack, firsts)), None)
            if turn is None:
                break
            for part in turn.parts:
                if part.lo <= reached.get(part.life, -1):
                    log.info("not taken over: it does not follow what the backup has", pack=turn.name)
                    return
                reached[part.life] = part.hi
            todo.remove(turn)
            taken.append(turn)
        if not todo:
            self._packs += taken
            self._reached = reached

    async def _copy_history(self, seen: Seen) -> None:
        """What ClickHouse has below the sink's positions and this backup has not yet."""
        lives = await self._history.lives()
        starts = await self._starts(seen)
        todo: dict[Life, tuple[int, int]] = {}
        for life in sorted(lives):
            after = self._reached.get(life, -1)
            upto = self._upto(seen, starts, life, lives[life])
            if after + 1 < upto:
                todo[life] = (after, upto)
        for life, reached in self._reached.items():
            if self._is_now(seen, life) and reached >= self._upto(seen, starts, life, reached):
                raise DivergedError(
                    f"{self._target.root} holds {life[0]}-{life[2]} up to offset {reached}, and this installation has "
                    "not come so far: it was restored from an older state; give another directory"
                )
        total = sum([await self._history.count(life, *span) for life, span in todo.items()])
        done = 0
        packer = Packer(self._target, "history")
        for life, (after, upto) in todo.items():
            async for page in self._history.pages(life, after, upto):
                packer.add(page, _claims(page))
                done += len(page)
                self._told("history", done, total)
                self._reached[life] = page[-1].record.offset
        packer.flush()
        self._packs += packer.packs

    def _is_now(self, seen: Seen, life: Life) -> bool:
        meta = seen.look.metas.get(life[0])
        return meta is not None and meta.epoch == life[1]

    def _upto(self, seen: Seen, starts: Mapping[TopicPartition, int], life: Life, last: int) -> int:
        """The first offset of a partition that is not ClickHouse's to tell."""
        topic, _, partition = life
        if not self._is_now(seen, life):
            return last + 1
        position = seen.look.reached("sink", topic, partition)
        return position if position is not None else starts.get(TopicPartition(topic, partition), 0)

    async def _starts(self, seen: Seen) -> dict[TopicPartition, int]:
        tps = [tp for topic in STORED for tp in partitions(seen.look.metas, topic)]
        return {tp: start for tp, (start, _) in (await self._kafka.bounds(tps)).items()} if tps else {}

    async def _moment(self) -> tuple[Seen, dict[TopicPartition, int], list[Pack], list[str]]:
        """One look at the log that fits together, and what ClickHouse took until then."""
        for attempt in range(_ATTEMPTS):
            seen = await see(self._kafka)
            await self._copy_history(seen)
            try:
                starts, tail, notes = await self._tail(seen)
            except TornError as error:
                log.info("looking again", why=str(error), attempt=attempt + 1)
                await asyncio.sleep(attempt + 1)
            else:
                return seen, starts, tail, notes
        raise UnavailableError(
            "broker", "results showed before the positions that go with them, each time: is the broker in trouble?"
        )

    async def _tail(self, seen: Seen) -> tuple[dict[TopicPartition, int], list[Pack], list[str]]:
        """What lies behind the sink's positions and belongs to the moment, and what stages remember."""
        notes: list[str] = []
        metas = seen.look.metas
        # A redrive's status is not to be there without the record that it tells of: so its end is taken first.
        statuses = partitions(metas, "dead_letter_status")
        ends = {tp: end for tp, (_, end) in (await self._kafka.bounds(statuses)).items()} if statuses else {}
        units = [tp for topic in ("replays", "replay_units") for tp in partitions(metas, topic)]
        if units:
            found, quiet = await quiet_ends(self._kafka, units)
            ends |= found
            if not quiet:
                notes.append("a replay was being planned: after a restore, `rewatch replay run` it again")
        rest = [tp for topic in STORED for tp in partitions(metas, topic) if tp not in ends]
        ends |= {tp: end for tp, (_, end) in (await self._kafka.bounds(rest)).items()} if rest else {}
        starts = await self._starts(seen)
        since = {tp: max(start, seen.look.positions["sink"].get(tp, start)) for tp, start in starts.items()}
        memories = _Memories(seen)
        packer = Packer(self._target, f"tail/{secrets.token_hex(8)}")  # nobody else names it, so nobody removes it
        total, done = sum(max(0, ends[tp] - since[tp]) for tp in ends), 0
        async for page in beyond(self._kafka, seen.look, since, ends):
            kept = []
            for one in page:
                if belongs(seen.look, one.record):
                    kept.append(one)
                    memories.note(one.record)
                else:
                    check(seen.look, one.record)
            if kept:
                packer.add(kept, _claims(kept))
            done += len(page)
            self._told("log", done, max(done, total))
        for state in memories.states():
            packer.add([state])
        packer.flush()
        return starts, packer.packs, notes

    async def _copy_passes(self) -> tuple[list[Pass], int]:
        """What retention has taken until now, and how many bytes of it are new."""
        known = {one.name: one for one in (self._before.passes if self._before is not None else ())}
        found: list[Pass] = []
        size = 0
        for row in await self._history.passes():
            was = known.get(row["name"])
            if was is None:
                marks = await self._history.marks(row["name"])
                file = write_marks(self._target, row["name"], marks)
                size += file[2]
            else:
                file = was.file, was.sha256, was.size
            found.append(Pass(**row, file=file[0], sha256=file[1], size=file[2]))
        return found, size

    async def _copy_images(self, new: Iterable[Pack], tail: Iterable[Pack]) -> tuple[int, tuple[int, int], set[str]]:
        """How many images are claimed; how many were copied, and their bytes; those that are nowhere."""
        claimed = {claim for pack in (*self._packs, *tail) for claim in claims_of(self._target, pack)}
        wanted = {claim for pack in new for claim in claims_of(self._target, pack)}
        wanted |= {*(self._before.missing if self._before is not None else ())} & claimed
        todo = sorted(wanted)
        missing: set[str] = set()
        count = size = done = 0
        turns = asyncio.Semaphore(_COPIES)

        async def copy(sha256: str) -> None:
            nonlocal count, size, done
            async with turns:
                name = manifests.image_name(sha256)
                if not await asyncio.to_thread(self._target.exists, name):
                    try:
                        data = await self._images.get(f"{_CLAIM}{sha256}", sha256)
                    except UnprocessableError as error:
                        log.error("image missing", sha256=sha256, why=str(error))  # noqa: TRY400
                        missing.add(sha256)
                    else:
                        await asyncio.to_thread(self._target.put, name, data)
                        count, size = count + 1, size + len(data)
                done += 1
                self._told("images", done, len(todo))

        await _all(copy(sha256) for sha256 in todo)
        return len(claimed), (count, size), missing

    def _forget_tail(self, manifest: Manifest) -> None:
        """The broker's part of the backup before this: the manifest names another now.

        Nothing else: on an object store another backup may be writing.
        """
        named = {pack.name for pack in manifest.tail}
        for pack in self._before.tail if self._before is not None else ():
            if pack.name not in named:
                for name in (pack.name, pack.claims, f"{pack.name.removesuffix('.pack')}.json"):
                    self._target.remove(name)


class _Memories:
    """What ingest remembers of each camera, with the frames that came since it was asked.

    The frames are in the backup, so it must know them: a camera that sends one again is told that it is there.
    """

    def __init__(self, seen: Seen) -> None:
        self._before = seen.before
        self._metas = seen.look.metas
        self._kept = list(seen.states)
        self._names: dict[tuple[int, str], list[tuple[str, bool]]] = {}

    def note(self, record: Incoming) -> None:
        """One more record of the tail."""
        tp = TopicPartition(record.topic, record.partition)
        if tp not in self._before or record.offset < self._before[tp]:
            return
        found = _named(record)
        if found is not None:
            camera, name = found
            self._names.setdefault((record.partition, camera), []).append((name, record.topic == "frames"))

    def states(self) -> list[Kept]:
        """The state records of all stages, brought up to date."""
        made: list[Kept] = []
        for kept in self._kept:
            state = read_as(kept.record, IngestState) if kept.record.topic == "ingest_state" else None
            names = self._names.pop((kept.record.partition, state.camera_id), []) if state is not None else []
            made.append(self._with(kept.record.partition, state.camera_id, state, names) if state and names else kept)
        for (partition, camera), names in self._names.items():
            made.append(self._with(partition, camera, None, names))
        return made

    def _with(self, partition: int, camera: str, state: IngestState | None, names: list[tuple[str, bool]]) -> Kept:
        memory = Memory(camera, state)
        new = [(name, frame) for name, frame in names if not memory.knows(name)]
        after = memory.state([name for name, _ in new], sum(frame for _, frame in new))
        emit = codec.emit("ingest_state", after, partition)
        epoch = self._metas["ingest_state"].epoch
        return Kept(Incoming("ingest_state", epoch, partition, 0, emit.key, emit.value, emit.headers))


def _named(record: Incoming) -> tuple[str, str] | None:
    """Camera, and the name by which ingest remembers what it appended; None of what it did not append."""
    if record.topic == "frames":
        frame = read_as(record, Frame)
        return (frame.camera_id, frame.frame_id) if frame is not None and record.redriven is None else None
    letter = read_as(record, DeadLetter)
    if letter is None or letter.stage != "ingest":
        return None
    if letter.kind == "shed":
        return letter.camera_id, f"shed {letter.origin}"
    return letter.camera_id, letter.origin if letter.attempt == 1 else f"{letter.origin}#{letter.attempt}"


def _claims(page: Iterable[Kept]) -> list[str]:
    """The images that records claim, by SHA-256."""
    found: list[str] = []
    for kept in page:
        record = kept.record
        claim: str | None = None
        if record.topic == "frames" and record.value is not None and not kept.decode_error:
            frame = read_as(record, Frame)
            claim = frame.claim if frame is not None else None
        elif record.topic == "dead_letters":
            letter = read_as(record, DeadLetter)
            claim = letter.claim if letter is not None else None
        if claim is not None and claim.startswith(_CLAIM):
            found.append(claim.removeprefix(_CLAIM))
    return found


def _previous(target: Target) -> Manifest | None:
    return manifests.read(target) if target.exists(manifests.NAME) else None


def _unfinished(target: Target, known: Iterable[Pack]) -> list[Pack]:
    """Packs that a backup wrote which was killed before it was done: whole ones, so they need not be made again."""
    names = {pack.name for pack in known}
    found: list[Pack] = []
    for name in target.names("history"):
        if name.endswith(".json"):
            try:
                pack = msgspec.json.decode(target.read(name), type=Pack)
                good = pack.name in names or target.sha256(pack.name) == (pack.sha256, pack.size)
            except (msgspec.MsgspecError, FileNotFoundError) as error:
                raise ManifestError(f"{target.root}/{name} is damaged ({error}): give another directory") from None
            if not good:
                raise ManifestError(f"{target.root}/{pack.name} is damaged: give another directory")
            if pack.name not in names:
                found.append(pack)
    return found


def _leads(pack: Pack, firsts: Mapping[Life, int]) -> bool:
    """Whether each partition of the pack begins with it, `firsts` being where they begin."""
    lows: dict[Life, int] = {}
    for part in pack.parts:
        lows[part.life] = min(lows.get(part.life, part.lo), part.lo)
    return all(low == firsts[life] for life, low in lows.items())


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Do all, a thousand at a time; the first error ends it."""
    batch: list[Awaitable[None]] = []
    for one in work:
        batch.append(one)
        if len(batch) == 1000:
            await asyncio.gather(*batch)
            batch = []
    await asyncio.gather(*batch)


def _nested(by_partition: Mapping[TopicPartition, int]) -> dict[str, dict[int, int]]:
    nested: dict[str, dict[int, int]] = {}
    for tp, offset in by_partition.items():
        nested.setdefault(tp.topic, {})[tp.partition] = offset
    return nested

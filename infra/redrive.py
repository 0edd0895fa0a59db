"""Redriving dead letters: what can be tried again, where its bytes are, and the way back onto the road.

The bytes of a record are appended to its own topic and partition, with a header that names the letter's origin; its
stage sees to it that there is one result (`streams.redrives`). A rejected file goes back to its camera's folder.
Nothing here has to happen once: whoever is killed in the middle, or asks twice, appends records of which nothing is
made.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from aiokafka import TopicPartition

from infra.config import Settings
from processors.ingest import rejected
from processors.store.queries import Queries, Row
from schemas import ids
from streams.admin import read_meta
from streams.delivery import FencedProducer
from streams.kafka import MAX_RECORD_BYTES, Kafka
from streams.messages import Emit, Headers
from streams.redrives import again, redriven
from streams.survey import READS

if TYPE_CHECKING:
    from schemas.records import TopicMeta

# Letters of one transaction: at 256 KB each 16 MB, which a broker that flushes has within a second. Their bytes come
# from ClickHouse as hex, so twice that is in memory.
CHUNK = 64

# One origin has at most as many letters as there are stages that read its topic.
_STAGES = len(READS)

# What a broker counts of a batch of one record besides key, value and headers.
_FRAMING = 1024

_BY = "cli"

_LOG = "log:"
"""What the claim of a record begins with that was too large for its letter: the rest names where it lies."""


class Outcome(NamedTuple):
    """What was done with one dead letter, or would be."""

    origin: str
    stage: str
    kind: str
    attempts: int
    to: str | None
    """Where it went: `topic-partition`, or a file. None: nowhere."""
    why: str | None
    """Why not, and what to do instead. None where it went."""


def obstacle(letter: Row) -> str | None:
    """Why this letter can never be redriven, and what to do instead; None where it can, as far as it tells."""
    stage, kind, topic = letter["stage"], letter["kind"], letter["origin"].split(":", 1)[0]
    if letter["status"] == "resolved":
        return "it is resolved: its result is there"
    if kind == "gap":
        return (
            "a gap has no bytes: those offsets were gone from the log before the stage had read them; "
            "what ClickHouse holds of them is in its table `log`. Give the stage more processes, or the log more time"
        )
    if kind == "shed":
        return (
            "detect or analyze did not keep up, and ingest set it aside without its bytes: give them more processes "
            "(stages.detect.processes, stages.analyze.processes), and let its sender send it again"
        )
    if kind == "rejected":
        sent = f"it came by {topic} and left no file: mend what the message names, and send it again"
        return None if topic == "folder" else sent
    if stage == "replay" and topic != "replay_units":
        return "a shadow failed in it: it judges live windows once, as they come, and nothing is held up by it"
    met = ids.place(letter["origin"]) is not None and stage != "sink" and topic in READS.get(stage, ())
    return None if met else f"no stage would meet it again: {stage} reads no {topic}"


class Redriver:
    """The way back for dead letters, letter by letter; with `dry_run` only what would be done is said."""

    def __init__(self, settings: Settings, store: Queries, *, dry_run: bool) -> None:
        self._settings = settings
        self._store = store
        self._dry_run = dry_run
        self._kafka = Kafka(settings.kafka)
        self._metas: dict[str, TopicMeta] = {}
        # A name of its own: two people who redrive at once need not wait for one another.
        self._producer = FencedProducer(self._kafka, self._kafka.transactional_id("redrive", secrets.token_hex(4)))

    async def run(self, letters: Sequence[Row], on_progress: Callable[[int], None] = lambda _: None) -> list[Outcome]:
        """Redrive the letters in the order of their records; `on_progress` is told how many are done.

        Raises:
            UnavailableError: ClickHouse is away.
            KafkaError, TimeoutError, FencedError, UncertainError: the broker is. What was done before stays, and to
                do it again is harmless.
        """
        self._metas = await read_meta(self._kafka)
        if not self._dry_run:
            await self._producer.open()
        done: list[Outcome] = []
        try:
            for chunk in _chunks(letters):
                done += await self._redrive(chunk)
                on_progress(len(done))
        finally:
            await self._producer.close()
        return done

    async def _redrive(self, chunk: Sequence[Row]) -> list[Outcome]:
        """One transaction's worth."""
        whole = await self._store.dead_letters(
            origins=[letter["origin"] for letter in chunk], limit=_STAGES * len(chunk)
        )
        bodies = {(letter["origin"], letter["stage"]): letter for letter in whole}
        outcomes: list[Outcome] = []
        emits: list[Emit] = []
        for letter in chunk:
            named = (letter["origin"], letter["stage"], letter["kind"], letter["attempt"])
            try:
                if why := obstacle(letter):
                    raise _CannotError(why)
                if letter["kind"] == "rejected":
                    to = await self._put_back(letter)
                    emits.append(redriven(letter["origin"], _BY, _now_ms()))
                else:
                    record, status = await self._record(bodies.get((letter["origin"], letter["stage"]), letter))
                    to = f"{record.topic}-{record.partition}"
                    emits += (record, status)
            except _CannotError as error:
                outcomes.append(Outcome(*named, None, str(error)))
            else:
                outcomes.append(Outcome(*named, to, None))
        if emits and not self._dry_run:
            await self._producer.transact(emits)
        return outcomes

    async def _put_back(self, letter: Row) -> str:
        """Move a rejected file to where ingest takes it again; where that is."""
        folder = self._settings.ingest.folder
        try:
            said = json.loads(letter["detail"])
            file = rejected.Letter(
                letter["origin"], letter["camera_id"], letter["attempt"], said["name"], said["size"], said["file_at"]
            )
        except (ValueError, KeyError, TypeError):
            raise _CannotError("the letter does not say where its file lies") from None
        try:
            if self._dry_run:
                base, _ = await asyncio.to_thread(rejected.find, folder, file)
                return str(base / file.name)
            return str(await asyncio.to_thread(rejected.put_back, folder, file))
        except rejected.NotThereError as error:
            raise _CannotError(str(error)) from None
        except OSError as error:
            raise _CannotError(f"{error.filename}: {error.strerror}") from error

    async def _record(self, letter: Row) -> tuple[Emit, Emit]:
        """The record as it first was, to be appended where it first was, and the status that says so."""
        place = ids.place(letter["origin"])
        assert place is not None, "else there is an obstacle"
        meta = self._metas.get(place.topic)
        if meta is None or place.partition >= meta.partitions:
            there = f"{meta.partitions} partitions" if meta is not None else "no partition"
            raise _CannotError(f"{place.topic} has {there} now: its place is not there any more")
        if letter["claim"]:
            key, value, headers = await self._from_log(letter["claim"])
        else:
            key, value = _bytes(letter["key"]), _bytes(letter["value"])
            headers = tuple((name, bytes.fromhex(content)) for name, content in letter["headers"])
        record, status = again(place, letter["attempt"], key=key, value=value, headers=headers, by=_BY, at=_now_ms())
        if record.size > MAX_RECORD_BYTES - _FRAMING:
            raise _CannotError(f"it has {record.size:,} bytes with its redrive's headers: more than a record holds")
        return record, status

    async def _from_log(self, claim: str) -> tuple[bytes | None, bytes | None, Headers]:
        """The bytes of a record that was too large for its letter, from where it lies on the log."""
        place = ids.place(claim.removeprefix(_LOG))
        if place is None:
            raise _CannotError(f"its bytes are at {claim!r}, which names no place on the log")
        meta = self._metas.get(place.topic)
        if meta is None or meta.epoch != place.epoch:
            raise _CannotError(f"its bytes were on the log alone, and {place.topic} was made anew since: they are gone")
        tp = TopicPartition(place.topic, place.partition)
        found = await self._kafka.read([tp], since={tp: place.offset}, until={tp: place.offset + 1})
        for record in found:
            if record.offset == place.offset:
                return record.key, record.value, record.original_headers
        start, _ = (await self._kafka.bounds([tp]))[tp]
        raise _CannotError(
            f"its bytes were on the log alone, at {place}, and retention has taken them: "
            f"{place.topic}-{place.partition} begins at offset {start} now"
        )


def _now_ms() -> int:
    return int(time.time() * 1000)


class _CannotError(Exception):
    """This letter cannot be redriven; the message says why."""


def one_each(letters: Sequence[Row]) -> list[Row]:
    """One letter of each origin, in the order of their records: of two stages one record serves both."""
    possible_last = sorted(letters, key=lambda letter: obstacle(letter) is None)
    return sorted({letter["origin"]: letter for letter in possible_last}.values(), key=_order)


def _order(letter: Row) -> tuple[str, str, int, int]:
    place = ids.place(letter["origin"])
    if place is None:
        return letter["origin"], "", 0, 0
    return place.topic, place.epoch, place.partition, place.offset


def _chunks(letters: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(letters), CHUNK):
        yield letters[start : start + CHUNK]


def _bytes(content: str | None) -> bytes | None:
    return None if content is None else bytes.fromhex(content)

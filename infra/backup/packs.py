"""Files of records: a pack is a row of parts, and each part is an Avro object container of one partition's records.

A part holds records of one partition of one life of a topic, in offset order, as they lay on the log and as ClickHouse
took them. Any Avro reader opens one, cut out by the place that the manifest names. Snappy: images do not get smaller,
everything else does, at 100 MB a second and more.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import fastavro
import msgspec

from infra.backup.target import Target
from streams.messages import Incoming, Tick

PACK_BYTES = 64 * 1024 * 1024
"""A pack is closed when it is as large: what a backup that is killed does again is at most this."""

_SCHEMA = fastavro.parse_schema(
    {
        "type": "record",
        "name": "rewatch.backup.Kept",
        "fields": [
            {"name": "offset", "type": "long"},
            {"name": "key", "type": ["null", "bytes"]},
            {"name": "value", "type": ["null", "bytes"]},
            {
                "name": "headers",
                "type": {
                    "type": "array",
                    "items": {
                        "type": "record",
                        "name": "rewatch.backup.Header",
                        "fields": [{"name": "name", "type": "string"}, {"name": "value", "type": "bytes"}],
                    },
                },
            },
            {"name": "timestamp", "type": ["null", "long"], "doc": "The broker's, ms; null of what ClickHouse gave."},
            {"name": "inserted_at", "type": ["null", "long"], "doc": "When ClickHouse took it, ms; null: not yet."},
            {"name": "decode_error", "type": "string", "doc": "As in ClickHouse's `log`."},
        ],
    }
)


class Kept(NamedTuple):
    """One record of a backup."""

    record: Incoming
    timestamp: int | None = None
    inserted_at: int | None = None
    decode_error: str = ""

    @property
    def tick(self) -> bool:
        """Whether it is wall time, not data."""
        return Tick.of(self.record) is not None


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Where one part lies, and what is in it."""

    topic: str
    epoch: str
    partition: int
    lo: int
    hi: int
    """Offsets of its first and last record."""
    records: int
    at: int
    """Its first byte in the pack."""
    size: int
    first_at: int | None
    """When ClickHouse took the first of them, ms since the Unix epoch; None where it has not."""

    @property
    def life(self) -> tuple[str, str, int]:
        """Topic, epoch and partition."""
        return self.topic, self.epoch, self.partition


class Pack(msgspec.Struct, frozen=True, kw_only=True):
    """One file of records."""

    name: str
    sha256: str
    size: int
    parts: tuple[Part, ...]
    claims: str
    """The file that lists the images that its records claim, by SHA-256, a line each."""
    claims_sha256: str

    @property
    def records(self) -> int:
        """How many records it holds."""
        return sum(part.records for part in self.parts)


class PackError(Exception):
    """A file of the backup is not what its manifest says."""


class Packer:
    """Collects parts, and writes a pack whenever there is enough for one."""

    def __init__(self, target: Target, folder: str) -> None:
        self._target = target
        self._folder = folder
        self._out = io.BytesIO()
        self._parts: list[Part] = []
        self._claims: set[str] = set()
        self.packs: list[Pack] = []
        """Those that are written, in order."""

    def add(self, records: list[Kept], claims: Iterable[str] = ()) -> None:
        """Add a part; the records are of one partition and at least one."""
        first, last = records[0], records[-1]
        at = self._out.tell()
        part = io.BytesIO()  # its own: fastavro takes a file that has something in it for one to go on with
        fastavro.writer(part, _SCHEMA, map(_plain, records), codec="snappy")
        self._out.write(part.getbuffer())
        topic, epoch, partition, lo = first.record[:4]
        self._parts.append(
            Part(
                topic=topic,
                epoch=epoch,
                partition=partition,
                lo=lo,
                hi=last.record.offset,
                records=len(records),
                at=at,
                size=self._out.tell() - at,
                first_at=first.inserted_at,
            )
        )
        self._claims.update(claims)
        if self._out.tell() >= PACK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what there is; its index last, by which a backup that goes on finds it."""
        if not self._parts:
            return
        data = self._out.getbuffer()
        sha256, size = hashlib.sha256(data).hexdigest(), len(data)
        stem = f"{self._folder}/{sha256[:32]}"
        claims = "".join(f"{claim}\n" for claim in sorted(self._claims)).encode()
        self._target.put(f"{stem}.pack", bytes(data))
        del data
        self._target.put(f"{stem}.images", claims)
        pack = Pack(
            name=f"{stem}.pack",
            sha256=sha256,
            size=size,
            parts=tuple(self._parts),
            claims=f"{stem}.images",
            claims_sha256=hashlib.sha256(claims).hexdigest(),
        )
        self._target.put(f"{stem}.json", msgspec.json.encode(pack))
        self.packs.append(pack)
        self._out, self._parts, self._claims = io.BytesIO(), [], set()


def read_part(target: Target, pack: Pack, part: Part) -> list[Kept]:
    """The records of a part.

    Raises:
        PackError: it is not what the manifest says.
        FileNotFoundError: the pack is gone.
    """
    data = target.read(pack.name, part.at, part.size)
    try:
        rows = list(fastavro.reader(io.BytesIO(data)))
    except Exception as error:  # fastavro raises whatever its struct and codec calls raise on bad bytes
        raise PackError(f"{pack.name}: {part.topic}-{part.partition} from {part.lo} cannot be read: {error}") from error
    if len(rows) != part.records:
        raise PackError(f"{pack.name}: {part.topic}-{part.partition} from {part.lo} has {len(rows)} records")
    return [_kept(row, part) for row in rows]


def claims_of(target: Target, pack: Pack) -> Iterator[str]:
    """The images that a pack's records claim, by SHA-256."""
    yield from target.read(pack.claims).decode().split()


def _plain(kept: Kept) -> dict[str, object]:
    record = kept.record
    return {
        "offset": record.offset,
        "key": record.key,
        "value": record.value,
        "headers": [{"name": name, "value": value} for name, value in record.headers],
        "timestamp": kept.timestamp,
        "inserted_at": kept.inserted_at,
        "decode_error": kept.decode_error,
    }


def _kept(row: dict[str, object], part: Part) -> Kept:
    made = msgspec.convert(row, _Row)
    headers = tuple((header.name, header.value) for header in made.headers)
    record = Incoming(part.topic, part.epoch, part.partition, made.offset, made.key, made.value, headers)
    return Kept(record, made.timestamp, made.inserted_at, made.decode_error)


class _Header(msgspec.Struct):
    name: str
    value: bytes


class _Row(msgspec.Struct):
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[_Header]
    timestamp: int | None
    inserted_at: int | None
    decode_error: str

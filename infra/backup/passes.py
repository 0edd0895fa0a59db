"""What retention took: passes of the collector that have begun to delete, and the positions of what each deleted.

By the time a pass deletes, its marks are complete, and they never change: each pass is one Avro object container,
written once. A pass that only marks has deleted nothing and would be taken back by the next run; it is left out.
Left out, too, is which images a pass has yet to look at: a restore brings no image that nothing restored claims.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence

import fastavro
import msgspec

from infra.backup.packs import PackError
from infra.backup.target import Target

_SCHEMA = fastavro.parse_schema(
    {
        "type": "record",
        "name": "rewatch.backup.Marks",
        "fields": [
            {"name": "topic", "type": "string"},
            {"name": "epoch", "type": "string"},
            {"name": "partition", "type": "int"},
            {"name": "why", "type": "string", "doc": "As in ClickHouse's `forgotten`."},
            {"name": "marked_at", "type": "long", "doc": "ms since the Unix epoch."},
            {"name": "offsets", "type": {"type": "array", "items": "long"}},
        ],
    }
)


class Marks(msgspec.Struct, frozen=True):
    """Positions that a pass marked in one partition of one life of a topic, for one reason, at one time."""

    topic: str
    epoch: str
    partition: int
    why: str
    marked_at: int
    """ms since the Unix epoch."""
    offsets: Sequence[int]
    """In order."""


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `gc_passes`, and the file of its marks. Times are ms since the Unix epoch."""

    name: str
    owner: str
    started_at: int
    state: str
    """deleting, which the next run of the collector finishes, or done."""
    records: int
    images: int
    at: int
    file: str
    sha256: str
    size: int


def write_marks(target: Target, name: str, marks: Iterable[Marks]) -> tuple[str, str, int]:
    """Write the marks of a pass; the file's name, its SHA-256 (hex) and its length, bytes."""
    out = io.BytesIO()
    # Not a random marker: whoever writes the same marks again comes to the same file.
    marker = hashlib.sha256(name.encode()).digest()[:16]
    fastavro.writer(out, _SCHEMA, map(msgspec.structs.asdict, marks), codec="snappy", sync_marker=marker)
    data = out.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    file = f"retention/{sha256[:32]}.avro"
    target.put(file, data)
    return file, sha256, len(data)


def read_marks(target: Target, one: Pass) -> Iterator[Marks]:
    """The marks of a pass.

    Raises:
        PackError: it is not what the manifest says.
        FileNotFoundError: the file is gone.
    """
    data = target.read(one.file)
    if hashlib.sha256(data).hexdigest() != one.sha256:
        raise PackError(f"{one.file} is damaged: its SHA-256 is another")
    for row in fastavro.reader(io.BytesIO(data)):
        yield msgspec.convert(row, Marks)

"""What goes in and out of a stage: `Incoming` and `Emit`, the headers they carry, and ticks."""

from typing import NamedTuple

from schemas import ids

FINGERPRINT = "fp"
"""Header: the Rabin fingerprint of the value's schema, 8 bytes."""
SOURCE = "src"
"""Header: the record that this one was made from, `topic:epoch:partition:offset`."""
REDRIVE = "redrive"
"""Header: the origin of the dead letter whose bytes these are. What is made of them carries it too, as a mark."""
ATTEMPTS = "redrive-attempts"
"""Header beside it: how often that record had been tried before, decimal."""
KIND = "kind"
TICK = b"tick"
WALL = "wall"
CAMERA = "camera"

Headers = tuple[tuple[str, bytes], ...]

# A count of attempts, like an int of Avro's, has no more.
_DIGITS = 9


class Incoming(NamedTuple):
    """One record as it was read: nothing is decoded yet, so a bad one can be kept as it came."""

    topic: str
    epoch: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def origin(self) -> str:
        """Its name across recreations of the topic."""
        return ids.origin(self.topic, self.epoch, self.partition, self.offset)

    def header(self, name: str) -> bytes | None:
        """The last header of that name, as Kafka has it."""
        for key, value in reversed(self.headers):
            if key == name:
                return value
        return None

    @property
    def redriven(self) -> str | None:
        """The origin of the dead letter that this record repeats; None where it repeats none.

        What was made of a redriven record carries the header too, but names a record of another topic or partition.
        """
        name = self.header(REDRIVE)
        if name is None or not name.startswith(f"{self.topic}:".encode()):
            return None
        place = ids.place(name.decode(errors="replace"))
        return str(place) if place is not None and place[::2] == (self.topic, self.partition) else None

    @property
    def attempts(self) -> int:
        """How often the record that this one repeats had been tried before; 0 where it repeats none."""
        said = self.header(ATTEMPTS) if self.redriven is not None else None
        return int(said) if said is not None and said.isdigit() and len(said) <= _DIGITS else 0

    @property
    def repeats(self) -> bool:
        """Whether it stands on its topic for another time: a redriven record, or its dead letter once more."""
        name = self.header(REDRIVE)
        return name is not None and (name == self.key or self.redriven is not None)

    @property
    def original_headers(self) -> Headers:
        """Its headers, without those that a redrive put behind them."""
        if self.redriven is None:
            return self.headers
        kept = list(self.headers)
        for name in (REDRIVE, ATTEMPTS):
            last = max((index for index, header in enumerate(kept) if header[0] == name), default=None)
            if last is not None:
                del kept[last]
        return tuple(kept)

    @property
    def size(self) -> int:
        """Bytes of key and value, for bounds on memory."""
        return len(self.key or b"") + len(self.value or b"")


class Emit(NamedTuple):
    """One record to append. It goes to the partition of the record that it was made from, unless it says other."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None
    since: int | None = None
    """When the frame that it tells of arrived, or the window ended, ms since the Unix epoch. Metrics' only."""

    @property
    def size(self) -> int:
        """Bytes of key, value and headers: what a broker's bound on records counts."""
        return len(self.key or b"") + len(self.value or b"") + size_of(self.headers)


def size_of(headers: Headers) -> int:
    """Bytes of headers, names and values."""
    return sum(len(name.encode()) + len(value) for name, value in headers)


class Tick(NamedTuple):
    """Wall time as an event: a record without a value on `frames`, handed on in order by detect.

    With a camera it ends that camera's stream (the end of a folder that was played); without one it is the
    pulse that lets windows of every camera of the partition close while no frame comes.
    """

    wall_at: int
    """Milliseconds since the Unix epoch."""
    camera_id: str | None = None

    @classmethod
    def of(cls, record: Incoming) -> "Tick | None":
        """The tick that this record is, or None. A tick whose time or camera cannot be read is none."""
        if record.header(KIND) != TICK:
            return None
        wall, camera = record.header(WALL), record.header(CAMERA)
        try:
            return cls(int(wall or b""), camera.decode() if camera is not None else None)
        except ValueError:
            return None

    def emit(self, topic: str, partition: int | None = None) -> Emit:
        """The record that carries it."""
        headers: Headers = ((KIND, TICK), (WALL, str(self.wall_at).encode()))
        if self.camera_id is not None:
            headers += ((CAMERA, self.camera_id.encode()),)
        return Emit(topic, (self.camera_id or "tick").encode(), None, headers, partition)

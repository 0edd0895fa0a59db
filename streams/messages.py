"""What goes in and out of a stage: `Incoming` and `Emit`, the headers they carry, and ticks."""

from typing import NamedTuple

from schemas import ids

FINGERPRINT = "fp"
"""Header: the Rabin fingerprint of the value's schema, 8 bytes."""
SOURCE = "src"
"""Header: the record that this one was made from, `topic:epoch:partition:offset`."""
REDRIVE = "redrive"
"""Header: the origin of the dead letter whose bytes these are."""
KIND = "kind"
TICK = b"tick"
WALL = "wall"
CAMERA = "camera"

Headers = tuple[tuple[str, bytes], ...]


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
    def size(self) -> int:
        """Bytes of key and value, for bounds on memory."""
        return len(self.key or b"") + len(self.value or b"")


class Emit(NamedTuple):
    """One record to append. It goes to the partition of the record that it was made from, unless it says other."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None
    since: int | None = None
    """When the frame that it tells of arrived, or the window ended, ms since the Unix epoch. Metrics' only."""

    @property
    def size(self) -> int:
        """Bytes of key, value and headers: what a broker's bound on records counts."""
        return len(self.key) + len(self.value or b"") + size_of(self.headers)


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

"""People's labels on their way to the log: whoever takes one, the page or a command, puts it there through here.

Each is appended exactly once, in the partition of its camera, and named by its content.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import msgspec
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from schemas import ids
from schemas.records import Label
from streams import codec
from streams.control import Cameras
from streams.delivery import FencedProducer
from streams.errors import FencedError, UnavailableError, UncertainError
from streams.kafka import Kafka
from streams.topics import partition_of

log = structlog.get_logger(__name__)

MAX_AUTHOR = 100
"""Longest name of whoever gives a label, characters."""
MAX_NOTE = 2000
"""Longest note on a label, characters."""
LONGEST_MISSED = timedelta(days=31)
"""Longest span in which an alarm was missed: a month, the longest that the page shows at once."""

# Appending holds its fence for some 200 ms: ten tries with jitter let a dozen writers through.
_ATTEMPTS = 10

# The same verdict on the same thing again within this is a button pressed twice, milliseconds.
_TWICE_MS = 10_000

# What a label is given on, and by whom; and all that it says.
_THING = ("camera_id", "started_at", "ended_at", "event_id", "author")
_CONTENT = tuple(name for name in Label.__struct_fields__ if name not in {"label_id", "labelled_at"})


class LabelLog:
    """The way of labels into the log.

    Args:
        kafka: the connection.
        cameras: which partition a camera lives in.
        clock: wall time, seconds since the Unix epoch.
    """

    def __init__(self, kafka: Kafka, cameras: Cameras, clock: Callable[[], float] = time.time) -> None:
        self._kafka = kafka
        self._cameras = cameras
        self._clock = clock
        self._turn = asyncio.Lock()
        self._recent: list[Label] = []

    async def append(self, label: Label) -> Label:
        """Put a label on the log, naming it by its content; what is returned is there.

        `label_id` and `labelled_at` of what is given are ignored. The same said of the same thing twice within ten
        seconds, with nothing else said of it between, is one label.

        Raises:
            UnavailableError: the broker is away; then it is not there, or not known to be.
        """
        async with self._turn:
            now = int(self._clock() * 1000)
            if (before := self._just_said(label, now)) is not None:
                return before
            named = _named(label, now)
            try:
                await self._cameras.table.load()
                await self._put(named)
            except (KafkaError, TimeoutError, OSError, FencedError, UncertainError) as error:
                why = self._kafka.away(error)
                raise UnavailableError("broker", f"the label cannot be put on the log: {why}") from error
            self._recent.append(named)
            return named

    async def read(self) -> list[Label]:
        """Every label that the log holds, in no order across cameras. One that cannot be read is left out and logged.

        ClickHouse has them a moment later, or much later where the sink is away. People give thousands, so all of them
        are read in a second.

        Raises:
            KafkaError or TimeoutError: the broker is away.
        """
        partitions = [TopicPartition("labels", n) for n in range(self._kafka.settings.partitions)]
        found: list[Label] = []
        for record in await self._kafka.read(partitions):
            try:
                found.append(codec.decode(record, Label))
            except codec.DecodeError as error:
                log.warning("label skipped", partition=record.partition, offset=record.offset, why=str(error))
        return found

    def _just_said(self, label: Label, now: int) -> Label | None:
        self._recent = [other for other in self._recent if now - other.labelled_at <= _TWICE_MS]
        before = next((other for other in reversed(self._recent) if _same(other, label, _THING)), None)
        return before if before is not None and _same(before, label, _CONTENT) else None

    async def _put(self, label: Label) -> None:
        camera = self._cameras.get(label.camera_id)
        pin = camera.partition if camera is not None else None
        partition = partition_of(label.camera_id, self._kafka.settings.partitions, pin)
        emit = codec.emit("labels", label, partition)
        tp = TopicPartition("labels", partition)
        since: int | None = None
        for attempt in range(_ATTEMPTS):
            # Writers take turns by fencing one another. Once this one is open, what an earlier try became is settled.
            producer = FencedProducer(self._kafka, self._kafka.transactional_id("labels", partition))
            try:
                await producer.open()
                if since is None:
                    since = (await self._kafka.bounds([tp]))[tp][1]
                elif any(found.value == emit.value for found in await self._kafka.read([tp], since={tp: since})):
                    return
                await producer.transact([emit])
            except (FencedError, UncertainError) as error:
                if attempt == _ATTEMPTS - 1:
                    raise
                log.warning("label again", label=label.label_id, why=str(error))
                await asyncio.sleep(random.uniform(0.05, 0.3))
            else:
                return
            finally:
                await producer.close()


def _same(one: Label, other: Label, names: Iterable[str]) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _named(label: Label, now: int) -> Label:
    name = ids.digest(
        label.camera_id,
        str(label.started_at),
        str(label.ended_at),
        label.verdict,
        label.event_id or "",
        label.author,
        str(now),
    )
    return msgspec.structs.replace(label, label_id=name, labelled_at=now)

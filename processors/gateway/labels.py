"""People's labels on their way to the log: each is appended exactly once, and whoever gave it sees it at once."""

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from processors.gateway.models import Label
from schemas import ids, records
from streams import codec
from streams.control import Cameras
from streams.delivery import FencedProducer
from streams.errors import FencedError, UnavailableError, UncertainError
from streams.kafka import Kafka
from streams.topics import partition_of

log = structlog.get_logger(__name__)

# Appending holds its fence for some 200 ms: ten tries with jitter let a dozen gateways through.
_ATTEMPTS = 10

# How many labels this process gave are remembered: more than people give while a sink is away for a day.
_REMEMBERED = 10_000

# The same verdict on the same thing again within this is a button pressed twice, seconds.
_TWICE_S = 10.0


class Labels:
    """The way of labels into the log, and what this process put there.

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
        self._given: OrderedDict[str, Label] = OrderedDict()

    async def append(self, label: Label) -> Label:
        """Put a label on the log, naming it by its content; what is returned is there.

        `label_id` and `labelled_at` of what is given are ignored. The same label given twice within ten seconds is one.

        Raises:
            UnavailableError: the broker is away; then it is not there, or not known to be.
        """
        async with self._turn:
            now = datetime.fromtimestamp(int(self._clock() * 1000) / 1000, UTC)
            for other in reversed(self._given.values()):
                if (now - other.labelled_at).total_seconds() > _TWICE_S:
                    break
                if _content(other) == _content(label):
                    return other
            record = _record(label, now)
            try:
                await self._cameras.table.load()
                await self._put(record)
            except (KafkaError, TimeoutError, OSError, FencedError, UncertainError) as error:
                raise UnavailableError(
                    "broker", f"the label cannot be put on the log (kafka.bootstrap_servers): {error!r}"
                ) from error
            given = label.model_copy(update={"label_id": record.label_id, "labelled_at": now})
            self._given[given.label_id] = given
            while len(self._given) > _REMEMBERED:
                self._given.popitem(last=False)
            return given

    def with_given(self, stored: Iterable[Label], wanted: Callable[[Label], bool]) -> list[Label]:
        """What ClickHouse has and what this process gave, where wanted; newest first, each once.

        The sink stores a label a moment after it was given, or much later, where it is away.
        """
        found: dict[str, Label] = {label.label_id: label for label in self._given.values() if wanted(label)}
        found |= {label.label_id: label for label in stored}
        return sorted(found.values(), key=lambda label: (label.labelled_at, label.label_id), reverse=True)

    async def _put(self, record: records.Label) -> None:
        camera = self._cameras.get(record.camera_id)
        pin = camera.partition if camera is not None else None
        partition = partition_of(record.camera_id, self._kafka.settings.partitions, pin)
        emit = codec.emit("labels", record, partition)
        tp = TopicPartition("labels", partition)
        since: int | None = None
        for attempt in range(_ATTEMPTS):
            # Gateways take turns by fencing one another. Once this one is open, what an earlier try became is settled.
            producer = FencedProducer(self._kafka, self._kafka.transactional_id("gateway", "labels", partition))
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
                log.warning("label again", label=record.label_id, why=str(error))
                await asyncio.sleep(random.uniform(0.05, 0.3))
            else:
                return
            finally:
                await producer.close()


def newest(labels: Iterable[Label]) -> Mapping[str, Label]:
    """The newest label of each event."""
    found: dict[str, Label] = {}
    for label in labels:
        event_id = label.event_id or ""
        if event_id not in found or label.labelled_at > found[event_id].labelled_at:
            found[event_id] = label
    return found


def _content(label: Label) -> tuple[object, ...]:
    return tuple(value for name, value in label if name not in {"label_id", "labelled_at"})


def _record(label: Label, now: datetime) -> records.Label:
    started_at, ended_at, labelled_at = (_ms(at) for at in (label.started_at, label.ended_at, now))
    name = ids.digest(
        label.camera_id,
        str(started_at),
        str(ended_at),
        label.verdict,
        label.event_id or "",
        label.author,
        str(labelled_at),
    )
    return records.Label(
        label_id=name,
        camera_id=label.camera_id,
        started_at=started_at,
        ended_at=ended_at,
        verdict=label.verdict,
        event_id=label.event_id,
        author=label.author,
        note=label.note,
        labelled_at=labelled_at,
    )


def _ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)

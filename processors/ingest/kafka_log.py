"""The log as Kafka keeps it: one transactional id a camera, its memory on `ingest_state`."""

from collections.abc import Sequence

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from schemas.records import Camera, IngestState
from streams import codec
from streams.delivery import FencedProducer
from streams.errors import UnavailableError
from streams.kafka import Kafka
from streams.messages import Emit
from streams.topics import partition_of

# How far back the first look for a camera's state goes, records; it doubles until the state is found. A state is
# at most 8 KB and a busy camera writes one a transaction, so the newest is usually among the last ones.
_TAIL = 256


class KafkaLog:
    """Frames on Kafka.

    Args:
        kafka: the connection.
        epoch: the epoch of the topic `frames`.
    """

    def __init__(self, kafka: Kafka, epoch: str) -> None:
        self._kafka = kafka
        self.identity = f"{kafka.settings.system}:{epoch}"

    def camera(self, camera: Camera) -> "KafkaCameraLog":
        """A new way in for the camera, not open."""
        partition = partition_of(camera.camera_id, self._kafka.settings.partitions, camera.partition)
        return KafkaCameraLog(self._kafka, camera.camera_id, partition)


class KafkaCameraLog:
    """One camera's way into Kafka."""

    def __init__(self, kafka: Kafka, camera_id: str, partition: int) -> None:
        self._kafka = kafka
        self._camera_id = camera_id
        self._partition = partition
        self._producer = FencedProducer(kafka, kafka.transactional_id("ingest", camera_id))

    async def open(self) -> IngestState | None:
        """Fence, then read the state; see the port."""
        try:
            await self._producer.open()
            return await self._read_state()
        except (KafkaError, TimeoutError, OSError) as error:
            raise UnavailableError(self._kafka.waiting_on, self._kafka.away(error)) from error

    async def commit(self, emits: Sequence[Emit]) -> None:
        """Append in one transaction; see the port."""
        mine = self._partition
        await self._producer.transact([e if e.partition is not None else e._replace(partition=mine) for e in emits])

    async def close(self) -> None:
        """Let go."""
        await self._producer.close()

    async def _read_state(self) -> IngestState | None:
        tp = TopicPartition("ingest_state", self._partition)
        key = self._camera_id.encode()
        start, end = (await self._kafka.bounds([tp]))[tp]
        since, tail = end, _TAIL
        while since > start:
            since = max(start, end - tail)
            for record in reversed(await self._kafka.read([tp], since={tp: since})):
                if record.key != key:
                    continue
                try:
                    state = codec.decode_state(record, IngestState)
                except codec.UnknownSchemaError as error:  # without what it remembers frames would double
                    raise UnavailableError("settings", f"state of camera {self._camera_id}: {error}") from error
                if state is not None:
                    return state
            tail *= 8
        return None

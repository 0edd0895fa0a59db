"""Control topics read whole and folded to the latest by key, as the stages look them up; cameras among them.

They are small and never compacted, because their history is the product. A follower reads them to their end
before its stage sees the first record, then keeps up with them.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from schemas.records import Camera, Record, WindowSettings
from streams import codec
from streams.delivery import FencedProducer
from streams.errors import FencedError
from streams.kafka import Kafka, incoming
from streams.messages import Incoming
from streams.topics import TOPICS

log = structlog.get_logger(__name__)

R = TypeVar("R", bound=Record)

# A write holds its fence for some 200 ms: ten tries with jitter let a dozen simultaneous writers through.
_WRITE_ATTEMPTS = 10


class ControlTable(Generic[R]):
    """The latest record of each key of one control topic."""

    def __init__(
        self, kafka: Kafka, topic: str, kind: type[R], refuse: Callable[[R], str | None] = lambda _: None
    ) -> None:
        self._kafka = kafka
        self._tp = TopicPartition(topic, 0)
        self._kind = kind
        self._refuse = refuse
        self._latest: dict[str, R] = {}
        self._next = 0
        self.skipped = 0
        """Records that could not be read: skipped, counted, alarmed; one bad record must not stop a stage."""

    def get(self, key: str) -> R | None:
        """The latest record of the key."""
        return self._latest.get(key)

    def all(self) -> dict[str, R]:
        """The latest record of every key."""
        return dict(self._latest)

    async def load(self) -> None:
        """Read to the end as it is now."""
        for record in await self._kafka.read([self._tp], since={self._tp: self._next}):
            self._take(record)

    async def append(self, record: R, *, only_new: bool = False) -> None:
        """Append a record, then read to the end, so that what holds here is what holds for everyone.

        With `only_new` it is not appended where its key has a record by now: whoever wrote that one was asked to.

        Raises:
            FencedError: other writers were in the way again and again.
            UncertainError: whether it was appended is unknown; appending it again is harmless.
        """
        for attempt in range(_WRITE_ATTEMPTS):
            # Writers take turns by fencing one another; whoever was fenced tries again.
            producer = FencedProducer(self._kafka, self._kafka.transactional_id("control", self._tp.topic))
            try:
                await producer.open()
                if only_new:
                    await self.load()  # behind the fence: nobody else writes between this look and our record
                    if TOPICS[self._tp.topic].key(record) in self._latest:
                        return
                await producer.transact([codec.emit(self._tp.topic, record, 0)])
                break
            except FencedError:
                if attempt == _WRITE_ATTEMPTS - 1:
                    raise
                # Ever longer: on a slow machine each turn lasts longer, and whoever tries too soon spoils another's.
                await asyncio.sleep(random.uniform(0.05, 0.3 * (attempt + 1)))
            finally:
                await producer.close()
        await self.load()

    @asynccontextmanager
    async def following(self) -> AsyncIterator["ControlTable[R]"]:
        """Loaded at entry, as soon as the broker answers; kept up to date until exit."""
        said = ""
        while True:
            try:
                await self.load()
                break
            except (KafkaError, TimeoutError, OSError) as error:
                if self._kafka.away(error) != said:
                    said = self._kafka.away(error)
                    log.warning("waiting", on="broker", topic=self._tp.topic, why=said)
                await asyncio.sleep(1)
        task = asyncio.create_task(self._follow(), name=f"follow {self._tp.topic}")
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                async with self._kafka.reading() as consumer:
                    consumer.assign([self._tp])
                    consumer.seek(self._tp, self._next)  # no await since assign: aiokafka's own reset would win
                    while True:
                        async for record in consumer:
                            self._take(incoming(record, ""))
            await asyncio.sleep(1)  # the broker is away; what is known stays in force

    def _take(self, record: Incoming) -> None:
        if record.offset < self._next:
            return  # a follower and a load may read the same record: once is enough, and a later one holds by now
        self._next = record.offset + 1
        try:
            value = codec.decode(record, self._kind)
        except codec.DecodeError as error:
            self.skipped += 1
            log.error("control record skipped", topic=self._tp.topic, offset=record.offset, error=str(error))  # noqa: TRY400
            return
        why = self._refuse(value)
        if why is not None:
            self.skipped += 1
            log.error("control record skipped", topic=self._tp.topic, offset=record.offset, error=why)
            return
        self._latest[TOPICS[self._tp.topic].key(value)] = value


class Cameras:
    """The folded `cameras` topic: what is set for each camera."""

    def __init__(
        self,
        kafka: Kafka,
        default_window: WindowSettings,
        time_zone: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.table = ControlTable(kafka, "cameras", Camera, self._refuse)
        self._partitions = kafka.settings.partitions
        self._default_window = default_window
        self._time_zone = time_zone
        self._clock = clock

    def get(self, camera_id: str) -> Camera | None:
        """The camera, or None where it is not known."""
        return self.table.get(camera_id)

    def window(self, camera_id: str) -> WindowSettings | None:
        """The camera's window settings, or None where it is not known."""
        camera = self.get(camera_id)
        return camera.window if camera is not None else None

    def _refuse(self, camera: Camera) -> str | None:
        """A pin to no partition: a camera that has one can neither be read nor written."""
        if camera.partition is None or 0 <= camera.partition < self._partitions:
            return None
        return f"camera {camera.camera_id[:255]!r} is pinned to partition {camera.partition} of {self._partitions}"

    async def ensure(self, camera_id: str) -> Camera:
        """The camera, made with the defaults where it is not known."""
        camera = self.get(camera_id)
        if camera is None:
            await self.table.load()  # another process may have made it since
            camera = self.get(camera_id)
        if camera is None:
            made = Camera(
                camera_id=camera_id,
                name=camera_id,
                time_zone=self._time_zone,
                zones=(),
                window=self._default_window,
                partition=None,
                updated_at=int(self._clock() * 1000),
            )
            await self.table.append(made, only_new=True)
            camera = self.get(camera_id) or made
        return camera

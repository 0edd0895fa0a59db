"""Readings on their way to the log: a bounded buffer before the broker."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from schemas.records import GpuMetrics
from streams import codec
from streams.kafka import Kafka

log = structlog.get_logger(__name__)

TOPIC = "gpu_metrics"

MOST = 2_880
"""Readings that are kept while the broker is away: of one card, every 10 s, those of 8 hours; 1 KB each."""

_AGAIN_S = 5.0
_LAST_S = 3.0


class Outbox:
    """Appends readings as they come; those that the broker does not take are kept and tried again.

    A reading is worth what a gap in a chart costs, so there is no transaction: the oldest are dropped where the
    buffer is full, and at a stop with the broker away those in it; both are counted. One whose fate was unknown may
    be on the log twice: ClickHouse folds rows of the same host, device and instant.

    Args:
        kafka: the connection; nothing is connected before there is something to send.
        most: how many are kept.
        again_s: pause before the next try, seconds.
    """

    def __init__(self, kafka: Kafka, *, most: int = MOST, again_s: float = _AGAIN_S) -> None:
        self._kafka = kafka
        self._waiting: deque[GpuMetrics] = deque()
        self._most = most
        self._again_s = again_s
        self._filled = asyncio.Event()
        self.sent = 0
        self.dropped = 0
        self.waiting_on: str | None = None
        """`broker` while it does not take them."""

    def put(self, readings: Iterable[GpuMetrics]) -> None:
        """Send these soon."""
        for reading in readings:
            if len(self._waiting) == self._most:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(reading)
        self._filled.set()

    async def _send(self, producer: AIOKafkaProducer, reading: GpuMetrics) -> None:
        try:
            emit = codec.emit(TOPIC, reading)
            await producer.send_and_wait(TOPIC, emit.value, emit.key, headers=list(emit.headers))
        except BaseException:
            self._keep(reading)
            raise
        self.sent += 1

    def _keep(self, reading: GpuMetrics) -> None:
        """Put back what was not taken; where the buffer has filled meanwhile it is the oldest, and dropped."""
        if len(self._waiting) == self._most:
            self.dropped += 1
        else:
            self._waiting.appendleft(reading)

    async def run(self, stop: asyncio.Event) -> None:
        """Send until the stop; then what is left, if it goes quickly."""
        producer: AIOKafkaProducer | None = None
        try:
            while not stop.is_set():
                await _first(stop, self._filled)
                self._filled.clear()
                # Not awaited to its end at a stop: a broker that is away takes a request's timeout to be so.
                sending = asyncio.create_task(self._empty(producer))
                stopped = asyncio.create_task(stop.wait())
                try:
                    await asyncio.wait({sending, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.wait({sending}, timeout=_LAST_S)  # what is on its way would be sent twice
                finally:
                    stopped.cancel()
                    sending.cancel()
                    await asyncio.gather(sending, stopped, return_exceptions=True)
                producer = None if sending.cancelled() else sending.result()
                if self.waiting_on is not None:
                    self._filled.set()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), self._again_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_S):
                    producer = await self._empty(producer)
        finally:
            if self._waiting:
                self.dropped += len(self._waiting)
                log.warning("readings of GPUs dropped at the stop", count=len(self._waiting))
            if producer is not None:
                await _close(producer)

    async def _empty(self, producer: AIOKafkaProducer | None) -> AIOKafkaProducer | None:
        """Send all that waits; the producer to go on with, None where it is no good."""
        if not self._waiting:
            return producer
        try:
            if producer is None:
                producer = self._kafka.producer()
                await producer.start()
            while self._waiting:
                await self._send(producer, self._waiting.popleft())  # out of the way of `put`, which drops the oldest
        except (KafkaError, OSError, TimeoutError) as error:
            if self.waiting_on is None:
                log.warning("waiting", on="broker", why=self._kafka.away(error), kept_at_most=self._most)
            self.waiting_on = self._kafka.waiting_on
            if producer is not None:
                await _close(producer)
            return None
        except asyncio.CancelledError:
            if producer is not None:
                await _close(producer)
            raise
        if self.waiting_on is not None:
            log.info("the broker takes readings again", dropped=self.dropped)
        self.waiting_on = None
        return producer


async def _first(*events: asyncio.Event) -> None:
    """Wait for one of them."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _close(producer: AIOKafkaProducer) -> None:
    with contextlib.suppress(KafkaError, OSError, TimeoutError):
        async with asyncio.timeout(_LAST_S):
            await producer.stop()

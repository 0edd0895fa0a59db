"""The log alone, for `scale.py`: frames in, a result appended for each, transactions, and nothing looked at."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from processors.detect.core import record
from streams import codec
from streams.delivery import FencedProducer
from streams.messages import FINGERPRINT, Emit
from tests.bench import kit
from tests.bench.sleeping_detector import SEEN


async def rate(home: kit.Installation, images: Sequence[bytes], count: int, at_once: int) -> float:
    """Frames a second through the log alone: fetched, not looked at, a result of the usual size appended for each.

    Each partition has its transactional producer; a transaction takes `at_once` records at most.
    """
    kafka, group = home.kafka, home.kafka.group("bare")
    tps = kit.partitions_of("frames", partitions=kafka.settings.partitions)
    ends = {tp: end for tp, (_, end) in (await kafka.bounds(tps)).items()}
    [(_, frame)] = kit.frames(images, 1)
    made_by = {"model": "sleeper", "model_digest": "0" * 64, "runtime": "sleep"}
    detections = record(frame, SEEN, **made_by, inference_ms=20.0, detected_at=frame.arrived_at)
    value, fingerprint = codec.encode("detections", detections)
    waiting: dict[TopicPartition, asyncio.Queue[int]] = {tp: asyncio.Queue() for tp in tps}

    async def fetch(consumer: AIOKafkaConsumer) -> None:
        while True:
            for tp, records in (await consumer.getmany(timeout_ms=200, max_records=500)).items():
                for one in records:
                    waiting[tp].put_nowait(one.offset)

    async def work(tp: TopicPartition, producer: FencedProducer, until: int) -> None:
        position = 0
        while position < until:
            taken = [await waiting[tp].get()]
            while len(taken) < at_once and not waiting[tp].empty():
                taken.append(waiting[tp].get_nowait())
            position = taken[-1] + 1
            emit = Emit("detections", b"camera", value, ((FINGERPRINT, fingerprint),), tp.partition)
            offsets = {tp: OffsetAndMetadata(position, "")}
            await producer.transact([emit] * len(taken), offsets=(group, offsets))

    async with AsyncExitStack() as open_ones:
        producers = {tp: FencedProducer(kafka, kafka.transactional_id("bare", tp.partition)) for tp in tps}
        for producer in producers.values():
            open_ones.push_async_callback(producer.close)
            await producer.open()
        consumer = await open_ones.enter_async_context(kafka.reading())
        consumer.assign(tps)
        for tp, end in ends.items():
            consumer.seek(tp, end)
        emits = [codec.emit("frames", frame, p) for p, frame in kit.frames(images, count, kafka.settings.partitions)]
        async with kit.backlog(kafka, emits) as backlog:
            del emits
            fetching = asyncio.create_task(fetch(consumer))
            try:
                began = time.perf_counter()
                await backlog.show()
                await asyncio.gather(*(work(tp, producers[tp], until) for tp, until in backlog.positions.items()))
                return count / (time.perf_counter() - began)
            finally:
                fetching.cancel()
                await asyncio.gather(fetching, return_exceptions=True)

"""How much work waits before a stage, looked up cheaply: for whoever wants to know every few seconds.

`streams/survey.py` counts the records that lie there, for which it reads them. Here offsets are subtracted.
"""

from collections.abc import Mapping, Sequence

from aiokafka import TopicPartition

from streams.kafka import Kafka
from streams.survey import READS


async def backlog(kafka: Kafka, stages: Sequence[str]) -> dict[str, int]:
    """Offsets from each stage's committed positions to its topics' ends, all partitions together.

    Every transaction ends with a marker that takes an offset too. So records that came one by one count twice; of a
    burst, whose transactions hold many records each, the figure is nearly exact.

    Raises:
        KafkaError, TimeoutError or OSError: the broker is away.
    """
    tps = {
        stage: [TopicPartition(topic, p) for topic in READS[stage] for p in range(kafka.settings.partitions)]
        for stage in stages
    }
    async with kafka.reading() as consumer, kafka.admin() as admin:
        every = sorted({tp for some in tps.values() for tp in some})
        starts = await consumer.beginning_offsets(every)
        ends = await consumer.end_offsets(every)
        found: dict[str, int] = {}
        for stage in stages:
            committed = await admin.list_consumer_group_offsets(kafka.group(stage))
            positions: Mapping[TopicPartition, int] = {tp: entry.offset for tp, entry in committed.items()}
            # A stage that never committed has all before it; so has one whose position is of another life.
            found[stage] = sum(
                ends[tp] - (at if starts[tp] <= (at := positions.get(tp, -1)) <= ends[tp] else starts[tp])
                for tp in tps[stage]
            )
    return found

"""Which life of each topic is read: the epochs of `meta`, known while stages run and asked again at each acquire."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from schemas.records import TopicMeta
from streams.admin import ensure_topics
from streams.control import ControlTable
from streams.kafka import Kafka


class Lives:
    """The topics' epochs as `meta` has them now.

    Whoever makes a topic anew writes its new epoch there first, so a follower knows of it before the first record of
    the new life can be read.
    """

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._table = ControlTable(kafka, "meta", TopicMeta)
        self._reading = asyncio.Lock()
        self._begun = 0

    def __call__(self, topic: str) -> str:
        """The topic's epoch.

        Raises:
            KeyError: `meta` does not know the topic.
        """
        meta = self._table.get(topic)
        if meta is None:
            raise KeyError(topic)
        return meta.epoch

    async def refresh(self) -> None:
        """Read what was written until now. Who asks while others are waiting shares one read.

        Raises:
            KafkaError, TimeoutError or OSError: the broker is away.
        """
        asked = self._begun
        async with self._reading:
            if self._begun == asked:
                self._begun += 1
                await self._table.load()

    async def restore(self) -> None:
        """Make what is missing of the catalogue, as new lives, and know of them.

        Raises:
            KafkaError, TimeoutError, OSError, FencedError or UncertainError: not now; try again.
        """
        await ensure_topics(self._kafka)
        await self.refresh()

    @asynccontextmanager
    async def following(self) -> AsyncIterator["Lives"]:
        """Read at entry, kept up to date until exit."""
        async with self._table.following():
            yield self

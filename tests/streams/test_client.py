"""The connections under every client: none is left behind."""

import asyncio
import contextlib
import gc
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError

from streams.kafka import Kafka


class SilentBroker:
    """Stands before the real broker and passes its first answer on, no other: a client connects, and waits."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.asked = asyncio.Event()
        """A client has its connection and has asked something that is not answered."""
        self.left = asyncio.Event()
        """The client has closed its connection."""
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["SilentBroker"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        up_writer.write(await _frame(reader))
        writer.write(await _frame(up_reader))
        up_writer.close()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await _frame(reader)
            self.asked.set()
            await _frame(reader)
        self.left.set()
        writer.close()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "big"))


async def _admin(kafka: Kafka) -> None:
    async with kafka.admin():
        pass


async def _reading(kafka: Kafka) -> None:
    async with kafka.reading():
        pass


async def _producer(kafka: Kafka) -> None:
    producer = kafka.producer()
    try:
        await producer.start()
    finally:
        await producer.stop()


@pytest.mark.parametrize("start", [_admin, _reading, _producer])
async def test_a_start_that_is_cancelled_leaves_no_connection_behind(
    kafka: Kafka, start: Callable[[Kafka], Awaitable[None]]
) -> None:
    """The one that aiokafka bootstraps by, which it forgets; the garbage collector would close it, and complain."""
    port = int(kafka.settings.bootstrap_servers.rpartition(":")[2])
    async with SilentBroker(port).running() as broker:
        silent = Kafka(kafka.settings.model_copy(update={"bootstrap_servers": f"127.0.0.1:{broker.port}"}))
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            starting = asyncio.ensure_future(start(silent))
            await broker.asked.wait()
            starting.cancel()
            await asyncio.wait([starting])
            del starting
            gc.collect()
            async with asyncio.timeout(5):
                await broker.left.wait()
        assert [str(complaint.message) for complaint in complaints] == []


async def test_a_client_that_is_closed_makes_no_new_connection(kafka: Kafka) -> None:
    """A request that outlives it, as of a producer let go in the middle, would else open one that nobody closes."""
    async with kafka.admin() as admin:
        client = admin._client
        assert await client.ready(1)
    assert not await client.ready(1)
    assert [conn for conn in client._conns.values() if conn.connected()] == []


async def test_a_consumer_that_tries_a_fetch_again_stops_as_any_other(kafka: Kafka) -> None:
    """Its way out would look like a cancellation of whoever stops it, and leave its connections open."""
    tried = asyncio.Event()

    async def away(*_: object, **__: object) -> None:
        tried.set()
        raise KafkaConnectionError("away")

    async with kafka.reading() as consumer:
        consumer._fetcher._retry_backoff = 3600
        client, send = consumer._client, consumer._client.send
        consumer.assign([TopicPartition("frames", 0)])
        consumer.seek(TopicPartition("frames", 0), 0)
        client.send = away
        fetching = asyncio.ensure_future(consumer.getmany(timeout_ms=60_000))
        await tried.wait()
        client.send = send
    await asyncio.wait([fetching])
    assert [conn for conn in client._conns.values() if conn.connected()] == []
    assert [task for task in asyncio.all_tasks() if "_proc_fetch_request" in repr(task)] == []

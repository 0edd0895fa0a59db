"""A TCP proxy that lets the produce requests of one client arrive late, whether or not the client still lives."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

_PRODUCE = b"\x00\x00"  # Kafka's api_key

_Held = asyncio.Queue[tuple[float, float, bytes] | None]
"""How late, until when, what."""


class DelayingProxy:
    """Forwards to a broker's port; while `delay` is set, produce requests and what follows them wait so long."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.delay = 0.0
        self.delayed = 0
        """Produce requests that were held back."""
        self.arrived = 0
        """How many of them went on to the broker."""
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["DelayingProxy"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        for copying in (self._requests(reader, up_writer), self._answers(up_reader, writer)):
            task = asyncio.create_task(copying)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _requests(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> None:
        held: _Held = asyncio.Queue()
        sending = asyncio.create_task(self._send(held, upstream))
        try:
            while True:
                size = await reader.readexactly(4)
                body = await reader.readexactly(int.from_bytes(size, "big"))
                late = self.delay if body[:2] == _PRODUCE else 0.0
                self.delayed += late > 0
                held.put_nowait((late, asyncio.get_running_loop().time() + late, size + body))
        except (asyncio.IncompleteReadError, ConnectionError):
            held.put_nowait(None)
        await sending

    async def _send(self, held: _Held, upstream: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while (item := await held.get()) is not None:
                late, due, frame = item
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                upstream.write(frame)
                await upstream.drain()
                self.arrived += late > 0
        upstream.close()

    async def _answers(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await upstream.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

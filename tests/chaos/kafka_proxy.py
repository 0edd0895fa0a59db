"""A TCP proxy that every client of the broker goes through: it can be cut, and can hold one process's produces back.

Like `tests/streams/conformance/proxy.py`, but for a whole installation: what is held back belongs to one client.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection

_PRODUCE = b"\x00\x00"  # Kafka's api_key
_GOODBYE_S = 2.0


class Hold:
    """Produce requests that come late, and how many they were."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.held = 0
        """Produce requests that were held back."""
        self.arrived = 0
        """How many of them went on to the broker."""


class _Connection:
    """One client's way to the broker."""

    def __init__(self, writer: asyncio.StreamWriter, upstream: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.upstream = upstream
        self.peer = int(writer.get_extra_info("peername")[1])

    def abort(self) -> None:
        self.writer.transport.abort()
        self.upstream.transport.abort()


class KafkaProxy:
    """Forwards to a broker's port."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.port = 0
        self._late: dict[int, Hold] = {}
        """What holds produce requests of a client's port back."""
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["KafkaProxy"]:
        await self.restore()
        try:
            yield self
        finally:
            self.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._connections):
            connection.abort()

    async def restore(self) -> None:
        """Take connections, at the same port as before."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def hold(self, peers: Collection[int], hold: Hold) -> None:
        """From now on produce requests from these ports arrive so much later, whether or not their process lives."""
        self._late.update(dict.fromkeys(peers, hold))

    def release(self, hold: Hold) -> None:
        """No further request comes late: other processes will have those ports. What is held arrives in its time."""
        self._late = {port: other for port, other in self._late.items() if other is not hold}

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, up_writer)
        self._connections.add(connection)
        both = asyncio.create_task(self._run(connection, reader, up_reader))
        self._tasks.add(both)
        both.add_done_callback(self._tasks.discard)

    async def _run(
        self, connection: _Connection, reader: asyncio.StreamReader, up_reader: asyncio.StreamReader
    ) -> None:
        answers = asyncio.create_task(_copy(up_reader, connection.writer))
        try:
            await self._requests(connection, reader)
            await asyncio.wait({answers}, timeout=_GOODBYE_S)  # the broker hangs up once it has read everything
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)
            connection.abort()
            self._connections.discard(connection)
            self._late.pop(connection.peer, None)

    async def _requests(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        """Frames in order: what stands behind a late one waits with it."""
        held: asyncio.Queue[tuple[float, Hold | None, bytes] | None] = asyncio.Queue()
        sending = asyncio.create_task(self._send(held, connection.upstream))
        clock = asyncio.get_running_loop().time
        try:
            while True:
                size = await reader.readexactly(4)
                body = await reader.readexactly(int.from_bytes(size, "big"))
                hold = self._late.get(connection.peer) if body[:2] == _PRODUCE else None
                if hold is not None:
                    hold.held += 1
                held.put_nowait((clock() + hold.seconds if hold is not None else 0.0, hold, size + body))
        except (asyncio.IncompleteReadError, OSError):
            held.put_nowait(None)
            await sending  # what a dead client sent still arrives
        finally:
            sending.cancel()

    async def _send(
        self, held: "asyncio.Queue[tuple[float, Hold | None, bytes] | None]", upstream: asyncio.StreamWriter
    ) -> None:
        clock = asyncio.get_running_loop().time
        with contextlib.suppress(OSError):
            while (item := await held.get()) is not None:
                due, hold, frame = item
                await asyncio.sleep(max(0.0, due - clock()))
                upstream.write(frame)
                await upstream.drain()
                if hold is not None and not upstream.is_closing():
                    hold.arrived += 1
            if upstream.can_write_eof():
                upstream.write_eof()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the broker hangs up; what it says to a client that is gone is read all the same."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            if not writer.is_closing():
                with contextlib.suppress(OSError):
                    writer.write(data)
                    await writer.drain()
    writer.close()

"""The two proxies do what faults ask of them, and nothing else."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.chaos.kafka_proxy import Hold, KafkaProxy
from tests.chaos.llm_proxy import LlmProxy, Manner, question

WINDOW = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "north-yard at noon"}]}
CANARY = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "front-door at noon"}]}


class Server:
    """Something that answers, and counts who hung up before it did."""

    def __init__(self) -> None:
        self.slow = False
        self.hung_up = asyncio.Event()
        self.frames: list[bytes] = []

    async def http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(
            dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n") if b": " in line)[b"content-length"]
        )
        await reader.readexactly(size)
        if self.slow:
            await reader.read()
            self.hung_up.set()
        writer.write(b"HTTP/1.1 200 .\r\nContent-Length: 8\r\n\r\n" + b'{"a": 1}')
        writer.close()

    async def frames_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                body = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                self.frames.append(body)
                writer.write(body)
        writer.close()


@contextlib.asynccontextmanager
async def llm(server: Server) -> AsyncIterator[tuple[LlmProxy, httpx.AsyncClient]]:
    listening = await asyncio.start_server(server.http, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with LlmProxy(port, ["north-yard"]).running() as proxy, httpx.AsyncClient(base_url=proxy.url) as client:
        yield proxy, client
        listening.close()


async def ask(client: httpx.AsyncClient, body: object, timeout: float = 5.0) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body, timeout=timeout)


async def test_without_a_manner_everything_passes():
    async with llm(Server()) as (proxy, client):
        assert (await ask(client, WINDOW)).json() == {"a": 1}
        assert not proxy.spoiled


async def test_one_window_is_always_refused_and_others_are_not():
    async with llm(Server()) as (proxy, client):
        proxy.poisoning = 1
        assert (await ask(client, CANARY)).status_code == 200
        assert [(await ask(client, WINDOW)).status_code for _ in range(3)] == [500, 500, 500]
        assert (await ask(client, CANARY)).status_code == 200
        assert proxy.spoiled == {question(WINDOW["messages"]): 3}


@pytest.mark.parametrize(
    ("manner", "error"), [("cut-off", httpx.RemoteProtocolError), ("hangs", httpx.ReadTimeout), ("garbage", ValueError)]
)
async def test_bad_manners_are_counted_by_question(manner: Manner, error: type[Exception]):
    async with llm(Server()) as (proxy, client):
        proxy.manner = manner
        with pytest.raises(error):
            (await ask(client, WINDOW, timeout=0.3)).json()
        proxy.manner = None
        assert (await ask(client, WINDOW)).status_code == 200
        assert proxy.spoiled == {question(WINDOW["messages"]): 1}


async def test_a_client_that_hangs_up_frees_the_servers_slot():
    server = Server()
    server.slow = True
    async with llm(server) as (_, client):
        with pytest.raises(httpx.ReadTimeout):
            await ask(client, WINDOW, timeout=0.2)
        async with asyncio.timeout(5):
            await server.hung_up.wait()


async def test_a_server_that_is_down_is_away_and_not_broken():
    async with LlmProxy(1, ["north-yard"]).running() as proxy, httpx.AsyncClient(base_url=proxy.url) as client:
        assert (await ask(client, WINDOW)).status_code == 503


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@contextlib.asynccontextmanager
async def kafka(server: Server) -> AsyncIterator[KafkaProxy]:
    listening = await asyncio.start_server(server.frames_in, "127.0.0.1", 0)
    async with KafkaProxy(listening.sockets[0].getsockname()[1]).running() as proxy:
        yield proxy
        listening.close()


async def test_produce_requests_of_a_client_that_died_arrive_late_and_those_of_others_at_once():
    server = Server()
    async with kafka(server) as proxy:
        _, dying = await asyncio.open_connection("127.0.0.1", proxy.port)
        reader, living = await asyncio.open_connection("127.0.0.1", proxy.port)
        hold = Hold(0.5)
        proxy.hold([dying.get_extra_info("sockname")[1]], hold)
        dying.write(frame(b"\0\0produce"))
        async with asyncio.timeout(5):
            while not hold.held:
                await asyncio.sleep(0.01)
        dying.transport.abort()
        proxy.release(hold)
        living.write(frame(b"\0\0produce of another"))
        assert await reader.readexactly(20) == b"\0\0produce of another"
        assert server.frames == [b"\0\0produce of another"]
        async with asyncio.timeout(5):
            while len(server.frames) < 2:
                await asyncio.sleep(0.01)
        assert (server.frames[1], hold.held) == (b"\0\0produce", 1)
        async with asyncio.timeout(5):
            while not hold.arrived:
                await asyncio.sleep(0.01)
        living.close()


async def test_a_cut_breaks_connections_and_refuses_new_ones_until_it_is_mended():
    async with kafka(Server()) as proxy:
        port = proxy.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(frame(b"\0\1fetch"))
        assert await reader.readexactly(7) == b"\0\1fetch"
        proxy.cut()
        with contextlib.suppress(OSError):
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await proxy.restore()
        assert proxy.port == port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(frame(b"\0\1fetch"))
        assert await reader.readexactly(7) == b"\0\1fetch"
        writer.close()

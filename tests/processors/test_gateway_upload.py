"""Uploads through the gateway into a real ingest: passed on as they come, answered as ingest answers."""

import asyncio
import contextlib
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.tls import certificates
from processors.gateway.app import build_app
from processors.gateway.fakes import FakeSource
from processors.gateway.settings import GatewaySettings
from processors.gateway.upload import Uploads
from processors.ingest.fakes import MemoryLog
from processors.ingest.http import build_app as build_ingest
from processors.ingest.settings import UploadSettings
from tests.processors.gateway_kit import served
from tests.processors.ingest_kit import appenders, jpeg

URL = "/api/upload?camera=front"


@asynccontextmanager
async def gateway(
    ingest: str,
    *,
    key: str | None = None,
    certificate: Path | None = None,
    at_once: int = 8,
    timeout_s: float = 10,
    **settings,
):
    """The gateway in front of an ingest, behind a real socket; gives a client of it."""
    uploads = Uploads(ingest, key=key, certificate=certificate, at_once=at_once, timeout_s=timeout_s)
    app = build_app(FakeSource(), GatewaySettings(**settings), uploads)
    async with served(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        yield client
    await uploads.close()


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


@pytest.fixture
async def ingest(log: MemoryLog, tmp_path):
    """Starts ingest's real endpoint over a log in memory; gives its address."""
    async with AsyncExitStack() as stack:

        async def start(**upload) -> str:
            made = appenders(log, tmp_path, max_bytes=100_000)
            stack.push_async_callback(made.close)
            return await stack.enter_async_context(served(build_ingest(made, UploadSettings(**upload))))

        yield start


async def test_a_picture_is_passed_on_whole_with_its_query_and_answered_by_ingest(log: MemoryLog, ingest) -> None:
    async with gateway(await ingest()) as client:
        answer = await client.post(f"{URL}&captured_at=2026-11-01T12%3A00%3A00%2B01:00&name=a%20b.jpg", content=jpeg(1))
        assert answer.status_code == 200, answer.text
        (frame,) = log.frames()
        assert answer.json() == {"frame_id": frame.frame_id, "status": "accepted"}
        assert (frame.image, frame.source_name) == (jpeg(1), "a b.jpg")
        assert frame.captured_at == 1_793_530_800_000
        assert (await client.post(f"{URL}&captured_at=2026-11-01T11:00:00Z", content=jpeg(1))).json()[
            "status"
        ] == "known"


async def test_forms_and_bodies_of_unknown_length_pass_too(log: MemoryLog, ingest) -> None:
    async def parts():
        for at in range(0, len(jpeg(2)), 100):
            yield jpeg(2)[at : at + 100]

    async with gateway(await ingest()) as client:
        files = {"file": ("front.jpg", jpeg(1), "image/jpeg")}
        assert (await client.post("/api/upload", files=files, data={"camera": "front"})).status_code == 200
        assert (await client.post(URL, content=parts())).status_code == 200
    assert [frame.image for frame in log.frames()] == [jpeg(1), jpeg(2)]


async def test_ingests_refusals_are_passed_back(log: MemoryLog, ingest) -> None:
    async with gateway(await ingest()) as client:
        for path, content, status in (
            (URL, b"no picture", 400),
            ("/api/upload?camera=nobody", jpeg(1), 404),
            ("/api/upload", jpeg(1), 400),
            (URL, b"\xff\xd8" + bytes(150_000), 413),
        ):
            answer = await client.post(path, content=content)
            assert answer.status_code == status, answer.text
            assert list(answer.json()) == ["error"]
    assert log.frames() == []


async def test_what_ingest_says_of_waiting_is_passed_back() -> None:
    async def busy(_request: Request) -> Response:
        return JSONResponse({"error": "busy"}, 429, headers={"Retry-After": "7", "Set-Cookie": "a=b", "Server": "x"})

    async with served(Starlette(routes=[Route("/api/upload", busy, methods=["POST"])])) as url, gateway(url) as client:
        answer = await client.post(URL, content=jpeg(1))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert not {"set-cookie", "server"} & set(answer.headers)


async def test_ingests_own_key_is_added_and_never_the_callers(ingest, log: MemoryLog) -> None:
    url = await ingest(api_key="inner")
    async with gateway(url, key="inner", api_key="outer") as client:
        assert (await client.post(URL, content=jpeg(1), headers={"x-api-key": "outer"})).status_code == 200
        assert (await client.post(URL, content=jpeg(2), headers={"x-api-key": "inner"})).status_code == 401
    async with gateway(url, key="wrong") as client:
        answer = await client.post(URL, content=jpeg(3))
        assert answer.status_code == 503
        assert "ingest.upload.api_key" in answer.json()["error"]
    assert len(log.frames()) == 1


async def test_without_ingest_it_says_so_and_when_to_come_back() -> None:
    async with gateway("http://127.0.0.1:9") as client:
        answer = await client.post(URL, content=jpeg(1))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "ingest.upload" in answer.json()["error"]


async def test_of_a_chain_the_first_certificate_alone_is_ingests(tmp_path: Path) -> None:
    """Whoever gets a certificate of the same authority, as of a public one anybody does, is not taken for ingest."""
    now = datetime.now(UTC)
    public = certificates.authority("a public authority", now)

    def chain(name: str) -> tuple[Path, Path]:
        cert, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        leaf, secret = certificates.issue(public, name, ("cameras.example",), now)
        cert.write_bytes(leaf + public.certificate)
        key.write_bytes(secret)
        return cert, key

    async def taken(_request: Request) -> Response:
        return JSONResponse({"status": "accepted"})

    app = Starlette(routes=[Route("/api/upload", taken, methods=["POST"])])
    mine, another = chain("mine"), chain("another")
    for (cert, key), status in ((mine, 200), (another, 503)):
        async with (
            served(app, tls_cert_path=cert, tls_key_path=key) as url,
            gateway(url, certificate=mine[0]) as client,
        ):
            assert (await client.post(URL, content=jpeg(1))).status_code == status
    mine[0].write_text("no certificate")
    async with gateway("https://127.0.0.1:9", certificate=mine[0]) as client:
        assert (await client.post(URL, content=jpeg(1))).status_code == 503


async def test_an_ingest_that_dies_over_a_picture_is_one_that_is_away() -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, gateway(f"http://127.0.0.1:{port}") as client:
        assert (await client.post(URL, content=bytes(1_000_000))).status_code == 503
        assert (await client.post(URL, content=jpeg(1))).status_code == 503


class Slow:
    """A client that sends a part of a picture and then waits."""

    def __init__(self, url: str, sent: bytes, *, length: int | None = 100_000) -> None:
        self.place = urlsplit(url)
        how = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
        body = sent if length is not None else b"%x\r\n%s\r\n" % (len(sent), sent)
        self.bytes = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\n{how}\r\n\r\n".encode() + body

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection(self.place.hostname, self.place.port)
        self.writer.write(self.bytes)
        await self.writer.drain()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def answer(self) -> int:
        return int((await self.reader.readline()).split()[1])


async def test_a_body_that_does_not_come_is_given_up_by_the_gateway_itself(ingest) -> None:
    async with gateway(await ingest(timeout_s=60), timeout_s=0.3) as client:
        for length in (100_000, None):
            async with Slow(str(client.base_url), b"\xff\xd8", length=length) as slow:
                assert await slow.answer() == 408
        assert (await client.post(URL, content=jpeg(1))).status_code == 200


async def test_when_ingest_gives_up_first_its_answer_comes_at_once(ingest) -> None:
    async with gateway(await ingest(timeout_s=0.3), timeout_s=60) as client:
        async with Slow(str(client.base_url), b"\xff\xd8") as slow, asyncio.timeout(10):
            assert await slow.answer() == 408
        assert (await client.post(URL, content=jpeg(1))).status_code == 200


@pytest.mark.parametrize("length", [len(jpeg(1)) + 1, None])
async def test_a_client_that_goes_away_leaves_nothing_half_taken(log: MemoryLog, ingest, length: int | None) -> None:
    # A whole picture was sent, but not the end of the body: only its sender knows that nothing is missing.
    async with gateway(await ingest(), at_once=1) as client:
        async with Slow(str(client.base_url), jpeg(1), length=length):
            await asyncio.sleep(0.2)
        async with asyncio.timeout(5):
            while (answer := await client.post(URL, content=jpeg(2))).status_code == 429:
                await asyncio.sleep(0.02)
        assert answer.status_code == 200
    assert [frame.image for frame in log.frames()] == [jpeg(2)]


async def test_more_than_may_be_passed_on_at_once_are_told_to_come_back(ingest) -> None:
    async with gateway(await ingest(), at_once=1) as client, Slow(str(client.base_url), b"\xff\xd8"):
        async with asyncio.timeout(5):
            while (answer := await client.post(URL, content=jpeg(1))).status_code != 429:
                await asyncio.sleep(0.02)
        assert answer.headers["retry-after"] == "1"
        assert "gateway.max_uploads" in answer.json()["error"]


async def test_nothing_of_a_picture_waits_in_the_gateway() -> None:
    """An ingest that reads nothing holds the sender up: what lies between them is bounded."""
    held = asyncio.Event()

    async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.transport.abort()

    server = await asyncio.start_server(hold, "127.0.0.1", 0, limit=1024)
    sent = 0

    async def picture():
        nonlocal sent
        for _ in range(1000):
            sent += 65_536
            yield bytes(65_536)

    port = server.sockets[0].getsockname()[1]
    async with server, gateway(f"http://127.0.0.1:{port}", timeout_s=60) as client:
        sending = asyncio.create_task(client.post(URL, content=picture()))
        before = -1
        while before != sent:  # until it stands still
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 25_000_000  # sockets' buffers, by far the most of it
        held.set()
        with contextlib.suppress(httpx.TransportError):  # an answer, if the sender still takes one
            assert (await sending).status_code == 503

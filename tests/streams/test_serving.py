"""Serving HTTP to the slow, the endless and the silent: a connection that brings no request is not kept."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from streams import serving
from streams.serving import EndpointSettings, SettingsError, listen, serve

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


class Settings(EndpointSettings):
    section: ClassVar[str] = "toy"
    port: int = 0


def test_a_certificate_that_cannot_be_used_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"toy\.tls_cert_path or \.tls_key_path cannot be used"):
        listen(Settings(tls_cert_path=tmp_path / "none.pem", tls_key_path=tmp_path / "none.key"))


async def echo(request: Request) -> Response:
    """Refuses what says that it is secret, before its body is read."""
    if "secret" in request.headers:
        raise HTTPException(403)
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(serving, "HEAD_S", 0.4)
    monkeypatch.setattr(serving, "LINGER_S", 0.4)
    settings = Settings()
    listener = listen(settings)
    stop = asyncio.Event()
    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    running = asyncio.create_task(serve(app, settings, listener, stop))
    yield int(listener.getsockname()[1])
    stop.set()
    await running


async def spoken(port: int, *parts: bytes, pause: float = 0.0) -> tuple[bytes, bool]:
    """What came back, and whether the server hung up by itself, a second after the last part at the latest."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = bytearray()

    async def hear() -> None:
        with contextlib.suppress(ConnectionError):
            while some := await reader.read(65_536):
                said.extend(some)

    hearing = asyncio.create_task(hear())
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await asyncio.wait({hearing}, timeout=pause)
            if hearing.done():
                break
    await asyncio.wait({hearing}, timeout=1)
    ended = hearing.done()
    hearing.cancel()
    writer.close()
    return bytes(said), ended


@pytest.mark.parametrize("drops", [[], [b"P"], [HEAD], [HEAD, *[b"X"] * 100]], ids=["nothing", "a", "head", "drops"])
async def test_a_head_that_does_not_end_is_hung_up_on(port: int, drops: list[bytes]) -> None:
    assert await spoken(port, *drops, pause=0.05) == (b"", True)


async def test_a_second_head_on_a_kept_connection_must_end_too(port: int) -> None:
    whole = HEAD + b"Content-Length: 2\r\n\r\nhi"
    said, ended = await spoken(port, whole, *[b"P", b"O", *[b"S"] * 100], pause=0.05)
    assert said.count(b"200 OK") == 1
    assert ended


async def test_a_body_that_goes_on_after_its_refusal_is_cut_and_the_refusal_arrives(port: int) -> None:
    head = HEAD + b"secret: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    said, ended = await spoken(port, head, *[b"4000\r\n" + bytes(0x4000) + b"\r\n"] * 1000, pause=0.01)
    assert said.startswith(b"HTTP/1.1 403")
    assert ended


async def test_a_body_that_ends_soon_after_its_refusal_keeps_the_connection(port: int) -> None:
    refused = HEAD + b"secret: x\r\nContent-Length: 2\r\n\r\nh"
    said, ended = await spoken(port, refused, b"i" + HEAD + b"Content-Length: 3\r\n\r\nyou", pause=0.1)
    assert b"HTTP/1.1 403" in said
    assert said.endswith(b"3")
    assert not ended


async def test_a_slow_body_is_whoever_reads_it_s_affair(port: int) -> None:
    said, ended = await spoken(port, HEAD + b"Content-Length: 10\r\n\r\n", *[b"x"] * 10, pause=0.1)
    assert said.endswith(b"10")
    assert not ended

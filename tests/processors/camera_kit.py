"""A camera on HTTP, for the tests of snapshots: it answers what a test tells it to, and remembers what it was asked."""

import asyncio
import contextlib
import hashlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

Answer = Callable[[Request], "Response | Awaitable[Response]"]

REALM, NONCE = "camera", "0123456789abcdef"


class Camera:
    """The server. `answers` are used up one by one; the last one stays."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[Answer] = [lambda _: Response(status_code=404)]
        self.asked: list[Request] = []
        self.was_asked = asyncio.Condition()

    def says(self, *answers: Answer | Response | bytes) -> None:
        """What it answers from now on."""
        self.answers = [a if callable(a) and not isinstance(a, Response) else _always(a) for a in answers]

    async def until_asked(self, times: int) -> None:
        """Wait until it was asked so often."""
        async with self.was_asked:
            await self.was_asked.wait_for(lambda: len(self.asked) >= times)

    async def handle(self, request: Request) -> Response:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        async with self.was_asked:
            self.asked.append(request)
            self.was_asked.notify_all()
        made = answer(request)
        return made if isinstance(made, Response) else await made


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        yield


@asynccontextmanager
async def camera(**config) -> AsyncIterator[Camera]:
    """A camera on a free port of this machine."""
    made = Camera()
    app = Starlette(routes=[Route("/{path:path}", made.handle, methods=["GET", "POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    scheme = "https" if "ssl_certfile" in config else "http"
    made.url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    server = _Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=0, **config),
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield made
    finally:
        server.should_exit = True
        await serving
        listener.close()


def picture(data: bytes, *, etag: str = "", modified: str = "") -> Answer:
    """A picture with validators, and 304 for whoever has it."""

    def answer(request: Request) -> Response:
        headers = {k: v for k, v in {"etag": etag, "last-modified": modified}.items() if v}
        has_it = (etag and request.headers.get("if-none-match") == etag) or (
            modified and request.headers.get("if-modified-since") == modified
        )
        if has_it:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/jpeg", headers=headers)

    return answer


def with_digest(inner: Answer, user: str, password: str, *, body: bytes = b"who are you?") -> Answer:
    """Ask for digest authentication (MD5, qop auth), and check it as RFC 7616 says."""

    def answer(request: Request) -> Response | Awaitable[Response]:
        given = dict(re.findall(r'(\w+)="?([^",]+)"?', request.headers.get("authorization", "").partition(" ")[2]))
        ha1 = _md5(f"{user}:{REALM}:{password}")
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        ha2 = _md5(f"GET:{target}")
        nonce, nc, cnonce = (given.get(name, "") for name in ("nonce", "nc", "cnonce"))
        right = _md5(f"{ha1}:{nonce}:{nc}:{cnonce}:auth:{ha2}")
        if given.get("response") == right and given.get("username") == user and nonce == NONCE:
            return inner(request)
        challenge = f'Digest realm="{REALM}", qop="auth", nonce="{NONCE}", algorithm=MD5'
        return Response(body, 401, headers={"www-authenticate": challenge})

    return answer


def endless(chunk: bytes = b"\xff" * 65536, status: int = 200, **headers: str) -> Answer:
    """A body without an end; `sent` of the answer counts its bytes."""

    async def body() -> AsyncIterator[bytes]:
        while True:
            answer.sent += len(chunk)
            yield chunk
            await asyncio.sleep(0)

    def answer(_: Request) -> Response:
        return StreamingResponse(body(), status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    answer.sent = 0
    return answer


def slow(data: bytes, pause_s: float) -> Answer:
    """A byte at a time."""

    async def body() -> AsyncIterator[bytes]:
        for at in range(len(data)):
            yield data[at : at + 1]
            await asyncio.sleep(pause_s)

    return lambda _: StreamingResponse(body(), media_type="image/jpeg")


def half(data: bytes) -> Answer:
    """A picture whose connection ends in the middle."""

    async def body() -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]
        raise ConnectionResetError

    return lambda _: StreamingResponse(body(), media_type="image/jpeg", headers={"content-length": str(len(data))})


def _always(answer: Response | bytes) -> Answer:
    return lambda _: answer if isinstance(answer, Response) else Response(answer, media_type="image/jpeg")


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()

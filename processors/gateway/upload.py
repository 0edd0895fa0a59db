"""Uploads, passed on to ingest as they come: nothing of a picture is kept here.

The answer is ingest's own: it knows what it takes, and only it can promise that a frame is on the log.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from yarl import URL

log = structlog.get_logger(__name__)

# Ingest fights 30 s for a camera's place on the log (ingest.deadline_s) before it gives up, and then says so.
_ANSWER_S = 40.0
_CONNECT_S = 5.0
# When to come back, seconds: ingest restarts in about three, a full queue drains in one.
_RETRY_AWAY = "5"
_RETRY_BUSY = "1"

# What ingest is told of the request besides its address.
_TOLD = ("content-type", "content-length")
# What of its answer is passed back besides status and body.
_ANSWERED = ("content-type", "retry-after")


class Uploads:
    """The way of uploads to ingest.

    Args:
        url: where ingest listens.
        key: its API key, where it asks for one.
        certificate: the file of the certificate that it shows, where it listens with TLS: the first in it is taken, no
            other; None is the system's authorities.
        at_once: how many are passed on at once.
        timeout_s: how long a body may take to arrive, seconds.
    """

    def __init__(
        self, url: str, *, key: str | None = None, certificate: Path | None = None, at_once: int, timeout_s: float
    ) -> None:
        self._url = f"{url}/api/upload"
        self._key = key
        self._certificate = certificate
        self._at_once = at_once
        self._timeout_s = timeout_s
        self._in_hand = 0
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections to ingest."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def post(self, request: Request) -> Response:
        """Pass one upload on, and ingest's answer back."""
        if self._in_hand >= self._at_once:
            return _refuse(429, "too many uploads at once (gateway.max_uploads)", _RETRY_BUSY)
        self._in_hand += 1
        body = _Body(request)
        limit = asyncio.timeout(self._timeout_s)
        body.at_end = lambda: limit.reschedule(asyncio.get_running_loop().time() + _ANSWER_S)
        try:
            async with limit:
                return await self._send(request, body)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            if body.cut:
                return _refuse(400, "the connection ended before the image did", None)
            if limit.expired() and not body.ended:
                return _refuse(
                    408, f"the image did not arrive within {self._timeout_s:g} s (gateway.upload_timeout_s)", None
                )
            log.warning("upload not passed on", url=self._url, why=repr(error))
            return _refuse(
                503, f"ingest at {self._url} does not answer (ingest.upload); sending it again is harmless", _RETRY_AWAY
            )
        finally:
            self._in_hand -= 1

    async def _send(self, request: Request, body: "_Body") -> Response:
        headers = {name: request.headers[name] for name in _TOLD if name in request.headers}
        if self._key is not None:
            headers["x-api-key"] = self._key
        query = request.scope["query_string"].decode("latin-1")
        url = URL(f"{self._url}?{query}" if query else self._url, encoded=True)
        async with self._client().post(url, data=body.parts(), headers=headers, allow_redirects=False) as answer:
            data = await answer.read()
            if answer.status in {401, 403}:
                log.error("ingest refuses the gateway's key", url=self._url)
                return _refuse(
                    503, "ingest refuses the gateway: set the same ingest.upload.api_key for both", _RETRY_AWAY
                )
            passed = {name: answer.headers[name] for name in _ANSWERED if name in answer.headers}
            return Response(data, answer.status, headers=passed)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            context: ssl.SSLContext | bool = True
            if self._certificate is not None:
                context = _only(self._certificate)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=context),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def _only(certificate: Path) -> ssl.SSLContext:
    """Takes the certificate that a server shows from this file, its first one, and no other.

    Raises:
        OSError: the file cannot be read, or holds none.
    """
    try:
        own = x509.load_pem_x509_certificate(certificate.read_bytes())
    except ValueError as error:
        raise ssl.SSLError(f"{certificate} (ingest.upload.tls_cert_path) holds no certificate in PEM") from error
    # What follows it in the file signed it, and others too: a public authority signs for anybody.
    context = ssl.create_default_context(cadata=own.public_bytes(Encoding.DER))
    context.check_hostname = False  # it is reached by an address that no certificate names
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


class _Body:
    """A request's body on its way, part by part."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.ended = False
        self.cut = False
        """Whether its sender went away before its end."""
        self.at_end: Callable[[], None] = lambda: None

    async def parts(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._request.stream():
                if part:
                    yield part
        except ClientDisconnect:
            self.cut = True
            raise
        self.ended = True
        with contextlib.suppress(RuntimeError):  # the time is up at this very moment
            self.at_end()


def _refuse(status: int, message: str, retry_after: str | None) -> Response:
    return JSONResponse(
        {"error": message}, status, headers=None if retry_after is None else {"Retry-After": retry_after}
    )

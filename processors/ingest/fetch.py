"""One picture of a camera by HTTP: asked for only where it changed, bounded in time and size, from nowhere else."""

import asyncio
import contextlib
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Generator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple, Protocol
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from processors.ingest.address import Address
from processors.ingest.reach import CameraTransport, Reach, RefusedAddressError

# http to https, a trailing slash, a session's cookie: more than that is a circle.
_MAX_HOPS = 5

# A camera in the same house answers within milliseconds, behind a sleeping switch within a second or two.
_CONNECT_S = 5.0

# What is read of an answer that is no picture, so that its connection can be used again; a longer one costs it.
_LEFTOVER = 64 * 1024

# Cameras lock a user out after a handful of wrong passwords, often for half an hour from the last one.
_REFUSED_S = 300.0

# A validator is a camera's word. One in so many seconds is not taken at it: some never change theirs.
_DISTRUST_S = 60.0

_REDIRECTS = {301, 302, 303, 307, 308}

# What waiting hardly mends.
_LASTING = {401, 403, 404, 405, 410}


class FetchError(Exception):
    """No picture this time; the message says why, holds no secret, and names the fix where there is one."""

    def __init__(self, message: str, *, not_before_s: float = 0.0, lasting: bool = False) -> None:
        super().__init__(message)
        self.not_before_s = not_before_s
        """The camera asks not to be asked again sooner, seconds; 0 where it does not say."""
        self.lasting = lasting
        """Waiting hardly mends it: a person must."""


class Picture(NamedTuple):
    """What a camera answered."""

    data: bytes
    """Its bytes; empty where there were more than are taken."""
    size: int
    """Their number; of what is not taken, as far as it is known: more than the limit."""
    modified_at: int | None
    """When the camera says that it changed last, ms since the Unix epoch."""


class Pictures(Protocol):
    """Where a camera's pictures come from."""

    async def get(self) -> Picture | None:
        """The newest picture; None where it is the same as last time.

        Raises:
            FetchError: there is none now.
        """

    def forget(self) -> None:
        """Ask for the whole picture next time: the last one was not taken."""

    async def close(self) -> None:
        """Let go of the connection."""


class HttpPictures:
    """A camera's pictures at an address.

    Args:
        address: where.
        max_bytes: the longest picture; reading stops there.
        timeout_s: how long a whole picture may take, with redirects and authentication, seconds.
        insecure: take any certificate.
        link_local: ask at link-local addresses and clouds' metadata services too.
        clock: wall time, seconds since the Unix epoch, against which a camera's Retry-After is read.
        monotonic: seconds that never jump.
    """

    def __init__(
        self,
        address: Address,
        *,
        max_bytes: int,
        timeout_s: float,
        insecure: bool = False,
        link_local: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._clock = clock
        self._monotonic = monotonic
        self._auth = _CameraAuth(address.user, address.password) if address.user or address.password else None
        self._conditions: dict[str, str] = {}
        self._whole_at = 0.0
        self._client = httpx.AsyncClient(
            headers={"User-Agent": "rewatch", "Accept": "image/jpeg, */*;q=0.1", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            # An address that a person set is the address: no proxy stands before it.
            trust_env=False,
            transport=CameraTransport(
                Reach(link_local=link_local),
                # Own authorities come by SSL_CERT_FILE or SSL_CERT_DIR, as everywhere.
                verify=_any_certificate() if insecure else httpx.create_ssl_context(),
                limits=httpx.Limits(max_connections=2, max_keepalive_connections=1),
            ),
            follow_redirects=False,
        )

    async def get(self) -> Picture | None:
        """The newest picture; see the port."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._get()
        except (TimeoutError, httpx.TimeoutException):
            raise self._error(f"no whole picture within {self._timeout_s:g} s (timeout_s)") from None
        except RefusedAddressError as error:
            raise self._error(
                f"its address, {error}, is link-local or a cloud's metadata service, which is not asked: if it is a "
                "camera's, say so by --link-local (setting `link_local`)",
                lasting=True,
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise self._explain(error) from None
        finally:
            self._client.cookies.clear()  # a session's cookie is for its redirect; kept, they pile up

    def forget(self) -> None:
        """Ask for the whole picture next time."""
        self._conditions = {}

    async def close(self) -> None:
        """Let go of the connection."""
        await self._client.aclose()

    async def _get(self) -> Picture | None:
        if self._monotonic() - self._whole_at >= _DISTRUST_S:
            self._conditions = {}
        url = self._address.url
        for _ in range(_MAX_HOPS + 1):
            async with self._answer(self._client.build_request("GET", url, headers=self._conditions)) as response:
                if response.status_code in _REDIRECTS:
                    url = self._follow(url, response)
                    continue
                if response.status_code == HTTPStatus.NOT_MODIFIED and self._conditions:
                    return None
                if response.status_code != HTTPStatus.OK:
                    raise self._refused(response)
                return await self._read(response)
        raise self._error("it redirects in a circle: give the address where the picture is", lasting=True)

    @contextlib.asynccontextmanager
    async def _answer(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        """The answer to an authenticated request, its body not read.

        httpx would read the whole body of a 401, however long, so the authentication is driven here.
        """
        flow = self._auth.auth_flow(request) if self._auth is not None else _no_auth(request)
        asked: httpx.Request | None = next(flow)
        while asked is not None:
            response = await self._client.send(asked, stream=True)
            try:
                asked = self._next(flow, response)
                if asked is None:
                    yield response
            finally:
                await _finish(response)

    def _next(
        self,
        flow: Generator[httpx.Request, httpx.Response, None],
        response: httpx.Response,
    ) -> httpx.Request | None:
        """The request that the answer asks for; None where it is the last one."""
        try:
            return flow.send(response)
        except StopIteration:
            return None
        except (KeyError, NotImplementedError, ValueError):
            raise self._error("it asks for a digest authentication that is not known here", lasting=True) from None

    async def _read(self, response: httpx.Response) -> Picture:
        kind = response.headers.get("content-type", "")
        if kind.lower().startswith("multipart/"):
            raise self._error(
                "this is an endless stream (MJPEG), no snapshot: give the camera's snapshot address", lasting=True
            )
        modified_at = _http_time(response.headers.get("last-modified"))
        announced = _length(response)
        if announced is not None and announced > self._max_bytes:
            return Picture(b"", announced, modified_at)
        data = bytearray()
        # Raw: what a server compressed unasked is no JPEG, and cannot grow while it is unpacked.
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > self._max_bytes:
                return Picture(b"", self._max_bytes + 1, modified_at)
        if not data:
            raise self._error("it answered with an empty picture")
        self._whole_at = self._monotonic()
        self._conditions = _conditions(response)
        return Picture(bytes(data), len(data), modified_at)

    def _follow(self, url: str, response: httpx.Response) -> str:
        """Where a redirect leads, if it may be gone there."""
        try:
            target = urljoin(url, response.headers.get("location", ""))
            parts = urlsplit(target)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise self._error("it redirects to what is no address", lasting=True) from None
        where = f"[{host}]" if ":" in host else host
        where = f"{where}:{port}" if port is not None else where
        if parts.scheme not in {"http", "https"} or host != self._address.host:
            raise self._error(
                f"it redirects to another host, {where or parts.scheme}, which is not followed: "
                "if you trust it, give that address instead",
                lasting=True,
            )
        if parts.scheme == "http" and url.startswith("https:"):
            raise self._error("it redirects from https to http, which is not followed", lasting=True)
        # On a host of many services another port is another service: ClickHouse's beside a camera's on this machine.
        if parts.scheme == urlsplit(url).scheme and _port(parts) != _port(urlsplit(url)):
            raise self._error(
                f"it redirects to another port, {where}, which is not followed: if you trust it, give that address "
                "instead",
                lasting=True,
            )
        query = f"?{parts.query}" if parts.query else ""
        return f"{parts.scheme}://{where}{parts.path or '/'}{query}"

    def _refused(self, response: httpx.Response) -> FetchError:
        status = response.status_code
        try:
            text = f"{status} {HTTPStatus(status).phrase}"
        except ValueError:
            text = str(status)
        wait = self._retry_after(response.headers.get("retry-after"))
        if status == HTTPStatus.UNAUTHORIZED and self._auth is None:
            text += (
                ": it asks for a user and a password: give --user (setting `user`), and the password by the "
                "environment (setting `password`)"
            )
        elif status == HTTPStatus.UNAUTHORIZED and self._auth is not None:
            self._auth.forget()
            wait = max(wait, _REFUSED_S)
            text += ": it refuses this user or this password"
        elif status == HTTPStatus.NOT_FOUND:
            text += ": there is no picture at this address"
        return self._error(text, not_before_s=wait, lasting=status in _LASTING)

    def _retry_after(self, text: str | None) -> float:
        text = (text or "").strip()
        if text.isascii() and text.isdigit():
            return float(text[:9])
        at = _http_time(text)
        return max(0.0, at / 1000 - self._clock()) if at is not None else 0.0

    def _explain(self, error: Exception) -> FetchError:
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            why = re.sub(r".*certificate verify failed:?\s*|\s*\(_ssl.*", "", text)
            return self._error(
                f"its TLS certificate is not trusted ({why}): SSL_CERT_FILE names an authority of your own, "
                "--insecure (setting `insecure`) takes any certificate",
                lasting=True,
            )
        if isinstance(error, httpx.ConnectError):
            return self._error(f"cannot connect ({_system_says(error) or text or type(error).__name__})")
        if isinstance(error, httpx.RemoteProtocolError) and "complete message body" in text:
            return self._error("the picture was cut off on its way")
        return self._error(f"{type(error).__name__}: {text}")

    def _error(self, text: str, *, not_before_s: float = 0.0, lasting: bool = False) -> FetchError:
        message = f"{self._address.shown}: {self._address.scrub(text)}"
        return FetchError(message, not_before_s=not_before_s, lasting=lasting)


class _CameraAuth(httpx.Auth):
    """Digest where the camera offers it, else basic; nothing is sent before it asks, then with each request."""

    def __init__(self, user: str, password: str) -> None:
        self._user = user
        self._password = password
        self._agreed: httpx.Auth | None = None

    def forget(self) -> None:
        """Let the camera ask again: it takes no credentials of the kind that was agreed."""
        self._agreed = None

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Requests to send, each after the answer to the one before; see httpx."""
        if self._agreed is not None:
            yield from self._agreed.auth_flow(request)
            return
        response = yield request
        offers = [offer.lower() for offer in response.headers.get_list("www-authenticate")]
        if response.status_code != HTTPStatus.UNAUTHORIZED:
            return
        auth: httpx.Auth
        if any(offer.startswith("digest ") for offer in offers):
            auth = httpx.DigestAuth(self._user, self._password)
            flow = auth.auth_flow(request)
            next(flow)
            again = flow.send(response)
        elif any(offer.startswith("basic") for offer in offers):
            auth = httpx.BasicAuth(self._user, self._password)
            again = next(auth.auth_flow(request))
        else:
            return
        response = yield again
        if response.status_code != HTTPStatus.UNAUTHORIZED:
            self._agreed = auth


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _no_auth(request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
    yield request


async def _finish(response: httpx.Response) -> None:
    """Read a little of what is left, so that the connection can be used again, and close."""
    length = _length(response)
    try:
        if not response.is_stream_consumed and length is not None and length <= _LEFTOVER:
            with contextlib.suppress(httpx.HTTPError):
                async for _ in response.aiter_raw():
                    pass
    finally:
        await response.aclose()


def _length(response: httpx.Response) -> int | None:
    """The body's length as announced, bytes."""
    text = response.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _conditions(response: httpx.Response) -> dict[str, str]:
    """What to send so that the camera answers 304 while this picture is its newest.

    A Last-Modified of the same second as the answer can be that of two pictures (RFC 9110, 8.8.2.2).
    """
    etag, modified = response.headers.get("etag"), response.headers.get("last-modified")
    if etag:
        return {"If-None-Match": etag}
    at, now = _http_time(modified), _http_time(response.headers.get("date"))
    if modified and at is not None and (now is None or now - at >= 1000):
        return {"If-Modified-Since": modified}
    return {}


def _http_time(text: str | None) -> int | None:
    """An HTTP date as ms since the Unix epoch; None where there is none, or nonsense."""
    try:
        return int(parsedate_to_datetime(text).timestamp() * 1000) if text else None
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _system_says(error: BaseException) -> str:
    """What the operating system said, below the libraries' layers: `Connection refused`."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.errno:
            # asyncio writes a text of its own over the system's; of names that are not found only the text tells.
            return os.strerror(below.errno) if below.errno > 0 else below.strerror or ""
        below = below.__cause__ or below.__context__
    return ""


def _any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context

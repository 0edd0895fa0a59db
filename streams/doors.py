"""What the HTTP doors that take images share: whom they let in, bodies within bounds, refusals that say what to change.

Ingest's uploads and the detector's service use it. The gateway's door is its own: people and browsers come there.
"""

import asyncio
import math
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from streams.serving import EndpointSettings, by_web_page


def refuse(status: int, message: str, retry_after: float | None = None) -> HTTPException:
    """The refusal to raise; `retry_after` is when to come back, seconds."""
    headers = {"Retry-After": str(math.ceil(retry_after))} if retry_after is not None else None
    return HTTPException(status, message, headers=headers)


async def refusal(_request: Request, error: Exception) -> Response:
    """The handler of `HTTPException`: its words as `{"error": ...}`."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def check_sender(request: Request, settings: EndpointSettings, *, to_pages: str) -> None:
    """Let in whoever has the key, where one is asked for, and no page of a browser.

    Raises:
        HTTPException: 403 with the words `to_pages`, or 401.
    """
    if by_web_page(request.headers):  # without a key any page that somebody opens here could ask
        raise HTTPException(403, to_pages)
    check_key(request, settings)


def check_key(request: Request, settings: EndpointSettings) -> None:
    """Let in whoever has the key, where one is asked for.

    Raises:
        HTTPException: 401.
    """
    if not settings.lets_in(request.headers):
        raise HTTPException(
            401,
            f"an API key is needed: `Authorization: Bearer KEY` or `X-API-Key: KEY` ({settings.section}.api_key)",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def take_body(
    request: Request,
    give: Callable[[bytes], object],
    *,
    limit: int,
    within_s: float,
    too_long: HTTPException,
    too_slow: HTTPException,
) -> None:
    """Read a body and give it on, part by part; one that says by its head that it is too long is not read.

    Raises:
        HTTPException: `too_long`, beyond `limit` bytes; `too_slow`, after `within_s` seconds; or what `give` raises.
        ClientDisconnect: it ended before its end.
    """
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and int(said) > limit:
        raise too_long
    size = 0
    try:
        async with asyncio.timeout(within_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_long
                give(part)
    except TimeoutError:
        raise too_slow from None

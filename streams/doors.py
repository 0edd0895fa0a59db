"""What the HTTP doors that take images share: whom they let in, bodies within bounds, refusals that say what to change.

Ingest's uploads and the detector's service use it. The gateway's door is its own: people and browsers come there.
"""

import asyncio
import math
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from streams.admission import Guard, NotAdmittedError
from streams.grants import Scope
from streams.serving import by_web_page


def refuse(status: int, message: str, retry_after: float | None = None) -> HTTPException:
    """The refusal to raise; `retry_after` is when to come back, seconds."""
    headers = {"Retry-After": str(math.ceil(retry_after))} if retry_after is not None else None
    return HTTPException(status, message, headers=headers)


async def refusal(_request: Request, error: Exception) -> Response:
    """The handler of `HTTPException`: its words as `{"error": ...}`."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def check_sender(request: Request, guard: Guard, scope: Scope, *, to_pages: str) -> None:
    """Let in whoever may do this, where that is asked for, and no page of a browser.

    Raises:
        HTTPException: 403 with the words `to_pages`, or as `check`.
    """
    if by_web_page(request.headers):  # without a key any page that somebody opens here could ask
        raise HTTPException(403, to_pages)
    check(request, guard, scope)


def check(request: Request, guard: Guard, scope: Scope) -> None:
    """Let in whoever may do this, where that is asked for.

    Raises:
        HTTPException: 401, it carries no key and no token that is taken; 403, its token is not good for the scope.
    """
    try:
        guard.admit(request.headers, scope)
    except NotAdmittedError as error:
        raise HTTPException(error.status, str(error), headers=error.headers) from None


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

"""Bodies of requests to pages and API: bounded in length and time before anything reads them."""

import asyncio

from fastapi import HTTPException
from starlette.types import Message, Receive

# Forms and labels have a few hundred bytes; uploads are bounded where they are passed on.
_BODY_BYTES = 64 * 1024
_BODY_S = 15.0


def bounded(receive: Receive) -> Receive:
    """The body of a request, refused where it is too long or too slow."""
    size = 0
    deadline = asyncio.get_running_loop().time() + _BODY_S
    ended = False

    async def next_part() -> Message:
        nonlocal size, ended
        if ended:
            return await receive()  # the disconnect, whenever it comes
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {_BODY_S:g} s") from None
        size += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if size > _BODY_BYTES:
            raise HTTPException(413, f"more than {_BODY_BYTES:,} bytes")
        return message

    return next_part

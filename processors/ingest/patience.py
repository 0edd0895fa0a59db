"""Waiting for what is away, without limit, and saying so: shared by what feeds ingest from files and cameras."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

T = TypeVar("T")

Sleep = Callable[[float], Awaitable[None]]
"""How to pause, seconds."""

_FIRST_PAUSE_S = 0.5
_LAST_PAUSE_S = 10.0


async def patiently(
    attempt: Callable[[], Awaitable[T]],
    waits: Callable[[str], None] = lambda _: None,
    sleep: Sleep = asyncio.sleep,
) -> T:
    """Try until what it needs is there.

    Args:
        attempt: what to do; raises `UnavailableError` for not now.
        waits: told what is waited on, before each pause.
        sleep: how to pause.
    """
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return await attempt()
        except UnavailableError as error:
            log.info("waiting", on=error.waiting_on, why=str(error))
            waits(error.waiting_on)
            await sleep(random.uniform(0.5, 1) * pause)
            pause = min(_LAST_PAUSE_S, 2 * pause)

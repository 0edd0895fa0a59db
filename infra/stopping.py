"""How processes are asked to stop, and what is given up for it. Imports nothing that takes time."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """The stop came first."""


def stop_event() -> asyncio.Event:
    """Set by SIGTERM and Ctrl-C: work in hand is let go in order, not torn off."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def unless(stop: asyncio.Event, doing: Awaitable[T]) -> T:
    """What it gives; asked to stop before that, it is cancelled.

    Raises:
        StoppedError: the stop came first.
    """
    done, stopping = asyncio.ensure_future(doing), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({done, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise StoppedError
    finally:
        for task in (done, stopping):
            task.cancel()
        await asyncio.gather(done, stopping, return_exceptions=True)

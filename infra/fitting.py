"""Whether this version may touch the data that are there: a database that a newer version made is refused at once.

Stages start side by side with the servers, and one of an older version would set aside what it cannot read. So the
question is asked as soon as ClickHouse answers, seconds before any stage has its model loaded.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from typing import Any

from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from streams.errors import UnavailableError

_PAUSE_S = 0.3


async def start_if_it_fits(settings: ClickHouseSettings, start: Coroutine[Any, Any, None]) -> None:
    """Start, and give the start up where the database turns out to be newer than this version.

    Where there is no database yet, or no ClickHouse, nothing is held up: who makes it will say what is wrong.

    Raises:
        MigrationError: it is newer, or was changed; what had begun to start has been stopped.
        StartError: as the start.
    """
    starting, looking = asyncio.create_task(start), asyncio.create_task(_look(settings))
    try:
        await asyncio.wait({starting, looking}, return_when=asyncio.FIRST_COMPLETED)
        if looking.done():
            looking.result()
        await starting
    finally:
        for task in (looking, starting):
            task.cancel()
        await asyncio.gather(looking, starting, return_exceptions=True)


async def _look(settings: ClickHouseSettings) -> None:
    """Return once the database is there and is no newer than this version."""
    async with aclosing(Queries(settings)) as store:
        while True:
            with suppress(UnavailableError):
                await store.pending_migrations()
                return
            await asyncio.sleep(_PAUSE_S)

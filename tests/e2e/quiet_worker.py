"""A worker whose consumer falls silent once a file is there.

`python -m tests.e2e.quiet_worker FILE STALL_S MODULE ...`: it is the module otherwise, with all limits of a stall
shortened as STALL_S is to the product's. What the file says is how it falls silent, while the member's heartbeats go on
and nothing fails:

- `stops`: the next poll never returns;
- `deaf`: polls return, and bring nothing any more;
- `ends`: what is fetched is handed on to nobody, because Faust's agent has returned.
"""

import asyncio
import runpy
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiokafka.consumer.fetcher import Fetcher

from streams import hearing, liveness, workers
from streams.host_faust import FaustHost


def shorten(stall_s: float) -> None:
    """Every limit by the same factor."""
    factor = stall_s / liveness.STALL_S
    liveness.STALL_S = workers.STALL_S = stall_s
    workers.LOOK_S *= factor
    hearing.DEAF_S *= factor


def silence(file: Path) -> None:
    """From the moment the file is there the consumers of this process do as it says."""

    def manner() -> str:
        return file.read_text() if file.exists() else ""

    fetched, feed = Fetcher.fetched_records, FaustHost._feed

    async def quiet(self: Any, *arguments: Any, **options: Any) -> Any:
        if manner() == "deaf":
            await asyncio.sleep(0.2)
            return {}
        found = await fetched(self, *arguments, **options)
        if manner() == "stops":
            await asyncio.Event().wait()
        return found

    class Ending:
        """A Faust stream that ends."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def noack(self) -> "Ending":
            return self

        async def events(self) -> AsyncIterator[Any]:
            async for event in self._stream.noack().events():
                if manner() == "ends":
                    return
                yield event

    async def ending(self: FaustHost, stream: Any) -> None:
        await feed(self, Ending(stream))

    Fetcher.fetched_records = quiet
    FaustHost._feed = ending  # type: ignore[method-assign]


if __name__ == "__main__":
    _, file, stall_s, module, *arguments = sys.argv
    shorten(float(stall_s))
    silence(Path(file))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

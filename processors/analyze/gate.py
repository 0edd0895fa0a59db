"""The gate that every call to an LLM server passes: so many at once, in the order they came, or one all alone."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class SlotGate:
    """A first-in, first-out semaphore whose holders may ask for every slot. `clock` gives seconds, monotonic."""

    def __init__(self, slots: int, clock: Callable[[], float]) -> None:
        self.slots = slots
        self._free = slots
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._clock = clock

    @property
    def busy(self) -> int:
        """Slots that are held."""
        return self.slots - self._free

    @asynccontextmanager
    async def hold(self, *, alone: bool = False) -> AsyncIterator[float]:
        """Hold a slot, or all of them; gives the wait for it in milliseconds."""
        need = self.slots if alone else 1
        began = self._clock()
        await self._take(need)
        try:
            yield (self._clock() - began) * 1000
        finally:
            self._give(need)

    async def _take(self, need: int) -> None:
        if not self._waiting and self._free >= need:
            self._free -= need
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((need, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give(need)  # it was our turn already
            else:
                self._waiting.remove((need, turn))
                self._give(0)  # who waited behind us may fit now
            raise

    def _give(self, need: int) -> None:
        self._free += need
        while self._waiting and self._waiting[0][0] <= self._free:
            taken, turn = self._waiting.popleft()
            self._free -= taken
            turn.set_result(None)

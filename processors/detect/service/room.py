"""Memory that is given out: so many bytes in all, and whoever finds none is refused or waits his turn."""

import asyncio
from collections import deque
from contextlib import suppress


class Room:
    """So many bytes. Whoever takes some gives them back; those who wait get them in the order of asking."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def taken(self) -> int:
        """Bytes that are out."""
        return self.size - self._free

    def grab(self, count: int) -> bool:
        """Take them now, if they are there."""
        if self._waiting or count > self._free:
            return False
        self._free -= count
        return True

    async def take(self, count: int) -> None:
        """Wait for them. `count` is `size` at most."""
        if self.grab(count):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came at this very moment
                self.give(count)
            else:
                with suppress(ValueError):  # `give` came by after the cancellation, and took it off
                    self._waiting.remove((count, turn))
                self.give(0)  # who was behind may fit
            raise

    def give(self, count: int) -> None:
        """Give so many back."""
        self._free += count
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= wanted
                turn.set_result(None)

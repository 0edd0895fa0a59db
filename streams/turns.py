"""Slots that those who wait take in turn: whoever queues for many waits no less than whoever queues for one."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable


class Turns:
    """A semaphore whose free slots go round among those who wait.

    With a plain one, first come first served, a partition with a single frame would stand behind all that fifteen
    flooded ones had queued for: sixteen each, in detect.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    def locked(self) -> bool:
        """Whether a slot would have to be waited for."""
        return not self._free

    async def acquire(self, who: Hashable) -> None:
        """Wait for a slot in `who`'s queue."""
        if self._free:  # then nobody waits
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # it was given just now
            raise

    def release(self) -> None:
        """Give a slot back: to the queue whose turn it is."""
        while self._waiting:
            who, queue = next(iter(self._waiting.items()))
            turn = queue.popleft()
            if queue:
                self._waiting.move_to_end(who)
            else:
                del self._waiting[who]
            if not turn.done():  # else it was cancelled
                turn.set_result(None)
                return
        self._free += 1

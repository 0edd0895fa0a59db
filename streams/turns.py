"""Slots that those who wait take in turn: whoever queues for many waits no less than whoever queues for one."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable


class Turns:
    """A semaphore whose free slots go round among those who wait.

    With a plain one, first come first served, a partition with a single frame would stand behind all that fifteen
    flooded ones had queued for: sixteen each, in detect. `slots` may be a function, where their number changes.
    """

    def __init__(self, slots: int | Callable[[], int]) -> None:
        self._slots = slots if callable(slots) else lambda: slots
        self._held = 0
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def slots(self) -> int:
        """How many there are now."""
        return self._slots()

    def locked(self) -> bool:
        """Whether a slot would have to be waited for."""
        return self._held >= self.slots

    async def acquire(self, who: Hashable) -> None:
        """Wait for a slot in `who`'s queue."""
        if not self._waiting and not self.locked():
            self._held += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(turn)
        self._give()  # there may be more than there were
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # it was given just now
            raise

    def release(self) -> None:
        """Give a slot back: to the queue whose turn it is."""
        self._held -= 1
        self._give()

    def _give(self) -> None:
        while self._waiting and not self.locked():
            who, queue = next(iter(self._waiting.items()))
            turn = queue.popleft()
            if queue:
                self._waiting.move_to_end(who)
            else:
                del self._waiting[who]
            if not turn.done():  # else it was cancelled
                self._held += 1
                turn.set_result(None)

"""How often keys are tried: by whichever way they come, they are counted together."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable

# A person mistypes twice or thrice; at five a minute a key of eight random letters takes 40,000 years.
_TRIES = 5
_TRIES_TOGETHER = 60
_TRIES_IN_S = 60.0
_ADDRESSES = 10_000
# Programs come every few seconds, or once a night: a proof holds for a day.
_PROOF_S = 86_400.0


class Throttle:
    """Wrong keys, at the login and with requests: five a minute from one address, and sixty in all.

    Then no key is looked at, so a guess that is right tells nothing either. From an address whose programs sent the
    right one within a day right ones go on to be taken: strangers, or one camera with an old key behind the same proxy,
    must not shut the others out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all: deque[float] = deque()
        self._of: OrderedDict[str, deque[float]] = OrderedDict()
        self._proven: OrderedDict[str, float] = OrderedDict()

    def wait(self, address: str) -> float:
        """How long this address must wait before it may try, seconds; 0 is not at all."""
        now = self._clock()
        return max(
            _wait(self._all, now, _TRIES_TOGETHER),
            _wait(self._of[address], now, _TRIES) if address in self._of else 0.0,
        )

    def failed(self, address: str) -> None:
        """It tried a wrong key."""
        now = self._clock()
        self._all.append(now)
        self._of.setdefault(address, deque()).append(now)
        self._of.move_to_end(address)
        while len(self._of) > _ADDRESSES:
            self._of.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """A program there sent the right key."""
        self._proven[address] = self._clock()
        self._proven.move_to_end(address)
        while len(self._proven) > _ADDRESSES:
            self._proven.popitem(last=False)

    def is_proven(self, address: str) -> bool:
        """Whether a program there sent the right key within a day."""
        return address in self._proven and self._clock() - self._proven[address] < _PROOF_S


def _wait(failures: deque[float], now: float, most: int) -> float:
    while failures and failures[0] <= now - _TRIES_IN_S:
        failures.popleft()
    return failures[-most] + _TRIES_IN_S - now if len(failures) >= most else 0.0

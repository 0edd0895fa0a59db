"""A circuit breaker: a service that failed several times in a row is left alone for a while, then tried once."""

import random
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)


class Breaker:
    """Closed, it lets all through; open, nothing; when its time is over, one trial decides. For one thread."""

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float]) -> None:
        """Closed.

        Args:
            failures: in a row, after which it opens.
            open_s: how long it stays open, seconds; up to half more, so that several clients do not try together.
            clock: monotonic, seconds.
        """
        self._most = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._until = 0.0
        self.why = ""
        """What failed last."""

    def wait_s(self) -> float:
        """How long nothing may be asked, seconds; 0 is not at all."""
        return max(0.0, self._until - self._clock())

    @property
    def is_trial(self) -> bool:
        """Whether what is asked now decides: one try, no other."""
        return self._failures >= self._most

    def answered(self) -> None:
        """The service answered: closed."""
        if self.is_trial:
            log.info("the detector's service answers again")
        self._failures = 0

    def failed(self, why: str, *, times: int = 1) -> None:
        """It did not; `times` is how many failures this one weighs."""
        self._failures += times
        if self.is_trial:
            self.open_for(self._open_s * random.uniform(1.0, 1.5), why)

    def open_for(self, seconds: float, why: str) -> None:
        """Ask nothing for so long: it said so itself, or it failed too often."""
        self.why = why
        self._until = max(self._until, self._clock() + seconds)
        log.warning("the detector's service is left alone", seconds=round(seconds, 1), why=why)

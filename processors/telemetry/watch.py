"""Looking at the GPUs without being held up by them: a call into a sick driver can hang for ever."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

import structlog

from processors.telemetry.core import Seen
from processors.telemetry.port import Gpus

log = structlog.get_logger(__name__)

# A look takes 5 to 50 ms a card; without persistence mode the driver first wakes the card up, 1 to 3 s.
PATIENCE_S = 10.0


class Watch:
    """Looks from a thread of its own, one at a time.

    Whoever looks while an earlier look still hangs is told so at once: no second thread joins the first one. The
    thread is a daemon: a process can end while it hangs.

    Args:
        gpus: what is looked at.
        patience_s: how long a look may take.
        clock: seconds, monotonic.
    """

    def __init__(
        self, gpus: Gpus, *, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gpus = gpus
        self._patience_s = patience_s
        self._clock = clock
        self._looking: threading.Thread | None = None
        self._began = 0.0

    @property
    def busy(self) -> bool:
        """Whether a look is under way, or hangs."""
        return self._looking is not None and self._looking.is_alive()

    async def look(self) -> Seen:
        """What is seen now; that the driver hangs is a thing that can be seen."""
        if self.busy:
            return self._hung()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Seen] = loop.create_future()

        def tell(seen: Seen) -> None:
            if not answer.done():  # else nobody waits any more
                answer.set_result(seen)

        def work() -> None:
            try:
                seen = self._gpus.look()
            except Exception as error:
                log.exception("NVML was read wrongly: please report this")
                seen = Seen(why=f"the GPUs cannot be read: {type(error).__name__}: {error}")
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, seen)

        self._began = self._clock()
        self._looking = threading.Thread(target=work, name="nvml", daemon=True)
        self._looking.start()
        try:
            async with asyncio.timeout(self._patience_s):
                return await answer
        except TimeoutError:
            return self._hung()

    def _hung(self) -> Seen:
        since = self._clock() - self._began
        return Seen(
            why=f"NVIDIA's driver has not answered for {since:.0f} s; `dmesg` may say why (NVRM: Xid), and most often "
            "only a restart of the machine helps",
            hung=True,
        )

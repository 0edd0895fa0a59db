"""What the service counts: answers by path and status, how long they took, what is in hand."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streams.metrics import WORK_S, Counts, Distribution, gauge

_PATHS = frozenset({"/detect", "/detect/batch", "/health", "/metrics"})


class ServiceMetrics(Collector):
    """Counters of one service. Strangers' paths are one label: they make no series."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._responses = Counts(
            "rewatch_detector_responses", "Answers by path and HTTP status.", "path", "code", unit="responses"
        )
        self._seconds = Distribution(
            "rewatch_detector_answer_seconds", "From a POST's head to its answer, whole: 200 alone.", WORK_S
        )
        self.files = Counts(
            "rewatch_detector_files", "Files by what became of them: answered, or refused.", "outcome", unit="files"
        )
        for outcome in ("answered", "refused"):
            self.files.add(outcome, by=0)
        self.in_hand: Callable[[], int] = lambda: 0
        self.memory: Callable[[], dict[str, int]] = dict
        """Bytes that count as taken, by `bodies` and `pixels`."""

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        yield self._responses.family()
        yield self._seconds.family()
        yield self.files.family()
        yield gauge("rewatch_detector_in_hand", "Pictures in hand.", (), {(): self.in_hand()})
        yield gauge(
            "rewatch_detector_memory_bytes",
            "Memory that requests hold: bodies, and decoded pictures.",
            ("what",),
            {(what,): count for what, count in self.memory().items()},
            unit="bytes",
        )

    def counting(self, app: ASGIApp) -> ASGIApp:
        """The app with its answers counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began, status = self._clock(), 0

            async def sending(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    path = scope["path"]
                    self._responses.add(path if path in _PATHS else "other", str(status))
                await send(message)

            await app(scope, receive, sending)
            if status == 200 and scope["method"] == "POST":
                self._seconds.observe(self._clock() - began)

        return counted

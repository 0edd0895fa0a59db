"""What the gateway counts, for Prometheus: answers by kind and status, how long they took, and what is open now."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streams.metrics import Counts, Distribution, gauge

# From a page that was asked for again to the longest that ClickHouse is waited for.
_ANSWER_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# A stream lasts for as long as somebody looks, and an upload for as long as its sender takes: neither is an answer's
# time. Longest first.
_KINDS = (
    ("/api/events/stream", "stream"),
    ("/api/images/", "image"),
    ("/api/upload", "upload"),
    ("/api/", "api"),
    ("/static/", "static"),
    ("/health", "probe"),
)
_OPEN = frozenset({"stream", "upload"})


class GatewayMetrics(Collector):
    """Counters of one gateway process. A path is a label by its kind alone: strangers make no series."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._responses = Counts(
            "rewatch_gateway_responses",
            "Answers by kind (page, api, image, stream, upload, static, probe) and HTTP status.",
            "kind",
            "code",
            unit="responses",
        )
        self._seconds = {
            kind: Distribution("rewatch_gateway_answer", "Time until an answer was sent whole.", _ANSWER_S, kind=kind)
            for kind in ("page", "api", "image")
        }
        self._open = dict.fromkeys(sorted(_OPEN), 0)

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        yield self._responses.family()
        first, *others = (seconds.family() for seconds in self._seconds.values())
        for other in others:  # one family, told apart by its label
            first.samples.extend(other.samples)
        yield first
        values: dict[tuple[str, ...], float] = {(kind,): count for kind, count in self._open.items()}
        yield gauge("rewatch_gateway_open", "Streams and uploads that are open now.", ("kind",), values)

    def counting(self, app: ASGIApp) -> ASGIApp:
        """The app with its answers counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            kind = next((kind for path, kind in _KINDS if scope["path"].startswith(path)), "page")

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._responses.add(kind, str(message["status"]))
                await send(message)

            began = self._clock()
            if kind in _OPEN:
                self._open[kind] += 1
            try:
                await app(scope, receive, sending)
            finally:
                if kind in _OPEN:
                    self._open[kind] -= 1
                elif kind in self._seconds:
                    self._seconds[kind].observe(self._clock() - began)

        return counted

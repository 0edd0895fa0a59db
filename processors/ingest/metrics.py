"""What ingest counts: images by camera, way in and outcome, and the endpoint's answers."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from prometheus_client import Metric
from prometheus_client.registry import Collector

from processors.ingest.shed import Shed
from streams.metrics import Counts, gauge

App = Callable[[Any, Any, Any], Awaitable[None]]


class IngestMetrics(Collector):
    """Counters of one ingest process.

    Cameras are a label here and nowhere else: 200 cameras with two ways in and four outcomes are 1,600 series at most,
    and only ids of known cameras become labels, so no stranger's request makes one.
    """

    def __init__(self, shed: Shed) -> None:
        self._shed = shed
        self.images = Counts(
            "rewatch_ingest_images",
            "Images by what became of them: accepted (on the log), unchanged (was there already), rejected (no image "
            "that can be taken), shed (429, or dropped as ingest.shed says). `camera` is empty where it is not known.",
            "camera",
            "source",
            "outcome",
            unit="images",
        )
        self.responses = Counts(
            "rewatch_ingest_responses", "Answers of POST /api/upload, by HTTP status.", "code", unit="responses"
        )

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        yield self.images.family()
        yield self.responses.family()
        if self._shed.settings.enabled:
            yield gauge(
                "rewatch_ingest_shedding", "Whether new frames are shed (ingest.shed).", (), {(): bool(self._shed.why)}
            )
            waiting: dict[tuple[str, ...], float] = {(stage,): count for stage, count in self._shed.waiting.items()}
            yield gauge(
                "rewatch_ingest_backlog",
                "Offsets that wait before the stage, as ingest last saw it; markers of transactions count.",
                ("stage",),
                waiting,
            )

    def counting(self, app: App) -> App:
        """The ASGI app with its answers to uploads counted."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            async def sending(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.responses.add(str(message["status"]))
                await send(message)

            uploads = scope["type"] == "http" and scope["path"] == "/api/upload"
            await app(scope, receive, sending if uploads else send)

        return counted

"""`rewatch run gateway`: the web door as a process, until told to stop. It needs nobody to be there when it starts."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import structlog

from processors.gateway.app import build_app
from processors.gateway.health import Pulse
from processors.gateway.images import Images
from processors.gateway.labels import Labels
from processors.gateway.metrics import GatewayMetrics
from processors.gateway.reads import Reads
from processors.gateway.settings import GatewaySettings
from processors.gateway.source import StoredSource
from processors.gateway.upload import Uploads
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from streams.claims import ClaimStore
from streams.control import Cameras
from streams.kafka import Kafka
from streams.labels import LabelLog
from streams.liveness import Liveness
from streams.metrics import LivenessCollector
from streams.scraping import Endpoint
from streams.serving import SettingsError, listen, serve

log = structlog.get_logger(__name__)


class Service:
    """The gateway, whole.

    Args:
        source: everything that is shown.
        settings: the section `gateway`.
        uploads: the way to ingest.
        status: a file to write how it is, once a second.
        endpoint: where its metrics are served.
    """

    def __init__(
        self,
        source: StoredSource,
        settings: GatewaySettings,
        uploads: Uploads,
        *,
        status: Path | None = None,
        endpoint: Endpoint | None = None,
    ) -> None:
        self._source = source
        self._settings = settings
        self._uploads = uploads
        self._status = status
        self._metrics = GatewayMetrics()
        self.liveness = Liveness("gateway")
        if endpoint is not None:
            self.liveness.metrics = endpoint.url
            endpoint.registry.register(self._metrics)
            endpoint.registry.register(LivenessCollector(self.liveness))
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Where it is reached, once it is."""

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop; streams end at once, other answers in hand within 5 s.

        Raises:
            SettingsError: it cannot listen where it is set to.
        """
        if not self._settings.enabled:
            raise SettingsError("gateway.enabled is false: set it (REWATCH_GATEWAY__ENABLED) to true")
        listener = listen(self._settings)
        url = self._settings.model_copy(update={"port": listener.getsockname()[1]}).url
        app = self._metrics.counting(build_app(self._source, self._settings, self._uploads))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._end_streams_at(stop), name="gateway stop")
                group.create_task(self.liveness.tell(self._status, stop), name="gateway status")
                log.info("serving", url=url)
                self.url.set_result(url)
                await serve(app, self._settings, listener, stop)
        finally:
            await self._uploads.close()
            await self._source.close()

    async def _end_streams_at(self, stop: asyncio.Event) -> None:
        """Whoever listens would otherwise hold the stop up for as long as answers in hand may take."""
        await stop.wait()
        await self._source.feed.close()


def build_source(
    kafka: Kafka,
    clickhouse: ClickHouseSettings,
    cameras: Cameras,
    claims: ClaimStore,
    data_dir: Path,
    *,
    fixes: Mapping[str, str] | None = None,
    expected: Callable[[], Mapping[str, str]] = dict,
    toys: Collection[str] = (),
) -> StoredSource:
    """The real source; nothing is connected yet.

    Args:
        kafka: the log.
        clickhouse: where the store is.
        cameras: which partition a camera lives in; read when it is needed.
        claims: where images above 64 KB are.
        data_dir: where workers of this machine say how they are.
        fixes: what to do when `broker` or `clickhouse` is away.
        expected: as for `Pulse`.
        toys: SHA-256 of the demo models' weights.
    """
    queries = Queries(clickhouse)
    pulse = Pulse(kafka, queries, data_dir, fixes=fixes, expected=expected, toys=toys)
    return StoredSource(queries, Images(Reads(queries), claims), Labels(LabelLog(kafka, cameras)), pulse, toys=toys)

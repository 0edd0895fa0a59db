"""`rewatch run ingest`: folder, upload endpoint and cameras' snapshots side by side, until told to stop."""

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from processors.ingest.appender import Appenders
from processors.ingest.folder import Folder
from processors.ingest.http import build_app
from processors.ingest.kafka_log import KafkaLog
from processors.ingest.ports import Cameras, Log
from processors.ingest.settings import IngestSettings
from processors.ingest.shed import BACKLOG, Look
from processors.ingest.snapshot import Snapshots
from streams.backlog import backlog
from streams.claims import ClaimStore
from streams.kafka import Kafka
from streams.liveness import Liveness
from streams.metrics import LivenessCollector
from streams.scraping import Endpoint
from streams.serving import listen, serve

log = structlog.get_logger(__name__)


class Service:
    """Ingest, whole.

    Args:
        log_: where frames go.
        settings: the section `ingest`.
        cameras: which cameras are known.
        claims: where images above 64 KB go.
        clock: wall time, seconds since the Unix epoch.
        status: a file to write how it is.
        look: says how much waits before the stages; without it nothing is shed.
    """

    def __init__(
        self,
        log_: Log,
        settings: IngestSettings,
        cameras: Cameras,
        claims: ClaimStore,
        *,
        clock: Callable[[], float] = time.time,
        status: Path | None = None,
        look: Look | None = None,
    ) -> None:
        self._settings = settings
        self._status = status
        self._look = look
        self.liveness = Liveness("ingest")
        self.appenders = Appenders(log_, cameras, claims, settings, clock=clock)
        self.folder = Folder(settings.folder, self.appenders, clock=clock) if settings.folder.enabled else None
        self.snapshots = [Snapshots(camera, one, self.appenders) for camera, one in settings.snapshots.items()]
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Where uploads are taken, once they are; cancelled where they are off."""

    def waiting_on(self) -> list[str]:
        """What it waits on: broker, disk, folder, settings, a camera that does not answer."""
        waits = set(self.appenders.waiting_on.values())
        if self.folder is not None:
            waits.update(self.folder.waiting_on.values())
        waits.update(source.waiting_on for source in self.snapshots)
        if self.appenders.shed.why:
            waits.add(BACKLOG)
        return sorted(waits - {""})

    async def run(self, stop: asyncio.Event) -> None:
        """Take images until told to stop; then finish what is in hand, about 5 s at most.

        Raises:
            SettingsError: the upload endpoint cannot listen where it is set to.
        """
        listener = listen(self._settings.upload) if self._settings.upload.enabled else None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._close_at(stop), name="ingest stop")
                group.create_task(self.liveness.tell(self._status, stop, self.waiting_on), name="ingest status")
                if listener is not None:
                    group.create_task(self._serve(listener, stop), name="ingest upload")
                else:
                    self.url.cancel()
                if self.folder is not None:
                    group.create_task(self.folder.run(stop), name="ingest folder")
                if self._look is not None:
                    group.create_task(self.appenders.shed.run(self._look, stop), name="ingest shed")
                for source in self.snapshots:
                    group.create_task(source.run(stop), name="ingest snapshots")
        finally:
            await self.appenders.close()

    async def _close_at(self, stop: asyncio.Event) -> None:
        """At a stop transactions in hand are finished and what waits is refused, so folder and endpoint end soon."""
        await stop.wait()
        await self.appenders.close()

    async def _serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        upload = self._settings.upload
        url = upload.model_copy(update={"port": listener.getsockname()[1]}).url
        log.info("taking uploads", url=url)
        self.url.set_result(url)
        app = build_app(self.appenders, upload, self.waiting_on)
        await serve(self.appenders.metrics.counting(app), upload, listener, stop)


async def run(
    kafka: Kafka,
    settings: IngestSettings,
    cameras: Cameras,
    claims: ClaimStore,
    stop: asyncio.Event,
    *,
    epoch: str,
    status: Path | None = None,
    endpoint: Endpoint | None = None,
) -> None:
    """Run ingest on Kafka until told to stop.

    Args:
        kafka: the connection.
        settings: the section `ingest`.
        cameras: which cameras are known.
        claims: where images above 64 KB go.
        stop: set it to end.
        epoch: the epoch of the topic `frames`.
        status: a file to write how it is, once a second.
        endpoint: where its metrics are served.

    Raises:
        SettingsError: the upload endpoint cannot listen where it is set to.
    """
    service = Service(
        KafkaLog(kafka, epoch),
        settings,
        cameras,
        claims,
        status=status,
        look=lambda: backlog(kafka, ("detect", "analyze")),
    )
    if endpoint is not None:
        service.liveness.metrics = endpoint.url
        endpoint.registry.register(service.appenders.metrics)
        endpoint.registry.register(LivenessCollector(service.liveness))
    await service.run(stop)

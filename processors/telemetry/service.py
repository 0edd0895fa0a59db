"""`rewatch run telemetry`: reads this host's GPUs until told to stop. No GPU is a state in which it waits for one."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from processors.telemetry import core
from processors.telemetry.core import Seen
from processors.telemetry.metrics import TelemetryMetrics
from processors.telemetry.nvml import Nvml
from processors.telemetry.outbox import Outbox
from processors.telemetry.port import Gpus
from processors.telemetry.settings import TelemetrySettings
from processors.telemetry.watch import PATIENCE_S, Watch
from streams.kafka import Kafka
from streams.liveness import Liveness
from streams.metrics import LivenessCollector
from streams.scraping import Endpoint

log = structlog.get_logger(__name__)

AGAIN_S = 60.0
"""How often a GPU is looked for where there is none: a driver is installed, a card is passed to a container."""


class Service:
    """Telemetry, whole.

    Args:
        outbox: takes the readings to the log.
        settings: the section `telemetry`.
        gpus: what is read.
        host: this host's name; it keys the records.
        status: a file to write how it is, once a second.
        endpoint: where its metrics are served.
        clock: wall time, seconds since the Unix epoch.
        again_s: how often a GPU is looked for where there is none.
        patience_s: how long one look at the GPUs may take.
    """

    def __init__(
        self,
        outbox: Outbox,
        settings: TelemetrySettings,
        gpus: Gpus | None = None,
        *,
        host: str = "",
        status: Path | None = None,
        endpoint: Endpoint | None = None,
        clock: Callable[[], float] = time.time,
        again_s: float = AGAIN_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.outbox = outbox
        self._settings = settings
        self._watch = Watch(gpus or Nvml(), patience_s=patience_s)
        self._host = host or socket.gethostname()
        self._status = status
        self._clock = clock
        self._again_s = again_s
        self.seen = Seen(why="not looked yet")
        """The last look."""
        self.liveness = Liveness("telemetry")
        self._tell()
        if endpoint is not None:
            self.liveness.metrics = endpoint.url
            endpoint.registry.register(TelemetryMetrics(lambda: self.seen, outbox))
            endpoint.registry.register(LivenessCollector(self.liveness))

    async def run(self, stop: asyncio.Event) -> None:
        """Read and send until told to stop."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.liveness.tell(self._status, stop, self._waits), name="telemetry status")
            group.create_task(self.outbox.run(stop), name="telemetry outbox")
            group.create_task(self._read(stop), name="telemetry")

    async def _read(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            before, self.seen = self.seen, await self._watch.look()
            self._tell()
            _say(before, self.seen)
            self.outbox.put(core.records(self.seen, self._host, int(self._clock() * 1000)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    stop.wait(), self._again_s if self.seen.state == "none" else self._settings.every_s
                )

    def _tell(self) -> None:
        self.liveness.details = {"gpu": core.report(self.seen)}

    def _waits(self) -> list[str]:
        return [self.outbox.waiting_on] if self.outbox.waiting_on else []


def _say(before: Seen, now: Seen) -> None:
    """Log what changed, once."""
    if now.state != before.state or (now.state == "none" and now.why != before.why):
        if now.hung:
            log.error("GPUs cannot be read", why=now.why)
        else:
            log.info("GPUs", found=core.sentence(core.report(now)))
    said = {(card.uuid, card.device): card.error for card in before.cards}
    for card in now.cards:
        earlier = said.get((card.uuid, card.device))
        about = {"gpu": card.device, "name": card.name, "uuid": card.uuid}
        if card.error and card.error != earlier:
            log.error("a GPU is lost: what runs on it fails until it is back", **about, why=card.error)
        elif earlier and not card.error:
            log.warning("a lost GPU is back", **about)


async def run(
    kafka: Kafka, settings: TelemetrySettings, stop: asyncio.Event, *, status: Path, endpoint: Endpoint
) -> None:
    """Run telemetry on Kafka until told to stop; the broker need not be there.

    Args:
        kafka: the connection.
        settings: the section `telemetry`.
        stop: set it to end.
        status: a file to write how it is, once a second.
        endpoint: where its metrics are served.
    """
    await Service(Outbox(kafka), settings, status=status, endpoint=endpoint).run(stop)

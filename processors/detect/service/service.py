"""`rewatch serve detector`: listening at once, healthy when the model is warm, drained when it is told to stop."""

import asyncio
import threading
from collections.abc import Callable

import structlog

from processors.detect.detector import Batcher, Detector
from processors.detect.service.http import Door, Model
from processors.detect.settings import DetectorSettings
from streams.scraping import new_registry
from streams.serving import SettingsError, listen, serve

log = structlog.get_logger(__name__)


class Service:
    """The detector's service, whole.

    Args:
        load: gives the detector, warmed up; it may take as long as it takes.
        settings: `batch_size` and `wait_ms` say how requests share an inference, `service` the rest.
    """

    def __init__(self, load: Callable[[], Detector], settings: DetectorSettings) -> None:
        self._load = load
        self._settings = settings
        self._registry = new_registry()
        self._door = Door(settings.service, self._registry)
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Where it is reached, once it is."""
        self.warm = asyncio.Event()
        """Set when it is healthy."""
        self.torn = False
        """Whether a thread is still at work after `run`: the model loads, or did not answer in time."""

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop; then finish what is in hand, `drain_s` at most.

        Raises:
            SettingsError: it cannot listen where it is set to.
            ModelError: the model cannot be loaded.
        """
        settings = self._settings.service
        if not settings.enabled:
            raise SettingsError(
                "detector.service.enabled is false: set it (REWATCH_DETECTOR__SERVICE__ENABLED) to true"
            )
        listener = listen(settings)
        url = settings.model_copy(update={"port": listener.getsockname()[1]}).url
        ended = asyncio.Event()
        serving = asyncio.create_task(serve(self._door.app(), settings, listener, ended), name="detector http")
        stopped = asyncio.create_task(stop.wait())
        loading = asyncio.create_task(_beside(self._load), name="detector load")
        try:
            log.info("serving", url=url)
            self.url.set_result(url)
            await asyncio.wait({loading, serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                self._begin(loading.result())
                await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            else:
                self.torn = True
            if not serving.done() and not await self._door.drain(settings.drain_s):
                self.torn = True
        finally:
            for task in (stopped, loading):
                task.cancel()
            ended.set()
            await asyncio.gather(stopped, loading, return_exceptions=True)
            try:
                await serving
            finally:
                await self._close()

    def _begin(self, detector: Detector) -> None:
        batcher = Batcher(detector, size=self._settings.batch_size, wait_s=self._settings.wait_ms / 1000)
        self._registry.register(batcher.metrics)
        self._door.model = Model(detector, batcher)
        self.warm.set()
        log.info("healthy", model=detector.name, digest=detector.digest, runtime=detector.runtime)

    async def _close(self) -> None:
        self._door.close()
        if self._door.model is not None:
            await self._door.model.batcher.close()
            self._door.model.detector.close()


async def _beside(load: Callable[[], Detector]) -> Detector:
    """What it gives, from a thread that nobody waits for: a stop must not wait until a model is loaded."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Detector] = loop.create_future()

    def tell(found: Detector | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        elif found is not None:
            done.set_result(found)

    def work() -> None:
        found: Detector | None = None
        failed: BaseException | None = None
        try:
            found = load()
        except BaseException as error:  # noqa: BLE001 (whoever awaits it gets it)
            failed = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, found, failed)

    threading.Thread(target=work, name="detector load", daemon=True).start()
    return await done

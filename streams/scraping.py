"""A process's `/metrics`: the section `metrics` of rewatch.yaml, the endpoint, and what else is scraped on this host.

Every process has an endpoint of its own, at a port that stays the same. `/targets` on each of them lists all that
report below one data directory, for Prometheus' `http_sd_configs`: one address in its configuration finds the rest.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry, GCCollector, Metric, PlatformCollector, ProcessCollector
from prometheus_client.core import InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streams.admission import Guard
from streams.doors import check, refusal
from streams.liveness import read_report
from streams.serving import EndpointSettings, SettingsError, listen, serve

log = structlog.get_logger(__name__)

# A process that was killed stays a target for this long, so that its absence is seen; its successor takes its place.
_MISSED_S = 3600

_PORTS_A_STAGE = 10


class MetricsSettings(EndpointSettings):
    """Prometheus' endpoint of every process."""

    section: ClassVar[str] = "metrics"

    port: int = Field(
        default=9400,
        ge=0,
        le=65_000,
        description="The first process's port: ingest's. The others follow, 10 a stage: gateway 9410, detect 9420, its "
        "second process 9421, batch 9430. One that is taken is replaced by a free one; 0 takes free ones.",
    )

    def port_of(self, place: int, index: int) -> int:
        """The port of the process `index` of the stage at `place`; 0, a free one, beyond the tenth."""
        return self.port + _PORTS_A_STAGE * place + index if self.port and index < _PORTS_A_STAGE else 0


class Endpoint:
    """An async context manager: inside it the registry is served.

    It never fails for want of a port: a stage without metrics is better than metrics without a stage.
    """

    def __init__(self, settings: MetricsSettings, reports: Path) -> None:
        """`reports`: the directory of the status files that `/targets` reads."""
        self._settings = settings
        self._reports = reports
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self.url: str | None = None
        """Where it is served; None where it is not."""
        self.registry = new_registry()

    async def __aenter__(self) -> Self:
        listener = self._listen() if self._settings.enabled else None
        if listener is not None:
            bound = self._settings.model_copy(update={"port": listener.getsockname()[1]})
            self.url = f"{bound.url}/metrics"
            self._serving = asyncio.create_task(self._serve(bound, listener), name="metrics")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        if self._serving is not None:
            await self._serving

    def _listen(self) -> socket.socket | None:
        try:
            return listen(self._settings)
        except SettingsError as error:
            taken = error
        with contextlib.suppress(SettingsError):
            listener = listen(self._settings.model_copy(update={"port": 0}))
            log.warning("metrics on another port", port=listener.getsockname()[1], why=str(taken))
            return listener
        log.warning("no metrics", why=str(taken))
        return None

    async def _serve(self, settings: MetricsSettings, listener: socket.socket) -> None:
        log.info("metrics", url=self.url)
        try:
            await serve(build_app(self.registry, settings, self._reports), settings, listener, self._stop)
        except (SettingsError, RuntimeError, OSError) as error:
            self.url = None
            log.error("no metrics", why=str(error))  # noqa: TRY400 (the message names the setting)


def new_registry() -> CollectorRegistry:
    """A registry that tells of the process and its version."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    registry.register(_Build())
    return registry


def exposition(request: Request, registry: CollectorRegistry) -> Response:
    """The registry, in the form that the scraper asks for."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"Content-Type": content_type})


class _Build(Collector):
    """Which version this is."""

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("rewatch_build", "The version that runs.", {"version": version("rewatch")})


def build_app(registry: CollectorRegistry, settings: MetricsSettings, reports: Path) -> Starlette:
    """The ASGI app: `/metrics` and `/targets`."""
    guard = Guard(settings)

    async def metrics(request: Request) -> Response:
        check(request, guard, "read")
        return exposition(request, registry)

    async def listed(request: Request) -> Response:
        check(request, guard, "read")
        found = await asyncio.to_thread(targets, reports, host=request.url.hostname)
        return JSONResponse(found)

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/targets", listed)], exception_handlers={HTTPException: refusal}
    )


def targets(reports: Path, *, host: str | None = None, now: float | None = None) -> list[dict[str, Any]]:
    """What is scraped on this host, in the form of Prometheus' HTTP and file service discovery.

    Args:
        reports: the directory of the status files.
        host: the name under which they are asked for; by default the address that each listens on.
        now: wall time, seconds.
    """
    found = []
    for path in sorted(reports.glob("*.json")):
        report = read_report(path)
        if report is None:
            continue
        try:
            written_at = path.stat().st_mtime
        except FileNotFoundError:  # it ended just now
            continue
        url = urlsplit(report.get("metrics") or "")
        if url.port is None or (now or time.time()) - written_at > _MISSED_S:
            continue
        name = host or url.hostname or ""
        address = f"[{name}]:{url.port}" if ":" in name else f"{name}:{url.port}"
        found.append({"targets": [address], "labels": {"__scheme__": url.scheme, "process": path.stem}})
    return found

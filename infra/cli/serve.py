"""Commands that serve a model: `serve detector`."""

import asyncio
import os
import time
from typing import TYPE_CHECKING

import typer

from infra.cli.errors import mendable
from infra.cli.help import RUN, examples
from infra.cli.lifecycle import Stop, duration
from infra.cli.output import console

if TYPE_CHECKING:
    from infra.config import Settings


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    serve = typer.Typer(
        no_args_is_help=True,
        help="Serve a model over HTTP, to this product and to other clients.",
        epilog=examples("rewatch serve detector"),
    )
    serve.command(
        epilog=examples(
            "rewatch serve detector",
            "curl -F file=@snapshot.jpg http://127.0.0.1:8090/detect",
            "REWATCH_DETECTOR__SERVICE__PORT=8190 rewatch serve detector",
            "REWATCH_DETECTOR__SERVICE__HOST=0.0.0.0 REWATCH_DETECTOR__SERVICE__API_KEY=... rewatch serve detector",
        ),
    )(detector)
    app.add_typer(serve, name="serve", rich_help_panel=RUN)


def detector(ctx: typer.Context) -> None:
    """Serve the detector of these settings at :8090, until Ctrl-C or SIGTERM.

    POST /detect (multipart `file`, or JSON {"image": BASE64}) and /detect/batch (`files`, or {"images": [...]}), GET
    /health and /metrics, as clients of RT-DETR services know them. Boxes below 0.5 are left out unless a request says
    ?min_confidence=0.1. It listens to this machine alone until detector.service.host and .api_key are set. The stage
    asks it where RTDETR_URL is set to its address, and RTDETR_API_KEY to its key. A stop answers what is in hand, for
    5 s at most (detector.service.drain_s).
    """
    from infra import logs, topology
    from infra.masks import secrets_of
    from processors.detect.service.service import Service

    settings: Settings = ctx.obj
    out = console()
    # A service does not ask another one: where RTDETR_URL is set for the stages, it is most often this one.
    own = settings.model_copy(update={"detector": settings.detector.model_copy(update={"url": None})})

    async def main() -> bool:
        logs.to_stderr(settings.log.level, settings.log.format, stage="detector", secrets=secrets_of(settings))
        stop = Stop(out)
        service = Service(lambda: topology.detector(own), settings.detector)
        began = time.monotonic()
        saying = asyncio.create_task(_say(service, began))
        try:
            await service.run(stop.asked)
        finally:
            saying.cancel()
            if stop.asked.is_set():
                out.print(f"detector stopped after {duration(time.monotonic() - began)}", soft_wrap=True)
        return service.torn

    async def _say(service: Service, began: float) -> None:
        url = await service.url
        out.print(f"detector at {url}: loading the model; Ctrl-C stops it in order", soft_wrap=True)
        await service.warm.wait()
        out.print(f"healthy after {duration(time.monotonic() - began)}", soft_wrap=True)

    if mendable(settings, lambda: asyncio.run(main())):
        # Python would wait for the model, which may never answer.
        out.file.flush()
        os._exit(0)

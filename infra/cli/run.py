"""Commands that run something: `up`, `run STAGE`, `demo`, `ingest dir`."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from infra import topology
from infra.config import Settings
from infra.demo import run_demo
from infra.installation import Installation
from infra.local.process import StartError
from infra.local.supervisor import AlreadyRunningError, ProcessFailedError
from streams.admin import TopicsError

console = Console(stderr=True)
ingest_app = typer.Typer(no_args_is_help=True, help="Take images in.")


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.command()(up)
    app.command()(demo)
    app.command("run")(run_stage)
    app.add_typer(ingest_app, name="ingest")


def up(ctx: typer.Context) -> None:
    """Start everything on this machine and keep it running; Ctrl-C stops it in order. The data stay."""
    settings: Settings = ctx.obj

    async def main() -> None:
        stop = _stop_event()
        with console.status("starting servers and stages ..."):
            installation = await Installation(settings, ctx.meta["config"]).__aenter__()
        try:
            console.print(f"rewatch is up: drop JPEGs into {settings.ingest.folder.root}/<camera>/,")
            console.print(f"or POST them to {settings.ingest.upload.url}/api/upload?camera=<camera>")
            console.print("ask with `rewatch events ls`, `rewatch status`, `rewatch sql`; stop with Ctrl-C")
            failed = asyncio.create_task(installation.stack.supervisor.wait())
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
        finally:
            console.print("stopping ...")
            await installation.__aexit__(None, None, None)

    _run(main())


def demo(ctx: typer.Context) -> None:
    """Play three rendered cameras through the whole pipeline, show what it found, and stop. The data stay."""
    _run(run_demo(ctx.obj, ctx.meta["config"], _stop_event))


def run_stage(
    ctx: typer.Context,
    stage: Annotated[str, typer.Argument(help=f"One of: {', '.join(topology.PROCESSES)}.")],
    status: Annotated[Path | None, typer.Option(help="Where it writes how it is; default below data_dir.")] = None,
) -> None:
    """Run one stage in this process until SIGTERM; on as many machines as you like."""
    if stage not in topology.PROCESSES:
        raise typer.BadParameter(f"there is no stage {stage!r}; there are {', '.join(topology.PROCESSES)}")
    settings: Settings = ctx.obj

    async def main() -> None:
        await topology.run(settings, stage, _stop_event(), status or topology.status_path(settings, stage))

    _run(main())


def _stop_event() -> asyncio.Event:
    """Set by SIGTERM and Ctrl-C: work in hand is let go in order, not torn off."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run it; failures that a person can mend are one line and an exit code."""
    try:
        asyncio.run(main)
    except AlreadyRunningError as error:
        console.print(str(error))
        raise typer.Exit(0) from None
    except (StartError, ProcessFailedError, TopicsError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(3) from None

"""Commands that run something: `up`, `demo`, `run STAGE`.

What they run is imported by them: other commands must not pay for it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from aiokafka.errors import KafkaError

from infra import topology
from infra.cli.output import AWAY, USAGE, broker_away, console, explain, fail
from infra.config import Settings
from infra.worker import stop_event, work
from processors.detect.settings import ModelError
from schemas.migrations import MigrationError
from streams.admin import TopicsError
from streams.errors import FencedError, UnavailableError, UncertainError
from streams.serving import SettingsError

T = TypeVar("T")


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.command()(up)
    app.command()(demo)
    app.command("run")(run_stage)


def up(ctx: typer.Context) -> None:
    """Start everything on this machine and keep it running; Ctrl-C stops it in order. The data stay."""
    from infra.installation import Installation

    settings: Settings = ctx.obj
    out = console()

    async def main() -> None:
        stop = stop_event()
        installation = Installation(settings, ctx.meta["config"])
        with out.status("starting servers and stages ..."):
            await installation.__aenter__()
        try:
            out.print(f"rewatch is up: drop JPEGs into {settings.ingest.folder.root}/<camera>/,")
            out.print(f"or POST them to {settings.ingest.upload.url}/api/upload?camera=<camera>")
            out.print("ask with `rewatch events ls`, `rewatch status`, `rewatch sql`; stop with Ctrl-C")
            failed = asyncio.create_task(installation.stack.supervisor.wait())
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
        finally:
            out.print("stopping ...")
            await installation.__aexit__(None, None, None)

    _run(settings, main())


def demo(ctx: typer.Context) -> None:
    """Play three rendered cameras through the whole pipeline, show what it found, and stop. The data stay."""
    from infra.demo import DemoError, run_demo
    from infra.local.supervisor import AlreadyRunningError

    async def main() -> None:
        try:
            await run_demo(ctx.obj, ctx.meta["config"], stop_event())
        except (DemoError, AlreadyRunningError) as error:
            fail(str(error))

    _run(ctx.obj, main())


def run_stage(
    ctx: typer.Context,
    stage: Annotated[str, typer.Argument(help=f"One of: {', '.join(topology.PROCESSES)}.")],
    status: Annotated[Path | None, typer.Option(help="Where it writes how it is; default below data_dir.")] = None,
) -> None:
    """Run one stage in this process until SIGTERM; on as many machines as you like."""
    if stage not in topology.PROCESSES:
        fail(f"there is no stage {stage!r}; there are {', '.join(topology.PROCESSES)}", USAGE)
    _run(ctx.obj, work(ctx.obj, stage, status))


def _run(settings: Settings, main: Coroutine[Any, Any, None]) -> None:
    mendable(settings, lambda: asyncio.run(main))


def mendable(settings: Settings, run: Callable[[], T]) -> T:
    """Run it; failures that a person can mend are one line and an exit code."""
    from infra.local.process import StartError
    from infra.local.supervisor import AlreadyRunningError, ProcessFailedError

    try:
        return run()
    except AlreadyRunningError as error:
        console().print(str(error))
        raise typer.Exit(0) from None
    except (SettingsError, ModelError, TopicsError, MigrationError) as error:
        fail(str(error), USAGE)
    except (StartError, ProcessFailedError, UnavailableError) as error:
        fail(str(error), AWAY)
    except (KafkaError, TimeoutError, FencedError, UncertainError) as error:
        fail(f"{broker_away(settings)}: {explain(error)}", AWAY)

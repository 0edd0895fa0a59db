"""Commands that run something: `up`, `demo`, `run STAGE`, `ingest dir`.

What they run is imported by them: other commands must not pay for it.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from infra import topology
from infra.cli.output import AWAY, NO, USAGE, JsonFlag, broker_away, console, explain, fail, print_json
from infra.config import Settings
from infra.worker import stop_event, work
from processors.detect.settings import ModelError
from processors.ingest.settings import SettingsError
from schemas.ids import digest
from schemas.migrations import MigrationError
from streams.admin import TopicsError, ensure_topics
from streams.claims import ClaimStore
from streams.errors import FencedError, UnavailableError, UncertainError
from streams.kafka import Kafka

T = TypeVar("T")

ingest_app = typer.Typer(no_args_is_help=True, help="Take images in.")


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.command()(up)
    app.command()(demo)
    app.command("run")(run_stage)
    ingest_app.command("dir")(ingest_dir)
    app.add_typer(ingest_app, name="ingest")


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


def ingest_dir(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="A directory of JPEGs; sub-directories too.")],
    camera: Annotated[str, typer.Option(help="The camera that took them; made where it is not known.")],
    speed: Annotated[float, typer.Option(min=0, help="1 plays at the pace of the capture times; 0 at once.")] = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """Take every JPEG of a directory in order, then end the camera's stream. What was taken before is skipped."""
    from processors.ingest.appender import Appenders
    from processors.ingest.core import RejectedError
    from processors.ingest.kafka_log import KafkaLog
    from processors.ingest.playback import PlaybackError, Progress, play

    settings: Settings = ctx.obj

    async def main() -> Progress:
        kafka = Kafka(settings.kafka)
        epoch = (await ensure_topics(kafka))["frames"].epoch
        known = topology.cameras(settings, kafka)
        async with known.table.following():
            log = KafkaLog(kafka, epoch)
            appenders = Appenders(log, known, ClaimStore(settings.images_root), settings.ingest, clock=time.time)
            cursor = settings.data_dir / "playback" / f"{camera}-{digest(str(path.resolve()))[:8]}"
            bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with ProgressBar(*bars, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("frames")

                def show(now: Progress) -> None:
                    waits = f"waiting on {now.waiting_on}" if now.waiting_on else "frames"
                    bar.update(task, total=now.total, completed=now.done, description=waits)

                try:
                    return await play(appenders, path, camera, cursor=cursor, speed=speed, on_progress=show)
                finally:
                    await appenders.close()

    def taken() -> Progress:
        try:
            return asyncio.run(main())
        except (PlaybackError, RejectedError) as error:
            fail(str(error), USAGE)

    done = _mendable(settings, taken)
    if as_json:
        print_json(done._asdict())
    else:
        typer.echo(
            f"{done.accepted} taken, {done.known} known, {done.rejected} rejected, {done.changed} changed meanwhile"
        )
    if done.rejected or done.changed:
        raise typer.Exit(NO)


def _run(settings: Settings, main: Coroutine[Any, Any, None]) -> None:
    _mendable(settings, lambda: asyncio.run(main))


def _mendable(settings: Settings, run: Callable[[], T]) -> T:
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

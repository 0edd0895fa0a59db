"""`rewatch ingest ...`: take images in from a directory, a camera's snapshots or a recording.

What a command runs is imported by it: other commands must not pay for it.
"""

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from infra import topology
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json
from infra.cli.run import mendable
from infra.config import Settings
from schemas.ids import digest
from streams.admin import ensure_topics
from streams.claims import ClaimStore
from streams.kafka import Kafka

ingest_app = typer.Typer(no_args_is_help=True, help="Take images in.")


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    ingest_app.command("dir")(ingest_dir)
    app.add_typer(ingest_app, name="ingest")


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

    done = mendable(settings, taken)
    if as_json:
        print_json(done._asdict())
    else:
        typer.echo(
            f"{done.accepted} taken, {done.known} known, {done.rejected} rejected, {done.changed} changed meanwhile"
        )
    if done.rejected or done.changed:
        raise typer.Exit(NO)

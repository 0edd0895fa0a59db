"""Commands that run something: `up`, `demo`, `run STAGE`."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from infra.cli import complete
from infra.cli.errors import mendable
from infra.cli.help import RUN, examples
from infra.cli.lifecycle import Stop, Tally, bring_up, duration, in_short, left, look, narrate
from infra.cli.output import INTERRUPTED, USAGE, console, fail

if TYPE_CHECKING:
    from rich.console import Console

    from infra.config import Settings


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.command(
        rich_help_panel=RUN,
        epilog=examples(
            "rewatch up",
            "rewatch --config site.yaml up",
            "REWATCH_LOCAL__KAFKA_PORT=9192 rewatch up  # 9092 is taken",
        ),
    )(up)
    app.command(
        rich_help_panel=RUN,
        epilog=examples(
            "rewatch demo",
            "REWATCH_DATA_DIR=/tmp/demo rewatch demo  # leaves .rewatch alone",
            "rewatch demo --days 32                   # a month: some 500 events, a history to re-watch",
            "rewatch demo --footage day/ --mp4        # only writes the footage, to play with",
        ),
    )(demo)
    app.command(
        "run",
        rich_help_panel=RUN,
        epilog=examples(
            "rewatch run detect  # as many as you like, on any machine",
            "REWATCH_KAFKA__BOOTSTRAP_SERVERS=log1:9092 rewatch run analyze",
            "rewatch --verbose run ingest",
        ),
    )(run_stage)


def up(ctx: typer.Context) -> None:
    """Run everything on this machine, until Ctrl-C.

    The servers that are not set to be elsewhere, and every stage. A process that dies is started again. Ctrl-C stops
    in order and says what was done; a second one stops at once. The data stay.
    """
    from infra.installation import Installation
    from infra.notify import Notifier, keep_telling

    settings: Settings = ctx.obj
    out = console()

    async def main() -> None:
        notifier = Notifier.of_environment()
        stop = Stop(out)
        began = time.monotonic()
        installation = Installation(settings, ctx.meta["config"])
        if not await bring_up(installation, out, stop):
            out.print(f"stopped before it was up; data stay in {settings.data_dir.absolute()}", soft_wrap=True)
            return
        tally = Tally(settings)
        _say_what_next(out, settings, time.monotonic() - began)
        supervisor = installation.stack.supervisor
        notifier.ready(in_short(supervisor.state()))
        living = asyncio.create_task(keep_telling(notifier, lambda: in_short(supervisor.state())))
        failed = asyncio.create_task(supervisor.wait())
        stopped = asyncio.create_task(stop.asked.wait())
        telling = asyncio.create_task(narrate(installation, out))
        summary: list[str] = []
        try:
            await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
            notifier.stopping()
            with out.status("counting ..."):
                summary = await tally.summary()
            if failed.done():
                failed.result()
        finally:
            for task in (failed, stopped, telling, living):
                task.cancel()
            with out.status("stopping ..."):
                await installation.__aexit__(None, None, None)
            for line in summary:
                out.print(line, soft_wrap=True)

    mendable(settings, lambda: asyncio.run(main()))


def demo(
    ctx: typer.Context,
    footage: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Only write the footage there: a folder of JPEGs a camera."),
    ] = None,
    mp4: Annotated[bool, typer.Option("--mp4", help="With --footage: an MP4 a camera instead.")] = False,
    days: Annotated[
        int, typer.Option(min=1, max=366, help="Days to play: 32 make some 500 events, a history to re-watch.")
    ] = 1,
) -> None:
    """Play three rendered cameras through everything, show what it found, and stop.

    On the real broker, ClickHouse engine, detector and LLM server, in about a minute (more days: some 10 s each). The
    data stay.
    """
    from infra.demo import DemoError, run_demo, write_demo_footage

    if mp4 and footage is None:
        fail("--mp4 is how --footage DIR writes: name the DIR", USAGE)
    if footage is not None:
        write_demo_footage(footage, console(), mp4=mp4)
        return

    async def main() -> bool:
        out = console()
        try:
            return await run_demo(ctx.obj, ctx.meta["config"], out, Stop(out), days=days)
        except DemoError as error:
            fail(str(error))

    if not mendable(ctx.obj, lambda: asyncio.run(main())):
        raise typer.Exit(INTERRUPTED)


def run_stage(
    ctx: typer.Context,
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE", help=f"One of: {', '.join(complete.STAGES)}.", autocompletion=complete.stages),
    ],
    status: Annotated[Path | None, typer.Option(help="Where it writes how it is; default below data_dir.")] = None,
) -> None:
    """Run one stage in this process, until Ctrl-C or SIGTERM.

    On as many machines as you like: they share the work. What was in hand at the stop is not lost.
    """
    from infra import topology
    from infra.notify import Notifier, tell_of_stage
    from infra.worker import work

    settings: Settings = ctx.obj
    if stage not in topology.PROCESSES:
        fail(f"there is no stage {stage!r}; there are {', '.join(topology.PROCESSES)}", USAGE)
    out = console()

    async def main() -> None:
        notifier = Notifier.of_environment()
        stop = Stop(out)
        began = time.monotonic()
        report = status or topology.status_path(settings, stage)
        telling = asyncio.create_task(tell_of_stage(notifier, report, topology.report_beside(report)))
        out.print(f"{stage} runs on {settings.kafka.bootstrap_servers}; Ctrl-C stops it in order", soft_wrap=True)
        try:
            await work(settings, stage, report, stop=stop.asked)
        finally:  # also where it was asked to stop before the broker answered, which ends it with SystemExit
            telling.cancel()
            notifier.stopping()
            if stop.asked.is_set():
                out.print(f"{stage} stopped after {duration(time.monotonic() - began)}", soft_wrap=True)
        seen = await look(settings, count=False)
        if seen is not None and stage in seen.positions:
            out.print(left(seen, stage), soft_wrap=True)

    mendable(settings, lambda: asyncio.run(main()))


def _say_what_next(out: "Console", settings: "Settings", seconds: float) -> None:
    """What a person does with it now: where to look, where images go, what to ask, where the logs are."""
    upload, folder = settings.ingest.upload, settings.ingest.folder
    lines: list[tuple[str, str]] = []
    if settings.gateway.enabled:
        lines.append(("look", settings.gateway.url))
    if folder.enabled:
        lines.append(("drop", f"JPEGs into {folder.root}/<camera>/; a new folder is a new camera"))
    if upload.enabled:
        known = "" if upload.auto_create else "  (after `rewatch camera add front-door`)"
        address = f"{upload.url}/api/upload?camera=front-door"
        lines.append(("upload", f"curl --data-binary @snapshot.jpg '{address}'{known}"))
    lines += [
        ("ask", 'rewatch events ls     rewatch status     rewatch sql "SHOW TABLES"     rewatch doctor'),
        ("logs", f"{settings.data_dir}/logs/"),
    ]
    out.print(f"[bold]rewatch is up[/bold] after {seconds:.0f} s. Ctrl-C stops it; the data stay.", soft_wrap=True)
    for name, text in lines:
        out.print(Text.assemble("  ", (f"{name:<8}", "bold"), text), soft_wrap=True)

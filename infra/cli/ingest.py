"""`rewatch ingest ...`: take images in from a directory, a camera's snapshots or a recording."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from infra.cli import complete, times
from infra.cli.errors import mendable
from infra.cli.help import RUN, examples
from infra.cli.output import AWAY, NO, USAGE, JsonFlag, fail, print_json, printable

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar
    from rich.progress import ProgressColumn

    from infra.config import Settings
    from processors.ingest.appender import Appenders
    from processors.ingest.playback import Progress
    from processors.ingest.settings import SnapshotSettings
    from processors.ingest.snapshot import Watch
    from processors.ingest.video import Progress as VideoProgress

T = TypeVar("T")

PASSWORD = "CAMERA_PASSWORD"  # noqa: S105 (the variable's name)
"""The variable that holds a camera's password, unless --password-env names another."""

_CAMERA = Annotated[
    str,
    typer.Option(help="The camera that took them; made where it is not known.", autocompletion=complete.cameras),
]
_SPEED = Annotated[float, typer.Option(min=0, help="1 plays at the pace of the capture times; 0 at once.")]

ingest_app = typer.Typer(no_args_is_help=True, help="Take images in: a directory, a camera's snapshots, a recording.")


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    ingest_app.command(
        "dir",
        epilog=examples(
            "rewatch ingest dir ~/footage/driveway --camera driveway",
            "rewatch ingest dir ~/footage/driveway --camera driveway --speed 1    # as it happened",
        ),
    )(ingest_dir)
    ingest_app.command(
        "snapshot",
        epilog=examples(
            "rewatch ingest snapshot http://frigate:5000/api/driveway/latest.jpg --camera driveway",
            "CAMERA_PASSWORD=... rewatch ingest snapshot http://192.168.1.20/snap.jpg --user admin --camera yard",
            "rewatch ingest snapshot https://cam.lan/still.jpg --insecure --camera gate --every 5s --for 10m",
        ),
    )(ingest_snapshot)
    ingest_app.command(
        "video",
        epilog=examples(
            "rewatch ingest video driveway.mp4 --camera driveway --fps 2",
            "rewatch ingest video clip.mkv --camera gate --start 2026-11-02T18:00:00+01:00",
            "rewatch ingest video clip.mkv --camera gate --speed 1    # as it happened",
        ),
    )(ingest_video)
    app.add_typer(
        ingest_app,
        name="ingest",
        rich_help_panel=RUN,
        epilog=examples(
            "rewatch ingest dir ~/footage/driveway --camera driveway",
            "rewatch ingest video driveway.mp4 --camera driveway --fps 2",
        ),
    )


def ingest_dir(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="A directory of JPEGs; sub-directories too.")],
    camera: _CAMERA,
    speed: _SPEED = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """Take every JPEG of a directory in order, then end the camera's stream.

    What was taken before is skipped.
    """
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    from processors.ingest.core import RejectedError, check_camera_id
    from processors.ingest.playback import PlaybackError, files_in, play

    settings: Settings = ctx.obj

    async def main() -> "Progress":
        check_camera_id(camera)  # what can be told without a broker, before one is asked
        await asyncio.to_thread(files_in, path)
        async with _ways_in(settings) as appenders:
            with _bar(MofNCompleteColumn(), TimeRemainingColumn()) as bar:
                task = bar.add_task("frames")

                def show(now: "Progress") -> None:
                    waits = f"waiting on {now.waiting_on}" if now.waiting_on else "frames"
                    bar.update(task, total=now.total, completed=now.done, description=waits)

                cursor = _cursor(settings, camera, path)
                return await play(appenders, path, camera, cursor=cursor, speed=speed, on_progress=show)

    done = _run(settings, main, PlaybackError, RejectedError)
    if as_json:
        print_json(done._asdict())
    else:
        typer.echo(
            f"{done.accepted} taken, {done.known} known, {done.rejected} rejected, {done.changed} changed meanwhile"
        )
    if done.rejected or done.changed:
        raise typer.Exit(NO)


def ingest_snapshot(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of a camera's JPEG, http or https.")],
    camera: _CAMERA,
    every: Annotated[str, typer.Option(metavar="TIME", help="How often: 500ms, 1s, 5m.")] = "1s",
    for_: Annotated[str, typer.Option("--for", metavar="TIME", help="End after this long; else at Ctrl-C.")] = "",
    count: Annotated[int, typer.Option(min=0, help="End after so many answers, new or not; 0 for no end.")] = 0,
    user: Annotated[str, typer.Option(help="User that the camera asks for (digest or basic).")] = "",
    password_env: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable that holds the user's password.")
    ] = PASSWORD,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Give a picture up after this long.")] = "10s",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Take any TLS certificate, as of cameras that signed their own.")
    ] = False,
    link_local: Annotated[
        bool, typer.Option("--link-local", help="Ask at 169.254.0.0/16 and fe80::/10 too: a camera without DHCP.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Fetch a camera's newest picture again and again, until Ctrl-C.

    One that did not change is no new frame.
    The password is read from the environment: CAMERA_PASSWORD, or what
    --password-env names. To watch cameras with `rewatch up`, set
    ingest.snapshots in rewatch.yaml instead.
    """
    from processors.ingest.core import RejectedError
    from processors.ingest.snapshot import LastingError, Snapshots

    settings: Settings = ctx.obj
    for_s = _seconds(for_, "--for") if for_ else 0.0
    source = _source(
        url=url,
        user=user,
        password_env=password_env,
        every_s=_seconds(every, "--every"),
        timeout_s=_seconds(timeout, "--timeout"),
        insecure=insecure,
        link_local=link_local,
    )

    async def main() -> "Watch":
        from infra.stopping import stop_event

        stop = stop_event()
        async with _ways_in(settings) as appenders:
            with _status() as say:
                snapshots = Snapshots(camera, source, appenders, on_progress=lambda now: say(_watched(camera, now)))
                say(f"{camera}: asking {source.url}")
                return await snapshots.run(stop, count=count, for_s=for_s, hasty=True)

    done = _run(settings, main, LastingError, RejectedError)
    if as_json:
        print_json(done._asdict())
    else:
        typer.echo(f"{done.accepted} taken, {done.unchanged} unchanged, {done.rejected} rejected, {done.failed} failed")
    if not done.answers:
        fail(done.why or f"no picture came from {source.url}", AWAY)
    if done.rejected:
        raise typer.Exit(NO)


def ingest_video(  # noqa: PLR0917
    ctx: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, metavar="FILE", help="MP4, MKV, AVI, TS: whatever FFmpeg reads."),
    ],
    camera: _CAMERA,
    fps: Annotated[float, typer.Option(min=0.001, max=1000, help="Frames a second; never more than there are.")] = 1.0,
    start: Annotated[
        str, typer.Option(metavar="TIME", help="When it began, ISO 8601; without an offset by the camera's time zone.")
    ] = "",
    quality: Annotated[int, typer.Option(min=1, max=95, help="Quality of the JPEGs.")] = 85,
    speed: _SPEED = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """Take a recording's frames in order, then end the camera's stream.

    What was taken before is skipped.
    A frame's time is the recording's start and its position. The start is
    --start, else the container's creation_time, else a time in the file's name
    (ingest.time_patterns), else the file's modification time less its length;
    the last line says which.
    """
    from rich.progress import TextColumn, TimeRemainingColumn

    from processors.ingest.core import RejectedError
    from processors.ingest.video import RecordingError, play

    settings: Settings = ctx.obj

    async def main() -> "VideoProgress":
        async with _ways_in(settings) as appenders:
            with _bar(TextColumn("{task.fields[position]}"), TimeRemainingColumn()) as bar:
                task = bar.add_task("reading", total=None, position="")

                def show(now: "VideoProgress") -> None:
                    length = f" of {_clock(now.duration_ms)}" if now.duration_ms else ""
                    bar.update(
                        task,
                        total=now.duration_ms,
                        completed=now.position_ms,
                        description=f"waiting on {now.waiting_on}" if now.waiting_on else "reading",
                        position=f"{_clock(now.position_ms)}{length}, {now.accepted + now.known} frames",
                    )

                return await play(
                    appenders,
                    path,
                    camera,
                    fps=Fraction(str(fps)),
                    quality=quality,
                    start=start,
                    cursor=_cursor(settings, camera, path),
                    speed=speed,
                    on_progress=show,
                )

    done = _run(settings, main, RecordingError, RejectedError)
    began = datetime.fromtimestamp(done.start.at / 1000, UTC).isoformat(sep=" ", timespec="milliseconds")
    if as_json:
        print_json(done._asdict() | {"start": done.start._asdict()})
    else:
        typer.echo(f"{done.accepted} taken, {done.known} known, {done.rejected} rejected")
        typer.echo(f"it began at {began}, by {done.start.source}")
    if done.fault:
        fail(f"{path.name}: {done.fault}; what can be decoded is taken")
    if done.rejected:
        raise typer.Exit(NO)


# What the three share


@asynccontextmanager
async def _ways_in(settings: "Settings") -> "AsyncIterator[Appenders]":
    """The ways into the log; closed in order, so that counts and transactions in hand are kept."""
    from infra import topology
    from infra.private import make_private
    from processors.ingest.appender import Appenders
    from processors.ingest.kafka_log import KafkaLog
    from streams.admin import ensure_topics
    from streams.claims import ClaimStore
    from streams.kafka import Kafka

    make_private(settings.data_dir)
    kafka = Kafka(settings.kafka)
    epoch = (await ensure_topics(kafka))["frames"].epoch
    known = topology.cameras(settings, kafka)
    async with known.table.following():
        log = KafkaLog(kafka, epoch)
        appenders = Appenders(log, known, ClaimStore(settings.images_root), settings.ingest, clock=time.time)
        try:
            yield appenders
        finally:
            await appenders.close()


def _run(settings: "Settings", main: Callable[[], Coroutine[Any, Any, T]], *usage: type[Exception]) -> T:
    """Run it; the errors in `usage` are a person's to mend."""

    def work() -> T:
        try:
            return asyncio.run(main())
        except usage as error:
            fail(str(error), USAGE)

    return mendable(settings, work)


def _cursor(settings: "Settings", camera: str, path: Path) -> Path:
    from schemas.ids import digest

    return settings.data_dir / "playback" / f"{camera}-{digest(str(path.resolve()))[:8]}"


def _bar(*columns: "ProgressColumn") -> "ProgressBar":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    shown = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*shown, console=Console(stderr=True), transient=True)


def _clock(ms: int) -> str:
    minutes, seconds = divmod(ms // 1000, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# Snapshots


def _source(
    *, url: str, user: str, password_env: str, every_s: float, timeout_s: float, insecure: bool, link_local: bool
) -> "SnapshotSettings":
    """The source as it was asked for, with the password that the environment holds."""
    from pydantic import SecretStr, ValidationError

    from processors.ingest.address import AddressError, parse
    from processors.ingest.settings import CameraUrl, SnapshotSettings

    try:
        given = parse(url, user)
    except AddressError as error:
        fail(str(error), USAGE)
    if given.password:
        typer.echo(
            "warning: every user of this machine can read the password in the address: "
            f"give --user, and the password in {password_env}",
            err=True,
        )
    password = os.environ.get(password_env, "") if given.user and not given.password else ""
    if given.user and not given.password and password_env not in os.environ:
        fail(f"no password: set {password_env} in the environment (or name another variable by --password-env)", USAGE)
    try:
        return SnapshotSettings(
            url=CameraUrl(url),
            user=user,
            password=SecretStr(password),
            every_s=every_s,
            timeout_s=timeout_s,
            insecure=insecure,
            link_local=link_local,
        )
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        option = {"every_s": "--every", "timeout_s": "--timeout"}.get(str(problem["loc"][0]), "URL")
        fail(f"{option}: {problem['msg']} (seconds)", USAGE)


def _seconds(text: str, option: str) -> float:
    try:
        return times.seconds(text)
    except ValueError as error:
        fail(f"{option} {text!r} is {error}", USAGE)


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A line on stderr that changes; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(Text(printable(text)))


def _watched(camera: str, now: "Watch") -> str:
    counts = f"{camera}: {now.accepted} taken, {now.unchanged} unchanged"
    if now.rejected:
        counts += f", {now.rejected} rejected"
    if now.failed:
        counts += f", {now.failed} failed"
    if now.why:
        return f"{counts}; again in {now.pause_s:.1f} s: {now.why}"
    if now.waiting_on:
        return f"{counts}; waiting on {now.waiting_on}"
    return f"{counts}; {now.size / 1000:.0f} kB in {now.took_s * 1000:.0f} ms"

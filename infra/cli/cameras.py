"""`rewatch camera ls|add|set`: what is set for each camera, on the `cameras` topic."""

import difflib
import json
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import typer
from pydantic import ValidationError

from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, print_table, run, when
from infra.config import Settings
from processors.batch.settings import WindowsSettings
from processors.ingest import core
from processors.ingest.kafka_log import KafkaLog
from schemas.records import Camera
from streams.admin import read_meta
from streams.control import ControlTable
from streams.errors import UnavailableError
from streams.kafka import Kafka
from streams.topics import partition_of

app = typer.Typer(no_args_is_help=True, help="What is set for each camera.")

DEMO_DETECTOR = Path(__file__).parent.parent / "models" / "weights" / "detector"

_ID = Annotated[str, typer.Argument(metavar="ID", help="Lower-case letters, digits, - and _.")]
_NAME = Annotated[str | None, typer.Option(help="A name for people.")]
_ZONE = Annotated[str | None, typer.Option(help="IANA time zone, as Europe/Berlin.")]
_OPEN_ON = Annotated[str | None, typer.Option(help="Classes that open a window, comma-separated.")]
_THRESHOLD = Annotated[float | None, typer.Option(help="Least score at which a detection matters.")]
_IDLE = Annotated[float | None, typer.Option(help="A window closes after this long without one that matters, s.")]
_MAX = Annotated[float | None, typer.Option(help="A window closes at this length, s.")]
_FRAMES = Annotated[int | None, typer.Option(help="A window closes at this many frames.")]
_FAST_LABEL = Annotated[str | None, typer.Option(help='Class that closes a window at once; "" turns it off.')]
_FAST_SCORE = Annotated[float | None, typer.Option(help="Score from which such a sighting is sure.")]
_COOLDOWN = Annotated[float | None, typer.Option(help="At most one fast close in this long, s.")]
_IOU = Annotated[float | None, typer.Option(help="Overlap from which a box has not moved, 0 to 1.")]
_PARTITION = Annotated[int | None, typer.Option(help="Pin to a partition; only before the camera's first frame.")]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(app, name="camera")


class Change(NamedTuple):
    """What a person asked to be set; None leaves it as it is."""

    name: str | None
    time_zone: str | None
    window: dict[str, Any]
    """As `WindowsSettings` names them."""
    partition: int | None


class ChangeError(ValueError):
    """This cannot be set; the message names the option and the fix."""


@app.command("ls")
def ls(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List the cameras."""
    settings: Settings = ctx.obj

    async def main() -> list[Camera]:
        table = await _table(settings)
        return sorted(table.all().values(), key=lambda camera: camera.camera_id)

    cameras = run(settings, main)
    if as_json:
        print_json([_plain(camera, settings) for camera in cameras])
    elif not cameras:
        typer.echo("no cameras yet: drop an image into the inbox, or `rewatch camera add ID`")
    else:
        print_table(
            ("camera", "name", "time zone", "partition", "opens on", "score", "idle s", "max s", "frames", "set at"),
            [
                (
                    c.camera_id,
                    c.name,
                    c.time_zone,
                    f"{_partition(c, settings)}{' (pinned)' if c.partition is not None else ''}",
                    ", ".join(c.window.open_on),
                    c.window.threshold,
                    c.window.idle_ms / 1000,
                    c.window.max_ms / 1000,
                    c.window.max_frames,
                    when(c.updated_at, settings.time_zone),
                )
                for c in cameras
            ],
        )


@app.command("add")
def add(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    camera_id: _ID,
    name: _NAME = None,
    time_zone: _ZONE = None,
    open_on: _OPEN_ON = None,
    threshold: _THRESHOLD = None,
    idle: _IDLE = None,
    max_: Annotated[float | None, typer.Option("--max", help="A window closes at this length, s.")] = None,
    max_frames: _FRAMES = None,
    fast_label: _FAST_LABEL = None,
    fast_score: _FAST_SCORE = None,
    fast_cooldown: _COOLDOWN = None,
    stationary_iou: _IOU = None,
    partition: _PARTITION = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a camera known, with the defaults of rewatch.yaml where nothing else is said."""
    window = _window(open_on, threshold, idle, max_, max_frames, fast_label, fast_score, fast_cooldown, stationary_iou)
    _append(ctx.obj, camera_id, Change(name, time_zone, window, partition), new=True, as_json=as_json)


@app.command("set")
def set_(  # noqa: PLR0917
    ctx: typer.Context,
    camera_id: _ID,
    name: _NAME = None,
    time_zone: _ZONE = None,
    open_on: _OPEN_ON = None,
    threshold: _THRESHOLD = None,
    idle: _IDLE = None,
    max_: Annotated[float | None, typer.Option("--max", help="A window closes at this length, s.")] = None,
    max_frames: _FRAMES = None,
    fast_label: _FAST_LABEL = None,
    fast_score: _FAST_SCORE = None,
    fast_cooldown: _COOLDOWN = None,
    stationary_iou: _IOU = None,
    partition: _PARTITION = None,
    as_json: JsonFlag = False,
) -> None:
    """Change what is set for a camera; the rest stays. An open window keeps the settings it opened with."""
    window = _window(open_on, threshold, idle, max_, max_frames, fast_label, fast_score, fast_cooldown, stationary_iou)
    change = Change(name, time_zone, window, partition)
    if change == Change(None, None, {}, None):
        fail("nothing to set: name at least one option (`rewatch camera set --help`)", USAGE)
    _append(ctx.obj, camera_id, change, new=False, as_json=as_json)


def changed(camera: Camera, change: Change, settings: Settings, now_ms: int) -> Camera:
    """The camera with the change.

    Raises:
        ChangeError: a value cannot be used.
    """
    if change.time_zone is not None:
        try:
            ZoneInfo(change.time_zone)
        except (ValueError, OSError, KeyError):  # ZoneInfo raises all three, by the kind of nonsense
            raise ChangeError(f"--time-zone {change.time_zone!r}: no such IANA zone, as Europe/Berlin or UTC") from None
    if change.partition is not None and not 0 <= change.partition < settings.kafka.partitions:
        raise ChangeError(f"--partition {change.partition}: there are 0 to {settings.kafka.partitions - 1}")
    if "open_on" in change.window:
        _check_classes(change.window["open_on"], settings)
    try:
        window = WindowsSettings.model_validate(WindowsSettings.of(camera.window).model_dump() | change.window)
    except ValidationError as error:
        raise ChangeError(
            "; ".join(
                ": ".join(
                    filter(None, (".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")))
                )
                for problem in error.errors()
            )
        ) from None
    return Camera(
        camera_id=camera.camera_id,
        name=camera.name if change.name is None else change.name,
        time_zone=camera.time_zone if change.time_zone is None else change.time_zone,
        zones=camera.zones,
        window=window.record(),
        partition=camera.partition if change.partition is None else change.partition,
        updated_at=now_ms,
    )


def model_classes(settings: Settings) -> tuple[str, ...] | None:
    """The classes that the detector can name; None where they cannot be read here (a service, a hub name)."""
    if settings.detector.url is not None:
        return None
    path = DEMO_DETECTOR if settings.detector.model_path == "demo" else Path(settings.detector.model_path)
    try:
        labels = json.loads((path / "config.json").read_text())["id2label"]
    except (OSError, ValueError, KeyError):
        return None
    return tuple(labels.values())


def _append(settings: Settings, camera_id: str, change: Change, *, new: bool, as_json: bool) -> None:
    try:
        core.check_camera_id(camera_id)
    except core.RejectedError as error:
        fail(str(error), USAGE)

    async def main() -> Camera:
        table = await _table(settings)
        camera = table.get(camera_id)
        if new and camera is not None:
            fail(f"camera {camera_id} is known already: change it by `rewatch camera set {camera_id}`", NO)
        if not new and camera is None:
            known = difflib.get_close_matches(camera_id, table.all(), n=1)
            hint = f"did you mean {known[0]}?" if known else f"make it by `rewatch camera add {camera_id}`"
            fail(f"camera {camera_id} is not known; {hint}", NO)
        before = camera or Camera(
            camera_id=camera_id,
            name=camera_id,
            time_zone=settings.time_zone,
            zones=(),
            window=settings.windows.record(),
            partition=None,
            updated_at=0,
        )
        try:
            after = changed(before, change, settings, int(time.time() * 1000))
        except ChangeError as error:
            fail(str(error), USAGE)
        if _partition(after, settings) != _partition(before, settings) and await _has_frames(settings, before):
            fail(
                f"camera {camera_id} has frames on partition {_partition(before, settings)}: a pin moves it away from "
                "its own past, so it is set only before the first frame; add the camera under another id",
                NO,
            )
        await table.append(after)
        return after

    camera = run(settings, main)
    if as_json:
        print_json(_plain(camera, settings))
    else:
        typer.echo(f"camera {camera.camera_id} {'added' if new else 'set'}; in force from the next frame on")


async def _table(settings: Settings) -> ControlTable[Camera]:
    table = ControlTable(Kafka(settings.kafka), "cameras", Camera)
    await table.load()
    return table


async def _has_frames(settings: Settings, camera: Camera) -> bool:
    """Whether ingest remembers frames of it. The look fences whoever appends for it, who then looks again."""
    kafka = Kafka(settings.kafka)
    metas = await read_meta(kafka)
    way_in = KafkaLog(kafka, metas["frames"].epoch).camera(camera)
    try:
        return await way_in.open() is not None
    except UnavailableError as error:
        raise TimeoutError(str(error)) from error
    finally:
        await way_in.close()


def _window(  # noqa: PLR0917 (the options, as they come)
    open_on: str | None,
    threshold: float | None,
    idle: float | None,
    max_: float | None,
    max_frames: int | None,
    fast_label: str | None,
    fast_score: float | None,
    fast_cooldown: float | None,
    stationary_iou: float | None,
) -> dict[str, Any]:
    asked = {
        "open_on": None if open_on is None else tuple(label.strip() for label in open_on.split(",") if label.strip()),
        "threshold": threshold,
        "idle_s": idle,
        "max_s": max_,
        "max_frames": max_frames,
        "fast_label": fast_label,
        "fast_score": fast_score,
        "fast_cooldown_s": fast_cooldown,
        "stationary_iou": stationary_iou,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _check_classes(labels: tuple[str, ...], settings: Settings) -> None:
    known = model_classes(settings)
    for label in labels if known is not None else ():
        if label not in (known or ()):
            close = difflib.get_close_matches(label, known or (), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"it names {', '.join(known or ())}"
            raise ChangeError(
                f"--open-on {label}: the detector ({settings.detector.model_path}) names no such class; {hint}"
            )


def _partition(camera: Camera, settings: Settings) -> int:
    return partition_of(camera.camera_id, settings.kafka.partitions, camera.partition)


def _plain(camera: Camera, settings: Settings) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(camera)
    return plain | {"partition": _partition(camera, settings), "pinned": camera.partition is not None}

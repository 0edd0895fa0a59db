"""`rewatch camera ls|add|set`: what is set for each camera, on the `cameras` topic."""

import difflib
import functools
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from zoneinfo import ZoneInfo

import typer

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.help import CAMERAS, examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, print_table, when

if TYPE_CHECKING:
    from infra.config import Settings
    from schemas.records import Camera
    from streams.control import ControlTable

app = typer.Typer(no_args_is_help=True)

_WINDOW = "Windows"


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="camera",
        rich_help_panel=CAMERAS,
        help="List cameras, make one known, change what is set for one.",
        epilog=examples(
            "rewatch camera ls",
            "rewatch camera add front-door --time-zone Europe/Berlin",
            "rewatch camera set front-door --idle 20",
        ),
    )


class Options(NamedTuple):
    """What `add` and `set` can set, as options; those of windows are named as `WindowsSettings` names them."""

    name: Annotated[str | None, typer.Option(help="A name for people.")] = None
    time_zone: Annotated[str | None, typer.Option(help="IANA time zone, as Europe/Berlin.")] = None
    partition: Annotated[int | None, typer.Option(help="Pin to a partition; only before the camera's first frame.")] = (
        None
    )
    open_on: Annotated[
        str | None,
        typer.Option(help="Classes that open a window, comma-separated.", rich_help_panel=_WINDOW),
    ] = None
    threshold: Annotated[
        float | None, typer.Option(help="Least score at which a detection matters.", rich_help_panel=_WINDOW)
    ] = None
    idle_s: Annotated[
        float | None,
        typer.Option(
            "--idle", help="A window closes after this long without one that matters, s.", rich_help_panel=_WINDOW
        ),
    ] = None
    max_s: Annotated[
        float | None, typer.Option("--max", help="A window closes at this length, s.", rich_help_panel=_WINDOW)
    ] = None
    max_frames: Annotated[
        int | None, typer.Option(help="A window closes at this many frames.", rich_help_panel=_WINDOW)
    ] = None
    fast_label: Annotated[
        str | None,
        typer.Option(help='Class that closes a window at once; "" turns it off.', rich_help_panel=_WINDOW),
    ] = None
    fast_score: Annotated[
        float | None, typer.Option(help="Score from which such a sighting is sure.", rich_help_panel=_WINDOW)
    ] = None
    fast_cooldown_s: Annotated[
        float | None,
        typer.Option("--fast-cooldown", help="At most one fast close in this long, s.", rich_help_panel=_WINDOW),
    ] = None
    stationary_iou: Annotated[
        float | None,
        typer.Option(help="Overlap from which a box has not moved, 0 to 1.", rich_help_panel=_WINDOW),
    ] = None

    def change(self) -> "Change":
        """What was asked for, without what was not said."""
        window = {name: value for name, value in self._asdict().items() if value is not None}
        for name in ("name", "time_zone", "partition"):
            window.pop(name, None)
        if "open_on" in window:
            window["open_on"] = tuple(label.strip() for label in window["open_on"].split(",") if label.strip())
        return Change(self.name, self.time_zone, window, self.partition)


def _spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each field of `Options` as a parameter in place of its parameter `options`: typer's way."""
    mine = inspect.signature(command)

    @functools.wraps(command)
    def spread(**given: Any) -> None:
        options = Options(**{name: given.pop(name) for name in Options._fields})
        command(options=options, **given)

    fields = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=Options._field_defaults[name],
            annotation=Options.__annotations__[name],
        )
        for name in Options._fields
    ]
    others = [parameter for name, parameter in mine.parameters.items() if name != "options"]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others]
    parameters = [*keywords[:-1], *fields, keywords[-1]]  # --json stays last
    spread.__signature__ = mine.replace(parameters=parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


class Change(NamedTuple):
    """What a person asked to be set; None leaves it as it is."""

    name: str | None
    time_zone: str | None
    window: dict[str, Any]
    """As `WindowsSettings` names them."""
    partition: int | None


class ChangeError(ValueError):
    """This cannot be set; the message names the option and the fix."""


@app.command("ls", epilog=examples("rewatch camera ls", "rewatch camera ls --json"))
def ls(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List the cameras and what is set for each."""
    settings: Settings = ctx.obj

    async def main() -> "list[Camera]":
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


@app.command(
    "add",
    epilog=examples(
        "rewatch camera add front-door",
        'rewatch camera add yard --name "Back yard" --time-zone Europe/Berlin',
        "rewatch camera add gate --open-on person,car --threshold 0.6 --idle 20",
    ),
)
@_spread
def add(
    ctx: typer.Context,
    camera_id: Annotated[str, typer.Argument(metavar="ID", help="Lower-case letters, digits, - and _.")],
    options: Options,
    as_json: JsonFlag = False,
) -> None:
    """Make a camera known.

    What is not said is as rewatch.yaml has it. A camera whose images come by the inbox makes itself known.
    """
    _append(ctx.obj, camera_id, options.change(), new=True, as_json=as_json)


@app.command(
    "set",
    epilog=examples(
        'rewatch camera set front-door --name "Front door"',
        "rewatch camera set driveway --open-on person,car,truck",
        'rewatch camera set yard --idle 20 --max 60 --fast-label ""',
    ),
)
@_spread
def set_(
    ctx: typer.Context,
    camera_id: Annotated[
        str, typer.Argument(metavar="ID", help="A camera of `rewatch camera ls`.", autocompletion=complete.cameras)
    ],
    options: Options,
    as_json: JsonFlag = False,
) -> None:
    """Change what is set for a camera.

    What is not said stays as it is. An open window keeps the settings it opened with.
    """
    change = options.change()
    if change == Change(None, None, {}, None):
        fail("nothing to set: name at least one option (`rewatch camera set --help`)", USAGE)
    _append(ctx.obj, camera_id, change, new=False, as_json=as_json)


def changed(camera: "Camera", change: Change, settings: "Settings", now_ms: int) -> "Camera":
    """The camera with the change.

    Raises:
        ChangeError: a value cannot be used.
    """
    from pydantic import ValidationError

    from processors.batch.settings import WindowsSettings
    from schemas.records import Camera

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


def model_classes(settings: "Settings") -> tuple[str, ...] | None:
    """The classes that the detector can name; None where they cannot be read here (a service, a hub name)."""
    if settings.detector.url is not None:
        return None
    from infra.models import library
    from processors.detect.settings import ModelError

    try:
        path = Path(library.resolve(settings.detector.model_path, "detector", settings.data_dir))
        labels = json.loads((path / "config.json").read_text())["id2label"]
    except (ModelError, OSError, ValueError, KeyError):
        return None
    return tuple(labels.values())


def _append(settings: "Settings", camera_id: str, change: Change, *, new: bool, as_json: bool) -> None:
    from processors.ingest import core
    from schemas.records import Camera

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


async def _table(settings: "Settings") -> "ControlTable[Camera]":
    from schemas.records import Camera
    from streams.control import ControlTable
    from streams.kafka import Kafka

    table = ControlTable(Kafka(settings.kafka), "cameras", Camera)
    await table.load()
    return table


async def _has_frames(settings: "Settings", camera: "Camera") -> bool:
    """Whether ingest remembers frames of it. The look fences whoever appends for it, who then looks again."""
    from processors.ingest.kafka_log import KafkaLog
    from streams.admin import read_meta
    from streams.errors import UnavailableError
    from streams.kafka import Kafka

    kafka = Kafka(settings.kafka)
    metas = await read_meta(kafka)
    way_in = KafkaLog(kafka, metas["frames"].epoch).camera(camera)
    try:
        return await way_in.open() is not None
    except UnavailableError as error:
        raise TimeoutError(str(error)) from error
    finally:
        await way_in.close()


def _check_classes(labels: tuple[str, ...], settings: "Settings") -> None:
    known = model_classes(settings)
    for label in labels if known is not None else ():
        if label not in (known or ()):
            close = difflib.get_close_matches(label, known or (), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"it names {', '.join(known or ())}"
            raise ChangeError(
                f"--open-on {label}: the detector ({settings.detector.model_path}) names no such class; {hint}"
            )


def _partition(camera: "Camera", settings: "Settings") -> int:
    from streams.topics import partition_of

    return partition_of(camera.camera_id, settings.kafka.partitions, camera.partition)


def _plain(camera: "Camera", settings: "Settings") -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(camera)
    return plain | {"partition": _partition(camera, settings), "pinned": camera.partition is not None}

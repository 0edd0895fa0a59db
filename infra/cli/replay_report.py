"""`rewatch replay report`: a comparison as one HTML file, to look at and to hand on."""

import os
import re
import tempfile
import time
import webbrowser
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.help import examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, printable

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.replay.report import Report

# A comparison reads some hundred thousand verdicts at once: seconds, on a busy machine a minute.
_ASK_S = 600.0

# What a file may be called everywhere; names of replays may hold more.
_UNUSUAL = re.compile(r"[^\w.-]+")
_LONGEST = 100


def register(app: typer.Typer) -> None:
    """Add this command to the group `rewatch replay`."""
    app.command(
        epilog=examples(
            "rewatch replay report stricter           # against what was said live",
            "rewatch replay report stricter --open    # in the browser",
            "rewatch replay report b --against a --out a-and-b.html",
        )
    )(report)


def report(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="REPLAY", help="A name, an id or its beginning.", autocompletion=complete.replays),
    ],
    against: Annotated[
        str, typer.Option(help="What it is compared with: live, or another replay.", autocompletion=complete.replays)
    ] = "live",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; without it <data_dir>/replays/REPLAY.html.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write what a replay changed as one HTML file, for whoever decides.

    What changed and whether it is more than noise, charts, the windows that changed their level with pictures and both
    verdicts, the prompt's difference, and all that it was made from. The file stands alone and loads nothing. It holds
    pictures of your cameras.
    """
    settings: Settings = ctx.obj
    found = run(settings, lambda: gathered(settings, against, name), doing="comparing, and fetching pictures ...")
    path, size = written(settings, found, out)
    if as_json:
        print_json({"path": str(path), "bytes": size})
    else:
        typer.echo(printable(str(path)))
        typer.echo(path.as_uri())
    if show and not webbrowser.open(path.as_uri()):
        fail(f"no browser could be opened here: open {path} yourself", NO)


def written(settings: "Settings", found: "Report", out: Path | None = None) -> tuple[Path, int]:
    """Write the file; where it lies, and its bytes."""
    from processors.replay.report import render

    page = render(found).encode()
    path = (out or _place(settings, found)).absolute()
    try:
        if out is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, page)
    except OSError as error:
        fail(f"{path}: {error.strerror}; name another file by --out", USAGE)
    return path, len(page)


async def gathered(settings: "Settings", against: str, name: str) -> "Report":
    """The comparison of the replay with the other side, and all that is shown of it."""
    from infra.replaying import store
    from processors.replay.compare import compare
    from processors.replay.gathering import gather
    from processors.replay.sides import SideError
    from processors.store.queries import Queries
    from streams.claims import ClaimStore

    patient = settings.clickhouse.model_copy(update={"read_timeout_s": max(_ASK_S, settings.clickhouse.read_timeout_s)})
    async with store(settings), aclosing(Queries(patient)) as queries:
        try:
            found = await compare(queries, against, name)
        except SideError as error:
            fail(str(error), NO)
        return await gather(
            queries,
            ClaimStore(settings.images_root),
            found,
            made_at=int(time.time() * 1000),
            time_zone=settings.time_zone,
            version=version("rewatch"),
        )


def _place(settings: "Settings", found: "Report") -> Path:
    """Where it goes unasked: by the replay's name, and by what it is compared with where that is not live."""
    sides = found.comparison
    names = [sides.b.name] if sides.a.id == "live" else [sides.b.name, "against", sides.a.name]
    file = _UNUSUAL.sub("-", "-".join(names)).strip(".-")[:_LONGEST] or sides.b.id
    return settings.data_dir / "replays" / f"{file}.html"


def _write(path: Path, page: bytes) -> None:
    """The whole file or none: whoever has the old one open keeps it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as part:
        try:
            part.write(page)
            # As any file that a person writes: temporary ones are for their owner alone.
            mask = os.umask(0)
            os.umask(mask)
            Path(part.name).chmod(0o666 & ~mask)
            Path(part.name).replace(path)
        except OSError:
            Path(part.name).unlink(missing_ok=True)
            raise

"""`rewatch models ls|pull|verify|use`: real models in place of the demo's toys."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import AWAY, NO, USAGE, JsonFlag, fail, print_json, print_table
from infra.models.catalogue import Model, UnknownModelError, lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from infra.config import Settings
    from infra.models.library import Progress

app = typer.Typer(no_args_is_help=True, help="Real models in place of the demo's toys.")

_NAME = Annotated[str, typer.Argument(metavar="MODEL", help="A name of `rewatch models ls`.")]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="models",
        rich_help_panel=MAINTENANCE,
        epilog=examples("rewatch models ls", "rewatch models pull nemotron-mini-4b"),
    )


@app.command("ls", epilog=examples("rewatch models ls", "rewatch models ls --json"))
def ls(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List the models that are known, where they lie on this machine, and which are in use."""
    from infra.models import shelf

    rows = shelf.listed(ctx.obj)
    if as_json:
        print_json(rows)
        return
    print_table(
        ("model", "for", "GB", "on this machine", "in use", "licence", "what it is"),
        [
            (
                r["name"],
                r["kind"],
                r["gigabytes"],
                r["path"] or "no",
                "yes" if r["in_use"] else "",
                r["licence"],
                r["about"],
            )
            for r in rows
        ],
    )


@app.command(
    "pull",
    epilog=examples(
        "rewatch models pull rtdetr_v2_r50vd",
        "rewatch models pull nemotron-mini-4b --quant Q5_K_M",
        "rewatch models pull nemotron-3-nano-30b --to /mnt/stick     # to carry it to a machine without a line",
    ),
)
def pull(
    ctx: typer.Context,
    name: _NAME,
    to: Annotated[
        Path | None, typer.Option(help="The folder that gets <model>/; by default <data_dir>/models.")
    ] = None,
    quant: Annotated[str, typer.Option(help="Of an LLM another quantisation, as Q5_K_M.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Bring a model from its hub.

    It is resumed where it broke off, and checked against what the hub published.
    For a machine without a line, pull on another one and carry the folder: `models verify` checks it there, and
    `models use MODEL --path FOLDER` takes it from where it lies. HF_ENDPOINT names a mirror, HF_TOKEN an account.
    """
    from infra.models import hub, library
    from infra.models.download import DownloadError, WrongFileError
    from infra.private import make_private

    settings: Settings = ctx.obj
    model = _lookup(name)
    if to is None:
        make_private(settings.data_dir)
    folder = to if to is not None else library.folders(settings.data_dir)[0]
    try:
        with _bars(quiet=as_json) as told:
            found = hub.pull(model, folder, quant=quant, on_progress=told)
    except WrongFileError as error:
        fail(str(error), NO)
    except DownloadError as error:
        fail(str(error), AWAY)
    if as_json:
        print_json({"name": model.name, "path": str(found.path)})
    else:
        where = "" if to is None else f" --path {folder / model.name}"
        typer.echo(f"{model.name} is here and is what was published: {found.path}")
        typer.echo(f"licence: {model.licence}; use it by: rewatch models use {model.name}{where}")


@app.command("verify", epilog=examples("rewatch models verify", "rewatch models verify /mnt/stick/nemotron-mini-4b"))
def verify(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[MODEL|FOLDER]", help="One model, or a folder that was carried here.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Read models' files and compare them with what was published.

    Exit code 1 when a byte differs.
    """
    from infra.models import library, shelf
    from processors.detect.settings import ModelError

    settings: Settings = ctx.obj
    found: dict[str, list[str]] = {}
    with _bars(quiet=as_json) as told:
        if name in {None, "demo"}:
            found["demo"] = library.verify_demo(on_progress=told)
        if name is not None and Path(name).is_dir():
            there = {name: Path(name)}
        else:
            try:
                there = {} if name == "demo" else shelf.folders(settings, None if name is None else _lookup(name))
            except ModelError as error:
                fail(str(error), NO)
        for label, folder in there.items():
            found[label] = shelf.verify(folder, told)
    if as_json:
        print_json([{"name": label, "ok": not wrong, "problems": wrong} for label, wrong in found.items()])
    else:
        for label, wrong in found.items():
            typer.echo(f"{label}: " + ("as published" if not wrong else "; ".join(wrong)))
    if any(found.values()):
        raise typer.Exit(NO)


@app.command(
    "use",
    epilog=examples(
        "rewatch models use rtdetr_v2_r50vd",
        "rewatch models use nemotron-mini-4b --path /mnt/stick/nemotron-mini-4b",
        "rewatch models use nemotron-3-nano-30b --anyway     # though it may not fit",
        "rewatch models use demo",
    ),
)
def use(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A name of `rewatch models ls`, or `demo`.")],
    path: Annotated[Path | None, typer.Option(help="Where it lies, if it was not pulled here.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also where an LLM does not fit.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Name a model in the settings file, in force at the next start.

    Comments and everything else in it stay. An LLM that does not fit on the card, or in memory, is refused with the
    arithmetic and the settings that change it.
    """
    from infra.models import shelf
    from processors.detect.settings import ModelError

    settings: Settings = ctx.obj
    try:
        changes = shelf.DEMO if name == "demo" else shelf.choice(_lookup(name), settings, path)
    except ModelError as error:
        fail(str(error), NO)
    if name != "demo" and "llm" in changes and settings.local_llm and not anyway:
        _refuse_what_does_not_fit(settings, changes["llm"])
    file: Path = ctx.meta["config"] or Path("rewatch.yaml")
    shelf.write(file, changes)
    if as_json:
        print_json({"file": str(file), "settings": changes})
        return
    for section, values in changes.items():
        for key, value in values.items():
            typer.echo(f"{file}: {section}.{key} is {value}")
    typer.echo("in force at the next start of `rewatch up`; verdicts name the model that made them")


def _refuse_what_does_not_fit(settings: "Settings", changes: "dict[str, Any]") -> None:
    """Say why the LLM would not fit, as the settings would be with these changes, and end; else nothing."""
    import asyncio

    from infra.models import fits, room
    from infra.models.header import HeaderError

    then = settings.model_copy(update={"llm": settings.llm.model_copy(update=changes)})
    try:
        fit = asyncio.run(room.fit(then, Path(changes["model_path"])))
    except (HeaderError, OSError) as error:
        typer.echo(f"whether it fits cannot be told: {error}; `rewatch models verify` looks closer", err=True)
        return
    if not fit.ok:
        fail(f"{fits.refusal(fit, room.asked(then))}; `--anyway` names it all the same", NO)


def _lookup(name: str) -> Model:
    try:
        return lookup(name)
    except UnknownModelError as error:
        fail(f"{error}; `rewatch models ls` lists them", USAGE)


@contextlib.contextmanager
def _bars(*, quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """A bar a file on stderr; nothing for programs."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    label = TextColumn("{task.description}")
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def told(now: "Progress") -> None:
            if now.file not in tasks:
                tasks[now.file] = bars.add_task(now.file, total=now.total)
            bars.update(tasks[now.file], completed=now.done)

        yield told

"""`rewatch export`: an event as one archive, to hand on and to check anywhere; and `rewatch export verify`."""

import json
import os
import re
import tempfile
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.help import LOOK, examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, printable

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.export.evidence import Evidence

# Ids hold a colon, which Windows refuses in names.
_UNUSUAL = re.compile(r"[^\w.-]+", re.ASCII)
_LONGEST = 100


class _EventFirst(TyperGroup):
    """`rewatch export EVENT` is `rewatch export event EVENT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["event", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_EventFirst, no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="export",
        rich_help_panel=LOOK,
        help="Write an event as one archive that anybody can check, or check one.",
        epilog=examples(
            "rewatch export front-door:7c1b                # `event` need not be said",
            "rewatch export 7c1b -o evidence.zip --sign-key key.pem",
            "rewatch export verify evidence.zip",
        ),
    )


@app.command(
    "event",
    epilog=examples("rewatch export front-door:7c1b", "rewatch export 7c1b -o evidence.zip --sign-key key.pem"),
)
def event(
    ctx: typer.Context,
    event_id: Annotated[
        str,
        typer.Argument(
            metavar="EVENT",
            help="An event's id, or a beginning of it that only one has; with or without its camera.",
            autocompletion=complete.events,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write it; without it ./EVENT.zip.")
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Sign it, which shows who exported it: an Ed25519 private key, PEM (openssl genpkey)."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write an event with its frames, records, prompt and verdict as one archive.

    The hashes in it make a chain from the images to the verdict; `verify.py` in it checks them without rewatch. The
    same event makes the same bytes. It holds pictures of your cameras. What is not kept any more is named, and the
    exit code is 1.
    """
    from infra.export.archive import files_of, packed
    from infra.export.signing import KeyFileError, load, sign
    from infra.export.verify import MANIFEST

    settings: Settings = ctx.obj
    try:
        key = load(sign_key) if sign_key is not None else None
    except KeyFileError as error:
        fail(str(error), USAGE)
    evidence = run(settings, lambda: _gathered(settings, event_id), doing="reading records and images ...")
    files = files_of(evidence, version=version("rewatch"))
    archive = packed(files, (lambda message: sign(key, message)) if key is not None else None)
    path = (out or Path(_named(evidence.event["event_id"]))).absolute()
    try:
        _write(path, archive)
    except OSError as error:
        fail(f"{path}: {error.strerror}; name another file by --out", USAGE)
    root = json.loads(files[MANIFEST])["root"]
    lacks = [f"{what}: {why}" for what, why in evidence.missing]
    if as_json:
        told = {"path": str(path), "bytes": len(archive), "event_id": evidence.event["event_id"], "root": root}
        print_json(told | {"signed": key is not None, "missing": lacks})
    else:
        typer.echo(printable(str(path)))
        typer.echo(f"{len(evidence.shots)} frames, {len(evidence.records)} records, {len(archive):,} bytes")
        typer.echo(f"root {root}")
    if lacks:
        listed = "\n  ".join(lacks)
        fail(f"the export is written, and lacks what is not kept any more:\n  {listed}", NO)


@app.command("verify", epilog=examples("rewatch export verify evidence.zip", "rewatch export verify x.zip --key p.pem"))
def verify(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="An archive, or the folder that it was unpacked to.")],
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The Ed25519 public key, PEM, that has to have signed it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check an export: every byte, every record, and the chain from images to verdict.

    It needs no network and no installation. Each file that is not as it was exported is named, and the exit code is 1.
    Of an archive that is not signed it tells that the parts fit together, not who exported it; nor is the page
    index.html checked against the records. --key, or the root that the export printed, tells both.
    """
    from infra.export import verify as checking

    try:
        found = checking.verify(archive, checking.public_key(key.read_bytes()) if key is not None else None)
    except checking.UnreadableError as error:
        fail(str(error), USAGE)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", USAGE)
    if as_json:
        print_json(
            {
                "whole": found.whole,
                "event_id": found.event_id,
                "root": found.root,
                "problems": [problem._asdict() for problem in found.problems],
                "links": found.links,
                "missing": found.missing,
                "signed_by": found.signed_by,
                "signed_by_the_given_key": found.known,
            }
        )
    else:
        for line in checking.told(found):
            typer.echo(printable(line))
    if not found.whole:
        raise typer.Exit(NO)


async def _gathered(settings: "Settings", text: str) -> "Evidence":
    from infra.cli.events import find
    from infra.export.evidence import NotKeptError, gather
    from processors.store.queries import Queries
    from streams.claims import ClaimStore

    async with aclosing(Queries(settings.clickhouse)) as store:
        lineage = await store.made_from(await find(store, text))
        try:
            return await gather(store, ClaimStore(settings.images_root), lineage)
        except NotKeptError as error:
            return fail(str(error), NO)


def _named(event_id: str) -> str:
    return (_UNUSUAL.sub("-", event_id).strip(".-")[:_LONGEST] or "event") + ".zip"


def _write(path: Path, archive: bytes) -> None:
    """The whole archive or none, for its owner alone: it holds pictures."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as part:
        try:
            part.write(archive)
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(path)
        except OSError:
            Path(part.name).unlink(missing_ok=True)
            raise

"""`rewatch tls make|renew|show`: certificates of one's own, for the broker, the doors, and clients."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import NO, USAGE, JsonFlag, fail, print_json, print_table

if TYPE_CHECKING:
    from infra.tls.folder import Kept

app = typer.Typer(no_args_is_help=True)

DirOption = Annotated[
    Path | None, typer.Option("--dir", help="Folder that keeps them; without it <data_dir>/tls.", file_okay=False)
]


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(
        app,
        name="tls",
        rich_help_panel=MAINTENANCE,
        help="Make and show certificates of one's own.",
        epilog=examples("rewatch tls make --host nas.lan", "rewatch tls show"),
    )


@app.command(
    epilog=examples(
        "rewatch tls make",
        "rewatch tls make --host nas.lan --host 192.168.1.5",
        "rewatch tls make --host kafka --dir site/tls --json",
    )
)
def make(
    ctx: typer.Context,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address that servers are asked for by, besides this machine's own; may be repeated."
        ),
    ] = None,
    directory: DirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make an authority and certificates for the broker, the doors and clients.

    An authority that is there signs, and stays. Nothing is overwritten. Give ca.pem to whoever is to trust these
    servers; ca.key stays here.
    """
    from infra.tls import folder

    at = _folder(ctx, directory)
    try:
        folder.make(at, host or [], datetime.now(UTC))
    except folder.FolderError as error:
        fail(str(error), NO)
    except ValueError as error:
        fail(f"--host: {error}", USAGE)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror} (--dir)", USAGE)
    _show(at, as_json)
    if not as_json:
        typer.echo(_uses(at))


@app.command(epilog=examples("rewatch tls renew", "rewatch tls renew --dir site/tls"))
def renew(ctx: typer.Context, directory: DirOption = None, as_json: JsonFlag = False) -> None:
    """Make what the authority signed anew, for the same hosts.

    Servers show the new certificates from their next start on; clients need nothing, since the authority stays.
    """
    from infra.tls import folder

    at = _folder(ctx, directory)
    try:
        folder.renew(at, datetime.now(UTC))
    except folder.FolderError as error:
        fail(str(error), NO)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror} (--dir)", USAGE)
    _show(at, as_json)


@app.command(epilog=examples("rewatch tls show", "rewatch tls show --dir site/tls --json | jq '.[].days_left'"))
def show(ctx: typer.Context, directory: DirOption = None, as_json: JsonFlag = False) -> None:
    """Show the certificates, whom each is for, and when it ends."""
    from infra.tls import folder

    at = _folder(ctx, directory)
    if not folder.show(at):
        fail(f"{at} holds no certificates: `rewatch tls make` makes some", NO)
    _show(at, as_json)


def _folder(ctx: typer.Context, directory: Path | None) -> Path:
    return directory if directory is not None else Path(ctx.obj.data_dir) / "tls"


def _show(at: Path, as_json: bool) -> None:
    from infra.tls import folder

    kept, now = folder.show(at), datetime.now(UTC)
    rows = [_row(one, now) for one in kept]
    if as_json:
        print_json(rows)
        return
    columns = ("certificate", "for", "ends", "days left", "signed by", "key")
    print_table(
        columns,
        [
            (row["certificate"], ", ".join(row["hosts"]), row["ends"], row["days_left"], row["signed_by"], row["key"])
            for row in rows
        ],
    )


def _row(kept: "Kept", now: datetime) -> dict[str, Any]:
    found = kept.certificate
    return {
        "certificate": str(kept.path),
        "name": found.name if found is not None else None,
        "hosts": list(found.hosts) if found is not None else [],
        "ends": found.ends if found is not None else None,
        "days_left": found.days_left(now) if found is not None else None,
        "signed_by": found.issuer if found is not None else None,
        "key": _of_key(kept),
    }


def _of_key(kept: "Kept") -> str:
    if not kept.key.exists():
        return "not here"
    return "private" if kept.key_is_private else "others can read it"


def _uses(at: Path) -> str:
    """What to set, a line a server."""
    doors = {"gateway": "gateway", "upload": "ingest.upload", "detector": "detector.service"}
    lines = [f"{door}: tls_cert_path {at / name}.pem, tls_key_path {at / name}.key" for name, door in doors.items()]
    asked = f"where the broker asks for a certificate too, ssl_certfile {at}/client.pem, ssl_keyfile {at}/client.key"
    return "\n".join((*lines, f"kafka: ssl_cafile {at}/ca.pem; {asked}"))

"""The root of the command line: global options, and the one place where all commands are assembled."""

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from infra import logs
from infra.cli import cameras, dlq, doctor, events, ingest, migrate, run, show, sql
from infra.cli import config as config_commands
from infra.config import ConfigError, load

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="rewatch watches cameras with local AI, and remembers everything as events that can be replayed.",
)
for commands in (run, ingest, show, events, sql, cameras, dlq, doctor, migrate, config_commands):
    commands.register(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rewatch {version('rewatch')}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="Settings file; without it ./rewatch.yaml if there is one.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
    show_version: Annotated[  # noqa: ARG001 (its callback answers)
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Read the settings once; every command gets them."""
    logs.to_stderr(logging.INFO if verbose else logging.WARNING)
    ctx.obj = load(config)
    ctx.meta["config"] = config


def main() -> None:
    """Run a command; what people can mend is one clear line, not a traceback."""
    try:
        app()
    except ConfigError as error:
        typer.echo(f"settings: {error}", err=True)
        sys.exit(2)

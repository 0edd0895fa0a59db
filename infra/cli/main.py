"""The root of the command line: global options, and the one place where all commands are assembled.

A command's module imports at its top only what describes the command; what it runs is imported by it. `--help` and
completion then take a third of a second, and no command pays for another's model.
"""

import contextlib
import io
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from infra.cli import (
    ai,
    audit,
    backup,
    cameras,
    dlq,
    doctor,
    events,
    export,
    gc,
    hold,
    ingest,
    label,
    migrate,
    models,
    prompts,
    rebuild,
    replay,
    run,
    serve,
    shadow,
    show,
    sizing,
    sql,
    tls,
)
from infra.cli import config as config_commands
from infra.cli.help import EXIT_CODES, HELP_ASKED, Panelled, examples
from infra.cli.output import NO, USAGE

_FIRST_STEPS = examples(
    "rewatch demo                   # three rendered cameras, a minute",
    "rewatch up                     # everything here, until Ctrl-C",
    "rewatch events ls --since 12h  # what happened",
    "rewatch doctor                 # what is wrong, and the fix",
    "rewatch --install-completion   # TAB completes cameras, events ...",
)

app = typer.Typer(
    cls=Panelled,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="rewatch watches cameras with local AI, and remembers everything as events that can be replayed.",
    epilog=f"{_FIRST_STEPS}\n\n{EXIT_CODES}",
    context_settings={"help_option_names": ["--help", "-h"]},
)
for commands in (
    run,
    serve,
    ai,
    ingest,
    show,
    events,
    export,
    label,
    hold,
    sql,
    cameras,
    prompts,
    replay,
    shadow,
    dlq,
    doctor,
    audit,
    backup,
    models,
    migrate,
    gc,
    rebuild,
    sizing,
    tls,
    config_commands,
):
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
    if ctx.meta[HELP_ASKED]:
        return  # it is asked for where the settings are wrong, too
    from infra import logs
    from infra.config import load
    from infra.masks import secrets_of

    level = "info" if verbose else "warning"
    logs.to_stderr(level)
    ctx.obj = load(config)
    logs.to_stderr(level, secrets=secrets_of(ctx.obj))
    ctx.meta["config"] = config


def main() -> None:
    """Run a command; what people can mend is one clear line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows no UTF-8 shows \\xe9, instead of ending the command in the middle of a table.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="rewatch")
    except Exception as error:
        # Looked up: only a command that read settings can have met this error, and has imported it then.
        if (config := sys.modules.get("infra.config")) is not None and isinstance(error, config.ConfigError):
            with contextlib.suppress(BrokenPipeError):
                typer.echo(f"settings: {error}", err=True)
            sys.exit(USAGE)
        if config is None:
            raise
        # Logged: Python's own way would show the secrets that the traceback may hold.
        sys.modules["structlog"].get_logger().exception("ended by an error that nobody expected")
        sys.exit(NO)

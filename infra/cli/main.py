"""The root of the command line: global options, and the one place where all commands are assembled."""

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import structlog
import typer

from infra.cli import cameras, dlq, doctor, events, migrate, run, show, sql
from infra.cli import config as config_commands
from infra.config import ConfigError, load

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="rewatch watches cameras with local AI, and remembers everything as events that can be replayed.",
)
for commands in (run, show, events, sql, cameras, dlq, doctor, migrate, config_commands):
    commands.register(app)


@app.callback()
def root(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Settings file; without it ./rewatch.yaml if there is one.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Read the settings once; every command gets them."""
    if show_version:
        typer.echo(f"rewatch {version('rewatch')}")
        raise typer.Exit
    log_to_stderr(logging.INFO if verbose else logging.WARNING)
    ctx.obj = load(config)
    ctx.meta["config"] = config


def log_to_stderr(level: int) -> None:
    """Logs are for operators and go to stderr; what a command answers goes to stdout."""
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    # aiokafka reports each reconnection of each client as an error; the stages say what they wait on.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.set_exc_info,
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(bool_as_flag=False)
            if not sys.stderr.isatty()
            else structlog.dev.ConsoleRenderer(),
        ],
    )


def main() -> None:
    """Run a command; what people can mend is one clear line, not a traceback."""
    try:
        app()
    except ConfigError as error:
        typer.echo(f"settings: {error}", err=True)
        sys.exit(2)

"""The command line: `rewatch`. One file for each purpose, assembled in `main`."""

import sys


def main() -> None:
    """Run a command. Ctrl-C ends it without a traceback, also while Python still reads the modules."""
    try:
        from infra.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["main"]

"""The command line: `rewatch`. One file for each purpose, assembled in `main`."""

from infra.cli.main import main

__all__ = ["main"]

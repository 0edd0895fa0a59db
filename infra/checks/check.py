"""The answer of one check, and what every check is given."""

from typing import Any, Literal, NamedTuple

from infra.config import Settings

Status = Literal["failed", "warning", "ok", "skipped"]
"""In the order of severity."""

# An address that does not answer is given up after this, seconds.
PATIENCE_S = 10.0


class Check(NamedTuple):
    """One question and its answer."""

    name: str
    status: Status
    found: str
    fix: str = ""
    """A command or a setting, where something is to be done."""


class Context(NamedTuple):
    """What the checks are about."""

    settings: Settings
    running: dict[str, Any]
    """What the supervisor on this data directory says it runs, by process name; empty when there is none."""


def not_running(name: str) -> Check:
    """The answer for an embedded service of an installation that is down."""
    return Check(name, "skipped", "the embedded one does not run", "`rewatch up` starts it")


def gigabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1024**3:.1f} GB"

"""`rewatch doctor`: is everything here that the settings ask for, and what to do where it is not."""

import asyncio
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import NO, JsonFlag, console, print_json, printable, working

if TYPE_CHECKING:
    from infra.checks.check import Check

_STYLES = {"failed": "bold red", "warning": "yellow", "ok": "green", "skipped": "dim"}


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command(
        rich_help_panel=MAINTENANCE,
        epilog=examples(
            "rewatch doctor",
            "rewatch doctor && rewatch up",
            "rewatch doctor --json | jq '.checks[] | select(.status == \"failed\")'",
        ),
    )(doctor)


def doctor(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Check machine, services and settings; name the fix of each problem.

    What is worst stands first. Exit code 1 when a check failed; warnings are not failures.
    """
    from infra.checks.examine import examine

    with working("checking ..."):
        checks = asyncio.run(examine(ctx.obj))
    failed = any(check.status == "failed" for check in checks)
    if as_json:
        print_json({"ok": not failed, "summary": _counts(checks), "checks": [check._asdict() for check in checks]})
    else:
        _print(checks)
    if failed:
        raise typer.Exit(NO)


def _counts(checks: "list[Check]") -> dict[str, int]:
    return {status: sum(check.status == status for check in checks) for status in _STYLES}


def _print(checks: "list[Check]") -> None:
    out = console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble((f"{check.status:<8}", _STYLES[check.status]), f"{check.name:<{width}}  ")
        out.print(line + Text(printable(check.found)), soft_wrap=True)
        if check.fix:
            out.print(Text(f"{'':8}{'fix':<{width}}  {check.fix}", style="bold"), soft_wrap=True)
    counts = _counts(checks)
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if counts["failed"]:
        told += ": mend what failed, from the top"
    elif counts["warning"]:
        told += ": it runs; the warnings may cost you later"
    else:
        told += ": all is well"
    out.print(Text(told, style=_STYLES["failed" if counts["failed"] else "warning" if counts["warning"] else "ok"]))

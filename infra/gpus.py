"""This host's GPUs as commands see them: as the process `telemetry` tells, else by a look of their own."""

from collections.abc import Iterable
from typing import Any

from processors.telemetry import core
from processors.telemetry.core import Seen
from processors.telemetry.driver import driver_found
from processors.telemetry.watch import Watch
from streams.health import Report

# A person waits for it. A card without persistence mode is woken up first, which takes up to 3 s.
_PATIENCE_S = 4.0


async def look() -> Seen:
    """What is here now. Nothing is imported where there is no driver; a driver that hangs is given up soon."""
    if not driver_found():
        return Seen(why="no NVIDIA GPU (its driver is not installed)")
    from processors.telemetry.nvml import Nvml  # noqa: PLC0415 - a quarter of a second for nothing without a driver

    return await Watch(Nvml(), patience_s=_PATIENCE_S).look()


async def told(reports: Iterable[Report]) -> dict[str, Any]:
    """What `rewatch status` says: `state` (cards, none, hung), `why`, `driver`, `cuda`, `cards`.

    Args:
        reports: those of this machine's workers.
    """
    for report in reports:
        if report["stage"] == "telemetry" and "gpu" in report:
            found: dict[str, Any] = report["gpu"]
            return found
    return core.report(await look())

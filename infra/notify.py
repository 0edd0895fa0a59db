"""Tells systemd how a process is: up, alive, stopping (sd_notify(3)); says nothing where systemd does not ask.

A unit of `Type=notify` names a socket in NOTIFY_SOCKET, one with `WatchdogSec=` how long silence may last in
WATCHDOG_USEC. Own code: the protocol is a datagram of lines, and its bindings want libsystemd on the machine.
"""

import asyncio
import os
import socket
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Self

import structlog

from streams.liveness import REPORT_EVERY_S, read_report

log = structlog.get_logger(__name__)

# systemd's own advice: half of what it allows, so that one ping may come late.
_SHARE = 0.5
# Where it wants no sign of life it is told now and then how things stand, for `systemctl status`.
_TELL_EVERY_S = 10.0


class Notifier:
    """What systemd is told. Telling never fails: a service that works is not ended because nobody listened."""

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        """Where to send: a path, or `@` and an abstract name; empty tells nobody. `watchdog_s`: see `every_s`."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = watchdog_s
        self._said = ""

    @classmethod
    def of_environment(cls, environment: MutableMapping[str, str] | None = None) -> Self:
        """As systemd asks this process; children are not told of it, for only the main process may answer."""
        environment = os.environ if environment is None else environment
        address = environment.pop("NOTIFY_SOCKET", "")
        allowed, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        ours = allowed.isdigit() and int(allowed) > 0 and pid in {"", str(os.getpid())}
        return cls(address, int(allowed) / 1e6 if ours else None)

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._address)

    @property
    def every_s(self) -> float:
        """Seconds between two signs of life."""
        return _TELL_EVERY_S if self._watchdog_s is None else self._watchdog_s * _SHARE

    def ready(self, status: str) -> None:
        """Everything is up."""
        self._send("READY=1", f"STATUS={status}")

    def alive(self, status: str) -> None:
        """It goes on."""
        self._send(*([] if self._watchdog_s is None else ["WATCHDOG=1"]), f"STATUS={status}")

    def stopping(self) -> None:
        """The stop has begun."""
        self._send("STOPPING=1", "STATUS=stopping")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        message = "\n".join(line.replace("\n", " ") for line in lines).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)  # a full queue is no reason to stand still
                out.sendto(message, self._address)
        except OSError as error:
            if str(error) != self._said:  # once is enough
                self._said = str(error)
                log.warning("systemd cannot be told", socket=self._address.replace("\0", "@"), error=str(error))


async def keep_telling(notifier: Notifier, status: Callable[[], str]) -> None:
    """Give signs of life until cancelled: a loop that hangs gives none, and the service is restarted."""
    while notifier.listens:
        notifier.alive(status())
        await asyncio.sleep(notifier.every_s)


async def tell_of_stage(notifier: Notifier, *reports: Path) -> None:
    """Tell how a stage is by the reports that it writes, until cancelled.

    It is up once it reports: one that waits for its broker is up and waits, in any order of start. One that says itself
    that it stalls gives no sign of life any more.
    """
    up = False
    while notifier.listens:
        found = [report for path in reports if (report := read_report(path)) and report["pid"] == os.getpid()]
        stalls = [report["stall"] for report in found if report["stall"] is not None]
        if found and not stalls:
            waits = sorted({what for report in found for what in report["waiting_on"]})
            status = f"waiting on {', '.join(waits)}" if waits else "at work"
            if not up:
                up = True
                notifier.ready(status)
            notifier.alive(status)
        await asyncio.sleep(notifier.every_s if up else REPORT_EVERY_S / 2)

"""One child process: how it is described, started, found ready, and stopped. Knows nothing of its siblings."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

LAUNCHER = Path(__file__).with_name("die_with_parent.py")
POLL_SECONDS = 0.05  # between two readiness checks: the servers take 0.5-3 s to start
LOG_TAIL_LINES = 20  # enough for a stack trace's last frames and its message
BEHIND = 5
"""Niceness of what keeps things, against what judges them: where both want the same core, a verdict comes first."""
_START = "--- "  # the first line of each run
LOG_MAX_BYTES = 20 * 1024 * 1024  # then it becomes NAME.log.1: two files a process bound the disk it takes


class StartError(RuntimeError):
    """A process cannot start; the message names the setting to change, or ends with the log's last lines."""


class PortTakenError(StartError):
    """Something else listens on the port; the message names the setting."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What a child process is.

    Attributes:
        name: Unique among its siblings; names the log file.
        argv: The command. `-m module` commands want `sys.executable` first.
        env: Added to this process's own environment.
        needs: Names of processes that must be ready before this one starts, and that stop after it.
        patient: It starts beside what it needs, and waits for it by itself.
        prepare: Awaited before every start (a port check, a format); what it raises stops the start.
        ready: Polled after the start until it answers True; None means ready at once.
        stalled: Asked now and then while it runs; a text is an unexplained stall and restarts the process.
        cleanup: Called once, after the last stop.
        port: Where it listens, for people and for the state file.
        nice: Niceness, 0 to 19: how far it stands behind the others where they want the same core.
        ready_timeout: Seconds from start to ready before the start counts as failed.
        stop_timeout: Seconds between SIGTERM and SIGKILL.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    patient: bool = False
    prepare: Callable[[], Awaitable[None]] | None = None
    ready: Callable[[], Awaitable[bool]] | None = None
    stalled: Callable[[], Awaitable[str | None]] | None = None
    cleanup: Callable[[], None] | None = None
    port: int | None = None
    nice: int = 0
    ready_timeout: float = 60.0
    stop_timeout: float = 10.0


class Process:
    """One run of a `ProcessSpec`, logging to `<log_dir>/<name>.log`."""

    def __init__(self, spec: ProcessSpec, log_dir: Path) -> None:
        self.spec = spec
        self.log_path = log_dir / f"{spec.name}.log"
        self.started_at = 0.0
        self._process: asyncio.subprocess.Process | None = None
        self._group: int | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, which is also its process group; None before the start and after the end."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else None

    @property
    def returncode(self) -> int | None:
        """The exit code; negative for a signal; None while it runs and before the start."""
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            StartError: It ended, or was not ready within `ready_timeout`; nothing of it is left running.
        """
        if self.spec.prepare is not None:
            await self.spec.prepare()
        self._spawn_log()
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-ISE", str(LAUNCHER), str(os.getpid()), str(self.spec.nice)),
                *self.spec.argv,
                env={**os.environ, **self.spec.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Its own session: Ctrl-C at the terminal reaches only the supervisor, which stops in order.
                start_new_session=True,
            )
        self.started_at = time.time()
        self._group = self._process.pid
        try:
            async with asyncio.timeout(self.spec.ready_timeout):
                await self._until_ready()
        except TimeoutError:
            await self.stop()
            raise StartError(
                f"{self.spec.name} was not ready within {self.spec.ready_timeout:g} s. {self.log_tail()}"
            ) from None
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        assert self._process is not None, "not started"
        code = await self._process.wait()
        self._end_group()
        return code

    async def stop(self, within: float | None = None) -> None:
        """SIGTERM, then SIGKILL after `within` or `stop_timeout`; also ends whatever it left in its process group."""
        if self._process is None:
            return
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
                self._process.send_signal(signal.SIGCONT)  # one that is stopped would not hear of it
            try:
                async with asyncio.timeout(self.spec.stop_timeout if within is None else within):
                    await self._process.wait()
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        self._end_group()

    def log_tail(self) -> str:
        """Where the log is and its last lines, for an error message."""
        with suppress(OSError):
            return "\n".join([f"The end of {self.log_path}:", *last_run(self.log_path)[-LOG_TAIL_LINES:]])
        return f"It left no log at {self.log_path}."

    def bound_log(self) -> None:
        """Copy the log away and truncate it once it is too long; the child appends, so it need not know."""
        with suppress(OSError):  # it is not there yet, or the disk is full: the child must run all the same
            if self.log_path.stat().st_size > LOG_MAX_BYTES:
                self.log_path.with_suffix(".log.1").write_bytes(self.log_path.read_bytes())
                os.truncate(self.log_path, 0)

    def _spawn_log(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.bound_log()
        with suppress(OSError), self.log_path.open("a") as log:  # a full disk
            log.write(f"{_START}{time.strftime('%Y-%m-%dT%H:%M:%S%z')} starting {self.spec.name}\n")

    async def _until_ready(self) -> None:
        assert self._process is not None
        while True:
            if self._process.returncode is not None:
                raise StartError(
                    f"{self.spec.name} ended with code {self._process.returncode} before it was ready. "
                    f"{self.log_tail()}"
                )
            if self.spec.ready is None or await self.spec.ready():
                return
            await asyncio.sleep(POLL_SECONDS)

    def _end_group(self) -> None:
        """Kill what a child that has ended left behind in its process group; once, for the id can be used again."""
        group, self._group = self._group, None
        if group is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)


def last_run(log: Path, most: int = 16384) -> list[str]:
    """The lines that the last run wrote to a log, of its last `most` bytes: what earlier runs said is not about it.

    Raises:
        OSError: it cannot be read.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        lines = file.read().decode(errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(_START)]
    return lines[starts[-1] + 1 if starts else 0 :]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on now. Another process can take it before it is used."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def require_free_port(host: str, port: int, *, what: str, setting: str) -> None:
    """Fail unless `what` can listen on the port.

    Raises:
        PortTakenError: Something listens there; the message names the setting and the fix.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers bind: connections of a dead predecessor in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTakenError(
                f"{what} cannot listen on {host}:{port} ({error.strerror}): another program has the port. "
                f"Stop that program, or set {setting} to a free port."
            ) from None


async def accepts_connections(host: str, port: int) -> bool:
    """Whether anything accepts TCP connections there."""
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True

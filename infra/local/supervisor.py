"""Supervises child processes: start by dependency, restart with back-off, stop in reverse order, no orphans.

Own code, because the well-kept supervisors lack what is needed here: honcho has no readiness, dependency order or
restart; circus orders by fixed priority and delay, not by readiness, and brings ZeroMQ and a web framework;
supervisord and systemd are installed on the machine, not with the product.

A process that dies is restarted alone: whatever needs it (a stage needs the broker) rides out the gap by itself.
Three things keep orphans away: the kernel kills children whose supervisor died (die_with_parent.py); each child has
its own process group, which is ended with it; and a start first ends what a dead supervisor's state file still lists.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from filelock import FileLock, Timeout

from infra.local.process import Process, ProcessSpec, StartError
from infra.private import make_private

log = logging.getLogger(__name__)

State = Literal["waiting", "starting", "ready", "backing off", "stopping", "stopped", "failed"]

BACKOFF_FIRST_SECONDS = 0.25  # doubles: 0.25, 0.5, 1, 2, 4 s, so five restarts ride out a blip of about 8 s
BACKOFF_MAX_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a process that ran this long was well: its earlier failures are forgotten
WATCH_SECONDS = 2.0  # between two questions to `stalled`, a read of a small file each
# Whoever stalled may not answer SIGTERM either, and need not: what a killed process leaves is taken over. With 45 s
# until it is a stall, a second until it is reported and two until it is seen, it is back within the promised 60 s.
STALLED_STOP_SECONDS = 3.0


class AlreadyRunningError(RuntimeError):
    """Another supervisor owns this data directory; `state` is what it wrote (see `read_state`)."""

    def __init__(self, data_dir: Path, state: dict[str, Any]) -> None:
        super().__init__(
            f"rewatch already runs on {data_dir} (process {state.get('pid', 'unknown')}). "
            "Use it, stop it, or set data_dir to another directory."
        )
        self.state = state


class ProcessFailedError(RuntimeError):
    """A process kept failing and was given up; the message ends with its log's last lines."""


@dataclass(slots=True)
class _Child:
    spec: ProcessSpec
    process: Process
    state: State = "waiting"
    restarts: int = 0
    reason: str = ""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    restart: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    task: asyncio.Task[None] | None = None


class Supervisor:
    """Runs the processes of one data directory.

    `start` returns once all are ready. `<data_dir>/run.json` says what runs (`read_state`), `<data_dir>/logs/NAME.log`
    what it printed. One supervisor owns a data directory at a time. Use it from one event loop, in a thread that
    outlives the processes.
    """

    def __init__(
        self, data_dir: Path, specs: Iterable[ProcessSpec] = (), *, max_restarts: int = 5, watch: float = WATCH_SECONDS
    ) -> None:
        """Prepare; nothing starts yet.

        Args:
            data_dir: Holds the state file, its lock and the logs; made when missing.
            specs: The processes; more can follow by `add`.
            max_restarts: Failures in a row (each within 60 s of its start) before a process is given up.
            watch: Seconds between two questions to a process's `stalled`.
        """
        self.data_dir = data_dir.resolve()
        self._children: dict[str, _Child] = {}
        self._max_restarts = max_restarts
        self._watch = watch
        self._lock = FileLock(self.data_dir / "run.lock")
        self._started_at = 0.0
        self._failed: asyncio.Future[None] | None = None
        self._unwritten = False
        for spec in specs:
            self._register(spec)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Take the data directory, then start everything: side by side where nothing is needed first.

        Raises:
            AlreadyRunningError: Another supervisor owns the data directory.
            StartError: A process could not start; everything has been stopped again.
        """
        make_private(self.data_dir)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise AlreadyRunningError(self.data_dir, _load(self.data_dir)) from None
        try:
            _end_leftovers(_load(self.data_dir))
            self._started_at = time.time()
            self._failed = asyncio.get_running_loop().create_future()
            await self._launch(list(self._children.values()))
        except BaseException:
            await self.stop()
            raise

    async def add(self, *specs: ProcessSpec) -> None:
        """Start more processes beside those that run; returns when they are ready.

        Raises:
            StartError: One of them could not start; those before it keep running.
        """
        await self._launch([self._register(spec) for spec in specs])

    async def wait(self) -> None:
        """Wait until a process is given up; to be cancelled by whoever stops the supervisor.

        Raises:
            ProcessFailedError: A process failed more often than `max_restarts` in a row, or its supervision broke off.
        """
        assert self._failed is not None, "not started"
        await asyncio.shield(self._failed)

    async def restart(self, name: str) -> None:
        """Stop one process in order and start it again; returns when it is ready.

        Raises:
            KeyError: No such process.
            StartError: It does not come back.
        """
        child = self._children[name]
        child.ready.clear()
        if child.task is None or child.task.done():  # given up before: a person asks for another try
            self._begin(child)
        else:
            child.restart.set()
        await self._until_ready(child)

    async def stop(self) -> None:
        """Stop everything, what needs others first; safe to call twice."""
        for layer in reversed(self._layers()):
            await asyncio.gather(*(self._stop_child(child) for child in layer))
        if self._lock.is_locked:
            (self.data_dir / "run.json").unlink(missing_ok=True)
            self._lock.release()
        if self._failed is not None and self._failed.done() and not self._failed.cancelled():
            self._failed.exception()  # retrieved: `wait` may never have been called

    def pid(self, name: str) -> int | None:
        """The process id of one process; None while it is down."""
        return self._children[name].process.pid

    def state(self) -> dict[str, Any]:
        """What runs: `{"pid", "create_time", "started_at", "processes": {name: {"state", "pid", ...}}}`."""
        return {
            "pid": os.getpid(),
            "create_time": psutil.Process().create_time(),
            "started_at": self._started_at,
            "processes": {
                name: {
                    "state": child.state,
                    "pid": child.process.pid,
                    "create_time": _create_time(child.process.pid),
                    "port": child.spec.port,
                    "started_at": child.process.started_at,
                    "restarts": child.restarts,
                    "reason": child.reason,
                    "log": str(child.process.log_path),
                }
                for name, child in self._children.items()
            },
        }

    def _register(self, spec: ProcessSpec) -> _Child:
        if spec.name in self._children:
            raise ValueError(f"two processes are named {spec.name!r}")
        if missing := set(spec.needs) - set(self._children):
            raise ValueError(f"{spec.name} needs {sorted(missing)}, which must be listed before it")
        child = _Child(spec, Process(spec, self.data_dir / "logs"))
        self._children[spec.name] = child
        return child

    def _layers(self) -> list[list[_Child]]:
        """The children, those that need nothing first; every child stands above what it needs."""
        depth: dict[str, int] = {}
        for name, child in self._children.items():
            depth[name] = 1 + max((depth[need] for need in child.spec.needs), default=-1)
        layers: list[list[_Child]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
        for name, child in self._children.items():
            layers[depth[name]].append(child)
        return layers

    async def _launch(self, children: list[_Child]) -> None:
        for child in children:
            self._begin(child)
        waits = [asyncio.create_task(self._until_ready(child)) for child in children]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _begin(self, child: _Child) -> None:
        child.task = asyncio.create_task(self._supervise(child), name=f"supervise {child.spec.name}")
        child.task.add_done_callback(lambda task: self._broke_off(child, task))

    def _broke_off(self, child: _Child, task: asyncio.Task[None]) -> None:
        """Nobody would start this child again: that ends all, as a process that is given up does."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.error("%s: its supervision broke off", child.spec.name, exc_info=error)
        child.error = ProcessFailedError(f"{child.spec.name} is supervised no more: {error!r}. Please report this")
        child.ready.clear()
        self._give_up(child)

    def _give_up(self, child: _Child) -> None:
        self._set(child, "failed")
        if self._failed is not None and not self._failed.done() and child.error is not None:
            self._failed.set_exception(child.error)

    async def _until_ready(self, child: _Child) -> None:
        assert child.task is not None, "not started"
        ready = asyncio.create_task(child.ready.wait())
        try:
            await asyncio.wait({ready, child.task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not child.ready.is_set():
            raise child.error or StartError(f"{child.spec.name} was stopped before it was ready")

    async def _supervise(self, child: _Child) -> None:
        """One child's life, until it is given up or `_stop_child` cancels this."""
        for need in () if child.spec.patient else child.spec.needs:
            await self._children[need].ready.wait()
        failures = 0
        while True:
            began = time.monotonic()
            reason = await self._run_once(child)
            child.ready.clear()
            if child.error is not None and child.restarts == 0 and failures == 0:
                break  # never came up: a wrong setting, not a blip
            if reason is None:  # asked for by `restart`
                child.restarts += 1
                continue
            failures = 1 if time.monotonic() - began > STEADY_SECONDS else failures + 1
            child.reason = reason
            log.warning("%s: %s (failure %d of %d)", child.spec.name, reason, failures, self._max_restarts)
            if failures > self._max_restarts:
                child.error = ProcessFailedError(
                    f"{child.spec.name} failed {failures} times in a row and is given up; last: {reason}. "
                    f"{child.process.log_tail()}"
                )
                break
            self._set(child, "backing off")
            await asyncio.sleep(min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** (failures - 1)))
            child.restarts += 1
        self._give_up(child)

    async def _run_once(self, child: _Child) -> str | None:
        """Start it and see it end; why it ended, or None when a restart was asked for."""
        child.error = None
        child.restart.clear()
        self._set(child, "starting")
        try:
            await child.process.start()
        except Exception as error:  # noqa: BLE001 - counted, reported, and raised by whoever waits for the start
            child.error = error
            return str(error)
        self._set(child, "ready")
        child.ready.set()
        ended = asyncio.create_task(child.process.wait())
        asked = asyncio.create_task(child.restart.wait())
        stalled = asyncio.create_task(self._until_stalled(child))
        try:
            await asyncio.wait({ended, asked, stalled}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return f"ended with code {ended.result()}"
            if not stalled.done():
                await child.process.stop()
                return None
            await child.process.stop(STALLED_STOP_SECONDS)
            return f"stalled: {stalled.result()}"
        finally:
            for task in (ended, asked, stalled):
                task.cancel()
            await asyncio.gather(ended, asked, stalled, return_exceptions=True)

    async def _until_stalled(self, child: _Child) -> str:
        while True:
            await asyncio.sleep(self._watch)
            child.process.bound_log()
            if self._unwritten:
                self._write()
            if child.spec.stalled is None:
                continue
            try:
                async with asyncio.timeout(max(self._watch, 1.0)):  # not wait_for: 3.11's can lose a cancellation
                    reason = await child.spec.stalled()
            except Exception as error:  # noqa: BLE001 - only an answer may restart a process, never a failed question
                log.warning("%s: its watchdog cannot tell: %r", child.spec.name, error)
                continue
            if reason is not None:
                return reason

    async def _stop_child(self, child: _Child) -> None:
        if child.task is not None:
            child.task.cancel()
            await asyncio.gather(child.task, return_exceptions=True)
        if child.process.pid is not None:
            self._set(child, "stopping")
        await child.process.stop()
        if child.spec.cleanup is not None:
            child.spec.cleanup()
        child.ready.clear()
        if child.state != "failed":
            self._set(child, "stopped")

    def _set(self, child: _Child, state: State) -> None:
        child.state = state
        self._write()

    def _write(self) -> None:
        """Write what runs. A full disk ends no supervision: it is written when there is room again."""
        if not self._lock.is_locked:
            return
        path = self.data_dir / "run.json"
        draft = path.with_suffix(".json.new")
        try:
            draft.write_text(json.dumps(self.state(), indent=1))
            draft.replace(path)
        except OSError as error:
            if not self._unwritten:
                log.warning("%s is not written, `rewatch status` may be wrong: %s", path, error)
            self._unwritten = True
        else:
            self._unwritten = False


def read_state(data_dir: Path) -> dict[str, Any] | None:
    """What runs on a data directory (`Supervisor.state`), or None when no live supervisor owns it."""
    state = _load(data_dir)
    return state if state and _alive(state) else None


def running(data_dir: Path) -> dict[str, Any]:
    """What the live supervisor on a data directory runs, by process name; empty where there is none."""
    try:
        state = read_state(data_dir)
    except OSError:  # a directory that cannot be read is doctor's to name
        return {}
    return dict((state or {}).get("processes", {}))


def _load(data_dir: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, json.JSONDecodeError):
        state = json.loads((data_dir / "run.json").read_text())
        if isinstance(state, dict):
            return state
    return {}


def _create_time(pid: int | None) -> float | None:
    with suppress(psutil.Error):
        return None if pid is None else psutil.Process(pid).create_time()
    return None


def _alive(entry: dict[str, Any]) -> bool:
    """Whether this very process still runs: a process id alone may have been given to another program since."""
    pid, then = entry.get("pid"), entry.get("create_time")
    now = _create_time(pid if isinstance(pid, int) else None)
    # psutil derives the time from the boot time, which can move by a tick between two reads.
    return now is not None and then is not None and abs(now - then) < 1.0


def _end_leftovers(state: dict[str, Any]) -> None:
    """End what a supervisor that died without stopping left running (see die_with_parent.py for when it can)."""
    for entry in state.get("processes", {}).values():
        if _alive(entry):
            with suppress(psutil.Error):
                leftover = psutil.Process(entry["pid"])
                leftover.kill()
                leftover.wait(timeout=10)

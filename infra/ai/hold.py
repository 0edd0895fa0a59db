"""Starts a service in the background and waits until it is healthy; stops one, for certain.

One process a service keeps it running (`keep.py`), in a session of its own: it outlives the command and its terminal.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from infra.ai import plan as plans
from infra.ai.plan import Plan
from infra.local.process import LOG_TAIL_LINES, StartError
from infra.local.supervisor import read_state

_LOOK_S = 0.1
# The detector answers what is in hand (5 s) and llama.cpp ends its step; each is killed after 10 s.
_STOP_S = 20.0
# Who only looks whether a command is at it holds the lock for an instant.
_INSTANT_S = 1.0


class BusyError(RuntimeError):
    """Another `rewatch ai` is starting or stopping the service."""


Progress = Callable[[float, Plan], None]
"""Told while it starts: seconds since then, and the plan with its notes."""


def alive(place: Path) -> dict[str, Any] | None:
    """What the live keeper of a service's folder says (`Supervisor.state`); None where there is none."""
    state = read_state(place)
    if state is None:
        return None
    with contextlib.suppress(psutil.Error):
        # One that nobody has waited for yet has ended all the same.
        if psutil.Process(state["pid"]).status() != psutil.STATUS_ZOMBIE:
            return state
    return None


def busy(place: Path) -> bool:
    """Whether a command is starting or stopping the service."""
    try:
        with _alone(place, patience_s=0):
            return False
    except BusyError:
        return True


def start(place: Path, plan: Plan, key: str, told: Progress = lambda _s, _p: None) -> bool:
    """Start the service; returns when it is healthy. False where it already runs.

    Args:
        place: its folder.
        plan: how it is to be run.
        key: what the LLM's server asks for; empty asks for none.
        told: called ten times a second meanwhile.

    Raises:
        StartError: it cannot be started; nothing of it is left running.
        BusyError: another command is at it.
    """
    with _alone(place):
        if alive(place) is not None:
            return False
        plans.save(place, plan)
        keeper = _spawn(place, key)
        began = time.monotonic()
        try:
            while not _ready(place, plan, keeper.pid):
                if keeper.poll() is not None:
                    raise StartError(_why(place))
                told(time.monotonic() - began, plans.load(place) or plan)
                time.sleep(_LOOK_S)
        except BaseException:
            _end(psutil.Process(keeper.pid) if keeper.poll() is None else None)
            keeper.poll()
            raise
        keeper.returncode = 0  # let go: it outlives this command, and Popen would warn that it does
        return True


def stop(place: Path) -> bool:
    """Stop the service, and forget its plan. False where nothing ran.

    Raises:
        BusyError: another command is at it.
    """
    with _alone(place):
        state = alive(place)
        if state is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                _end(psutil.Process(state["pid"]))
        for name in ("plan.json", "run.json"):
            (place / name).unlink(missing_ok=True)
        return state is not None


@contextlib.contextmanager
def _alone(place: Path, patience_s: float = _INSTANT_S) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / "start.lock")
    try:
        lock.acquire(timeout=patience_s)
    except Timeout:
        raise BusyError(f"another `rewatch ai` is starting or stopping the {place.name}: wait for it") from None
    try:
        yield
    finally:
        lock.release()


def _spawn(place: Path, key: str) -> "subprocess.Popen[bytes]":
    (place / "logs").mkdir(exist_ok=True)
    with (place / "logs" / "keeper.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "infra.ai.keep", str(place)],
            env={**os.environ, "LLAMA_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _ready(place: Path, plan: Plan, keeper: int) -> bool:
    state = read_state(place)
    # A keeper that was killed leaves its state behind, with a service that it calls ready.
    return bool(state and state["pid"] == keeper and state["processes"].get(plan.service, {}).get("state") == "ready")


def _why(place: Path) -> str:
    """Why the keeper ended."""
    plan = plans.load(place)
    if plan is not None and plan.gave_up:
        return plan.gave_up
    log = place / "logs" / "keeper.log"
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"what keeps the {place.name} running ended. The end of {log}:", *lines])


def _end(keeper: psutil.Process | None) -> None:
    """SIGTERM, then SIGKILL; the kernel ends the service with its keeper."""
    if keeper is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        keeper.terminate()
        try:
            keeper.wait(_STOP_S)
        except psutil.TimeoutExpired:
            if keeper.status() != psutil.STATUS_ZOMBIE:
                keeper.kill()
                with contextlib.suppress(psutil.TimeoutExpired):
                    keeper.wait(_STOP_S)

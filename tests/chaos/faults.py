"""Every kind of fault as one small thing: what begins it and what ends it."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import psutil

from tests.chaos.kafka_proxy import Hold
from tests.chaos.llm_proxy import Manner
from tests.chaos.schedule import Planned
from tests.chaos.site import NotInflictedError, Site
from tests.chaos.tearing import tear


class Note(Protocol):
    """Takes what became of the fault, for the record of the campaign."""

    def __call__(self, what: str) -> None:
        """Say it."""

    def over(self) -> None:
        """From now on whoever was hit may recover, though what the fault set off goes on."""


# A stage of a live road commits several times a second; one that waits for the LLM does not.
_PRODUCES_S = 10.0

# The LLM is asked every few seconds, but not while the broker is away.
ASKED_S = 90.0

# How long a zombie may try to write beside its successor before that goes.
_BESIDE_S = 4.0


def make(fault: Planned, site: Site, note: Note) -> AbstractAsyncContextManager[None]:
    """The fault: entering it begins it, and leaving it ends it. Both raise NotInflictedError where it was none."""
    rng = random.Random(fault.seed)
    if fault.kind.startswith("kill-"):
        return _kill(site, fault.target)
    if fault.kind.startswith("scale-"):
        return _scale(site, fault.target.removesuffix("-more"))
    if fault.kind in _MANNERS:
        return _manner(site, _MANNERS[fault.kind], note, ASKED_S)
    return _OTHERS[fault.kind](site, fault.target, rng, note)


@contextlib.asynccontextmanager
async def _kill(site: Site, name: str) -> AsyncIterator[None]:
    await site.signal(name, signal.SIGKILL)
    yield


@contextlib.asynccontextmanager
async def _stop(site: Site, name: str, _: random.Random, note: Note) -> AsyncIterator[None]:
    pid = await site.signal(name, signal.SIGSTOP)
    try:
        yield
    finally:
        await _continue(pid, note)


@contextlib.asynccontextmanager
async def _zombie(site: Site, stage: str, rng: random.Random, note: Note) -> AsyncIterator[None]:
    async with site.another(stage):
        async with _stop(site, stage, rng, note):
            yield
        await asyncio.sleep(_BESIDE_S)


async def _continue(pid: int, note: Note) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_STOPPED:
            process.resume()
            return
    note("was gone before it was continued")


@contextlib.asynccontextmanager
async def _scale(site: Site, stage: str) -> AsyncIterator[None]:
    async with site.another(stage):
        yield


@contextlib.asynccontextmanager
async def _late_produce(site: Site, name: str, _: random.Random, note: Note) -> AsyncIterator[None]:
    pid = await site.pid(name)
    hold = Hold(site.session_s + 4)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PRODUCES_S):
                while not hold.held:
                    # Again and again: a stage opens a partition's producer when it needs it.
                    site.kafka.hold(await asyncio.to_thread(_ports, pid), hold)
                    await asyncio.sleep(0.2)
        if not hold.held:
            raise NotInflictedError(f"{name} sent no produce request within {_PRODUCES_S:g} s")
        await site.signal(name, signal.SIGKILL)
        note.over()
        yield
    finally:
        site.kafka.release(hold)
    note(f"of {hold.held} produce requests held back {hold.arrived} arrived")
    if not hold.arrived:
        raise NotInflictedError("the broker was away when they were to arrive; it was a kill")


def _ports(pid: int) -> list[int]:
    """The ports of a process's connections."""
    with contextlib.suppress(psutil.Error):
        return [found.laddr.port for found in psutil.Process(pid).net_connections("tcp4")]
    return []


@contextlib.asynccontextmanager
async def _broker_away(site: Site, name: str, rng: random.Random, note: Note) -> AsyncIterator[None]:
    if rng.random() < 0.5:
        note("cut off")
        site.kafka.cut()
        try:
            yield
        finally:
            await site.kafka.restore()
    else:
        note("down")
        site.hold_down(name)
        try:
            await site.signal(name, signal.SIGKILL)
            yield
        finally:
            site.let_up(name)


@contextlib.asynccontextmanager
async def _power_cut(site: Site, name: str, rng: random.Random, note: Note) -> AsyncIterator[None]:
    site.hold_down(name)
    try:
        await site.gone(await site.signal(name, signal.SIGKILL))
        torn = await asyncio.to_thread(tear, site.log_dir, rng)
        note(f"torn: {', '.join(torn)}")
    finally:
        site.let_up(name)
    if not torn:
        raise NotInflictedError("no segment was torn; it was a kill")
    yield


@contextlib.asynccontextmanager
async def _manner(site: Site, manner: Manner, note: Note, patience_s: float) -> AsyncIterator[None]:
    before = site.llm.misbehaved
    site.llm.manner = manner
    try:
        yield
        # With the broker away nobody asks: then it lasts until somebody does.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while site.llm.misbehaved == before:
                    await asyncio.sleep(0.1)
    finally:
        site.llm.manner = None
    count = site.llm.misbehaved - before
    if not count:
        raise NotInflictedError(f"nobody asked the LLM, and for {patience_s:g} s more")
    note(f"{count} answers spoiled")


@contextlib.asynccontextmanager
async def _one_item(site: Site, _: str, __: random.Random, ___: Note) -> AsyncIterator[None]:
    before = len(site.llm.poisoned)
    site.llm.poisoning += 1
    try:
        async with asyncio.timeout(ASKED_S):
            while len(site.llm.poisoned) == before:
                await asyncio.sleep(0.1)
    except TimeoutError:
        site.llm.poisoning -= 1
        raise NotInflictedError(f"the LLM was asked of no window for {ASKED_S:g} s") from None
    yield


_MANNERS: dict[str, Manner] = {
    "llm-errors": "errors",
    "llm-hangs": "hangs",
    "llm-garbage": "garbage",
    "llm-cut-off": "cut-off",
}

_OTHERS: dict[str, Callable[[Site, str, random.Random, Note], AbstractAsyncContextManager[None]]] = {
    "stop": _stop,
    "zombie": _zombie,
    "late-produce": _late_produce,
    "broker-away": _broker_away,
    "broker-hangs": _stop,
    "power-cut": _power_cut,
    "clickhouse-hangs": _stop,
    "llm-one-item": _one_item,
}

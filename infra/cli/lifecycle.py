"""What a person sees of an installation's life: how the start goes, what dies and comes back, what Ctrl-C ended.

`up` and `demo` show it alike. The work itself is `infra.installation`'s.
"""

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from infra.cli.output import INTERRUPTED, printable

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.installation import Installation
    from streams.survey import Survey

# Often enough to look alive; a look costs 2 ms.
_LOOK_S = 0.2
# The servers' files are here, or the broker's jars come from afar: those on disk are found in a third of a second.
_FETCHING_S = 1.5
# Who pressed Ctrl-C waits for a summary, but not for a broker that does not answer.
_COUNT_S = 5.0


class Stop:
    """Ctrl-C and SIGTERM: the first asks for an orderly stop, the second ends everything at once."""

    def __init__(self, console: Console) -> None:
        self.asked = asyncio.Event()
        self._console = console
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
            self._console.print("\nstopping; Ctrl-C again stops at once", soft_wrap=True)
            return
        # The kernel ends the children with this process. Nothing is lost: what was in hand has not been committed.
        self._console.show_cursor()
        self._console.print("stopped at once; what was in hand is done at the next start", soft_wrap=True)
        self._console.file.flush()
        os._exit(INTERRUPTED)


async def bring_up(installation: "Installation", console: Console, stop: Stop) -> bool:
    """Start everything and show how it goes, a line for each process that is ready.

    Returns False where it was asked to stop meanwhile: then everything that had begun has been stopped again.
    """
    began = time.monotonic()
    starting = asyncio.create_task(installation.__aenter__(), name="start")
    stopped = asyncio.create_task(stop.asked.wait())
    shown: set[str] = set()
    try:
        with console.status("starting ...") as spinner:
            said = False
            while not starting.done() and not stop.asked.is_set():
                await asyncio.wait({starting, stopped}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                processes = installation.stack.supervisor.state()["processes"]
                elapsed = time.monotonic() - began
                if not processes and elapsed > _FETCHING_S and not said and not starting.done():
                    said = True
                    console.print("  fetching Apache Kafka from Maven Central: 46 jars, 45 MB, kept for later starts")
                _show_ready(console, processes, shown, elapsed)
                spinner.update(_progress(processes))
        if starting.done():
            starting.result()
        if not stop.asked.is_set():
            return True
        fetching = not installation.stack.supervisor.state()["processes"]
        with console.status("stopping ..."):
            if starting.done():
                await installation.__aexit__(None, None, None)
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
        if fetching:
            # The thread that fetches cannot be told to stop, and Python would wait for it. Nothing else runs yet.
            console.print("stopped; the next start fetches what is missing")
            console.file.flush()
            os._exit(0)
        return False
    finally:
        stopped.cancel()


async def narrate(installation: "Installation", console: Console) -> None:
    """Say which process died and came back, why, and where its log is; until it is cancelled."""
    known = {name: p["restarts"] for name, p in installation.stack.supervisor.state()["processes"].items()}
    down: set[str] = set()
    while True:
        for name, process in installation.stack.supervisor.state()["processes"].items():
            if process["state"] == "backing off" and name not in down:
                down.add(name)
                console.print(
                    f"{_now()}  {name} {_reason(process)}; starting it again. Its log: {process['log']}",
                    soft_wrap=True,
                )
            elif process["state"] == "ready" and (name in down or process["restarts"] > known.get(name, 0)):
                if name not in down:  # it was back before anybody looked
                    console.print(f"{_now()}  {name} {_reason(process)}. Its log: {process['log']}", soft_wrap=True)
                down.discard(name)
                console.print(f"{_now()}  {name} runs again (restart {process['restarts']})", soft_wrap=True)
            known[name] = max(known.get(name, 0), process["restarts"] if process["state"] == "ready" else 0)
        await asyncio.sleep(_LOOK_S)


class Tally:
    """What came through between two looks at the log."""

    def __init__(self, settings: "Settings") -> None:
        self._settings = settings
        self._began = time.monotonic()
        self._first: asyncio.Task[Survey | None] = asyncio.create_task(look(settings), name="first count")

    async def summary(self) -> list[str]:
        """Lines for people: how long, what was done, what is left, where the data are."""
        uptime = time.monotonic() - self._began
        last = await look(self._settings)
        first = self._first.result() if self._first.done() and not self._first.cancelled() else None
        self._first.cancel()
        lines = [f"stopped after {duration(uptime)}"]
        if first is not None and last is not None:
            done = {topic: _since(first, last, topic) for topic in ("frames", "risk_events", "dead_letters")}
            lines[0] += (
                f": {done['frames']} frames taken, {done['risk_events']} events, {done['dead_letters']} dead letters"
            )
        if last is not None:
            lines.append(left(last))
        else:
            lines.append("the broker did not answer: what is left was not counted")
        return [*lines, f"data stay in {self._settings.data_dir.absolute()}"]


async def look(settings: "Settings", *, count: bool = True) -> "Survey | None":
    """One look at the log; None where the broker does not answer in time."""
    from aiokafka.errors import KafkaError

    from streams.kafka import Kafka
    from streams.survey import survey

    try:
        async with asyncio.timeout(_COUNT_S):
            return await survey(Kafka(settings.kafka), count=count)
    except (KafkaError, OSError, TimeoutError):
        return None


def left(look: "Survey", *only: str) -> str:
    """What stands before the stages (or before some only), as a sentence."""
    waiting = {
        stage: sum(position.behind.records for position in positions)
        for stage, positions in look.positions.items()
        if not only or stage in only
    }
    behind = ", ".join(f"{count} before {stage}" for stage, count in waiting.items() if count)
    if not behind:
        return "nothing was left in the queue"
    return f"left in the queue: {behind}; the next start goes on with them"


def duration(seconds: float) -> str:
    """A time span as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {seconds % 60:.0f} s"


def in_short(state: dict[str, Any]) -> str:
    """What a supervisor runs, in a line."""
    processes = state["processes"]
    others = [f"{name} is {process['state']}" for name, process in processes.items() if process["state"] != "ready"]
    return f"{len(processes) - len(others)} processes run" + "".join(f"; {other}" for other in others)


def _show_ready(console: Console, processes: dict[str, Any], shown: set[str], elapsed: float) -> None:
    for name, process in processes.items():
        if process["state"] == "ready" and name not in shown:
            shown.add(name)
            port = f"  port {process['port']}" if process["port"] else ""
            line = Text.assemble("  ", (f"{name:<12}", "bold"), ("ready", "green"), f" after {elapsed:4.1f} s{port}")
            console.print(line, soft_wrap=True)


def _progress(processes: dict[str, Any]) -> str:
    coming = [name for name, process in processes.items() if process["state"] != "ready"]
    if not processes:
        return "starting ..."
    return f"starting {', '.join(coming)} ..." if coming else "making topics and tables ..."


def _reason(process: dict[str, Any]) -> str:
    return printable(next(iter(str(process.get("reason") or "was restarted").splitlines())))


def _since(first: "Survey", last: "Survey", topic: str) -> str:
    if topic not in last.records:
        return "0"
    end = last.records[topic]
    start = first.records.get(topic)
    # Retention may have taken older records meanwhile: fewer than none were not made.
    count = max(0, end.records - (start.records if start is not None else 0))
    exact = end.exact and (start is None or start.exact)
    return str(count) if exact else f"about {count}"


def _now() -> str:
    return time.strftime("%H:%M:%S")

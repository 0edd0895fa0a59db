"""The installation that is tormented: `rewatch up` as it is, with a proxy before the broker and one before the LLM.

Each server can be held down after it was killed: then the supervisor's restart waits at a gate.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from aiokafka.errors import KafkaError

from infra.config import Settings
from infra.installation import Installation
from infra.local.process import Process, ProcessSpec, StartError, free_port
from infra.models import library
from streams.kafka import Kafka
from streams.survey import survey
from tests.chaos.kafka_proxy import KafkaProxy
from tests.chaos.llm_proxy import LlmProxy
from tests.e2e.installation import settings_for

CAMERAS = ("north-yard", "south-yard", "west-gate")

# A process that is down comes back within a few restarts' backoff.
_BACK_S = 90.0

# One more worker joins in so long, or not at all: its broker may be away for another fault's sake.
_JOIN_S = 120.0

# The tenth process of a stage has no metrics port of its own: these begin below it.
_FIRST_MORE = 1
_LAST_MORE = 8


class NotInflictedError(Exception):
    """A fault could not be inflicted; the message says why."""


class Site:
    """One installation, and the hands to hurt it with."""

    def __init__(self, settings: Settings, installation: Installation, kafka: KafkaProxy, llm: LlmProxy) -> None:
        self.settings = settings
        self.installation = installation
        self.kafka = kafka
        self.llm = llm
        self._gates: dict[str, asyncio.Event] = {}
        self._more = _FIRST_MORE
        self.kills: Counter[str] = Counter()
        """SIGKILLs that reached a live process, by its name."""

    @property
    def log_dir(self) -> Path:
        """Where the broker keeps its segments."""
        return self.settings.data_dir.resolve() / "kafka" / "log"

    @property
    def session_s(self) -> float:
        """After how long a silent member is out of its group."""
        return self.settings.kafka.session_timeout_ms / 1000

    async def pid(self, name: str) -> int:
        """The process id; waits for a process that is just down.

        Raises:
            NotInflictedError: it does not come back.
        """
        try:
            async with asyncio.timeout(_BACK_S):
                while True:
                    pid = self.installation.stack.supervisor.pid(name)
                    if pid is not None and _lives(pid):
                        return pid
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise NotInflictedError(f"{name} was down for {_BACK_S:g} s") from None

    async def signal(self, name: str, number: signal.Signals) -> int:
        """Send it; whom it reached, which is a live process.

        Raises:
            NotInflictedError: there is none.
        """
        while True:
            pid = await self.pid(name)
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it ended by itself in this moment: its successor is meant
                await asyncio.sleep(0.05)
                continue
            if number == signal.SIGKILL:
                self.kills[name] += 1
            return pid

    def ended_by_themselves(self) -> dict[str, int]:
        """How often processes were restarted without having been killed here, by name; zeros left out."""
        processes = self.installation.stack.supervisor.state()["processes"]
        own = {name: told["restarts"] - self.kills[name] for name, told in processes.items()}
        return {name: count for name, count in sorted(own.items()) if count > 0}

    def hold_down(self, server: str) -> None:
        """From now on the server is not started again."""
        self._gates[server].clear()

    def let_up(self, server: str) -> None:
        """It may be started again."""
        self._gates[server].set()

    async def gone(self, pid: int) -> None:
        """Wait until the process is no more."""
        while _lives(pid):
            await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def another(self, stage: str) -> AsyncIterator[Process]:
        """One more worker of the stage, a member of its group inside the block; SIGTERM at the end.

        Raises:
            NotInflictedError: it could not join, or ended before it was told to.
        """
        index, self._more = self._more, self._more + 1 if self._more < _LAST_MORE else _FIRST_MORE
        spec = replace(self.installation._spec(stage, index, index + 1), ready_timeout=_JOIN_S)
        process = Process(spec, self.installation.stack.data_dir / "logs")
        try:
            try:
                await process.start()
            except StartError as error:
                raise NotInflictedError(str(error).split(". ", 1)[0]) from error
            yield process
            if process.returncode is not None:
                raise NotInflictedError(f"{spec.name} ended by itself with code {process.returncode}")
        finally:
            await process.stop()
            if spec.cleanup is not None:
                spec.cleanup()

    async def behind(self) -> dict[str, int] | None:
        """Records before each stage; None where the broker does not tell."""
        try:
            async with asyncio.timeout(20):
                look = await survey(Kafka(self.settings.kafka), count=False)
        except (KafkaError, OSError, TimeoutError):
            return None
        return {stage: sum(p.behind.records for p in positions) for stage, positions in look.positions.items()}

    def gated(self, spec: ProcessSpec) -> ProcessSpec:
        """The server's description with a gate before each start."""
        gate = self._gates[spec.name] = asyncio.Event()
        gate.set()
        prepare = spec.prepare

        async def wait() -> None:
            await gate.wait()
            if prepare is not None:
                await prepare()

        return replace(spec, prepare=wait)


async def _exported(settings: Settings, say: Callable[[str], None]) -> None:
    """Export the detector, as an installation does in its first minutes.

    Until then each start of detect imports torch: 18 s on two busy cores, and that once.
    """
    say("exporting the detector")
    folder = library.resolve(settings.detector.model_path, "detector", settings.data_dir)
    cache = settings.data_dir / "cache" / "detector"
    command = ("-m", "processors.detect.export", folder, str(cache), "--threads", str(settings.detector.threads))
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdin=asyncio.subprocess.PIPE)
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise StartError(f"the detector's export ended with code {process.returncode}")


def _lives(pid: int) -> bool:
    """Whether the process is there, and not only what is left of it until its parent has looked."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.asynccontextmanager
async def site(
    directory: Path, patch: pytest.MonkeyPatch, say: Callable[[str], None] = lambda _: None, **more: str
) -> AsyncIterator[Site]:
    """A running installation below the directory. `more`: settings by their names in the environment."""
    settings = settings_for(directory, patch, **more)
    broker, inner = settings.local.kafka_port, free_port()
    async with KafkaProxy(broker).running() as kafka, LlmProxy(settings.local.llama_port, CAMERAS).running() as llm:
        # The children's way; this process's own settings still name the servers, so that they are started here.
        patch.setenv("REWATCH_KAFKA__BOOTSTRAP_SERVERS", f"127.0.0.1:{kafka.port}")
        patch.setenv("REWATCH_LLM__URL", llm.url)
        installation = Installation(settings)
        made = Site(settings, installation, kafka, llm)
        stack = installation.stack
        # Clients are sent to the proxy; the broker's talk with itself (transaction markers) is no client's.
        controller = stack._broker._controller_port
        stack._broker._settings = {
            "listeners": f"PLAINTEXT://127.0.0.1:{broker},INNER://127.0.0.1:{inner},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{kafka.port},INNER://127.0.0.1:{inner}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,INNER:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "INNER",
        }
        specs = stack._specs

        async def gated() -> list[ProcessSpec]:
            return [made.gated(spec) for spec in await specs()]

        stack._specs = gated  # type: ignore[method-assign]
        # Whoever is killed again and again within a minute of its start is given up; here that is not its fault.
        stack.supervisor._max_restarts = 1_000_000
        await _exported(settings, say)
        say("starting the installation")
        async with installation:
            try:
                yield made
            finally:
                for gate in made._gates.values():
                    gate.set()

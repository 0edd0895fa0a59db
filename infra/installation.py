"""One installation on this machine: the servers that are not elsewhere, and the processes of every stage.

What `rewatch up` and `rewatch demo` run. Every child is supervised; data stay under `data_dir`.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from infra import topology
from infra.config import Settings
from infra.local.llama import LlamaSettings
from infra.local.process import BEHIND, ProcessSpec
from infra.local.stack import LocalStack
from processors.sink.store import ClickHouseStore
from schemas import prompts
from streams.admin import ensure_topics
from streams.control import Prompts
from streams.kafka import Kafka
from streams.liveness import STALL_S, read_report

# A stage loads its model (torch's import alone takes up to 9 s on a cold disk) and waits for the broker, its topics and
# its group before it is ready: 120 s and more were seen on a machine that was busy with much else. To give up the
# first start of one is to give up everything.
_READY_S = 600.0


class Installation:
    """An async context manager: inside it everything that the settings ask for runs."""

    def __init__(self, settings: Settings, config: Path | None = None) -> None:
        self.settings = settings
        self._config = config
        self.stack = LocalStack(
            settings.data_dir,
            kafka_port=settings.local.kafka_port,
            clickhouse_port=settings.local.clickhouse_port,
            llama=llama_settings(settings) if settings.local_llm else None,
            without=[
                name
                for name, local in (("kafka", settings.local_kafka), ("clickhouse", settings.local_clickhouse))
                if not local
            ],
        )

    async def __aenter__(self) -> Self:
        # Stages bear any start order: they wait for what is not there yet, topics, tables and models included.
        await self.stack.start(*self._specs())
        try:
            await self.prepare()
        except BaseException:
            await self.stack.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.stop()

    async def prepare(self) -> None:
        """Topics and tables as this version has them; safe to repeat."""
        kafka = Kafka(self.settings.kafka)
        await ensure_topics(kafka)
        await Prompts(kafka).register(prompts.default(), "the version that comes with the product")
        store = ClickHouseStore(self.settings.clickhouse)
        try:
            await store.migrate()
        finally:
            await store.close()

    def _specs(self) -> list[ProcessSpec]:
        return [
            self._spec(name, index, topology.processes(self.settings, name))
            for name in topology.PROCESSES
            for index in range(topology.processes(self.settings, name))
        ]

    def _spec(self, stage: str, index: int, count: int) -> ProcessSpec:
        name = stage if count == 1 else f"{stage}-{index + 1}"
        status = (self.settings.data_dir / "status" / f"{name}.json").resolve()
        config = ["--config", str(self._config)] if self._config else []
        metrics = str(topology.metrics_port_of(self.settings, stage, index))
        needs = {"kafka": self.settings.local_kafka and stage != "gateway"}
        return ProcessSpec(
            name=name,
            argv=[
                *(sys.executable, "-m", "infra.worker", stage),
                *("--status", str(status), "--metrics-port", metrics, *config),
            ],
            env={"PYTHONUNBUFFERED": "1"},
            needs=tuple(need for need, local in needs.items() if local),
            patient=True,
            ready=lambda: _ready(stage, status),
            stalled=Watchdog(status).stalled,
            nice=BEHIND if stage == "sink" else 0,
            cleanup=lambda: status.unlink(missing_ok=True),
            ready_timeout=_READY_S,
        )


class Watchdog:
    """Why the supervisor should restart a stage: it says so itself, or has stopped saying anything.

    Silence is measured by the monotonic clock: when the wall clock is set, or a laptop wakes, nobody has been silent.
    """

    def __init__(self, status: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._status = status
        self._clock = clock
        self._touched = 0
        self._heard_at = clock()

    async def stalled(self) -> str | None:
        """The reason, or None while it lives or says what it waits on."""
        report = read_report(self._status)
        if report is None:
            return None
        touched = self._status.stat().st_mtime_ns  # also where the disk has no room for a report
        if touched != self._touched:
            self._touched, self._heard_at = touched, self._clock()
        silent = self._clock() - self._heard_at
        if silent > STALL_S:
            return f"its loop has not ticked for {silent:.0f} s"
        return report["stall"] if isinstance(report["stall"], str) else None


async def _ready(stage: str, status: Path) -> bool:
    """A stage is ready once it is a member of its group; a door once it listens, and only then it reports."""
    report = read_report(status)
    return bool(report and _runs(int(report["pid"])) and (stage in topology.DOORS or report["generation"] >= 0))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def llama_settings(settings: Settings) -> LlamaSettings:
    """How the embedded llama.cpp server runs, from the `llm:` section."""
    llm = settings.llm
    return LlamaSettings(
        model=topology.analyst(settings),
        port=settings.local.llama_port,
        ctx=llm.context_size,
        parallel=llm.slots,
        threads=llm.threads,
        gpu_layers=llm.gpu_layers,
        prompt_cache=llm.prompt_cache,
        seed=llm.seed,
        api_key=llm.api_key.get_secret_value() if llm.api_key else "",
        server_path=llm.server_path,
    )

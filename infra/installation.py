"""One installation on this machine: the servers that are not elsewhere, and the processes of every stage.

What `rewatch up` and `rewatch demo` run. Every child is supervised; data stay under `data_dir`.
"""

import hashlib
import os
import re
import socket
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self

from infra import topology
from infra.config import Settings
from infra.fitting import start_if_it_fits
from infra.local.llama import LlamaSettings
from infra.local.process import BEHIND, ProcessSpec
from infra.local.stack import LocalStack
from infra.watchdog import Watchdog, either
from processors.analyze.settings import SLOTS
from processors.sink.store import ClickHouseStore
from schemas import prompts
from streams.admin import ensure_topics
from streams.kafka import Kafka
from streams.liveness import read_report
from streams.prompts import Prompts
from streams.retention import retain

# A stage loads its model (torch's import alone takes up to 9 s on a cold disk) and waits for the broker, its topics and
# its group before it is ready: 120 s and more were seen on a machine that was busy with much else. To give up the
# first start of one is to give up everything.
_READY_S = 600.0


class Installation:
    """An async context manager: inside it everything that the settings ask for runs."""

    def __init__(
        self, settings: Settings, config: Path | None = None, *, only: Collection[str] = topology.PROCESSES
    ) -> None:
        """Prepare; `only` names the processes of ours that may start. Where none of them judges there is no LLM."""
        self.settings = settings
        self._only = frozenset(only)
        self._config = config
        self.environment: dict[str, str] = {}
        """Settings that its processes have besides the file's, by their names in the environment."""
        self.stack = LocalStack(
            settings.data_dir,
            kafka_port=settings.local.kafka_port,
            kafka_secure=settings.local.kafka_secure,
            clickhouse_port=settings.local.clickhouse_port,
            llama=llama_settings(settings) if settings.local_llm and self._only & {"analyze", "replay"} else None,
            without=[
                name
                for name, local in (("kafka", settings.local_kafka), ("clickhouse", settings.local_clickhouse))
                if not local
            ],
        )

    async def __aenter__(self) -> Self:
        # Stages bear any start order: they wait for what is not there yet, topics, tables and models included.
        await start_if_it_fits(self.settings.clickhouse, self.stack.start(*self._specs()))
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
        await retain(kafka, self.settings.retention.topics_ms)
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
            if name in self._only
            for index in range(topology.processes(self.settings, name))
        ]

    def _spec(self, stage: str, index: int, count: int) -> ProcessSpec:
        name = stage if count == 1 else f"{stage}-{index + 1}"
        status = (self.settings.data_dir / "status" / f"{name}.json").resolve()
        config = ["--config", str(self._config)] if self._config else []
        metrics = str(topology.metrics_port_of(self.settings, stage, index))
        needs = {"kafka": self.settings.local_kafka and stage != "gateway"}
        reports = [status, topology.report_beside(status)] if stage == "analyze" else [status]
        return ProcessSpec(
            name=name,
            argv=[
                *(sys.executable, "-m", "infra.worker", stage),
                *("--status", str(status), "--metrics-port", metrics, *config),
                *("--member", member_name(self.settings, stage, index)),
            ],
            env={"PYTHONUNBUFFERED": "1", **self.environment},
            needs=tuple(need for need, local in needs.items() if local),
            patient=True,
            ready=lambda: _ready(stage, status),
            prepare=lambda: _forget_before(reports[1:]),
            stalled=either(*map(Watchdog, reports)),
            nice=BEHIND if stage in {"sink", "telemetry"} else 0,
            cleanup=lambda: _forget(reports),
            ready_timeout=_READY_S,
        )


def member_name(settings: Settings, stage: str, index: int) -> str:
    """What the process `index` of a stage, from 0, is called in the stage's group: at most 249 of Kafka's letters.

    Two installations can share a cluster and `kafka.system`, even a host name; a data directory they cannot share.
    """
    host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())[:100]
    place = hashlib.sha256(str(settings.data_dir.resolve()).encode()).hexdigest()[:8]
    return f"{settings.kafka.system[:100]}-{stage}-{host}-{place}-{index + 1}"


def strictly(settings: Settings) -> tuple[Settings, dict[str, str]]:
    """With an embedded LLM that gives the same answer to the same question: one slot, no prompt cache.

    What was set otherwise stays so. The second value is for `Installation.environment`: stages read settings of theirs.
    """
    strict = {"slots": 1, "prompt_cache": False} if settings.local_llm else {}
    unset = {name: value for name, value in strict.items() if name not in settings.llm.model_fields_set}
    llm = settings.llm.model_copy(update=unset)
    environment = {f"REWATCH_LLM__{name.upper()}": str(value).lower() for name, value in unset.items()}
    return settings.model_copy(update={"llm": llm}), environment


async def _forget_before(reports: Sequence[Path]) -> None:
    """What a predecessor that was killed said last is not about its successor, which takes a while to say something."""
    _forget(reports)


def _forget(reports: Sequence[Path]) -> None:
    for report in reports:
        report.unlink(missing_ok=True)


async def _ready(stage: str, status: Path) -> bool:
    """A stage is ready once it is a member of its group; the others report as soon as they are at work."""
    report = read_report(status)
    return bool(report and _runs(int(report["pid"])) and (stage not in topology.STAGES or report["generation"] >= 0))


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
        parallel=llm.slots or SLOTS,
        threads=llm.threads,
        gpu_layers=llm.gpu_layers,
        prompt_cache=llm.prompt_cache,
        seed=llm.seed,
        api_key=llm.api_key.get_secret_value() if llm.api_key else "",
        server_path=llm.server_path,
    )

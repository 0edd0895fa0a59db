"""What a replay needs on this machine: servers and processes that do not run here yet, for the time of a command.

Where `rewatch up` runs on the data directory its servers are used, and its analyze judges the units. Else the broker,
ClickHouse, the LLM server, the sink and a process `replay` start, those whose address is not set elsewhere. A live
stage never starts: what it left would be judged by accident.
"""

import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from infra import topology
from infra.config import Settings
from infra.installation import Installation, llama_settings, member_name, strictly
from infra.local import llama
from infra.local.process import BEHIND, ProcessSpec, accepts_connections, free_port
from infra.local.stack import LocalStack
from infra.local.supervisor import AlreadyRunningError, Supervisor, running
from infra.models import library
from infra.watchdog import Watchdog
from processors.analyze.llm import OpenAiLlm
from processors.analyze.port import Server
from processors.analyze.settings import LlmSettings
from processors.analyze.weights import WeightsDigest
from processors.replay.plan import Llm, PlanError
from processors.sink.store import ClickHouseStore
from streams.liveness import read_report
from streams.serving import SettingsError

_READY_S = 600.0
"""As `infra.installation` has it: a machine that is busy with much else takes minutes to import a stage."""

_TOLD_S = 5.0
"""What a server has to say which model it serves: it knows without looking."""

STRICT_FIX = (
    "a strict replay needs an LLM server with one slot and no prompt cache: stop `rewatch up` and try again, for then "
    "this command starts its own so; or set llm.slots: 1 and llm.prompt_cache: false, and start it again"
)


class Place:
    """Where a command works: the settings in force there, and a supervisor for what it starts besides."""

    def __init__(self, settings: Settings, config: Path | None, environment: dict[str, str]) -> None:
        self.settings = settings
        self.workers = 0
        """Processes `replay` of this command."""
        self._config = config
        self._environment = environment
        self._own: Supervisor | None = None
        self._shared: Supervisor | None = None
        self._mark = secrets.token_hex(4)

    async def start_workers(self, count: int) -> None:
        """Start so many processes that judge units, besides those that run.

        Raises:
            StartError: one cannot start.
        """
        specs = [self._worker(index) for index in range(self.workers, self.workers + count)]
        self.workers += count
        await self._start(*specs)

    async def start_llm(self, model: Path, port: int | None = None) -> str:
        """Start a server of another model beside the one that judges live windows; its base address.

        Raises:
            StartError: it cannot start.
        """
        own = llama_settings(self.settings)
        settings = replace(own, model=model, port=port or free_port(), api_key="")
        spec = llama.spec(settings, setting_name="another port")
        # As with workers: where live stages are at work on the same cores, theirs comes first.
        await self._start(replace(spec, name=f"llama-{settings.port}", nice=self._nice))
        return settings.url

    def use(self, supervisor: Supervisor) -> None:
        """What is started from now on belongs to this supervisor."""
        self._shared = supervisor

    async def stop(self) -> None:
        """Stop what this command started besides the installation."""
        if self._own is not None:
            await self._own.stop()

    async def _start(self, *specs: ProcessSpec) -> None:
        supervisor = self._shared
        if supervisor is None:
            if self._own is None:
                self._own = Supervisor(self.settings.data_dir / "replay" / self._mark)
                await self._own.start()
            supervisor = self._own
        await supervisor.add(*specs)

    @property
    def _nice(self) -> int:
        """Where live stages are at work on the same cores, theirs comes first."""
        return BEHIND if self._shared is None else 0

    def _worker(self, index: int) -> ProcessSpec:
        """A process `replay`, under a name in the group that neither `rewatch up` nor another command gives."""
        name = f"replay-{self._mark}-{index + 1}"
        status = (self.settings.data_dir / "status" / f"{name}.json").resolve()
        member = f"{member_name(self.settings, 'replay', index)}-{self._mark}"
        config = ["--config", str(self._config)] if self._config else []
        return ProcessSpec(
            name=name,
            argv=[
                *(sys.executable, "-m", "infra.worker", "replay", "--status", str(status)),
                *("--metrics-port", "0", "--member", member, *config),
            ],
            env={"PYTHONUNBUFFERED": "1", **self._environment},
            needs=("kafka",) if self._shared is not None and self.settings.local_kafka else (),
            patient=True,
            ready=lambda: _joined(status),
            stalled=Watchdog(status).stalled,
            nice=self._nice,
            cleanup=lambda: status.unlink(missing_ok=True),
            ready_timeout=_READY_S,
        )


@asynccontextmanager
async def store(settings: Settings) -> AsyncIterator[None]:
    """ClickHouse answers inside: started for the time where it is this machine's and nothing runs here.

    Raises:
        SettingsError: nothing was ever recorded here.
        StartError: it cannot start.
    """
    if not settings.local_clickhouse or running(settings.data_dir):
        yield
        return
    _recorded(settings)
    stack = LocalStack(
        settings.data_dir, kafka_port=0, clickhouse_port=settings.local.clickhouse_port, without=["kafka"]
    )
    try:
        await stack.start()
    except AlreadyRunningError:  # since this command looked
        yield
        return
    try:
        await _migrate(settings)
        yield
    finally:
        await stack.stop()


@asynccontextmanager
async def place(
    settings: Settings, config: Path | None, *, judging: bool, strict: bool = False, workers: int = 0
) -> AsyncIterator[Place]:
    """The broker, ClickHouse and the sink are there inside; with `judging` the LLM server, and who judges units.

    Args:
        settings: everything that is set.
        config: the file that they came from, for processes.
        judging: whether units are to be judged.
        strict: whether the same question must have the same answer: one slot, no prompt cache.
        workers: processes `replay` besides those that run.

    Raises:
        SettingsError: nothing was ever recorded here; or strict, and the server that runs is not.
        StartError: something cannot start.
    """
    here = running(settings.data_dir)
    if not judging and not (settings.local_kafka or settings.local_clickhouse):
        yield Place(settings, config, {})
        return
    if here:
        found = Place(settings, config, {})
        try:
            if judging:
                if strict:
                    await _require_strict(settings)
                # Every analyze judges units, too.
                judges = any(name.partition("-")[0] in {"analyze", "replay"} for name in here)
                await found.start_workers(workers if judges else max(1, workers))
            yield found
        finally:
            await found.stop()
        return
    _recorded(settings)
    environment: dict[str, str] = {}
    if strict:
        settings, environment = strictly(settings)
        if settings.local_llm and ((settings.llm.slots or 0) != 1 or settings.llm.prompt_cache):
            raise SettingsError("llm.slots and llm.prompt_cache are set otherwise: " + STRICT_FIX)
    only = ("sink", "replay") if judging else ("sink",)
    installation = Installation(settings, config, only=only)
    installation.environment.update(environment)
    async with installation:
        found = Place(settings, config, environment)
        found.use(installation.stack.supervisor)
        if judging:
            if strict and not settings.local_llm:
                await _require_strict(settings)
            await found.start_workers(max(1, workers))
        yield found


async def another_llm(where: Place, named: str) -> Llm:
    """The LLM that `--model` names, its server started here where it is a file.

    Raises:
        ModelError or PlanError: as `named_llm`.
        StartError: its server cannot start.
    """
    llm = named_llm(where.settings, named)
    return llm if llm.url else replace_llm(llm, await where.start_llm(Path(llm.model_path)))


def named_llm(settings: Settings, named: str) -> Llm:
    """The LLM that `--model` names: an address, a GGUF file or a name of the catalogue; a file has no address yet.

    Raises:
        ModelError: a name of the catalogue whose model is not on this machine.
        PlanError: no address of a server, or there is no such file.
    """
    if named.startswith(("http://", "https://")):
        try:
            asked = LlmSettings(url=named)
            hosts = [httpx.URL(url).host for url in asked.urls]
        except (ValueError, httpx.InvalidURL) as error:
            raise PlanError(f"--model {named}: no address of a server") from error
        if not all(hosts):
            raise PlanError(f"--model {named}: no address of a server")
        return Llm(url=asked.url)
    path = Path(library.resolve(named, "llm", settings.data_dir))
    if not path.is_file():
        raise PlanError(f"--model {named}: neither an address, nor a GGUF file, nor a name of `rewatch models ls`")
    return Llm(url="", model_path=str(path.resolve()))


def another_detector(settings: Settings, named: str) -> str:
    """The detector that `--detector` names: a name of the catalogue or a folder, as `detector.model_path` takes it.

    Raises:
        ModelError: a name of the catalogue whose model is not on this machine.
        PlanError: there is no such folder.
    """
    path = Path(library.resolve(named, "detector", settings.data_dir))
    if not path.is_dir():
        raise PlanError(f"--detector {named}: neither a model's folder, nor a name of `rewatch models ls`")
    return str(path.resolve())


async def again(where: Place, llm: Llm | None) -> Llm | None:
    """The plan's LLM, its server started again where it was one of ours and is gone; on its old port, if that is free.

    Whoever listens on the old port serves the plan's file, or is somebody else.

    Raises:
        StartError: it cannot start.
    """
    if llm is None or not llm.model_path:
        return llm
    host, _, port = llm.url.rpartition("//")[2].rpartition(":")
    if host != llama.HOST:
        return llm
    taken = await accepts_connections(host, int(port))
    if taken and await _serves(llm):
        return llm
    return replace_llm(llm, await where.start_llm(Path(llm.model_path), None if taken else int(port)))


def replace_llm(llm: Llm, url: str) -> Llm:
    """The same model at another address."""
    return Llm(url=url, model=llm.model, model_path=llm.model_path)


async def server(settings: Settings, llm: Llm | None) -> Server:
    """Who will judge, the digest of its weights where they can be read here.

    Raises:
        UnavailableError: it does not answer.
    """
    own = settings.llm
    weights: Path | None = topology.analyst(settings)
    if llm is not None:
        changed = {"url": llm.url, "model": llm.model, "model_path": llm.model_path or "demo", "api_key": None}
        own = LlmSettings.model_validate(dict(own) | changed)
        weights = Path(llm.model_path) if llm.model_path else None
    client = OpenAiLlm(own, WeightsDigest(weights) if weights is not None else None)
    try:
        return await client.server()
    finally:
        await client.close()


async def _serves(llm: Llm) -> bool:
    """Whether the server at the LLM's address says that it serves the LLM's file."""
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=_TOLD_S) as client:
            told = (await client.get(f"{llm.url}/props")).json()
    except (httpx.HTTPError, ValueError):
        return False
    return isinstance(told, dict) and told.get("model_path") == llm.model_path


async def _joined(status: Path) -> bool:
    """Whether it is a member of its group."""
    report = read_report(status)
    return report is not None and report["generation"] >= 0


async def _require_strict(settings: Settings) -> None:
    told = await server(settings, None)
    if told.slots != 1 or settings.llm.prompt_cache:
        raise SettingsError(
            f"{settings.llm.url} has {told.slots or 'an unknown number of'} slots, llm.prompt_cache is "
            f"{str(settings.llm.prompt_cache).lower()}: {STRICT_FIX}"
        )


async def _migrate(settings: Settings) -> None:
    own = ClickHouseStore(settings.clickhouse)
    try:
        await own.migrate()
    finally:
        await own.close()


def _recorded(settings: Settings) -> None:
    """Refuse to start servers over nothing: an empty store would only say that it is empty."""
    if settings.local_clickhouse and not (settings.data_dir / "clickhouse").is_dir():
        raise SettingsError(
            f"nothing was recorded in {settings.data_dir} (data_dir) yet: `rewatch demo` or `rewatch up` comes first"
        )

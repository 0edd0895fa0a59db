"""`rewatch doctor`: is everything here that the settings ask for, and what to do where it is not."""

import asyncio
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import httpx
import psutil
import typer
from aiokafka.errors import KafkaError
from rich.text import Text

from infra.cli.cameras import DEMO_DETECTOR
from infra.cli.output import NO, JsonFlag, console, explain, print_json, printable, working
from infra.cli.show import supervised
from infra.config import Settings
from infra.local.process import PortTakenError, require_free_port
from processors.analyze.llm import OpenAiLlm
from processors.detect.settings import DetectorSettings
from processors.store.queries import Queries
from schemas.migrations import MigrationError
from streams.errors import UnavailableError
from streams.kafka import Kafka
from streams.topics import TOPICS

Status = Literal["ok", "warning", "failed", "skipped"]

# Broker jars and log, ClickHouse, models: a first run takes 1 GB; below it the demo does not fit.
DISK_LEAST = 1 * 1024**3
DISK_LITTLE = 10 * 1024**3
# Resident: broker 0.34 GB, ClickHouse 0.5 GB, torch with a detector 0.8 GB, five small stages 0.4 GB (measured).
MEMORY_LEAST = 2 * 1024**3
# Ticks close windows 30 s after the last arrival: seconds of skew are noise there, and hours would never close one.
SKEW_MOST_S = 2.0
# An address that does not answer is given up after this, seconds.
PATIENCE_S = 10.0


class Check(NamedTuple):
    """One question and its answer."""

    name: str
    status: Status
    found: str
    fix: str = ""


class _Context(NamedTuple):
    settings: Settings
    running: dict[str, Any]
    """What the supervisor on this data directory says it runs, by process name; empty when there is none."""


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command()(doctor)


def doctor(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Check machine, services and settings; each problem comes with its fix. Exit code 1 when a check failed."""
    with working("checking ..."):
        checks = asyncio.run(examine(ctx.obj))
    if as_json:
        print_json({"ok": not _failed(checks), "checks": [check._asdict() for check in checks]})
    else:
        _print(checks)
    if _failed(checks):
        raise typer.Exit(NO)


async def examine(settings: Settings) -> list[Check]:
    """Every check, side by side; a check that breaks is a failed check."""
    context = _Context(settings, await asyncio.to_thread(supervised, settings.data_dir))
    checks: list[tuple[str, Callable[[_Context], Coroutine[Any, Any, list[Check]]]]] = [
        ("python", _python),
        ("memory", _memory),
        ("data_dir", _data_dir),
        ("images", _images),
        ("inbox", _inbox),
        ("ports", _ports),
        ("broker", _broker),
        ("clickhouse", _clickhouse),
        ("llm", _llm),
        ("detector", _detector),
    ]
    found = await asyncio.gather(*(_guarded(name, check(context)) for name, check in checks))
    return [check for group in found for check in group]


async def _guarded(name: str, check: Awaitable[list[Check]]) -> list[Check]:
    try:
        return await asyncio.wait_for(check, PATIENCE_S + 5)
    except TimeoutError:
        return [Check(name, "failed", "no answer in time", "look at the address in the settings, and at the service")]
    except Exception as error:  # noqa: BLE001 (a doctor reports what he meets, and goes on with the rest)
        return [
            Check(name, "failed", explain(error), "run with --verbose, and report this if the message does not help")
        ]


async def _python(_: _Context) -> list[Check]:
    # An older one could not have read this file: what is told is which one runs.
    return [Check("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")]


async def _memory(context: _Context) -> list[Check]:
    memory = psutil.virtual_memory()
    found = f"{_gb(memory.available)} free of {_gb(memory.total)}"
    if not context.running and memory.available < MEMORY_LEAST:
        fix = "stop other programs, or move the broker, ClickHouse or the LLM elsewhere (kafka., clickhouse., llm.)"
        return [Check("memory", "warning", found, fix)]
    return [Check("memory", "ok", found)]


async def _data_dir(context: _Context) -> list[Check]:
    path = context.settings.data_dir
    try:
        _probe(path)
    except OSError as error:
        fix = "give this user the right to write there, or set data_dir to another directory"
        return [Check("data_dir", "failed", f"{path.absolute()}: {error.strerror}", fix)]
    free = shutil.disk_usage(path).free
    found = f"{path.absolute()}, {_gb(free)} free"
    fix = "make room, or set data_dir to another disk"
    if free < DISK_LEAST:
        return [Check("data_dir", "failed", found, fix)]
    return [Check("data_dir", "warning" if free < DISK_LITTLE else "ok", found, fix if free < DISK_LITTLE else "")]


async def _images(context: _Context) -> list[Check]:
    root = context.settings.images_root
    try:
        if "://" in root:
            await asyncio.to_thread(_probe_url, root)
        else:
            _probe(Path(root))
    except Exception as error:  # noqa: BLE001 (each of fsspec's stores has its own errors)
        return [Check("images", "failed", f"{root}: {explain(error)}", "set images to a store that can be written")]
    return [Check("images", "ok", root)]


async def _inbox(context: _Context) -> list[Check]:
    folder = context.settings.ingest.folder
    if not folder.enabled:
        return [Check("inbox", "skipped", "ingest.folder.enabled is off")]
    root = folder.root
    if not root.exists():
        parent = next(p for p in root.absolute().parents if p.exists())
        if os.access(parent, os.W_OK):
            return [Check("inbox", "ok", f"{root}: made when ingest starts")]
        return [Check("inbox", "failed", f"{root} is not there", "make it, or set ingest.folder.root")]
    needed = os.R_OK | os.X_OK | (0 if folder.after == "leave" else os.W_OK)
    if not root.is_dir() or not os.access(root, needed):
        fix = "let this user read and write it, set ingest.folder.after: leave for a read-only folder, or another root"
        return [Check("inbox", "failed", f"{root} cannot be used (ingest.folder.after: {folder.after})", fix)]
    return [Check("inbox", "ok", str(root))]


async def _ports(context: _Context) -> list[Check]:
    settings = context.settings
    wanted = [
        ("kafka", "The embedded Kafka", settings.local.kafka_port, "local.kafka_port", settings.local_kafka),
        (
            "clickhouse",
            "The embedded ClickHouse",
            settings.local.clickhouse_port,
            "local.clickhouse_port",
            settings.local_clickhouse,
        ),
        ("llama", "The embedded llama.cpp server", settings.local.llama_port, "local.llama_port", settings.local_llm),
        (
            "ingest",
            "The upload endpoint",
            settings.ingest.upload.port,
            "ingest.upload.port",
            settings.ingest.upload.enabled,
        ),
    ]
    checks: list[Check] = []
    for process, what, port, setting, here in wanted:
        name = f"port {setting}"
        if not here or port == 0:
            checks.append(Check(name, "skipped", "not on this machine" if not here else "a free one is taken"))
        elif process in context.running:
            checks.append(Check(name, "ok", f"{port}, ours"))
        else:
            host = settings.ingest.upload.host if process == "ingest" else "127.0.0.1"
            try:
                require_free_port(host, port, what=what, setting=setting)
                checks.append(Check(name, "ok", f"{port}, free"))
            except PortTakenError as error:
                message, _, fix = str(error).partition(" Stop ")
                checks.append(Check(name, "failed", message, f"stop {fix}"))
    return checks


async def _broker(context: _Context) -> list[Check]:
    settings = context.settings
    if settings.local_kafka and "kafka" not in context.running:
        return [_not_running("broker")]
    kafka = Kafka(settings.kafka)
    where = settings.kafka.bootstrap_servers
    try:
        async with asyncio.timeout(PATIENCE_S), kafka.admin() as admin:
            cluster = await admin.describe_cluster()
            names = [name for name in await admin.list_topics() if name in TOPICS]
            described = await admin.describe_topics(names) if names else []
    except (KafkaError, OSError, TimeoutError) as error:
        fix = "start the broker, or correct kafka.bootstrap_servers (and kafka.security_protocol, kafka.sasl_*)"
        return [Check("broker", "failed", f"{where}: {explain(error)}", fix)]
    brokers = len(cluster["brokers"])
    checks = [Check("broker", "ok", f"{where}, {brokers} broker{'s' * (brokers != 1)}")]
    if settings.kafka.replication_factor > brokers:
        found = f"{settings.kafka.replication_factor} replicas on {brokers} brokers"
        checks.append(Check("replication", "failed", found, f"set kafka.replication_factor to {brokers} or less"))
    counts = {topic["topic"]: len(topic["partitions"]) for topic in described}
    return [*checks, _topics(settings, counts)]


def _topics(settings: Settings, counts: dict[str, int]) -> Check:
    if missing := sorted(set(TOPICS) - set(counts)):
        return Check("topics", "failed", f"missing: {', '.join(missing)}", "run `rewatch migrate`")
    wrong = {
        name: count
        for name, count in counts.items()
        if count != (1 if TOPICS[name].single else settings.kafka.partitions)
    }
    if wrong:
        found = ", ".join(f"{name} has {count} partitions" for name, count in sorted(wrong.items()))
        fix = f"set kafka.partitions back ({settings.kafka.partitions} now): it is fixed when a topic is made"
        return Check("topics", "failed", found, fix)
    return Check("topics", "ok", f"{len(counts)}, {settings.kafka.partitions} partitions")


async def _clickhouse(context: _Context) -> list[Check]:
    settings = context.settings
    if settings.local_clickhouse and "clickhouse" not in context.running:
        return [_not_running("clickhouse")]
    where = settings.clickhouse.url
    async with aclosing(Queries(settings.clickhouse)) as store:
        try:
            before = time.time()
            version, server_ms = await store.version_and_clock()
            after = time.time()
        except UnavailableError as error:
            fix = "start it, or correct clickhouse.url (and its user, password and database)"
            return [Check("clickhouse", "failed", str(error), fix)]
        checks = [Check("clickhouse", "ok", f"{where}, version {version}")]
        # The answer was made between the two readings: only what lies outside them is skew.
        skew = max(before - server_ms / 1000, server_ms / 1000 - after, 0.0)
        found = f"{skew:.1f} s between this machine and ClickHouse"
        if skew > SKEW_MOST_S:
            checks.append(Check("clock", "failed", found, "run NTP on both machines: windows close by wall time"))
        else:
            checks.append(Check("clock", "ok", found))
        try:
            pending = await store.pending_migrations()
        except MigrationError as error:
            fix = "run the version of rewatch that made it, or set clickhouse.database to another"
            return [*checks, Check("tables", "failed", str(error), fix)]
    if pending:
        checks.append(Check("tables", "failed", f"not migrated: {', '.join(pending)}", "run `rewatch migrate`"))
    else:
        checks.append(Check("tables", "ok", "as this version has them"))
    return checks


async def _llm(context: _Context) -> list[Check]:
    settings = context.settings
    if settings.local_llm and "llama" not in context.running:
        return [_not_running("llm")]
    llm = OpenAiLlm(settings.llm)
    try:
        async with asyncio.timeout(PATIENCE_S):
            server = await llm.server()
    except (UnavailableError, TimeoutError) as error:
        fix = "start the server, or correct llm.url and llm.api_key (NEMOTRON_URL, NEMOTRON_API_KEY)"
        return [Check("llm", "failed", str(error) or "no answer", fix)]
    finally:
        await llm.close()
    found = f"{settings.llm.url}, model {server.model}, {server.context_size} tokens, {server.slots or '?'} slots"
    room = server.context_size - settings.llm.max_completion_tokens
    # A window of one frame renders to about 400 tokens: less, and nothing but the shortest prompt fits.
    if room < 512:
        fix = "start the server with a larger context (llm.context_size), or lower llm.max_completion_tokens"
        return [Check("llm", "failed", f"{found}: {room} are left for the prompt", fix)]
    if 0 < server.slots < settings.llm.slots:
        fix = f"set llm.slots to {server.slots}, or start the server with --parallel {settings.llm.slots}"
        return [Check("llm", "warning", f"{found}: fewer than llm.slots ({settings.llm.slots})", fix)]
    return [Check("llm", "ok", found)]


async def _detector(context: _Context) -> list[Check]:
    detector = context.settings.detector
    if detector.url is not None:
        return [await _detector_service(detector, detector.url.rstrip("/"))]
    if detector.model_path == "demo":
        path = DEMO_DETECTOR
    else:
        path = Path(detector.model_path)
        if not path.exists() and not detector.model_path.startswith((".", "/", "~")):
            return [Check("detector", "ok", f"{detector.model_path}: a hub name, fetched when detect starts")]
    fix = "set detector.model_path (RTDETR_MODEL_PATH) to a directory with config.json and model.safetensors"
    if not (path / "config.json").is_file():
        return [Check("detector", "failed", f"no model at {path}", fix)]
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        return [Check("detector", "failed", f"no weights in {path}", fix)]
    return [Check("detector", "ok", detector.model_path)]


async def _detector_service(detector: DetectorSettings, url: str) -> Check:
    key = detector.api_key.get_secret_value() if detector.api_key else ""
    try:
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
            answer = await client.get(f"{url}/health", headers={"Authorization": f"Bearer {key}"} if key else {})
    except httpx.HTTPError as error:
        return Check("detector", "failed", f"{url}: {explain(error)}", "start it, or correct detector.url")
    if not answer.is_success:
        fix = "look at its log; set detector.api_key (RTDETR_API_KEY) where it asks for one"
        return Check("detector", "failed", f"{url}: HTTP {answer.status_code}", fix)
    return Check("detector", "ok", url)


def _not_running(name: str) -> Check:
    return Check(name, "skipped", "the embedded one does not run", "`rewatch up` starts it")


def _probe(directory: Path) -> None:
    """Write, flush and remove a file, as the stages will.

    Raises:
        OSError: it cannot be done.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())


def _probe_url(root: str) -> None:
    filesystem, path = fsspec.url_to_fs(f"{root.rstrip('/')}/.doctor-{uuid.uuid4().hex}")
    filesystem.pipe_file(path, b"x")
    filesystem.rm_file(path)


def _failed(checks: list[Check]) -> bool:
    return any(check.status == "failed" for check in checks)


def _print(checks: list[Check]) -> None:
    styles = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
    out = console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble((f"{check.status:<8}", styles[check.status]), f"{check.name:<{width}}  ")
        out.print(line + Text(printable(check.found)), soft_wrap=True)
        if check.fix:
            out.print(Text(f"{'':<{width + 10}}-> {check.fix}", style="italic"), soft_wrap=True)
    counts = {status: sum(check.status == status for check in checks) for status in styles}
    out.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


def _gb(size: float) -> str:
    return f"{size / 1024**3:.1f} GB"

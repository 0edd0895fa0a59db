"""Which stages there are, what each is made of, and how one is run in a process of its own (`rewatch run STAGE`).

Each stage is imported when it is built: torch alone takes seconds and 300 MB, and only detect needs it.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog
from aiokafka.errors import KafkaError

from infra.config import Settings
from infra.local.llama import threads_of
from infra.local.supervisor import running
from infra.models import library
from infra.stopping import StoppedError, unless
from processors.analyze.settings import LlmSettings
from processors.telemetry.driver import driver_found
from schemas.records import Replay, TopicMeta
from streams.admin import ensure_topics
from streams.claims import ClaimStore
from streams.control import Cameras, ControlTable
from streams.kafka import Kafka
from streams.liveness import Liveness
from streams.lives import Lives
from streams.metrics import Together
from streams.prompts import Prompts
from streams.scraping import Endpoint
from streams.stages import Stage
from streams.survey import READS

if TYPE_CHECKING:
    from processors.analyze.stage import AnalyzeStage
    from processors.detect.detector import Detector
    from processors.gateway.service import Service as Gateway
    from streams.host_faust import FaustHost
    from streams.host_raw import RawHost

log = structlog.get_logger(__name__)

STAGES = tuple(READS)
"""The stages with an input partition, in the order of the road."""

DOORS = ("ingest", "gateway")
"""What takes images in, and what shows the rest: they have no input partition, so no group to be a member of."""

BESIDE = ("telemetry",)
"""What stands beside the road and reads no topic, so it is no member of a group either."""

PROCESSES = (*DOORS, *(stage for stage in STAGES if stage != "replay"), *BESIDE, "replay")
"""Everything that `rewatch run` runs; the order decides the metrics' ports, so what is new comes last."""


def status_path(settings: Settings, stage: str) -> Path:
    """Where this process says how it is; `rewatch status` and the supervisor read it."""
    return settings.data_dir / "status" / f"{stage}-{os.getpid()}.json"


def report_beside(status: Path) -> Path:
    """Where the process of analyze, which reports in `status`, says how the replay stage in it is."""
    return status.with_name(f"{status.stem}+replay.json")


def cameras(settings: Settings, kafka: Kafka) -> Cameras:
    """The look-up of what is set for each camera."""
    return Cameras(kafka, settings.windows.record(), settings.time_zone)


def processes(settings: Settings, name: str) -> int:
    """How many processes of it `rewatch up` starts."""
    if name in DOORS:
        return 0 if name == "gateway" and not settings.gateway.enabled else 1
    if name == "telemetry":
        wanted = settings.telemetry.enabled
        return int(driver_found() if wanted is None else wanted)
    return int(getattr(settings.stages, name).processes)


def metrics_port_of(settings: Settings, name: str, index: int = 0) -> int:
    """Where the process `index` of a stage, from 0, serves its metrics."""
    return settings.metrics.port_of(PROCESSES.index(name), index)


async def run(
    settings: Settings,
    name: str,
    stop: asyncio.Event,
    status: Path,
    *,
    metrics_port: int | None = None,
    member: str | None = None,
) -> None:
    """Run one stage, a door or telemetry, until `stop` is set; say how it is in the `status` file.

    Args:
        settings: everything that is set.
        name: one of `PROCESSES`.
        stop: set it to end.
        status: the file that says how it is.
        metrics_port: where it serves its metrics, 0 for a free port; by default that of the stage's first process.
        member: the process's name in its stage's group: started again under it, it has its partitions back at once.

    Raises:
        TopicsError: the topics on the broker are not what the settings say.
        ModelError: a model cannot be loaded.
    """
    kafka = Kafka(settings.kafka)
    known, prompts, replays = cameras(settings, kafka), Prompts(kafka), ControlTable(kafka, "replays", Replay)
    # Importing and loading a model takes seconds, and so may the broker: neither waits for the other.
    loading = asyncio.to_thread(_load, settings, name, known, prompts, replays) if name in STAGES else None
    building = asyncio.create_task(loading) if loading is not None else None
    port = metrics_port_of(settings, name) if metrics_port is None else metrics_port
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(
            Endpoint(settings.metrics.model_copy(update={"port": port}), status.parent)
        )
        if name == "gateway":  # it shows what is away, so it waits for nothing
            await gateway(settings, kafka, known, status, endpoint).run(stop)
            return
        if name == "telemetry":  # what it reads is worth having without a broker, too
            from processors.telemetry.service import run as run_telemetry

            await run_telemetry(kafka, settings.telemetry, stop, status=status, endpoint=endpoint)
            return
        waits: list[str] = []
        # A door that reports is taken for one that listens.
        async with nullcontext() if building is None else _starting(name, status, waits):
            metas = await _topics(kafka, stop, waits)
            # Side by side: each reads its topic to the end, and a killed stage is to be back soon.
            lives = Lives(kafka)
            followed: list[AbstractAsyncContextManager[Any]]
            followed = [known.table.following(), prompts.table.following(), lives.following()]
            if name == "replay":
                followed.append(replays.following())
            try:
                await unless(stop, asyncio.gather(*map(stack.enter_async_context, followed)))
            except StoppedError:
                raise SystemExit(0) from None  # there is nothing to stop yet
        if building is None:
            from processors.ingest.service import run as run_ingest

            claims = ClaimStore(settings.images_root)
            epoch = metas["frames"].epoch
            await run_ingest(kafka, settings.ingest, known, claims, stop, epoch=epoch, status=status, endpoint=endpoint)
            return
        async with _starting(name, status, waits):
            stage, host_class = await building
        host = host_class(kafka, stage, epochs=lives, status=status, member=member)
        host.workers.liveness.metrics = endpoint.url
        told = Together()
        told.collectors.append(host.workers.collector)
        endpoint.registry.register(told)
        if name != "analyze":
            await host.run(stop)
            return
        from infra import rewatching

        beside = rewatching.Beside(settings, kafka, prompts, cast("AnalyzeStage", stage).judge, lives)
        after = host.workers.liveness
        await rewatching.together(
            stop, host.run, partial(beside.run, after=after, status=report_beside(status), member=member, told=told)
        )


def fixes(settings: Settings) -> dict[str, str]:
    """What to do in this installation when the `broker` or `clickhouse` is away."""
    start = "start it with `rewatch up`, or set"
    return {
        "broker": f"{start} kafka.bootstrap_servers" if settings.local_kafka else "`rewatch doctor` looks closer",
        "clickhouse": f"; {start} clickhouse.url" if settings.local_clickhouse else "",
    }


def expected(settings: Settings) -> dict[str, str]:
    """What `rewatch up` runs of this product here now, but the gateway, and where each logs; not what still starts."""
    return {
        stage: process["log"]
        for name, process in running(settings.data_dir).items()
        if (stage := name.partition("-")[0]) in {"ingest", *STAGES}
        and (process["state"] in {"ready", "backing off", "failed"} or process["restarts"])
    }


def gateway(settings: Settings, kafka: Kafka, known: Cameras, status: Path, endpoint: Endpoint) -> "Gateway":
    """The web door with the parts that the settings choose."""
    from processors.gateway.service import Service, build_source
    from processors.gateway.upload import Uploads

    upload = settings.ingest.upload
    source = build_source(
        kafka,
        settings.clickhouse,
        known,
        ClaimStore(settings.images_root),
        settings.data_dir,
        fixes=fixes(settings),
        expected=lambda: expected(settings),
        toys=library.demo_digests(),
    )
    uploads = Uploads(
        settings.gateway.ingest_url or upload.url,
        key=upload.api_key.get_secret_value() if upload.api_key is not None else None,
        certificate=upload.tls_cert_path if upload.with_tls else None,
        at_once=settings.gateway.max_uploads,
        timeout_s=settings.gateway.upload_timeout_s,
    )
    return Service(source, settings.gateway, uploads, status=status, endpoint=endpoint)


@asynccontextmanager
async def _starting(name: str, status: Path, waits: list[str]) -> AsyncIterator[None]:
    """Say in the status file that the stage starts, and on what it waits; its host says so from then on."""
    telling = asyncio.create_task(Liveness(name).tell(status, asyncio.Event(), lambda: waits))
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        status.unlink(missing_ok=True)


async def _topics(kafka: Kafka, stop: asyncio.Event, waits: list[str]) -> dict[str, TopicMeta]:
    """The topics' meta records, as soon as the broker answers; `waits` says that it is waited for."""
    said = ""
    while not stop.is_set():
        try:
            metas = await ensure_topics(kafka)
        except (KafkaError, OSError, TimeoutError) as error:
            waits[:] = [kafka.waiting_on]
            if str(error) != said:  # once is enough: a broker can take a minute to start
                said = str(error)
                log.warning("waiting", on="broker", why=kafka.away(error))
            await asyncio.sleep(0.5)
        else:
            waits.clear()
            return metas
    raise SystemExit(0)  # asked to stop before there was anything to stop


def build(settings: Settings, name: str, known: Cameras, prompts: Prompts, replays: ControlTable[Replay]) -> Stage:
    """The stage of that name, with the parts that the settings choose."""
    if name == "detect":
        from processors.detect.stage import DetectStage

        return DetectStage(detector(settings), ClaimStore(settings.images_root), settings.detector)
    if name == "batch":
        from processors.batch.stage import build as build_batch

        return build_batch(settings.windows.record(), known.window)
    if name == "enrich":
        from processors.enrich.stage import build as build_enrich

        return build_enrich(known.get)
    if name == "analyze":
        from processors.analyze.stage import build as build_analyze

        return build_analyze(
            judging(settings),
            prompt_of=prompts.of,
            weights=analyst(settings),
            conditions=conditions(settings),
        )
    if name == "replay":
        from infra import rewatching
        from processors.analyze.stage import build_judge

        judge = build_judge(judging(settings), weights=analyst(settings), conditions=conditions(settings))
        return rewatching.build(settings, replays, prompts, judge)
    if name == "sink":
        from processors.sink.stage import build as build_sink

        return build_sink(settings.clickhouse)
    raise ValueError(f"no such stage: {name}; there are {', '.join(PROCESSES)}")


def _load(
    settings: Settings, name: str, known: Cameras, prompts: Prompts, replays: ControlTable[Replay]
) -> "tuple[Stage, type[RawHost | FaustHost]]":
    """The stage, and what hosts it: seconds of imports each."""
    return build(settings, name, known, prompts, replays), _host(getattr(settings.stages, name).host)


def _host(name: str) -> "type[RawHost | FaustHost]":
    if name == "raw":
        from streams.host_raw import RawHost

        return RawHost
    from streams.host_faust import FaustHost

    return FaustHost


def detector(settings: Settings) -> "Detector":
    """The detector that the settings choose: a service, or a model in this process."""
    from processors.detect.http_detector import HttpDetector

    if settings.detector.url is not None:
        return HttpDetector(settings.detector)
    from processors.detect.runtimes import load

    path = library.resolve(settings.detector.model_path, "detector", settings.data_dir)
    return load(settings.detector, path, settings.data_dir / "cache" / "detector")


def analyst(settings: Settings) -> Path:
    """The LLM's weights, as the settings name them.

    Raises:
        ModelError: a model of the catalogue that is not on this machine.
    """
    return Path(library.resolve(settings.llm.model_path, "llm", settings.data_dir))


def judging(settings: Settings) -> LlmSettings:
    """The `llm:` section with what it leaves open decided by what is on this machine."""
    if settings.llm.live_alone is not None:
        return settings.llm
    return settings.llm.model_copy(update={"live_alone": settings.local_llm and not driver_found()})


def conditions(settings: Settings) -> dict[str, str]:
    """What the embedded server's answers do not tell: events carry it among the conditions of their making."""
    if not settings.local_llm:
        return {}
    return {"threads": str(threads_of(settings.llm.threads)), "gpu_layers": str(settings.llm.gpu_layers)}

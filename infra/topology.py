"""Which stages there are, what each is made of, and how one is run in a process of its own (`rewatch run STAGE`).

Each stage is imported when it is built: torch alone takes seconds and 300 MB, and only detect needs it.
"""

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from aiokafka.errors import KafkaError

from infra.config import Settings
from schemas.records import TopicMeta
from streams.admin import ensure_topics, epochs_of
from streams.claims import ClaimStore
from streams.control import Cameras, Prompts
from streams.kafka import Kafka
from streams.stages import Stage

if TYPE_CHECKING:
    from processors.detect.detector import Detector
    from streams.host_faust import FaustHost
    from streams.host_raw import RawHost

log = structlog.get_logger(__name__)

STAGES = ("detect", "batch", "enrich", "analyze", "sink")
"""The stages with an input partition, in the order of the road."""

PROCESSES = ("ingest", *STAGES)
"""Everything that `rewatch run` runs."""

DEMO_MODELS = Path(__file__).parent / "models" / "weights"


def status_path(settings: Settings, stage: str) -> Path:
    """Where this process says how it is; `rewatch status` and the supervisor read it."""
    return settings.data_dir / "status" / f"{stage}-{os.getpid()}.json"


def cameras(settings: Settings, kafka: Kafka) -> Cameras:
    """The look-up of what is set for each camera."""
    return Cameras(kafka, settings.windows.record(), settings.time_zone)


def processes(settings: Settings, name: str) -> int:
    """How many processes of it `rewatch up` starts."""
    return 1 if name == "ingest" else int(getattr(settings.stages, name).processes)


async def run(settings: Settings, name: str, stop: asyncio.Event, status: Path) -> None:
    """Run one stage, or ingest, until `stop` is set; say how it is in the `status` file.

    Raises:
        TopicsError: the topics on the broker are not what the settings say.
        ModelError: a model cannot be loaded.
    """
    kafka = Kafka(settings.kafka)
    known, prompts = cameras(settings, kafka), Prompts(kafka)
    # Importing and loading a model takes seconds, and so may the broker: neither waits for the other.
    building = (
        None if name == "ingest" else asyncio.create_task(asyncio.to_thread(build, settings, name, known, prompts))
    )
    metas = await _topics(kafka, stop)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(known.table.following())
        await stack.enter_async_context(prompts.table.following())
        if building is None:
            from processors.ingest.service import run as run_ingest

            claims = ClaimStore(settings.images_root)
            epoch = metas["frames"].epoch
            await run_ingest(kafka, settings.ingest, known, claims, stop, epoch=epoch, status=status)
            return
        stage = await building
        await _host(getattr(settings.stages, name).host)(kafka, stage, epochs=epochs_of(metas), status=status).run(stop)


async def _topics(kafka: Kafka, stop: asyncio.Event) -> dict[str, TopicMeta]:
    """The topics' meta records, as soon as the broker answers."""
    while not stop.is_set():
        try:
            return await ensure_topics(kafka)
        except (KafkaError, OSError, TimeoutError) as error:
            log.warning("waiting", on="broker", why=str(error))
            await asyncio.sleep(0.5)
    raise SystemExit(0)  # asked to stop before there was anything to stop


def build(settings: Settings, name: str, known: Cameras, prompts: Prompts) -> Stage:
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
            settings.llm,
            prompt_of=prompts.of,
            weights=analyst(settings),
            conditions=conditions(settings),
        )
    if name == "sink":
        from processors.sink.stage import build as build_sink

        return build_sink(settings.clickhouse)
    raise ValueError(f"no such stage: {name}; there are {', '.join(PROCESSES)}")


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
    from processors.detect.torch_detector import TorchDetector

    path = settings.detector.model_path
    return TorchDetector(settings.detector, str(DEMO_MODELS / "detector") if path == "demo" else path)


def analyst(settings: Settings) -> Path:
    """The LLM's weights, as the settings name them."""
    path = settings.llm.model_path
    return DEMO_MODELS / "analyst.gguf" if path == "demo" else Path(path)


def conditions(settings: Settings) -> dict[str, str]:
    """What the embedded server's answers do not tell: events carry it among the conditions of their making."""
    if not settings.local_llm:
        return {}
    return {"threads": str(settings.llm.threads or "auto"), "gpu_layers": str(settings.llm.gpu_layers)}

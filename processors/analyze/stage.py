"""analyze as a map stage: a context in, its risk event out."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog
from structlog.contextvars import bound_contextvars

from processors.analyze.judge import Judge
from processors.analyze.llm import OpenAiLlm
from processors.analyze.port import Llm
from processors.analyze.settings import LlmSettings
from processors.analyze.weights import WeightsDigest
from schemas import ids, prompts
from schemas.prompts import PromptVersion
from schemas.records import Context
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import Emit, Incoming

log = structlog.get_logger(__name__)


class AnalyzeStage:
    """A context in, its risk event out."""

    name = "analyze"
    inputs: tuple[str, ...] = ("contexts",)
    outputs: tuple[str, ...] = ("risk_events",)

    def __init__(self, judge: Judge, prompt_of: Callable[[str], PromptVersion], *, deadline_s: float) -> None:
        self.judge = judge
        self._prompt_of = prompt_of
        self.metrics = judge.metrics
        # A window and the canary that must answer before it is blamed, three times over at worst, besides those
        # that wait for a slot before it: without that much patience a slow model would be taken for a stall.
        self.patience_s = 2 * 3 * deadline_s

    @property
    def concurrency(self) -> int:
        """As many as the servers have slots, as far as they are known."""
        return self.judge.gate.slots

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        """The window's event, under the prompt that is active for its camera when it is taken up."""
        try:
            context = codec.decode(record, Context)
        except codec.DecodeError as error:
            raise UnprocessableError(str(error)) from error
        ids_of = {"batch": context.batch_id, "camera": context.camera_id, "_event": ids.event_id(context.batch_id)}
        # Whatever is logged on the way to the verdict (a failed attempt, a repair, the server away) tells of it.
        with bound_contextvars(**ids_of):
            event = await self.judge.judge(context, self._prompt_of(context.camera_id), key=record.origin)
            self.metrics.judged(event)
            log.info(
                "judged",
                risk_level=event.risk_level,
                score=event.risk_score,
                model=event.model,
                seconds=round(event.inference_ms / 1000, 3),
            )
        return [codec.emit("risk_events", event)]

    async def close(self) -> None:
        """Let go of the server's connections."""
        await self.judge.close()


def build(
    settings: LlmSettings,
    *,
    llm: Llm | None = None,
    prompt_of: Callable[[str], PromptVersion] = lambda _: prompts.default(),
    weights: Path | None = None,
    conditions: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.time,
) -> AnalyzeStage:
    """The stage; `prompt_of`: the prompt version that is active for a camera; the rest as for `build_judge`."""
    judge = build_judge(settings, llm=llm, weights=weights, conditions=conditions, clock=clock)
    return AnalyzeStage(judge, prompt_of, deadline_s=settings.deadline_s)


def build_judge(
    settings: LlmSettings,
    *,
    llm: Llm | None = None,
    weights: Path | None = None,
    conditions: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.time,
) -> Judge:
    """What judges windows.

    Args:
        settings: The `llm:` section.
        llm: Another LLM than the servers that the settings name.
        weights: The model's file, whose SHA-256 every event names; without it `llm.model_path`, if that is a file.
        conditions: What the server does not tell of itself (threads, device), for the events' conditions.
        clock: Wall time, seconds since the Unix epoch.
    """
    if weights is None and settings.model_path != "demo":
        weights = Path(settings.model_path)
    digest = WeightsDigest(weights) if weights is not None else None
    llms = [llm] if llm is not None else [OpenAiLlm(settings, digest, url) for url in settings.urls]
    return Judge(llms, settings, conditions=conditions, wall=lambda: int(clock() * 1000))

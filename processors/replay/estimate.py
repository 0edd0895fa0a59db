"""What a replay will take: time, tokens and GPU seconds, from what the same work took before. Pure but for `measure`.

Nothing is guessed: where no verdict and no detection was ever recorded, the answer is that it is not known.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from processors.replay.plan import Plan
from processors.store.queries import Queries

ENOUGH = 20
"""Verdicts under a prompt from which its own means are taken, not those of all: their mean then lies within some
10 % of the long run's (completions of one prompt vary by 40 %)."""

CUT_PER_S = 20_000.0
"""Recorded frames that are cut into windows in a second, on one core of two years ago (`make bench`, threshold_replay):
a bound, so that a cut that was never made has an estimate."""

_NEWEST = 2_000

# Of the newest verdicts, so that a model that was changed last year says nothing.
_VERDICTS = """
    SELECT prompt_digest, model, count() AS seen, avg(inference_ms) AS ms, avg(prompt_tokens) AS prompt_tokens,
        avg(completion_tokens) AS completion_tokens
    FROM
    (
        SELECT prompt_digest, model, inference_ms, prompt_tokens, completion_tokens, judged_at FROM risk_events FINAL
        UNION ALL
        SELECT prompt_digest, model, inference_ms, prompt_tokens, completion_tokens, judged_at FROM replay_events FINAL
        WHERE NOT reused
        ORDER BY judged_at DESC LIMIT {newest:UInt32}
    )
    GROUP BY prompt_digest, model
"""
_DETECTIONS = """
    SELECT model, count() AS seen, avg(inference_ms) AS ms FROM
    (SELECT model, inference_ms FROM detections ORDER BY detected_at DESC LIMIT {newest:UInt32})
    GROUP BY model
"""


class Rate(NamedTuple):
    """What one window under one prompt, or one frame, took on the mean."""

    of: str
    """Prompt digest, or empty for a detector."""
    model: str
    seen: int
    """How many it was measured on."""
    ms: float
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0


class Estimate(NamedTuple):
    """What a replay will take; None: nothing was ever measured."""

    windows: int
    reused: int
    """Windows of those whose verdict is there already."""
    frames: int
    prompt_tokens: int | None
    completion_tokens: int | None
    llm_s: float | None
    """Seconds of one slot of the LLM."""
    detector_s: float | None
    seconds: float | None
    """From the start to the end with nothing else going on."""
    by: str
    """What it was measured on, for people."""


def estimate(
    plan: Plan, verdicts: Sequence[Rate], detections: Sequence[Rate], *, reused: int = 0, slots: int = 1
) -> Estimate:
    """What the plan's windows and frames will take.

    Args:
        plan: `windows` and `frames` say how many.
        verdicts: what windows took, by prompt and model.
        detections: what frames took, by model.
        reused: of the windows, those that will not be judged.
        slots: windows that are judged at once when the replay has the LLM for itself.
    """
    own = [rate for rate in verdicts if rate.of == plan.change.prompt]
    enough = sum(rate.seen for rate in own) >= ENOUGH
    one = _mean(own if enough else verdicts)
    look = _mean([rate for rate in detections if rate.model == plan.change.detector] or detections)
    judged = max(0, plan.windows - reused)
    llm_s = None if one is None else judged * one.ms / 1000
    detector_s = 0.0 if not plan.change.detector else None if look is None else plan.frames * look.ms / 1000
    share = max(1, round(plan.share * slots))
    seconds = None
    if llm_s is not None and detector_s is not None:
        seconds = llm_s / share + detector_s + (plan.frames / CUT_PER_S if plan.change.entry != "contexts" else 0.0)
    return Estimate(
        windows=plan.windows,
        reused=reused,
        frames=plan.frames,
        prompt_tokens=None if one is None else round(judged * one.prompt_tokens),
        completion_tokens=None if one is None else round(judged * one.completion_tokens),
        llm_s=llm_s,
        detector_s=detector_s,
        seconds=seconds,
        by=_by(one, own=enough and bool(plan.change.prompt)),
    )


async def measure(store: Queries) -> tuple[list[Rate], list[Rate]]:
    """What windows took, by prompt and model, and frames, by model: of the newest records of each.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    verdicts = [
        Rate(row["prompt_digest"], row["model"], *_numbers(row), row["prompt_tokens"], row["completion_tokens"])
        for row in await store.rows(_VERDICTS, newest=_NEWEST)
    ]
    return verdicts, [Rate("", row["model"], *_numbers(row)) for row in await store.rows(_DETECTIONS, newest=_NEWEST)]


def _numbers(row: Mapping[str, Any]) -> tuple[int, float]:
    return row["seen"], row["ms"]


def _mean(rates: Sequence[Rate]) -> Rate | None:
    """The mean of all that the rates were measured on."""
    count = sum(rate.seen for rate in rates)
    if not count:
        return None

    def mean(values: Sequence[float]) -> float:
        return sum(value * rate.seen for value, rate in zip(values, rates, strict=True)) / count

    return Rate(
        of="",
        model=", ".join(sorted({rate.model for rate in rates})),
        seen=count,
        ms=mean([rate.ms for rate in rates]),
        prompt_tokens=mean([rate.prompt_tokens for rate in rates]),
        completion_tokens=mean([rate.completion_tokens for rate in rates]),
    )


def _by(rate: Rate | None, *, own: bool) -> str:
    if rate is None:
        return "nothing was ever judged here"
    return f"{rate.seen} verdicts {'under this prompt' if own else 'of late'}, by {rate.model}"

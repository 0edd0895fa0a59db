"""What a replay will take: the arithmetic, and the measuring of recorded verdicts on the real ClickHouse engine."""

from contextlib import aclosing

import msgspec
import pytest

from processors.replay.estimate import CUT_PER_S, ENOUGH, Rate, estimate, measure
from processors.replay.plan import Change, Plan
from processors.store.queries import Queries
from tests.processors.planner_kit import DEFAULT, OTHER, replay_event, verdict
from tests.processors.recorded_kit import judged, on_log, put, windows

pytest_plugins = ["tests.clickhouse_kit"]

OLD = Rate("old", "analyst", 100, 1000.0, 200.0, 50.0)
NEW = Rate("new", "analyst", ENOUGH, 4000.0, 300.0, 100.0)
SIGHTS = [Rate("", "r18", 500, 50.0), Rate("", "r101", 10, 400.0)]


def plan(windows: int, frames: int = 0, share: float = 1.0, **change: object) -> Plan:
    return Plan(kind="change", change=Change(**change), windows=windows, frames=frames, share=share)


def test_a_prompt_that_was_judged_with_often_enough_is_measured_by_itself() -> None:
    took = estimate(plan(30, prompt="new"), [OLD, NEW], SIGHTS, slots=2)
    assert (took.prompt_tokens, took.completion_tokens) == (9000, 3000)
    assert took.llm_s == pytest.approx(120)
    assert took.seconds == pytest.approx(60), "two at once"
    assert took.by == f"{ENOUGH} verdicts under this prompt, by analyst"


def test_another_prompt_takes_what_all_took_on_the_mean() -> None:
    took = estimate(plan(12, prompt="unknown"), [OLD, NEW._replace(seen=ENOUGH - 1)], SIGHTS)
    mean_ms = (100 * 1000 + 19 * 4000) / 119
    assert took.llm_s == pytest.approx(12 * mean_ms / 1000)
    assert took.prompt_tokens == round(12 * (100 * 200 + 19 * 300) / 119)
    assert took.by == "119 verdicts of late, by analyst"


def test_what_is_reused_costs_nothing_and_a_share_takes_longer() -> None:
    half = estimate(plan(40, share=0.5, prompt="old"), [OLD], [], reused=30, slots=4)
    assert half.llm_s == pytest.approx(10)
    assert half.seconds == pytest.approx(5), "two of four slots"
    assert estimate(plan(40, prompt="old"), [OLD], [], reused=40).seconds == 0


def test_a_cut_reads_its_frames_and_a_detector_looks_at_them() -> None:
    cut = estimate(plan(10, frames=40_000, threshold=0.6), [OLD], SIGHTS)
    assert cut.detector_s == 0
    assert cut.seconds == pytest.approx(10 + 40_000 / CUT_PER_S)
    seen = estimate(plan(10, frames=1000, detector="r101"), [OLD], SIGHTS)
    assert seen.detector_s == pytest.approx(400)
    assert seen.seconds == pytest.approx(10 + 400 + 1000 / CUT_PER_S)
    unknown = estimate(plan(10, frames=1000, detector="other"), [OLD], SIGHTS)
    assert unknown.detector_s == pytest.approx(1000 * (500 * 50 + 10 * 400) / 510 / 1000)


def test_where_nothing_was_ever_judged_nothing_is_guessed() -> None:
    took = estimate(plan(10), [], [])
    assert (took.prompt_tokens, took.completion_tokens, took.llm_s, took.seconds) == (None, None, None, None)
    assert took.by == "nothing was ever judged here"


@pytest.mark.real
async def test_recorded_verdicts_are_measured_live_and_replayed_without_those_reused(database) -> None:
    contexts = windows(6)
    slow = [msgspec.structs.replace(event, inference_ms=1500.0) for event in judged(contexts[:2])]
    again = [verdict(one, "r1", OTHER, inference_ms=100.0, prompt_tokens=90) for one in contexts]
    await put(
        database,
        on_log("risk_events", [*slow, *judged(contexts[2:])]),
        on_log("replay_events", [*map(replay_event, again[:4]), replay_event(again[5], reused=True)]),
    )
    async with aclosing(Queries(database)) as store:
        verdicts, detections = await measure(store)
    assert sorted(verdicts) == sorted(
        [
            Rate(DEFAULT.digest, "analyst", 6, pytest.approx((2 * 1500 + 4 * 500) / 6), 80.0, 20.0),
            Rate(OTHER.digest, "analyst", 4, 100.0, 90.0, 20.0),
        ]
    )
    assert detections == []

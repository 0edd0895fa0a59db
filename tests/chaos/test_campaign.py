"""A short campaign: each kind of fault once, close together, under load, and nothing lost, doubled or out of place."""

import asyncio
import logging
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import campaign, faults, stalls
from tests.chaos.audit import Made
from tests.chaos.campaign import Progress
from tests.chaos.llm_proxy import LlmProxy
from tests.chaos.schedule import KINDS, Planned, plan
from tests.chaos.site import NotInflictedError
from tests.chaos.stalls import Happened

# Close enough for most faults to meet another one, and each away for twice the session timeout of this test.
GAP_S = 5.0
LONGEST_S = 12.0
SETTINGS = {"KAFKA__SESSION_TIMEOUT_MS": "6000", "LLM__DEADLINE_S": "30"}


@pytest.mark.real
@pytest.mark.chaos
@pytest.mark.timeout(720)
async def test_each_kind_of_fault_once_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    planned = plan(len(KINDS), seed=11, gap_s=GAP_S, longest_s=LONGEST_S)
    outcome = await campaign.run(planned, tmp_path, Progress(expected_s=300), **SETTINGS)
    assert outcome.violations == []
    assert Counter(fault.kind for fault in outcome.happened) == Counter(list(KINDS))
    found = outcome.as_json()
    assert sum(found["faults"].values()) + len(found["skipped"]) == len(KINDS)
    # On a slow machine the broker is hardly back before its next fault, and another worker may not get to join.
    assert len(found["skipped"]) <= len(KINDS) // 3, found["skipped"]
    assert found["kills"] >= sum(kind.startswith("kill-") for kind in found["faults"])
    assert found["rewatch_audit"]["clean"]
    assert found["rewatch_audit"]["accepted"] == found["accepted"]
    assert found["lost"] == found["duplicates"] == found["unexplained_dead_letters"] == 0
    assert found["accepted"] > 200
    poisoned = found["faults"].get("llm-one-item", 0)
    assert outcome.explained >= poisoned, "the window that the LLM never answers for has a dead letter"


async def test_a_campaign_that_breaks_off_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> None:
            raise LookupError("there is no installation")

    outcome = campaign.Outcome()
    await campaign._torment(Nothing(), [], outcome, Progress(1, tell=lambda _: None))  # type: ignore[arg-type]
    assert any("there is no installation" in line for line in outcome.violations)
    assert outcome.as_json()["lost"] is None, "nobody has looked"
    await asyncio.sleep(0)


def test_only_what_was_inflicted_is_counted() -> None:
    both = [happened("kill-batch", "batch", 1_000), happened("late-produce", "sink", 2_000, number=2)]
    both[1] = both[1]._replace(inflicted=False, note="not inflicted: it sent none")
    found = campaign.Outcome(happened=both, kills=1).as_json()
    assert (found["faults"], found["kills"]) == ({"kill-batch": 1}, 1)
    assert found["skipped"] == [
        {"number": 2, "kind": "late-produce", "target": "sink", "why": "not inflicted: it sent none"}
    ]
    made = {"batch": [Made(9_000, 0)], "sink": [Made(9_000, 0)]}
    assert {stall.stage for stall in stalls.stalls(both, made)} == {"batch"}


class Idle:
    """A site on which nothing happens."""

    def __init__(self) -> None:
        self.llm = LlmProxy(1, [])

    async def pid(self, name: str) -> int:
        raise NotInflictedError(f"{name} was down for 90 s")

    async def signal(self, name: str, _: int) -> int:
        return await self.pid(name)


async def test_what_cannot_be_inflicted_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "ASKED_S", 0.1)
    planned = [
        Planned(1, "llm-errors", "llama", 0.0, 0.05, 1),
        Planned(2, "kill-sink", "sink", 0.0, 0.0, 2),
        Planned(3, "stop", "batch", 0.0, 0.05, 3),
    ]
    found: list[Happened] = []
    await campaign._inflict(Idle(), planned, found, Progress(1, tell=lambda _: None))  # type: ignore[arg-type]
    assert {fault.kind: fault.note for fault in found if not fault.inflicted} == {
        "llm-errors": "not inflicted: nobody asked the LLM, and for 0.1 s more",
        "kill-sink": "not inflicted: sink was down for 90 s",
        "stop": "not inflicted: batch was down for 90 s",
    }


def test_a_process_that_ends_by_itself_is_a_violation_and_one_that_was_killed_or_stalled_is_none():
    log = logging.getLogger("infra.local.supervisor")
    told = [("sink-1", "ended with code -9"), ("detect", "ended with code 1"), ("batch", "stalled: it hangs")]
    with campaign.Endings() as endings:
        for name, reason in told:
            log.warning("%s: %s (failure %d of %d)", name, reason, 1, 5)
    assert endings.violations(Counter({"sink-1": 1})) == [
        "detect ended by itself, 1 times with code 1: its log says why"
    ]
    assert len(endings.violations({})) == 2


def happened(kind: str, target: str, at: int, until: int | None = None, number: int = 1) -> Happened:
    return Happened(number, kind, target, at, at if until is None else until)


def test_a_stall_lasts_from_the_end_of_the_fault_to_the_next_record():
    found = stalls.stalls([happened("stop", "detect", 1_000, 5_000)], {"detect": [Made(4_900, 0), Made(9_000, 3_000)]})
    assert [(stall.stage, stall.seconds, stall.alone) for stall in found] == [("detect", 4.0, True)]


def test_a_stage_that_has_nothing_to_do_is_idle_and_not_silent():
    found = stalls.stalls([happened("kill-batch", "batch", 1_000)], {"batch": [Made(9_000, 8_500)]})
    assert [stall.seconds for stall in found] == [0.5]


def test_a_stall_behind_another_fault_counts_for_no_single_one():
    both = [happened("kill-batch", "batch", 1_000), happened("kill-detect", "detect", 3_000, number=2)]
    made = {"batch": [Made(9_000, 0)], "detect": [Made(8_000, 0)]}
    found = {stall.stage: stall for stall in stalls.stalls(both, made)}
    assert not found["batch"].alone
    assert found["detect"].alone, "what stands behind it cannot hold it up"
    assert stalls.longest(list(found.values())) is found["detect"]


def test_a_lost_broker_counts_for_every_stage_and_for_no_single_process():
    made = {stage: [Made(3_000 + number, 0)] for number, stage in enumerate(stalls._STORES["kafka"])}
    found = stalls.stalls([happened("kill-broker", "kafka", 1_000)], made)
    assert {stall.stage for stall in found} == set(made)
    assert stalls.longest(found) is None
    assert stalls.by_kind(found, alone=True) == {"kill-broker": 2.0}

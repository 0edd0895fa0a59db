"""The schedule is a pure function of the count and the seed."""

import itertools
from collections import Counter, defaultdict

import pytest

from tests.chaos.schedule import KINDS, plan


def test_the_same_seed_makes_the_same_schedule_and_another_seed_another():
    assert plan(100, 7) == plan(100, 7)
    assert plan(100, 7) != plan(100, 8)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_before_any_comes_by_its_weight(seed: int):
    kinds = Counter(fault.kind for fault in plan(100, seed))
    assert set(kinds) == set(KINDS)
    assert len(plan(len(KINDS), seed)) == len({fault.kind for fault in plan(len(KINDS), seed)})


@pytest.mark.parametrize("seed", range(20))
def test_forty_faults_have_every_kind_and_a_hundred_all_that_a_kind_may_hit(seed: int):
    assert {fault.kind for fault in plan(40, seed)} == set(KINDS)
    hits: dict[str, Counter[str]] = defaultdict(Counter)
    for fault in plan(100, seed):
        hits[fault.kind][fault.target] += 1
    for kind, targets in hits.items():
        each = [targets[name] for name in KINDS[kind].targets]
        assert max(each) - min(each) <= 1, f"{kind} hits some again before it has hit all"


@pytest.mark.parametrize("seed", range(20))
def test_faults_overlap_but_never_on_one_resource(seed: int):
    faults = plan(100, seed)
    assert [fault.number for fault in faults] == list(range(1, 101))
    assert any(b.at_s < a.at_s + a.length_s for a, b in itertools.pairwise(faults)), "none overlap"
    for target in {fault.target for fault in faults}:
        mine = [fault for fault in faults if fault.target == target]
        assert all(a.at_s + a.length_s < b.at_s for a, b in itertools.pairwise(mine)), target


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_faults_fit_in_forty_minutes(seed: int):
    last = plan(100, seed)[-1]
    assert last.at_s + last.length_s < 37 * 60


def test_some_kinds_only():
    assert {fault.kind for fault in plan(5, 1, only=["stop", "kill-sink"])} == {"stop", "kill-sink"}
    with pytest.raises(KeyError):
        plan(1, 1, only=["kill-time"])

"""The figures of a comparison, each against scipy, numpy or a count by hand."""

import math
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from processors.replay import statistics
from processors.replay.comparison import LEVELS, Comparison, Coverage, Pairing, Side, Verdict
from processors.replay.pairs import pairing
from processors.replay.statistics import GivenLabel
from tests.processors.compare_kit import AT, STEADY, anything, cut, label, labels, pair, verdict

sides = st.one_of(st.tuples(cut("a"), cut("b")), st.tuples(anything("a"), anything("b")))


# --- spreads ---


@STEADY
@given(st.lists(st.integers(-100, 100), min_size=1))
def test_the_spread_is_numpys(values: list[int]) -> None:
    found = statistics.spread(values, -100, 100)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = (found.p05, found.p25, found.median, found.p75, found.p95)
    assert quantiles == pytest.approx(np.quantile(values, shares), abs=1e-9)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.mean_abs == pytest.approx(np.mean(np.abs(values)), abs=1e-9)
    assert (found.minimum, found.maximum) == (min(values), max(values))
    expected, _ = np.histogram(values, bins=[*range(-100, 100, 10), 101])
    assert [bar.count for bar in found.histogram] == list(expected)


def test_bars_follow_one_another_and_hold_what_lies_outside_at_the_ends() -> None:
    found = statistics.spread([-1000, 1000, 0, 9, 10], -100, 100)
    assert [(bar.least, bar.most) for bar in found.histogram][:2] == [(-100, -91), (-90, -81)]
    assert (found.histogram[-1].least, found.histogram[-1].most) == (90, 100)
    assert {bar.least: bar.count for bar in found.histogram if bar.count} == {-100: 1, 0: 2, 10: 1, 90: 1}


def test_of_nothing_there_is_no_mean() -> None:
    found = statistics.spread([], 0, 100)
    assert (found.count, found.mean, found.p95) == (0, None, None)
    assert len(found.histogram) == 10


# --- slices ---


def test_transitions_count_every_level_and_add_up() -> None:
    pairs = [pair(10, 10), pair(10, 95, 1), pair(70, 40, 2), pair(10, 90, 3)]
    found = statistics.transitions(pairs)
    assert found["low"] == {"low": 1, "medium": 0, "high": 0, "critical": 2}
    assert found["high"]["medium"] == 1
    assert sum(map(sum, (row.values() for row in found.values()))) == len(pairs)
    assert list(found) == list(LEVELS)


def test_cameras_with_the_most_flips_come_first() -> None:
    pairs = [pair(10, 90), pair(10, 10, 1), pair(90, 10, camera="yard"), pair(20, 50, 1, camera="yard")]
    yard, gate = statistics.by_camera(pairs)
    assert (yard.name, yard.compared, yard.flips, yard.alarms_lost, yard.alarms_new, yard.raised) == (
        *("yard", 2, 2, 1, 0, 1),
    )
    assert (gate.name, gate.flips, gate.alarms_new, gate.alarms_a, gate.alarms_b, gate.flip_share) == (
        *("gate", 1, 1, 0, 1, 0.5),
    )
    assert yard.mean_delta == -25


def test_hours_are_those_of_the_clock_where_the_camera_is() -> None:
    # 20:26 UTC in May: 22:26 in Berlin, 01:56 the next day in Kolkata.
    zones = ("UTC", "Europe/Berlin", "Asia/Kolkata", "Nowhere/Never")
    pairs = [pair(10, 90, n, time_zone=zone) for n, zone in enumerate(zones)]
    assert [(one.name, one.compared) for one in statistics.by_hour(pairs)] == [("01", 1), ("20", 2), ("22", 1)]


def test_an_hour_that_daylight_saving_repeats_is_one_hour() -> None:
    berlin = {"time_zone": "Europe/Berlin"}
    first, second = (int(datetime(2026, 10, 25, hour, 30, tzinfo=UTC).timestamp() * 1000) for hour in (0, 1))
    pairs = [pair(1, 1, started_at=first, **berlin), pair(1, 1, started_at=second, **berlin)]
    assert [(one.name, one.compared) for one in statistics.by_hour(pairs)] == [("02", 2)]


def test_a_pair_counts_for_each_class_that_either_side_saw() -> None:
    a, b = verdict([1], 10, classes=("car", "person")), verdict([1], 90, side="b", classes=("dog", "person"))
    [one] = pairing([a], [b]).pairs
    found = statistics.by_class([one, pair(1, 1, 2)])
    assert {(row.name, row.compared, row.flips) for row in found} == {
        *(("car", 1, 1), ("dog", 1, 1), ("person", 1, 1), (statistics.NO_CLASS, 1, 0)),
    }


# --- flips ---


def test_flips_stand_in_the_order_of_harm() -> None:
    lost_true, lost, new_false, new = pair(70, 50, 0), pair(95, 10, 1), pair(50, 70, 2), pair(10, 99, 3)
    raised, lowered, lowered_more = pair(10, 40, 4), pair(59, 29, 5), pair(99, 65, 6)
    pairs = [lowered, lowered_more, raised, new, new_false, lost, lost_true, pair(10, 20, 7)]
    given_labels = [label("true_alarm", lost_true.a), label("false_alarm", new_false.b, n=1)]
    found = statistics.flips(pairs, given_labels, None)
    assert [flip.pair for flip in found] == [lost_true, lost, new_false, new, raised, lowered_more, lowered]
    assert [flip.harm for flip in found] == [0, 1, 2, 3, 4, 5, 5]
    assert [flip.kind for flip in found[:6]] == [
        *("alarm_lost", "alarm_lost", "alarm_new", "alarm_new", "raised", "lowered"),
    ]
    assert (found[0].label, found[1].label, found[2].label) == ("true_alarm", None, "false_alarm")


def test_within_a_harm_the_score_that_moved_most_comes_first() -> None:
    pairs = [pair(60, 59, 0), pair(100, 0, 1), pair(70, 20, 2)]
    assert [flip.pair.delta for flip in statistics.flips(pairs, [], None)] == [-100, -50, -1]


def test_an_alarm_lost_on_what_was_missed_is_the_worst_and_on_a_false_one_is_not() -> None:
    missed, false = pair(70, 50, 0), pair(90, 10, 60)
    found = statistics.flips([false, missed], [label("missed", missed.a), label("false_alarm", false.a, n=1)], None)
    assert [(flip.harm, flip.label) for flip in found] == [(0, "missed"), (1, "false_alarm")]


def test_the_newest_of_several_labels_counts() -> None:
    lost = pair(70, 50)
    before, after = label("false_alarm", lost.a, n=1), label("true_alarm", lost.a, n=2)
    for given_labels in ([before, after], [after, before]):
        [flip] = statistics.flips([lost], given_labels, None)
        assert flip.label == "true_alarm"


def test_a_flip_is_in_the_noise_where_the_score_moved_no_further() -> None:
    pairs = [pair(58, 63), pair(57, 63, 1)]
    assert [flip.in_noise for flip in statistics.flips(pairs, [], 5)] == [False, True]
    assert [flip.in_noise for flip in statistics.flips(pairs, [], None)] == [None, None]


# --- labels ---


def test_a_label_applies_to_what_shares_half_of_its_events_frames() -> None:
    event = verdict(range(4), 90)
    half, less, more = verdict([2, 3, 4, 5, 6, 7, 8]), verdict([3, 4]), verdict(range(50))
    assert statistics.applied([label("true_alarm", event)], [event, half, less, more]) == [[0, 1, 3]]


def test_a_label_of_something_missed_applies_to_what_overlaps_its_span() -> None:
    span = {"started_at": AT + 2000, "ended_at": AT + 4000}
    windows = [verdict([0, 1]), verdict([1, 2]), verdict([3]), verdict([4, 9]), verdict([5]), verdict(range(10))]
    yard = verdict([3], camera="yard")
    assert statistics.applied([label("missed", **span)], [*windows, yard]) == [[1, 2, 3, 5]]


def test_a_label_on_a_span_alone_applies_to_what_it_covers_half_of() -> None:
    span = {"started_at": AT + 2000, "ended_at": AT + 4000}
    windows = [verdict([3, 5]), verdict([3, 6]), verdict([4]), verdict(range(10))]
    assert statistics.applied([label("true_alarm", **span)], windows) == [[0, 2]]


def test_precision_recall_and_false_alarms_by_labels() -> None:
    # Scores of A and B, and what a person says of the window.
    said = [(90, 90, "true_alarm"), (90, 10, "true_alarm"), (10, 90, "true_alarm"), (70, 10, "false_alarm"),
            (70, 70, "false_alarm"), (10, 10, "false_alarm"), (10, 90, "false_alarm"), (90, 10, None)]  # fmt: skip
    pairs = [pair(a, b, n) for n, (a, b, _) in enumerate(said)]
    given_labels = [
        label(what, one.a, n=n) for n, (one, (_, _, what)) in enumerate(zip(pairs, said, strict=True)) if what
    ]
    found = statistics.labelled(Pairing(pairs=tuple(pairs)), given_labels)
    assert (found.labels, found.true_alarms, found.false_alarms, found.missed) == (7, 3, 4, 0)
    assert (found.events, found.labelled_events, found.coverage) == (8, 7, 7 / 8)
    a, b = found.a, found.b
    assert (a.true_positives, a.false_negatives, a.false_positives, a.true_negatives) == (2, 1, 2, 2)
    assert (b.true_positives, b.false_negatives, b.false_positives, b.true_negatives) == (2, 1, 2, 2)
    assert (a.precision.value, a.recall.value, a.false_alarm_rate.value) == (0.5, 2 / 3, 0.5)
    assert (a.labelled, a.verdicts, a.labelled_alarms, a.alarms) == (7, 8, 4, 5)
    expected = stats.binomtest(2, 3).proportion_ci(method="wilson")
    assert (a.recall.low, a.recall.high) == pytest.approx((expected.low, expected.high))


def test_what_was_missed_counts_against_recall_also_where_there_is_no_window() -> None:
    seen = pair(90, 90)
    far = {"started_at": AT + 900_000, "ended_at": AT + 900_000}
    found = statistics.labelled(Pairing(pairs=(seen,)), [label("true_alarm", seen.a), label("missed", n=1, **far)])
    assert (found.a.recall.value, found.b.recall.value) == (0.5, 0.5)
    assert found.a.precision.value == 1.0


def test_a_side_that_raises_an_alarm_over_what_was_missed_gains() -> None:
    quiet = pair(10, 90)
    found = statistics.labelled(Pairing(pairs=(quiet,)), [label("missed", quiet.a)])
    assert (found.a.recall.value, found.b.recall.value) == (0.0, 1.0)


def test_a_true_alarm_whose_window_vanished_is_an_alarm_less() -> None:
    gone = verdict([1], 90)
    found = statistics.labelled(Pairing(vanished=(gone,)), [label("true_alarm", gone)])
    assert (found.a.recall.value, found.b.recall.value) == (1.0, 0.0)


def test_a_label_on_a_window_that_was_split_counts_once() -> None:
    whole = verdict(range(8), 90)
    halves = [verdict(range(4), 90, side="b"), verdict(range(4, 8), 10, side="b")]
    found = statistics.labelled(pairing([whole], halves), [label("true_alarm", whole)])
    assert (found.b.true_positives, found.b.false_negatives, found.b.labelled) == (1, 0, 2)


def test_people_change_their_minds_and_the_newest_label_counts() -> None:
    one = pair(90, 90)
    found = statistics.labelled(
        Pairing(pairs=(one,)), [label("false_alarm", one.a, n=2), label("true_alarm", one.a, n=1)]
    )
    assert (found.labels, found.false_alarms) == (1, 1)


def test_labels_on_other_events_do_not_count() -> None:
    found = statistics.labelled(Pairing(pairs=(pair(90, 90),)), [label("true_alarm", verdict([5], 90))])
    assert (found.labels, found.a.precision.value, found.coverage) == (0, None, 0.0)


def test_with_every_chance_known_each_label_stands_for_as_many_events_as_were_like_it() -> None:
    # Ten labels drawn with 1/2 of which 6 are right, five drawn with 1/20 of which 1 is.
    hits = [GivenLabel(**_span(n), chance=0.5) for n in range(6)] + [GivenLabel(**_span(20), chance=0.05)]
    others = [GivenLabel(**_span(n), chance=0.5) for n in range(4)] + [
        GivenLabel(**_span(n), chance=0.05) for n in range(4)
    ]
    found = statistics.estimate(hits, others)
    weights = np.array([2.0] * 6 + [20.0] + [2.0] * 4 + [20.0] * 4)
    assert found.weighted
    assert found.value == pytest.approx(weights[:7].sum() / weights.sum())
    assert found.effective == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.effective < found.count == 15
    # Wilson's interval with the effective size, by its definition: where the score test just does not reject.
    for bound in (found.low, found.high):
        z = (found.value - bound) / math.sqrt(bound * (1 - bound) / found.effective)
        assert abs(z) == pytest.approx(stats.norm.ppf(0.975))


def test_one_unknown_chance_makes_the_estimate_one_of_what_was_labelled() -> None:
    hits, others = [GivenLabel(**_span(0), chance=0.01)], [GivenLabel(**_span(1))]
    found = statistics.estimate(hits, others)
    assert (found.value, found.weighted, found.effective) == (0.5, False, 2.0)


@STEADY
@given(st.integers(0, 2000), st.integers(0, 2000))
def test_the_interval_is_scipys(hits: int, others: int) -> None:
    if hits + others == 0:
        return
    expected = stats.binomtest(hits, hits + others).proportion_ci(method="wilson")
    found = statistics.wilson(hits / (hits + others), hits + others)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


# --- noise ---


def test_the_noise_is_what_the_same_again_gives() -> None:
    pairs = [pair(50, 50 + n % 12, n) for n in range(40)]
    found = statistics.noise(pairs, "r1", "again")
    assert found is not None
    assert (found.compared, found.flips, found.identical) == (40, 6, 4)
    assert found.floor == 6 / 40
    assert found.band == pytest.approx(np.quantile([n % 12 for n in range(40)], 0.95))
    assert statistics.noise([], "r1", "again") is None


@STEADY
@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 50), st.integers(1, 50))
def test_the_p_value_is_scipys(flips: int, same: int, noisy: int, quiet: int) -> None:
    noise = statistics.noise(
        [*(pair(10, 90, n) for n in range(noisy)), *(pair(10, 10, n) for n in range(quiet))], "r", "again"
    )
    expected = stats.fisher_exact([[flips, same], [noisy, quiet]], alternative="two-sided").pvalue
    assert statistics.p_value(flips, flips + same, noise) == pytest.approx(min(expected, 1.0))


def test_without_a_baseline_nothing_is_said_of_chance() -> None:
    assert statistics.p_value(3, 10, None) is None
    assert statistics.p_value(0, 0, statistics.noise([pair(1, 1)], "r", "again")) is None


# --- whatever comes ---


@STEADY
@given(sides, st.data())
def test_whatever_the_verdicts_and_labels_are_the_figures_add_up(
    both: tuple[list[Verdict], list[Verdict]], data: st.DataObject
) -> None:
    said = data.draw(labels([*both[0], *both[1]]))
    paired = pairing(*both)
    pairs = paired.pairs
    noise = statistics.noise(pairs, "r", "again")
    flips = statistics.flips(pairs, said, noise and noise.band)
    found = Comparison(
        a=Side(id="live", name="live"),
        b=Side(id="r", name="r"),
        coverage=Coverage(),
        pairing=paired,
        flips=flips,
        deltas=statistics.deltas(pairs),
        scores_a=statistics.scores(one.a for one in pairs),
        scores_b=statistics.scores(one.b for one in pairs),
        transitions=statistics.transitions(pairs),
        by_camera=statistics.by_camera(pairs),
        by_hour=statistics.by_hour(pairs),
        by_class=statistics.by_class(pairs),
        labels=statistics.labelled(paired, said),
        noise=noise,
        p_value=statistics.p_value(len(flips), len(pairs), noise),
    )
    assert sum(one.compared for one in found.by_camera) == sum(one.compared for one in found.by_hour) == found.compared
    assert sum(one.flips for one in found.by_camera) == len(found.flips)
    assert sum(bar.count for bar in found.deltas.histogram) == found.compared
    assert sum(sum(row.values()) for row in found.transitions.values()) == found.compared
    changed = sum(n for a, row in found.transitions.items() for b, n in row.items() if a != b)
    assert changed == len(found.flips) == Counter(flip.kind for flip in flips).total()
    assert 0 <= (found.flips_in_noise or 0) <= len(found.flips)
    for side in (found.labels.a, found.labels.b):
        cells = side.true_positives + side.false_negatives + side.false_positives + side.true_negatives
        assert cells == found.labels.labels
        for one in (side.precision, side.recall, side.false_alarm_rate):
            if one.value is not None:
                assert 0 <= one.low <= one.value + 1e-9 <= one.high + 2e-9 <= 1 + 2e-9
                assert 0 < one.effective <= one.count + 1e-9
    assert found.labels.labelled_events <= found.labels.events


def _span(n: int) -> dict[str, object]:
    return {
        "label_id": f"l{n}",
        "camera_id": "gate",
        "started_at": AT,
        "ended_at": AT,
        "verdict": "true_alarm",
        "labelled_at": AT + n,
    }

"""Pairing: every window of both sides in exactly one place, the same one from whichever side and in whichever order."""

import random
import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from processors.replay.comparison import Pairing, Regrouping, Verdict
from processors.replay.pairs import pairing
from processors.replay.statistics import sides
from tests.processors.compare_kit import STEADY, anything, cut, verdict

either = st.one_of(st.tuples(cut("a"), cut("b")), st.tuples(anything("a"), anything("b")))


def test_the_same_window_is_a_pair_whatever_was_said_of_it() -> None:
    a, b = verdict([1, 2], 10), verdict([1, 2], 90, side="b")
    found = pairing([a], [b])
    assert [(one.a, one.b, one.share) for one in found.pairs] == [(a, b, 1.0)]
    assert found == Pairing(pairs=found.pairs)


def test_the_same_window_is_a_pair_before_all_that_holds_the_same_frames() -> None:
    a, b = verdict([2, 1]), verdict([2, 1], side="b")
    other = [verdict([1, 2], side=f"{n}b") for n in range(3)]
    found = pairing([a], [*other, b])
    assert [(one.a, one.b) for one in found.pairs] == [(a, b)]
    assert found.appeared == tuple(sorted(other, key=lambda one: one.event_id))
    nothing_left = pairing([verdict([], batch_id="w")], [verdict([], batch_id="w", side="b")])
    assert len(nothing_left.pairs) == 1


def test_a_window_with_other_bounds_is_a_pair_by_its_frames() -> None:
    a, b = verdict([1, 2, 3]), verdict([2, 3, 4], side="b")
    [one] = pairing([a], [b]).pairs
    assert (one.a, one.b, one.share) == (a, b, 0.5)


def test_of_several_the_one_with_the_greatest_share_of_frames_is_the_pair() -> None:
    a = [verdict(range(8)), verdict(range(8, 16))]
    b = [verdict(range(7), side="b"), verdict(range(7, 16), side="b")]  # each overlaps both
    found = pairing(a, b)
    assert [(one.a, one.b) for one in found.pairs] == list(zip(a, b, strict=True))


def test_one_window_that_became_several_is_a_split_and_no_flip() -> None:
    a, b = verdict(range(10), 90), [verdict(range(4), 10, side="b"), verdict(range(5, 10), 10, side="b")]
    assert pairing([a], b) == Pairing(split=(Regrouping(a=(a,), b=tuple(b)),))


def test_several_windows_that_became_one_are_a_merger() -> None:
    a, b = [verdict(range(4)), verdict(range(5, 10))], verdict(range(10), side="b")
    assert pairing(a, [b]) == Pairing(merged=(Regrouping(a=tuple(a), b=(b,)),))


def test_several_that_became_several_others_are_told_as_such() -> None:
    a = [verdict(range(10)), verdict(range(10, 15))]
    b = [verdict(range(6), side="b"), verdict(range(6, 12), side="b")]  # the second holds the end of one, half of other
    assert pairing(a, b) == Pairing(regrouped=(Regrouping(a=tuple(a), b=tuple(b)),))


def test_a_window_that_shares_no_frame_appeared_or_vanished() -> None:
    a, b = verdict([1, 2]), verdict([3, 4], side="b")
    assert pairing([a], [b]) == Pairing(vanished=(a,), appeared=(b,))


def test_frames_of_other_cameras_are_other_frames() -> None:
    a = verdict([1], camera="gate", frame_ids=("f",))
    b = verdict([1], camera="yard", frame_ids=("f",), side="b")
    assert pairing([a], [b]) == Pairing(vanished=(a,), appeared=(b,))


@STEADY
@given(either)
def test_each_verdict_is_in_exactly_one_place(both: tuple[list[Verdict], list[Verdict]]) -> None:
    a, b = both
    placed_a, placed_b = sides(pairing(a, b))
    assert Counter(one.event_id for one in placed_a) == Counter(one.event_id for one in a)
    assert Counter(one.event_id for one in placed_b) == Counter(one.event_id for one in b)


@STEADY
@given(either)
def test_with_the_sides_swapped_it_is_the_same_swapped(both: tuple[list[Verdict], list[Verdict]]) -> None:
    a, b = both
    there, back = pairing(a, b), pairing(b, a)
    assert {(one.a.event_id, one.b.event_id, one.share) for one in there.pairs} == {
        (one.b.event_id, one.a.event_id, one.share) for one in back.pairs
    }
    assert (there.vanished, there.appeared) == (back.appeared, back.vanished)
    for groups, swapped in ((there.split, back.merged), (there.merged, back.split), (there.regrouped, back.regrouped)):
        assert groups == tuple(Regrouping(a=group.b, b=group.a) for group in swapped)


@STEADY
@given(either, st.randoms(use_true_random=False))
def test_the_order_in_which_verdicts_come_changes_nothing(
    both: tuple[list[Verdict], list[Verdict]], chance: random.Random
) -> None:
    a, b = both
    found = pairing(a, b)
    shuffled_a, shuffled_b = a[:], b[:]
    chance.shuffle(shuffled_a)
    chance.shuffle(shuffled_b)
    assert pairing(shuffled_a, shuffled_b) == found


@STEADY
@given(either)
def test_windows_hang_together_only_where_they_share_frames(both: tuple[list[Verdict], list[Verdict]]) -> None:
    found = pairing(*both)

    def share(one: Verdict, other: Verdict) -> bool:
        return one.camera_id == other.camera_id and not set(one.frame_ids).isdisjoint(other.frame_ids)

    for one in found.pairs:
        assert one.a.batch_id == one.b.batch_id or share(one.a, one.b)
        assert 0 < one.share <= 1
    for group in (*found.split, *found.merged, *found.regrouped):
        assert all(any(share(a, b) for b in group.b) for a in group.a)
        assert all(any(share(a, b) for a in group.a) for b in group.b)
    alone_a, alone_b = found.vanished, found.appeared
    assert not any(share(a, b) for a in alone_a for b in both[1] if not _has_batch(both[0], b))
    assert not any(share(a, b) for b in alone_b for a in both[0] if not _has_batch(both[1], a))


def _has_batch(verdicts: list[Verdict], of: Verdict) -> bool:
    """Whether it may be a pair by its batch id, and so is no neighbour to the others."""
    return any(one.batch_id == of.batch_id for one in verdicts)


def test_a_hundred_thousand_windows_with_other_bounds_take_seconds() -> None:
    frames = 12
    a = [verdict(range(n, n + frames)) for n in range(0, 50_000 * frames, frames)]
    # Every third window ends three frames early, and the next begins there.
    shift = [0 if n % 3 else 3 for n in range(50_001)]
    b = [verdict(range(n * frames - shift[n], (n + 1) * frames - shift[n + 1]), side="b") for n in range(50_000)]
    began = time.process_time()
    found = pairing(a, b)
    took = time.process_time() - began
    assert len(found.pairs) == 50_000
    assert took < 20, took  # 2.5 s on a machine at leisure; a quadratic one would take hours

"""The detector's measuring stick, against cases worked out by hand."""

import numpy as np
import pytest

from infra.models.measure import Found, iou, measure


def _found(*rows: tuple[int, float, tuple[float, float, float, float]]) -> Found:
    return Found(
        np.array([r[0] for r in rows], dtype=np.int64),
        np.array([r[1] for r in rows], dtype=np.float32),
        np.array([r[2] for r in rows], dtype=np.float32).reshape(-1, 4),
    )


BOX, ELSEWHERE = (0.1, 0.1, 0.3, 0.5), (0.6, 0.6, 0.8, 0.9)


def test_iou_of_half_overlapping_boxes_is_a_third():
    a, b = np.array([[0, 0, 2, 2]], np.float32), np.array([[1, 0, 3, 2]], np.float32)
    assert iou(a, b)[0, 0] == pytest.approx(1 / 3)


def test_perfect_boxes_score_one():
    truth = _found((0, 1.0, BOX), (8, 1.0, ELSEWHERE))
    got = measure([truth], [truth])
    assert (got.ap50, got.ap, got.precision, got.recall) == (1, 1, 1, 1)


def test_the_second_box_on_one_person_is_a_false_alarm():
    truth = _found((0, 1.0, BOX))
    got = measure([_found((0, 0.9, BOX), (0, 0.8, BOX))], [truth])
    assert got.person_recall == 1
    assert got.precision == 0.5
    assert got.false_persons_per_frame == 1
    assert got.ap50 == pytest.approx(1)  # it comes after the full recall was reached


def test_wrong_class_and_low_score_find_nothing():
    truth = _found((8, 1.0, BOX))
    assert measure([_found((7, 0.9, BOX))], [truth]).recall == 0
    assert measure([_found((8, 0.4, BOX))], [truth]).recall == 0


def test_a_loose_box_counts_at_half_overlap_only():
    loose = (0.1, 0.1, 0.3, 0.408)  # IoU 0.77 with BOX
    got = measure([_found((0, 0.9, loose))], [_found((0, 1.0, BOX))])
    assert got.ap50 == 1
    assert got.ap == pytest.approx(0.6, abs=0.01)  # right at 0.50 ... 0.75: six of ten


def test_a_false_alarm_ahead_of_the_right_box_halves_precision():
    frames = [_found((0, 0.9, ELSEWHERE)), _found((0, 0.8, BOX))]
    truth = [_found(), _found((0, 1.0, BOX))]
    assert measure(frames, truth).ap50 == pytest.approx(0.5)

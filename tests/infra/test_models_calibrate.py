"""Platt scaling: what was overconfident becomes honest, what is right stays."""

import numpy as np
import pytest

from infra.models.calibrate import fit


def test_it_recovers_the_curve_that_made_the_data():
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-(1.5 * logits + 0.7)))
    scale, shift = fit(logits, right)
    assert scale == pytest.approx(1.5, rel=0.05)
    assert shift == pytest.approx(0.7, abs=0.1)


def test_a_class_with_one_example_keeps_its_order():
    scale, shift = fit(np.array([-3.0, -2.0, 1.0]), np.array([False, False, True]))
    assert 0.1 <= scale < 5
    assert np.isfinite(shift)

"""Makes the detector's scores probabilities, by Platt scaling folded into its last layer.

RT-DETR's loss teaches scores that follow a box's overlap and stay far below one for classes that are harder to
learn, so that one threshold for all classes would drop most cats while it keeps doubtful persons. Per class, a scale
and a shift of the logit are fitted on scenes of their own. The order of a class's detections, and so its average
precision, stays as it was.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from infra.models.actors import CLASSES
from infra.models.measure import matches
from infra.models.measure_detector import detections
from infra.models.renders import Renders, truth

#: Seeds of the calibration scenes: neither trained on nor measured on.
CALIBRATION_SEED = 1_500_000_000
#: Holds scales near one, lest a class with few examples gets a wild curve.
_PRIOR = 1.0


def fit(logits: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and shift that turn logits (n,) into log odds of being `right` (n,), by maximum likelihood.

    Platt, "Probabilistic outputs for support vector machines", 1999.
    """

    def cost(parameters: NDArray[np.float64]) -> float:
        odds = parameters[0] * logits + parameters[1]
        return float(np.logaddexp(0, np.where(right, -odds, odds)).sum() + _PRIOR * (parameters[0] - 1) ** 2)

    scale, shift = minimize(cost, np.array([1.0, 0.0]), method="Nelder-Mead").x
    return float(max(scale, 0.1)), float(shift)


@torch.no_grad()
def calibrate(model: Any, data: Renders) -> None:
    """Rescales the class logits of `model` in place, so that on `data` a score is the share of right boxes."""
    found = detections(model, data)
    actual = [truth(data, i) for i in range(len(data.labels))]
    last = model.class_embed[-1]
    for label in range(len(CLASSES)):
        pairs = [matches(f, t, label, 0.5) for f, t in zip(found, actual, strict=True)]
        scores, right = (np.concatenate(column) for column in zip(*pairs, strict=True))
        odds = scores.astype(np.float64).clip(1e-9, 1 - 1e-9)
        scale, shift = fit(np.log(odds / (1 - odds)), right)
        last.weight[label] *= scale
        last.bias[label] = scale * last.bias[label] + shift

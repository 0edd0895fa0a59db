"""Sets the detector's working points: after this, 0.5 is every class's best threshold.

RT-DETR's loss teaches scores that follow a box's overlap and stay far below one for classes that are harder to
learn, so that one threshold for all classes would drop most dogs while it keeps doubtful persons. Per class, the
logit gets a scale (Platt's: odds of being right) and a shift (the threshold with the best F1 becomes 0.5), fitted on
scenes of their own and folded into the last layer. The order of a class's detections, and so its average precision,
stays as it was.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from infra.models.actors import CLASSES
from infra.models.measure import Found, matches
from infra.models.measure_detector import detections
from infra.models.renders import Renders, truth

#: Seeds of the calibration scenes: neither trained on nor measured on.
CALIBRATION_SEED = 1_500_000_000


def platt_scale(logits: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """The factor that makes logits (n,) into log odds of being `right` (n,), by maximum likelihood.

    Platt, "Probabilistic outputs for support vector machines", 1999; his targets keep a class with few examples
    from a wild curve.
    """
    hits = int(right.sum())
    target = np.where(right, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2))

    def cost(parameters: NDArray[np.float64]) -> float:
        odds = parameters[0] * logits + parameters[1]
        return float((np.logaddexp(0, odds) - target * odds).sum())

    return float(np.clip(minimize(cost, np.array([1.0, 0.0]), method="Nelder-Mead").x[0], 0.5, 3.0))


def best_threshold(logits: NDArray[np.float64], right: NDArray[np.bool_], objects: int) -> float:
    """The logit from which on keeping detections gives the best F1 of precision and recall."""
    order = np.argsort(-logits, kind="stable")
    hits = right[order].cumsum()
    best = int((2 * hits / (np.arange(1, len(hits) + 1) + objects)).argmax())
    # Half way to the next detection, so that the last one kept is not kept by a rounding.
    return float(logits[order][best : best + 2].mean())


@torch.no_grad()
def calibrate(model: Any, data: Renders) -> None:
    """Rescales the class logits of `model` in place, by what is right and wrong on `data`."""
    found: list[Found] = detections(model, data)
    actual = [truth(data, i) for i in range(len(data.labels))]
    last = model.class_embed[-1]
    for label in range(len(CLASSES)):
        pairs = [matches(f, t, label, 0.5) for f, t in zip(found, actual, strict=True)]
        scores, right = (np.concatenate(column) for column in zip(*pairs, strict=True))
        clipped = scores.astype(np.float64).clip(1e-7, 1 - 1e-7)
        logits = np.log(clipped / (1 - clipped))
        objects = sum(int((t.labels == label).sum()) for t in actual)
        if not right.any():
            continue  # not learned at all yet: nothing to calibrate
        scale, threshold = platt_scale(logits, right), best_threshold(logits, right, objects)
        last.weight[label] *= scale
        last.bias[label] = scale * (last.bias[label] - threshold)

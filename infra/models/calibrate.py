"""Makes the detector's scores probabilities, by Platt scaling folded into its last layer.

RT-DETR's loss teaches scores that follow the box's overlap and stay far below one for classes still being learned,
so that one threshold for all classes would drop most cats while it keeps doubtful persons. Per class, two numbers
(scale and shift of the logit) are fitted on scenes of their own; the order of a class's detections, and so its
average precision, stays as it was. Platt, "Probabilistic outputs for support vector machines", 1999.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from infra.models.actors import CLASSES
from infra.models.measure import Found, matches
from infra.models.renders import Renders, corners

#: Seeds of the calibration scenes: neither trained on nor measured on.
CALIBRATION_SEED = 1_500_000_000
#: Scales are held near one, lest a class with few examples gets a wild curve.
_PRIOR = 1.0


def fit(logits: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and shift that turn logits (n,) into log odds of being `right` (n,), by maximum likelihood."""

    def cost(parameters: NDArray[np.float64]) -> float:
        scale, shift = parameters
        odds = scale * logits + shift
        loss = np.logaddexp(0, np.where(right, -odds, odds)).sum()
        return float(loss + _PRIOR * (scale - 1) ** 2)

    scale, shift = minimize(cost, np.array([1.0, 0.0]), method="Nelder-Mead").x
    return float(max(scale, 0.1)), float(shift)


@torch.no_grad()
def calibrate(model: Any, data: Renders) -> None:
    """Rescales the class logits of `model` in place, so that on `data` a score is the share of right boxes."""
    model.eval()
    logits: list[list[NDArray[np.float64]]] = [[] for _ in CLASSES]
    right: list[list[NDArray[np.bool_]]] = [[] for _ in CLASSES]
    for start in range(0, len(data.labels), 20):
        pixels = torch.from_numpy(data.images[start : start + 20].copy()).permute(0, 3, 1, 2).float() / 255
        out = model(pixel_values=pixels)
        for k in range(len(pixels)):
            i = start + k
            truth = Found(data.labels[i], np.ones(len(data.labels[i]), np.float32), corners(data.boxes[i]))
            boxes = corners(out.pred_boxes[k].numpy())
            for label in range(len(CLASSES)):
                scores = out.logits[k, :, label].numpy()
                found = Found(np.full(len(scores), label), scores, boxes)
                ordered, hit = matches(found, truth, label, 0.5)
                logits[label].append(ordered.astype(np.float64))
                right[label].append(hit)
    last = model.class_embed[-1]
    for label in range(len(CLASSES)):
        scale, shift = fit(np.concatenate(logits[label]), np.concatenate(right[label]))
        last.weight[label] *= scale
        last.bias[label] = last.bias[label] * scale + shift

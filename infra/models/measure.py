"""Scores of a detector against ground truth: COCO-style average precision, recall and false alarms."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infra.models.actors import CLASSES

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """One image's boxes: labels (n,), scores (n,), and corners x0, y0, x1, y1 in any one unit (n, 4)."""

    labels: Ints
    scores: Floats
    boxes: Floats


@dataclass(frozen=True)
class Scores:
    """What a detector reached.

    Attributes:
        ap50: Mean over the classes of the average precision at IoU 0.5.
        ap: The same, averaged over IoU 0.50, 0.55, ... 0.95 (COCO's headline figure).
        precision: Share of the detections at or above the score threshold that are right at IoU 0.5.
        recall: Share of the objects found at or above the threshold.
        person_recall: The same for persons alone.
        false_persons_per_frame: Wrong person detections at or above the threshold, per image.
    """

    ap50: float
    ap: float
    precision: float
    recall: float
    person_recall: float
    false_persons_per_frame: float


def iou(a: Floats, b: Floats) -> Floats:
    """Intersection over union of corner boxes: (n, 4) and (m, 4) give (n, m)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    areas = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    first, second = areas
    out: Floats = shared / (first[:, None] + second[None] - shared + 1e-9)
    return out


def matches(found: Found, truth: Found, label: int, threshold: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Scores of one image's detections of a class, best first, and whether each found an object of its own."""
    mine = found.labels == label
    order = np.argsort(-found.scores[mine], kind="stable")
    scores, boxes = found.scores[mine][order], found.boxes[mine][order]
    overlap = iou(boxes, truth.boxes[truth.labels == label])
    right = np.zeros(len(scores), dtype=bool)
    for i in range(len(scores)):
        if overlap.shape[1] and overlap[i].max() >= threshold:
            right[i] = True
            overlap[:, overlap[i].argmax()] = -1
    return scores, right


def _average_precision(scores: Floats, right: NDArray[np.bool_], objects: int) -> float:
    hits = right[np.argsort(-scores, kind="stable")].cumsum()
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    best_after = np.maximum.accumulate(precision[::-1])[::-1]
    # COCO reads the curve at 101 recalls.
    at = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.append(best_after, 0.0)[np.minimum(at, len(hits))].mean())


def measure(found: list[Found], truth: list[Found], threshold: float = 0.5) -> Scores:
    """Compares detections with ground truth, image by image; `threshold` is a score, 0..1."""
    wanted = np.concatenate([t.labels for t in truth])
    per_iou: dict[float, list[float]] = {}
    kept_right = dict.fromkeys(range(len(CLASSES)), (0, 0))
    for step in range(10):
        least = 0.5 + 0.05 * step
        per_iou[least] = []
        for label in range(len(CLASSES)):
            pairs = [matches(f, t, label, least) for f, t in zip(found, truth, strict=True)]
            scores, right = (np.concatenate(column) for column in zip(*pairs, strict=True))
            objects = int((wanted == label).sum())
            if objects:
                per_iou[least].append(_average_precision(scores, right, objects))
            if step == 0:
                kept = scores >= threshold
                kept_right[label] = int(kept.sum()), int((kept & right).sum())
    kept_all = sum(k for k, _ in kept_right.values())
    right_all = sum(r for _, r in kept_right.values())
    persons, persons_right = kept_right[0]
    return Scores(
        ap50=float(np.mean(per_iou[0.5])),
        ap=float(np.mean([np.mean(v) for v in per_iou.values()])),
        precision=right_all / max(1, kept_all),
        recall=right_all / max(1, len(wanted)),
        person_recall=persons_right / max(1, int((wanted == 0).sum())),
        false_persons_per_frame=(persons - persons_right) / len(truth),
    )

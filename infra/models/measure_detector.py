"""Measures a detector on held-out scenes: `python -m infra.models.measure_detector FOLDER`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForObjectDetection

from infra.models.measure import Found, Scores, measure
from infra.models.renders import HELD_OUT_SEED, Renders, corners, load, truth


@torch.no_grad()
def detections(model: Any, data: Renders) -> list[Found]:
    """Every query under every class, image by image, as RT-DETR's own post-processing ranks them."""
    model.eval()
    found = []
    for start in range(0, len(data.labels), 20):
        pixels = torch.from_numpy(data.images[start : start + 20].copy()).permute(0, 3, 1, 2).float() / 255
        out = model(pixel_values=pixels)
        classes = out.logits.shape[-1]
        for scores, boxes in zip(out.logits.sigmoid().numpy(), out.pred_boxes.numpy(), strict=True):
            labels = np.tile(np.arange(classes), len(scores))
            found.append(Found(labels, scores.ravel(), corners(boxes).repeat(classes, 0)))
    return found


def evaluate(model: Any, data: Renders) -> Scores:
    """Measures a model on rendered scenes that it was not trained on, at the score threshold 0.5."""
    return measure(detections(model, data), [truth(data, i) for i in range(len(data.labels))])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder whose input is 320x192 and unnormalised")
    parser.add_argument("--count", type=int, default=400, help="scenes, about 50 ms each")
    parser.add_argument("--renders", type=Path, default=Path(".rewatch/train/renders"), help="where scenes are kept")
    args = parser.parse_args()
    model = AutoModelForObjectDetection.from_pretrained(args.folder)
    scores = evaluate(model, load(args.renders, HELD_OUT_SEED, args.count))
    print(json.dumps({name: round(value, 4) for name, value in asdict(scores).items()}))


if __name__ == "__main__":
    main()

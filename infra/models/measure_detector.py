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
from infra.models.renders import HELD_OUT_SEED, Renders, corners, load


@torch.no_grad()
def evaluate(model: Any, data: Renders) -> Scores:
    """Measures a model on rendered scenes that it was not trained on."""
    model.eval()
    found, truth = [], []
    for start in range(0, len(data.labels), 20):
        pixels = torch.from_numpy(data.images[start : start + 20].copy()).permute(0, 3, 1, 2).float() / 255
        out = model(pixel_values=pixels)
        scores, labels = out.logits.sigmoid().max(-1)
        for k in range(len(pixels)):
            box = corners(out.pred_boxes[k].numpy())
            found.append(Found(labels[k].numpy(), scores[k].numpy(), box))
            i = start + k
            kept = data.labels[i]
            truth.append(Found(kept, np.ones(len(kept), np.float32), corners(data.boxes[i])))
    return measure(found, truth)


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

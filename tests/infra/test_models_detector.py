"""The shipped detector, loaded as any RT-DETR from the hub would be, on frames that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from infra.models.actors import CLASSES
from infra.models.measure import Found
from infra.models.stories import write_footage

WEIGHTS = Path(__file__).parents[2] / "infra" / "models" / "weights" / "detector"


@pytest.fixture(scope="module")
def detect():
    model = AutoModelForObjectDetection.from_pretrained(WEIGHTS).eval()
    processor = AutoImageProcessor.from_pretrained(WEIGHTS)

    @torch.inference_mode()
    def run(images):
        out = model(**processor(images=images, return_tensors="pt"))
        sizes = torch.tensor([[1.0, 1.0]] * len(images))
        results = processor.post_process_object_detection(out, threshold=0.1, target_sizes=sizes)
        return [Found(r["labels"].numpy(), r["scores"].numpy(), r["boxes"].numpy()) for r in results]

    assert tuple(model.config.id2label.values()) == CLASSES
    return run


def test_it_sees_the_visitor_of_the_night_story(detect, tmp_path):
    from PIL import Image

    footage = write_footage(tmp_path, cameras=("front-door",))
    frames = [f for f in footage.frames if "loiters" in f.story][8::4]
    seen = detect([Image.open(f.path).convert("RGB") for f in frames])
    hits = [bool(((s.labels == 0) & (s.scores >= 0.5)).any()) for s in seen]
    assert np.mean(hits) >= 0.8

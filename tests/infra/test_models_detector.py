"""The shipped detector, loaded as any RT-DETR from the hub would be, on frames that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from infra.models.actors import CLASSES
from infra.models.measure import Found, measure
from infra.models.renders import HELD_OUT_SEED
from infra.models.scene import random_scene
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


def _truth(boxes) -> Found:
    return Found(
        np.array([CLASSES.index(b.label) for b in boxes], dtype=np.int64),
        np.ones(len(boxes), np.float32),
        np.array([(b.x0, b.y0, b.x1, b.y1) for b in boxes], dtype=np.float32).reshape(-1, 4),
    )


def test_it_finds_what_is_in_held_out_scenes(detect):
    # The weights' card has the figures over 400 scenes; floors leave room for this sample's noise.
    scenes = [random_scene(HELD_OUT_SEED + i) for i in range(60)]
    found = [f for i in range(0, 60, 20) for f in detect([image for image, _ in scenes[i : i + 20]])]
    got = measure(found, [_truth(boxes) for _, boxes in scenes])
    assert got.ap50 >= 0.7, got
    assert got.person_recall >= 0.7, got
    assert got.false_persons_per_frame <= 0.2, got


def test_it_sees_the_visitor_of_the_night_story(detect, tmp_path):
    from PIL import Image

    footage = write_footage(tmp_path, cameras=("front-door",))
    frames = [f for f in footage.frames if "loiters" in f.story][8::4]
    seen = detect([Image.open(f.path).convert("RGB") for f in frames])
    hits = [bool(((s.labels == 0) & (s.scores >= 0.5)).any()) for s in seen]
    assert np.mean(hits) >= 0.8

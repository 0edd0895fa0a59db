"""Rendered training images at the detector's input size, kept on disk so that later passes cost nothing."""

import pickle
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.models.actors import CLASSES
from infra.models.measure import Found
from infra.models.scene import random_scene

#: The detector's input, height and width in pixels: multiples of 32 close to the cameras' 16:9.
INPUT = (192, 320)
#: Seeds from here on are for measuring only.
HELD_OUT_SEED = 1_000_000_000


@dataclass
class Renders:
    """A set of scenes.

    Attributes:
        images: (count, 192, 320, 3), uint8 RGB.
        labels: Per image the class indices, (objects,), int64.
        boxes: Per image centre x, centre y, width, height as fractions, (objects, 4), float32.
    """

    images: NDArray[np.uint8]
    labels: list[NDArray[np.int64]]
    boxes: list[NDArray[np.float32]]


def corners(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centre x, centre y, width, height to x0, y0, x1, y1, (n, 4) each."""
    return np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1)


def truth(data: Renders, index: int) -> Found:
    """One image's ground truth, every score 1."""
    labels = data.labels[index]
    return Found(labels, np.ones(len(labels), np.float32), corners(data.boxes[index]))


def _one(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]]:
    image, found = random_scene(seed)
    small = image.resize((INPUT[1], INPUT[0]), Image.Resampling.BILINEAR)
    labels = np.array([CLASSES.index(b.label) for b in found], dtype=np.int64)
    boxes = [((b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2, b.x1 - b.x0, b.y1 - b.y0) for b in found]
    return np.asarray(small), labels, np.array(boxes, dtype=np.float32).reshape(-1, 4)


def load(folder: Path, first_seed: int, count: int, workers: int = 1) -> Renders:
    """The scenes of `count` seeds, rendered (about 30 ms each) unless `folder` has them already."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{first_seed}-{count}"
    pixels, truth = stem.with_suffix(".npy"), stem.with_suffix(".pickle")
    if not truth.exists():
        out = np.lib.format.open_memmap(pixels, "w+", np.uint8, (count, *INPUT, 3))
        labels, boxes = [], []
        with get_context("spawn").Pool(workers) as pool:
            seeds = range(first_seed, first_seed + count)
            for i, (image, label, box) in enumerate(pool.imap(_one, seeds, chunksize=25)):
                out[i] = image
                labels.append(label)
                boxes.append(box)
        out.flush()
        # Written last: a set whose truth is missing was interrupted and is rendered again.
        truth.write_bytes(pickle.dumps((labels, boxes)))
    labels, boxes = pickle.loads(truth.read_bytes())  # noqa: S301  (a cache that this module wrote)
    return Renders(np.load(pixels, mmap_mode="r"), labels, boxes)


def fresh(first_seed: int, count: int) -> Renders:
    """The scenes of `count` seeds, rendered now and here: no file of an older renderer can stand in for them."""
    drawn = [_one(seed) for seed in range(first_seed, first_seed + count)]
    return Renders(np.stack([image for image, _, _ in drawn]), [one[1] for one in drawn], [one[2] for one in drawn])

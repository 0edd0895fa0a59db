"""Exports a model for the CPU's other runtimes, and measures them: `python -m processors.detect.export`.

A process of its own: it takes some 20 s of a core and torch's memory, neither of which the detector should lend it. It
ends when its standard input does, that is, with whoever started it.
"""

import argparse
import os
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from processors.detect import network
from processors.detect.agreement import agree
from processors.detect.card import Card
from processors.detect.exported import Cache, Measured
from processors.detect.onnx_detector import OnnxDetector
from processors.detect.openvino_detector import OpenVinoDetector
from processors.detect.settings import DetectorSettings
from processors.detect.timing import compare
from processors.detect.torch_detector import TorchDetector

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from processors.detect.model_detector import ModelDetector

# grid_sample, the heart of deformable attention, is an operator of its own from 16 on; 17 has layer norm.
_OPSET = 17

# Of the batch that is compared and timed.
_IMAGES = 2

# It gives way to what runs meanwhile: nobody waits for it.
_NICE = 10


def export(card: Card, to: Path) -> None:
    """Write the network as ONNX, its first dimension free."""
    net = network.load(card)
    example = torch.zeros((2, card.pixels.height, card.pixels.width, 3), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer's warnings name what does not change here: the size of the input and the model's own settings.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (example,),
            to,
            input_names=["images"],
            output_names=["found"],
            dynamic_axes={"images": {0: "n"}, "found": {0: "n"}},
            opset_version=_OPSET,
            dynamo=False,  # by torch.export it takes five times as long, and needs the shapes' bounds spelt out
        )


def make(card: Card, cache: Cache, threads: int) -> None:
    """Make the cache's entry, unless somebody made it meanwhile."""
    cache.lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.lock):
        if cache.read() is None:
            cache.make(lambda onnx: _fill(card, onnx, threads))


def _fill(card: Card, onnx: Path, threads: int) -> Measured:
    export(card, onnx)
    made: dict[str, Callable[[], ModelDetector]] = {
        "torch": lambda: TorchDetector(card, DetectorSettings(device="cpu", threads=threads)),
        "openvino": lambda: OpenVinoDetector(card, onnx, threads),
        "onnxruntime": lambda: OnnxDetector(card, onnx, threads),
    }
    images = _images()
    seen: dict[str, NDArray[np.float32]] = {}
    detectors: dict[str, ModelDetector] = {}
    left_out: dict[str, str] = {}
    for name, build in made.items():
        try:
            detector = build()
            seen[name] = detector.raw(images)
        except Exception as error:  # noqa: BLE001 (another runtime will do, and torch's own was loaded before)
            left_out[name] = repr(error)
            continue
        detectors[name] = detector
        if not agree(seen["torch"], seen[name], (card.pixels.width, card.pixels.height)):
            left_out[name] = "other boxes than torch's"
            del detectors[name]
    timing = compare({name: partial(detector.raw, images) for name, detector in detectors.items()})
    return Measured({name: round(ms / len(images), 3) for name, ms in timing.ms.items()}, timing.by, left_out)


def _images() -> list[Image.Image]:
    """Patches of colour in a camera's size: something to see everywhere, so that every query has a place of its own."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (_IMAGES, 18, 32, 3), np.uint8)
    return [Image.fromarray(patch).resize((1280, 720), Image.Resampling.BICUBIC) for patch in patches]


def _end_with_parent() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock this thread would hold when the interpreter ends
    os._exit(1)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m processors.detect.export", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(_NICE)
    card = Card.read(arguments.folder)
    make(card, Cache(arguments.cache, card, arguments.threads), arguments.threads)


if __name__ == "__main__":
    main()

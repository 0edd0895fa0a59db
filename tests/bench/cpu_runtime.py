"""Images a second through the fastest CPU runtime, from decoded images to boxes, against eager transformers.

Both sides in one process that has nothing else to do: `python -m tests.bench.cpu_runtime MODEL` takes the pairs.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from infra.local.stack import LocalStack
from processors.detect.card import Card
from processors.detect.settings import DetectorSettings
from processors.detect.upgrading import WAITING
from tests.bench.figure import Figure, Pair, rate
from tests.processors import detect_kit

NAMES = ("cpu_runtime_vs_eager", "cpu_runtime_r18_vs_eager")
AIM = 2.0

MODELS = ("demo", "r18")
PAIRS = {"demo": 8, "r18": 4}
BATCH = 8


async def measure(stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False) -> list[Figure]:
    """The demo's detector, and RT-DETRv2 R18 with random weights at 640 x 640."""
    del stack  # nothing of it is needed
    models = MODELS[:1] if quick else MODELS
    figures = []
    for number, model in enumerate(models):
        pairs = await _pairs(model, 1 if quick else PAIRS[model])
        figures.append(rate(NAMES[number], pairs, "images/s", AIM))
        progress((number + 1) / len(models))
    return figures


async def _pairs(model: str, count: int) -> list[Pair]:
    """A process of its own: torch reads once how its threads wait, and other benchmarks have imported it.

    Both sides sleep while they wait. What spins is slower by a factor of up to thirty where other processes run: that
    would be measured instead.
    """
    command = ["-m", "tests.bench.cpu_runtime", model, "--pairs", str(count)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | dict([WAITING]),
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]
    return [(product, eager) for product, eager in json.loads(out.splitlines()[-1])["pairs"]]


def take(model: str, count: int) -> dict[str, Any]:
    """Export, check that both sides see the same, and measure in turn."""
    from processors.detect import export, runtimes
    from processors.detect.agreement import agree, distances
    from processors.detect.exported import Cache
    from processors.detect.model_detector import ModelDetector

    with tempfile.TemporaryDirectory(prefix="rewatch-bench-runtime-") as directory:
        folder = detect_kit.DEMO_DETECTOR if model == "demo" else detect_kit.r18(Path(directory) / "r18")
        card = Card.read(folder)
        cache = Cache(Path(directory) / "cache", card, 0)
        export.make(card, cache, 0)
        product = runtimes.load(DetectorSettings(device="cpu"), folder, Path(directory) / "cache")
        assert isinstance(product, ModelDetector), "the cache was just filled"
        eager = _Eager(card)
        images = detect_kit.scenes(BATCH)
        size = (card.pixels.width, card.pixels.height)
        expected = eager.raw(images)
        farthest = {}
        for name in ("openvino", "onnxruntime"):
            seen = runtimes.load(DetectorSettings(device="cpu", runtime=name), folder, Path(directory) / "cache")
            assert isinstance(seen, ModelDetector)
            assert seen.runtime == f"{name}-cpu", cache.read()
            found = seen.raw(images)
            assert agree(expected, found, size), f"{name} sees other boxes than transformers"
            farthest[name] = max(float(distances(a, b, size).max()) for a, b in zip(expected, found, strict=True))
        pairs = [(_rate(product.detect, images), _rate(eager.detect, images)) for _ in range(count)]
        manifest = cache.read()
        assert manifest is not None
        return {
            "pairs": pairs,
            "runtime": product.runtime,
            "ms": manifest.ms,
            "by": manifest.by,
            "left_out": manifest.left_out,
            "farthest": farthest,
            "load": os.getloadavg()[0],
        }


def _rate(detect: Callable[[Sequence[Image.Image]], Any], images: Sequence[Image.Image]) -> float:
    began = time.perf_counter()
    detect(images)
    return len(images) / (time.perf_counter() - began)


class _Eager:
    """transformers as its documentation uses it."""

    def __init__(self, card: Card) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForObjectDetection, RTDetrImageProcessorPil

        self._torch = torch
        self._processor = AutoImageProcessor.from_pretrained(card.folder)
        self._pil = RTDetrImageProcessorPil.from_pretrained(card.folder)
        self._model = AutoModelForObjectDetection.from_pretrained(card.folder).eval()

    def raw(self, images: Sequence[Image.Image]) -> Any:
        """Scores and boxes, as `ModelDetector.raw` has them, of the same pixels: torchvision rounds some by one."""
        with self._torch.inference_mode():
            output = self._model(**self._pil(images=list(images), return_tensors="pt"))
        return self._torch.cat((output.logits.sigmoid(), output.pred_boxes), -1).numpy()

    def detect(self, images: Sequence[Image.Image]) -> Any:
        """Boxes in pixels."""
        sizes = [(image.height, image.width) for image in images]
        return self._processor.post_process_object_detection(self._forward(images), threshold=0.1, target_sizes=sizes)

    def _forward(self, images: Sequence[Image.Image]) -> Any:
        inputs = self._processor(images=list(images), return_tensors="pt")
        with self._torch.inference_mode():
            return self._model(**inputs)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cpu_runtime", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--pairs", type=int, default=4)
    arguments = parser.parse_args()
    print(json.dumps(take(arguments.model, arguments.pairs)))


if __name__ == "__main__":
    main()

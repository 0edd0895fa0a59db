"""`make bench-gpu`: images a second of RT-DETRv2 R18 and R50 at 640 on a GPU, random weights, by batch size and step.

From JPEG to boxes, a step at a time: what a pipeline of these steps reaches is at most the slowest of them. The forward
pass is also shown as a share of what the same card multiplies in half precision: the floating point operations are
counted, the peak is measured with one large product. Without a GPU it says so and ends with 0.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from processors.detect import network
from processors.detect.card import Card
from processors.detect.core import best_boxes, decode_image
from processors.detect.cuda_graphs import CudaGraphs
from tests.bench import kit
from tests.processors import detect_kit

BATCHES = (1, 2, 4, 8, 16, 32, 64)
AIMS = {"r18": 1500, "r50": 700}
"""Images a second from JPEG on one H200."""

_ROUNDS = 10
_SIDE = 8192


def median_s(work: Callable[[], Any], rounds: int = _ROUNDS) -> float:
    """Seconds of one call, the median; the GPU has ended when it returns."""
    took = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[rounds // 2]  # the first one warms up


def peak_flops() -> float:
    """Floating point operations a second of one large product in half precision."""
    one = torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.half)
    return 2 * _SIDE**3 / median_s(lambda: one @ one)


def flops_of(card: Card) -> int:
    """Of one image."""
    images = torch.zeros((1, card.pixels.height, card.pixels.width, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.load(card)(images)
    return int(counter.get_total_flops())


def steps(
    card: Card, infer: Callable[[Any], Any], batch: int, decoders: ThreadPoolExecutor, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Images a second of every step, at one batch size; decoding and preparing with as many threads as there are."""
    jpegs = [data for data in kit.scenes(min(batch, 8), (1280, 720)) for _ in range(batch)][:batch]
    images = [decode_image(data) for data in jpegs]
    pixels = card.pixels.of(images)
    found = infer(pixels)
    work = {
        "decode": lambda: list(decoders.map(decode_image, jpegs)),
        "preprocess": lambda: list(decoders.map(lambda image: card.pixels.of([image]), images)),
        "forward": lambda: infer(pixels),
        "postprocess": lambda: [
            best_boxes(o[:, :-4], o[:, -4:], card.labels, i.size) for o, i in zip(found, images, strict=True)
        ],
    }
    return {name: batch / median_s(one, rounds) for name, one in work.items()}


def measure(decoders: ThreadPoolExecutor) -> dict[str, Any]:
    """Everything, on the GPU that is there."""
    peak = peak_flops()
    rows = []
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-gpu-") as directory:
        for model, write in {"r18": detect_kit.r18, "r50": detect_kit.r50}.items():
            card = Card.read(write(Path(directory) / model))
            flops = flops_of(card)
            for batch in BATCHES:
                graphs = CudaGraphs(network.load(card), batch)
                rates = steps(card, graphs, batch, decoders)
                rows.append({"model": model, "batch": batch, "share_of_peak": rates["forward"] * flops / peak, **rates})
                del graphs
                torch.cuda.empty_cache()
    return {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "peak_tflops": peak / 1e12, "rows": rows}


def show(found: dict[str, Any], console: Console) -> None:
    """The table, and how far the aims are."""
    names = ("decode", "preprocess", "forward", "postprocess")
    table = Table("model", "batch", *(f"{name}, images/s" for name in names), "of the peak", title=found["card"])
    for row in found["rows"]:
        rates = (f"{row[name]:,.0f}" for name in names)
        table.add_row(row["model"], str(row["batch"]), *rates, f"{row['share_of_peak']:.0%}")
    console.print(table)
    for model, aim in AIMS.items():
        best = max((min(row[name] for name in names) for row in found["rows"] if row["model"] == model), default=0.0)
        console.print(f"{model}: its slowest step reaches {best:,.0f} images/s; the aim on one H200 is {aim:,}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"), help="default: bench-gpu.json")
    arguments = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available():
        console.print("no GPU that torch can use: nothing to measure")
        return
    with ThreadPoolExecutor() as decoders:
        found = measure(decoders)
    show(found, console)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""RT-DETRv2 (and RT-DETR) by torch, on the CPU or CUDA.

On CUDA: half precision, and one CUDA graph a batch size. When the GPU's memory does not suffice, batches are halved;
when it does not suffice for one image, the CPU goes on.
"""

from collections.abc import Callable, Sequence

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from PIL import Image

from processors.detect import network
from processors.detect.card import Card
from processors.detect.cuda_graphs import CudaGraphs
from processors.detect.model_detector import ModelDetector
from processors.detect.settings import DetectorSettings, ModelError

log = structlog.get_logger(__name__)

Infer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""From `Pixels.of` to `Network`'s output."""


class TorchDetector(ModelDetector):
    """A detection transformer of transformers."""

    def __init__(self, card: Card, settings: DetectorSettings, *, on_gpu: Callable[[], Infer] | None = None) -> None:
        """Load it, and run it once at every batch size that it will meet.

        Args:
            card: the model.
            settings: `device`, `threads` and `batch_size` are read.
            on_gpu: makes what infers on the GPU; by default CUDA graphs.

        Raises:
            ModelError: the model cannot be loaded, or there is no such device.
        """
        super().__init__(card)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and on_gpu is None and not torch.cuda.is_available():
            raise ModelError("detector.device is cuda, but torch sees no CUDA device: set it to auto or cpu")
        self._most = settings.batch_size
        self.runtime = f"torch-{device}"
        self._infer: Infer
        if device == "cuda":
            try:
                self._infer = on_gpu() if on_gpu is not None else CudaGraphs(network.load(card), self._most)
            except torch.cuda.OutOfMemoryError as error:
                self._to_cpu(error)
        else:
            self._infer = on_cpu(card)
        self.warm_up(1)

    def raw(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """See the base. In batches that the device's memory bears."""
        pixels = self.card.pixels.of(images)
        while True:
            try:
                parts = [self._infer(pixels[at : at + self._most]) for at in range(0, len(pixels), self._most)]
                return np.concatenate(parts)
            except torch.cuda.OutOfMemoryError as error:
                tried = min(self._most, len(pixels))
                if tried > 1:
                    self._most = tried // 2
                    log.warning("out of GPU memory: smaller batches from here on", tried=tried, now=self._most)
                else:
                    self._to_cpu(error)
            torch.cuda.empty_cache()  # outside `except`: the error's traceback holds what is to be freed

    def _to_cpu(self, error: Exception) -> None:
        log.error(
            "out of GPU memory even for one image: the CPU goes on until the next start",
            fix="free the GPU's memory, or choose a smaller model (detector.model_path); then restart detect",
            error=str(error),
        )
        self._infer = on_cpu(self.card)  # loaded anew: what is on the GPU has lost half its bits
        self.runtime = "torch-cpu"


def on_cpu(card: Card) -> Infer:
    """The network on the CPU, float32, folded, `channels_last`."""
    net = network.load(card)

    @torch.inference_mode()
    def infer(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = net(torch.from_numpy(pixels)).numpy()
        return found

    return infer

"""RT-DETRv2 (and RT-DETR) by transformers' Auto classes, on the CPU or CUDA."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.utils import logging as transformers_logging

from processors.detect.core import best_boxes
from processors.detect.settings import DetectorSettings, ModelError
from schemas.records import Box

_READ = 1 << 20


class TorchDetector:
    """A detection transformer of transformers: whatever `AutoModelForObjectDetection` loads with sigmoid scores."""

    def __init__(self, settings: DetectorSettings, path: str) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ModelError("detector.device is cuda, but torch sees no CUDA device: set it to auto or cpu")
        transformers_logging.disable_progress_bar()  # it is drawn for terminals, and would stand in the log
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(path)
            self._model: Any = AutoModelForObjectDetection.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot load a detector from {path!r} (detector.model_path, RTDETR_MODEL_PATH): {error}",
            ) from error
        self._model = self._model.to(device).eval()
        self._device = device
        self._labels = {int(index): name for index, name in self._model.config.id2label.items()}
        self.name = Path(path).name if Path(path).exists() else path
        self.runtime = f"torch-{device}"
        self.digest = _weights_digest(path, self._model)

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """The boxes of each image, pixels, best first."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        with torch.inference_mode():
            output = self._model(**inputs)
        # One copy back for the whole batch; thresholds are applied on the host.
        scores = output.logits.sigmoid().float().cpu().numpy()
        boxes = output.pred_boxes.float().cpu().numpy()
        return [best_boxes(scores[index], boxes[index], self._labels, image.size) for index, image in enumerate(images)]


def _weights_digest(path: str, model: Any) -> str:
    """SHA-256 of the weights: of the file where there is one, else of the tensors in order of their names."""
    sha = hashlib.sha256()
    file = Path(path) / "model.safetensors"
    if file.exists():
        with file.open("rb") as source:
            while chunk := source.read(_READ):
                sha.update(chunk)
    else:
        for name, tensor in sorted(model.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

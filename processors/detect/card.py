"""What a model's folder says of it, read without torch: its name, its weights' hash, its classes, its input."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from processors.detect.settings import ModelError

_READ = 1 << 20
_WEIGHTS = "model.safetensors"

# What transformers' RTDetrImageProcessor does where a file is silent.
_SIDE = 640
_SCALE = 1 / 255


class Pixels(NamedTuple):
    """How an image becomes the model's input."""

    height: int
    width: int
    resample: Image.Resampling
    scale: tuple[float, float, float]
    """What a byte of each channel is multiplied by, and then `shift` is added."""
    shift: tuple[float, float, float]

    def of(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """The images in the model's size: (n, height, width, 3), RGB. Scaling and shifting are the network's part."""
        found = np.empty((len(images), self.height, self.width, 3), np.uint8)
        for index, image in enumerate(images):
            found[index] = np.asarray(image.resize((self.width, self.height), self.resample))
        return found


class Card(NamedTuple):
    """A detection transformer in a folder, as transformers' `save_pretrained` writes it."""

    folder: Path
    name: str
    digest: str
    """SHA-256 of the weights' file, hex; of several in the order of their names."""
    labels: dict[int, str]
    pixels: Pixels

    @classmethod
    def read(cls, path: str) -> "Card":
        """Read the card of a folder, or of a hub's model, which is fetched first if it is not on this machine.

        Raises:
            ModelError: there is no such model, or none that takes whole images of one size.
        """
        folder = Path(path)
        try:
            if not folder.is_dir():
                folder = _fetched(path)
            config = json.loads((folder / "config.json").read_bytes())
            processor = json.loads((folder / "preprocessor_config.json").read_bytes())
            name = folder.name if folder == Path(path) else path
            return cls(folder, name, _digest(folder), _labels(config), _pixels(processor))
        except (OSError, ValueError) as error:
            raise unloadable(path, error) from error


def unloadable(path: str, error: Exception) -> ModelError:
    """The error that says that no detector can be loaded from there."""
    return ModelError(f"cannot load a detector from {path!r} (detector.model_path, RTDETR_MODEL_PATH): {error}")


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a third of a second that folders need not wait
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except HfHubHTTPError as error:
        raise ValueError(f"neither a folder nor to be had from the hub: {error}") from error


def _digest(folder: Path) -> str:
    files = [folder / _WEIGHTS]
    if not files[0].exists():
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise ValueError(f"no weights in {folder}")
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as source:
            while chunk := source.read(_READ):
                sha.update(chunk)
    return sha.hexdigest()


def _labels(config: dict[str, Any]) -> dict[int, str]:
    named = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # two is transformers' default
    return {int(index): str(name) for index, name in named.items()}


def _pixels(config: dict[str, Any]) -> Pixels:
    size = config.get("size") or {"height": _SIDE, "width": _SIDE}
    if not config.get("do_resize", True) or config.get("do_pad", False) or {*size} != {"height", "width"}:
        raise ValueError("preprocessor_config.json does not resize every image to one size, as RT-DETR's do")
    factor = float(config.get("rescale_factor", _SCALE)) if config.get("do_rescale", True) else 1.0
    scale, shift = [factor] * 3, [0.0] * 3
    if config.get("do_normalize", False):
        mean, std = config["image_mean"], config["image_std"]
        scale = [factor / one for one in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return Pixels(
        int(size["height"]),
        int(size["width"]),
        Image.Resampling(config.get("resample", Image.Resampling.BILINEAR)),
        (scale[0], scale[1], scale[2]),
        (shift[0], shift[1], shift[2]),
    )

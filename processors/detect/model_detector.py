"""What every runtime of a model in this process shares: from the network's output to boxes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from processors.detect.card import Card
from processors.detect.core import best_boxes
from schemas.records import Box


class ModelDetector(ABC):
    """A `Detector` whose model runs in this process."""

    runtime: str

    def __init__(self, card: Card) -> None:
        self.card = card
        self.name, self.digest = card.name, card.digest

    @abstractmethod
    def raw(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """(n, queries, classes + 4): sigmoid scores, then centre x, centre y, width and height as fractions."""

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """The boxes of each image, pixels, best first."""
        found = self.raw(images)
        return [
            best_boxes(one[:, :-4], one[:, -4:], self.card.labels, image.size)
            for one, image in zip(found, images, strict=True)
        ]

    def warm_up(self, batch: int) -> None:
        """Infer so many blank images: what is made at the first inference is made now, before anybody waits."""
        self.raw([Image.new("RGB", (self.card.pixels.width, self.card.pixels.height))] * batch)

    def close(self) -> None:  # noqa: B027 (nothing but memory is held)
        """Nothing is left open."""

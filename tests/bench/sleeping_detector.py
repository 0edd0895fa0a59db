"""The production process of detect, whose model only sleeps: `python -m tests.bench.sleeping_detector detect ...`.

For `scale.py`. What stands behind the port is replaced, and nothing else: settings, group, host, images, transactions
and reports are those of `python -m infra.worker`, whose arguments it takes.
"""

import sys
import time
from collections.abc import Sequence

from PIL import Image

from infra import topology, worker
from infra.config import Settings
from processors.detect.detector import FakeDetector
from schemas.records import Box

SLEEP_S = 0.020
"""An image's inference, between what RT-DETRv2 S takes on a T4 (4.6 ms) and on a V100 in PyTorch (52 ms)."""


SEEN = tuple(
    Box(label=label, score=score, x=x, y=120, width=60, height=90)
    for label, score, x in (("person", 0.91, 40), ("car", 0.83, 300), ("dog", 0.42, 500))
)
"""What stands on an ordinary street."""


class SleepingDetector(FakeDetector):
    """Sees the same three things in each image, after a while."""

    name = "sleeper"
    runtime = "sleep"

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """What it always sees."""
        time.sleep(SLEEP_S)
        return [SEEN] * len(images)


def _sleeper(_: Settings) -> SleepingDetector:
    return SleepingDetector()


if __name__ == "__main__":
    topology.detector = _sleeper  # type: ignore[assignment]
    sys.exit(worker.main())

"""What detect counts besides what every stage does: its model's batches."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from streams.metrics import WORK_S, Distribution

# batch_size can be set up to whatever the device holds; a doubling tells how full they run.
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class DetectMetrics(Collector):
    """Counts of one detector."""

    def __init__(self) -> None:
        self.batch_images = Distribution(
            "rewatch_detect_batch_images", "Images in one call of the model.", _SIZES, unit="images"
        )
        self.batch_seconds = Distribution(
            "rewatch_detect_batch_seconds",
            "One call of the model (or of the detector's service): preparing, inference, reading its output.",
            WORK_S,
        )

    def inferred(self, images: int, seconds: float) -> None:
        """The model answered."""
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        yield CounterMetricFamily("rewatch_detect_images", "Images that the model saw.", self.batch_images.sum)
        yield self.batch_images.family()
        yield self.batch_seconds.family()

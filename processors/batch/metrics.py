"""What batch counts besides what every stage does: why windows closed."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

from streams.metrics import Counts, Distribution

# A window has 50 frames at most unless its settings say otherwise.
_FRAMES = (1, 2, 5, 10, 20, 35, 50, 100, 200)


class BatchMetrics(Collector):
    """Counts of the windows of one process. A window that is folded again after a fence counts again."""

    def __init__(self) -> None:
        self.windows = Counts("rewatch_batch_windows", "Windows by what closed them.", "closed_by", unit="windows")
        self.frames = Distribution("rewatch_batch_window_frames", "Frames of a window.", _FRAMES, unit="frames")

    def closed(self, closed_by: str, frames: int) -> None:
        """A window closed."""
        self.windows.add(closed_by)
        self.frames.observe(frames)

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        yield self.windows.family()
        yield self.frames.family()

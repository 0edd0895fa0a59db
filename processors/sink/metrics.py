"""What sink counts besides what every stage does: rows, inserts, and how old rows are when they can be asked for."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

from streams.metrics import AGE_S, WORK_S, Counts, Distribution


class SinkMetrics(Collector):
    """Counts of one sink."""

    def __init__(self) -> None:
        self.rows = Counts(
            "rewatch_sink_rows",
            "Rows that the store took, by table; those of a range inserted again count again here, not in the table.",
            "table",
            unit="rows",
        )
        self.refused = Counts(
            "rewatch_sink_refused_rows",
            "Rows that their typed table refused; they stay in `log`, with the reason.",
            "table",
            unit="rows",
        )
        self.insert_seconds = Distribution("rewatch_sink_insert_seconds", "One insert, until it is on disk.", WORK_S)
        self.oldest_row_seconds = Distribution(
            "rewatch_sink_oldest_row_seconds",
            "From the arrival of a frame, or the end of a window, to where it can be asked for: the oldest row of each "
            "insert. Footage over a day old is left out.",
            AGE_S,
        )

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        for one in (self.rows, self.refused, self.insert_seconds, self.oldest_row_seconds):
            yield one.family()

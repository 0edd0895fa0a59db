"""What one measurement says, and how two are compared: the vocabulary of every benchmark here."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A value against its baseline, both of the same run on the same machine."""

    name: str
    value: float
    """What the product reached, in `unit`."""
    baseline: float
    """What the least program that does the same mandatory work reached; or the aim, where there is none."""
    ratio: float
    """Of the two, so that higher is better whatever the unit."""
    unit: str

    def as_json(self) -> dict[str, Any]:
        """As `bench.json` has it."""
        return {
            "name": self.name,
            "value": round(self.value, 3),
            "baseline": round(self.baseline, 3),
            "ratio": round(self.ratio, 3),
            "unit": self.unit,
        }


def rate(name: str, pairs: Sequence[tuple[float, float]], unit: str) -> Figure:
    """A figure of rates (more is better) from interleaved `(product, baseline)` pairs.

    The ratio is the median of the pairs' ratios, not the ratio of the medians: what disturbs the machine for a
    minute disturbs both halves of a pair.
    """
    value = statistics.median(product for product, _ in pairs)
    baseline = statistics.median(bare for _, bare in pairs)
    return Figure(name, value, baseline, statistics.median(product / bare for product, bare in pairs), unit)


def latency(name: str, value: float, aim: float, unit: str = "ms") -> Figure:
    """A figure of latency (less is better) against its aim."""
    return Figure(name, value, aim, aim / value, unit)

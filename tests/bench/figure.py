"""What one measurement says, and how two are compared: the vocabulary of every benchmark here."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

Pair = tuple[float, float]
"""What the product and its baseline reached, one right after the other."""


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
    aim: float | None = None
    """The least ratio that we want; None where the figure is only shown."""
    pairs: tuple[Pair, ...] = ()
    """What it was made from, where it was made from pairs: their spread is the noise."""

    def as_json(self) -> dict[str, Any]:
        """As `bench.json` has it."""
        return {
            "name": self.name,
            "value": round(self.value, 3),
            "baseline": round(self.baseline, 3),
            "ratio": round(self.ratio, 3),
            "unit": self.unit,
        }

    @property
    def missed(self) -> bool:
        """Whether the ratio, as it is shown, is below the aim."""
        return self.aim is not None and round(self.ratio, 2) < self.aim

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest ratio of a pair; None where there is but one."""
        ratios = [product / bare for product, bare in self.pairs]
        return (min(ratios), max(ratios)) if len(ratios) > 1 else None


def rate(name: str, pairs: Sequence[Pair], unit: str, aim: float | None = None) -> Figure:
    """A figure of rates (more is better) from interleaved `(product, baseline)` pairs.

    The ratio is the median of the pairs' ratios, not the ratio of the medians: what disturbs the machine for a
    minute disturbs both halves of a pair.
    """
    value = statistics.median(product for product, _ in pairs)
    baseline = statistics.median(bare for _, bare in pairs)
    ratio = statistics.median(product / bare for product, bare in pairs)
    return Figure(name, value, baseline, ratio, unit, aim, tuple(pairs))


def latency(name: str, value: float, aim: float, unit: str = "ms") -> Figure:
    """A figure of latency (less is better) against its aim."""
    return Figure(name, value, aim, aim / value, unit, aim=1.0)

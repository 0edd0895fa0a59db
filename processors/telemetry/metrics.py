"""What Prometheus reads of the GPUs: the last look, never a new one (a scrape must not hang with the driver)."""

from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from processors.telemetry.core import REASONS, Reading, Seen
from processors.telemetry.outbox import Outbox
from streams.metrics import gauge

_MHZ = 1_000_000

_GAUGES: tuple[tuple[str, str, str, Callable[[Reading], float | None]], ...] = (
    ("memory_used", "bytes", "Memory in use, the driver's own included.", lambda c: c.memory_used),
    ("memory_total", "bytes", "Memory of the card.", lambda c: c.memory_total),
    ("utilization", "ratio", "Share of time that kernels ran.", lambda c: c.utilization),
    ("memory_utilization", "ratio", "Share of time that memory was read or written.", lambda c: c.memory_utilization),
    ("temperature", "celsius", "Temperature.", lambda c: c.temperature),
    ("power", "watts", "Power drawn.", lambda c: c.power),
    ("power_limit", "watts", "The limit in force.", lambda c: c.power_limit),
)

_CARD = ("gpu", "uuid")


class TelemetryMetrics(Collector):
    """The last look, as gauges. A value that a card does not tell has no series; nor has any while the driver hangs.

    Args:
        seen: gives the last look.
        outbox: what becomes of the readings.
    """

    def __init__(self, seen: Callable[[], Seen], outbox: Outbox) -> None:
        self._seen = seen
        self._outbox = outbox

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        seen = self._seen()
        yield gauge("rewatch_gpus", "Cards of this host that answer.", (), {(): float(_answering(seen))})
        yield gauge(
            "rewatch_gpu_driver_hung", "Whether NVIDIA's driver does not answer: 1 or 0.", (), {(): float(seen.hung)}
        )
        yield _each(
            "rewatch_gpu_lost", "Whether the card fell off the bus: 1 or 0.", seen, lambda c: float(bool(c.error))
        )
        for name, unit, text, of in _GAUGES:
            yield _each(f"rewatch_gpu_{name}", text, seen, of, unit=unit)
        yield gauge(
            "rewatch_gpu_clock",
            "Clocks of the multiprocessors and of the memory.",
            (*_CARD, "clock"),
            {
                (*_name(card), clock): float(mhz * _MHZ)
                for card in seen.cards
                for clock, mhz in (("sm", card.clock_sm), ("memory", card.clock_memory))
                if mhz is not None
            },
            unit="hertz",
        )
        yield gauge(
            "rewatch_gpu_ecc_uncorrected",
            "Uncorrected memory errors since the driver was loaded (volatile) and in the card's life (aggregate).",
            (*_CARD, "counter"),
            {
                (*_name(card), counter): float(count)
                for card in seen.cards
                for counter, count in (("volatile", card.ecc_volatile), ("aggregate", card.ecc_aggregate))
                if count is not None
            },
        )
        yield gauge(
            "rewatch_gpu_throttled",
            "Whether the card's clocks are held down for this reason: 1 or 0.",
            (*_CARD, "reason"),
            {
                (*_name(card), reason): float(reason in card.throttle_reasons)
                for card in seen.cards
                if card.throttle_reasons is not None
                for reason in (*REASONS.values(), *(r for r in card.throttle_reasons if r not in REASONS.values()))
            },
        )
        yield gauge(
            "rewatch_gpu_process_memory",
            "Memory of one process on the card.",
            (*_CARD, "pid", "process"),
            {
                (*_name(card), str(process.pid), process.name or ""): float(process.memory)
                for card in seen.cards
                for process in card.processes or ()
                if process.memory is not None
            },
            unit="bytes",
        )
        yield _info(seen)
        yield CounterMetricFamily("rewatch_gpu_readings", "Readings appended to gpu_metrics.", self._outbox.sent)
        yield CounterMetricFamily(
            "rewatch_gpu_readings_dropped",
            "Readings that the log never got: the broker was away for longer than they are kept.",
            self._outbox.dropped,
        )


def _answering(seen: Seen) -> int:
    return sum(card.error is None for card in seen.cards)


def _name(card: Reading) -> tuple[str, str]:
    return str(card.device), card.uuid or ""


def _each(name: str, text: str, seen: Seen, of: Callable[[Reading], float | None], *, unit: str = "") -> Metric:
    values: dict[tuple[str, ...], float] = {
        _name(card): float(value) for card in seen.cards if (value := of(card)) is not None
    }
    return gauge(name, text, _CARD, values, unit=unit)


def _info(seen: Seen) -> Metric:
    family = InfoMetricFamily("rewatch_gpu", "What the card is called, and what drives it.", labels=_CARD)
    for card in seen.cards:
        about = {"name": card.name, "driver": seen.driver or "", "cuda": seen.cuda or ""}
        family.add_metric(_name(card), about)
    return family

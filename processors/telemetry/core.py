"""What a reading of the GPUs says: to the log, to a status file, to people. Pure."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from schemas.records import GpuMetrics, GpuProcess

REASONS: Mapping[int, str] = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat (driver)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
"""NVML's bits (nvml.h, nvmlClocksEventReason*) in words. 0x1, an idle card, holds nothing down."""


class Process(NamedTuple):
    """One process with memory on a card."""

    pid: int
    name: str | None
    """The program's, without its arguments: they may hold secrets."""
    memory: int | None
    """Bytes."""


class Reading(NamedTuple):
    """One card, once. What it does not tell is None."""

    device: int
    """Its index on this host, from 0."""
    uuid: str | None = None
    name: str = "GPU"
    utilization: float | None = None
    """Share of time, 0 to 1."""
    memory_utilization: float | None = None
    """Share of time, 0 to 1."""
    memory_used: int | None = None
    """Bytes, the driver's own included."""
    memory_total: int | None = None
    """Bytes."""
    temperature: float | None = None
    """Degrees Celsius."""
    power: float | None = None
    """Watts."""
    power_limit: float | None = None
    """Watts."""
    clock_sm: int | None = None
    """MHz."""
    clock_memory: int | None = None
    """MHz."""
    ecc_volatile: int | None = None
    ecc_aggregate: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    processes: tuple[Process, ...] | None = None
    error: str | None = None
    """Why it cannot be read: the card has fallen off the bus. Then nothing else is told but which card it is."""

    @property
    def memory_free(self) -> int | None:
        """Bytes."""
        if self.memory_total is None or self.memory_used is None:
            return None
        return self.memory_total - self.memory_used


class Seen(NamedTuple):
    """One look at this host's GPUs."""

    cards: tuple[Reading, ...] = ()
    why: str = ""
    """Why there is no card to read; empty where there is one."""
    driver: str | None = None
    cuda: str | None = None
    hung: bool = False
    """The driver does not answer."""

    @property
    def state(self) -> Literal["cards", "none", "hung"]:
        """In a word."""
        return "hung" if self.hung else "cards" if self.cards else "none"


def throttle_words(bits: int) -> tuple[str, ...]:
    """Why clocks are held down, from NVML's bits; bits that came later are told as numbers."""
    unknown = bits & ~(sum(REASONS) | 1)
    return (
        *(word for bit, word in REASONS.items() if bits & bit),
        *((f"reason {unknown:#x}",) if unknown else ()),
    )


def cuda_version(number: int) -> str:
    """CUDA's version as people write it: 12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


def records(seen: Seen, host: str, read_at: int) -> list[GpuMetrics]:
    """A record for each card.

    Args:
        seen: the look.
        host: this host's name.
        read_at: wall time, milliseconds since the Unix epoch.
    """
    return [
        GpuMetrics(
            host=host,
            device=card.device,
            name=card.name,
            utilization=_or_nan(card.utilization),
            memory_used=-1 if card.memory_used is None else card.memory_used,
            memory_total=-1 if card.memory_total is None else card.memory_total,
            temperature=_or_nan(card.temperature),
            power=_or_nan(card.power),
            read_at=read_at,
            uuid=card.uuid,
            driver=seen.driver,
            cuda=seen.cuda,
            memory_utilization=card.memory_utilization,
            power_limit=card.power_limit,
            clock_sm=card.clock_sm,
            clock_memory=card.clock_memory,
            ecc_volatile=card.ecc_volatile,
            ecc_aggregate=card.ecc_aggregate,
            throttled=None if card.throttle_reasons is None else bool(card.throttle_reasons),
            throttle_reasons=card.throttle_reasons or (),
            process_count=None if card.processes is None else len(card.processes),
            processes=tuple(GpuProcess(pid=p.pid, name=p.name, memory=p.memory) for p in card.processes or ()),
            error=card.error,
        )
        for card in seen.cards
    ]


def report(seen: Seen) -> dict[str, Any]:
    """What the status file and `rewatch status --json` say, JSON-able."""
    return {
        "state": seen.state,
        "why": seen.why,
        "driver": seen.driver,
        "cuda": seen.cuda,
        "cards": [
            card._asdict() | {"processes": None if card.processes is None else [p._asdict() for p in card.processes]}
            for card in seen.cards
        ],
    }


def sentence(report: Mapping[str, Any]) -> str:
    """What `report` says, in a line for people."""
    if report["state"] != "cards":
        return str(report["why"])
    about = f"driver {report['driver']}, CUDA {report['cuda']}"
    return "; ".join([*(_card(card) for card in report["cards"]), about])


def _card(card: Mapping[str, Any]) -> str:
    if card["error"]:
        return f"{card['name']} ({card['device']}): {card['error']}"
    used, total = card["memory_used"], card["memory_total"]
    told = [
        f"{(total - used) / 2**30:.1f} GiB free of {total / 2**30:.1f}" if used is not None and total else "",
        f"{card['utilization']:.0%} busy" if card["utilization"] is not None else "",
        f"{card['temperature']:.0f} °C" if card["temperature"] is not None else "",
        f"{card['power']:.0f} W" if card["power"] is not None else "",
        f"held down by {', '.join(card['throttle_reasons'])}" if card["throttle_reasons"] else "",
    ]
    return f"{card['name']} ({card['device']}): " + (", ".join(filter(None, told)) or "tells nothing")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

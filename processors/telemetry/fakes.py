"""A fake of the module `pynvml`, with cards that answer as real ones do, refuse, hang or fall off the bus."""

# ruff: noqa: D102, N802
# The functions are named, and documented, as NVML has them.

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


@dataclass
class FakeCard:
    """One card. `answers` are by pynvml's function, without `nvmlDeviceGet`; one that it lacks is not supported."""

    uuid: str
    name: str
    answers: dict[str, Any] = field(default_factory=dict)
    error: int | None = None
    """NVML's code for every question: the card is lost."""


def rtx_a5500(uuid: str = "GPU-2b6c1e0a-7f1d-5c35-9a4e-3f0d8a1b2c3d") -> FakeCard:
    """A workstation card of 24 GB at work: ECC off, drawing as much as it may."""
    return FakeCard(
        uuid,
        "NVIDIA RTX A5500",
        {
            "MemoryInfo": SimpleNamespace(total=25_757_220_864, free=8_912_896_000, used=16_844_324_864),
            "UtilizationRates": SimpleNamespace(gpu=97, memory=63),
            "Temperature": 71,
            "PowerUsage": 229_480,
            "EnforcedPowerLimit": 230_000,
            "ClockInfo": {pynvml.NVML_CLOCK_SM: 1_695, pynvml.NVML_CLOCK_MEM: 7_600},
            "CurrentClocksEventReasons": 0x4,
            "ComputeRunningProcesses": [
                SimpleNamespace(pid=3_181, usedGpuMemory=15_204_352_000),
                SimpleNamespace(pid=3_300, usedGpuMemory=1_301_282_816),
            ],
            "GraphicsRunningProcesses": [SimpleNamespace(pid=901, usedGpuMemory=4_194_304)],
        },
    )


def h100(uuid: str = "GPU-91d5a1b2-0c3e-4f56-8a7b-1c2d3e4f5061") -> FakeCard:
    """A card of a data centre, idle, with ECC."""
    return FakeCard(
        uuid,
        "NVIDIA H100 80GB HBM3",
        {
            "MemoryInfo": SimpleNamespace(total=85_520_809_984, free=84_929_413_120, used=591_396_864),
            "UtilizationRates": SimpleNamespace(gpu=0, memory=0),
            "Temperature": 31,
            "PowerUsage": 70_215,
            "EnforcedPowerLimit": 700_000,
            "ClockInfo": {pynvml.NVML_CLOCK_SM: 345, pynvml.NVML_CLOCK_MEM: 2_619},
            "TotalEccErrors": {pynvml.NVML_VOLATILE_ECC: 0, pynvml.NVML_AGGREGATE_ECC: 2},
            "CurrentClocksEventReasons": 0x1,
            "ComputeRunningProcesses": [],
            "GraphicsRunningProcesses": [],
        },
    )


def gt_710(uuid: str = "GPU-5e0f7a61-3b2c-9d48-6e1f-7a8b9c0d1e2f") -> FakeCard:
    """A small card of long ago: it knows its memory and its temperature."""
    return FakeCard(
        uuid,
        "NVIDIA GeForce GT 710",
        {"MemoryInfo": SimpleNamespace(total=2_099_904_512, free=1_900_000_000, used=199_904_512), "Temperature": 44},
    )


class FakeNvml:
    """The functions and constants of `pynvml` that `Nvml` uses.

    Args:
        cards: those that are plugged in.
        installed: whether the driver's library is.
    """

    def __init__(self, *cards: FakeCard, installed: bool = True) -> None:
        self.cards = list(cards)
        self.error: int | None = None if installed else pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        """NVML's code for whoever opens it, and for every question behind that."""
        self.names = {
            3_181: "/usr/local/bin/llama-server --model secret.gguf",
            3_300: "/usr/bin/python3",
            901: "/usr/lib/xorg/Xorg",
        }
        self.opened = 0
        self.let_go = threading.Event()
        """Clear it, and questions hang until it is set."""
        self.let_go.set()
        self.old = False
        """Whether the driver is one of before 535."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML_"):
            return getattr(pynvml, name)
        if name.startswith("nvmlDeviceGet"):
            return self._asked(name.removeprefix("nvmlDeviceGet"))
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        self._check(self.error)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        self._check(self.error)
        self.let_go.wait()
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        card = self.cards[index]
        self._check(card.error)
        return card

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: FakeCard) -> str:
        return card.name

    def nvmlSystemGetDriverVersion(self) -> str:
        return "470.256.02" if self.old else "570.86.15"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 11_040 if self.old else 12_080

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid not in self.names:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.names[pid]

    def _asked(self, what: str) -> Callable[..., Any]:
        def answer(card: FakeCard, *of: int) -> Any:
            self._check(card.error)
            if what == "CurrentClocksEventReasons" and self.old:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            known = "CurrentClocksEventReasons" if what == "CurrentClocksThrottleReasons" else what
            if known not in card.answers:
                raise pynvml.NVMLError(UNSUPPORTED)
            found = card.answers[known]
            return found[of[-1]] if isinstance(found, dict) else found

        return answer

    @staticmethod
    def _check(code: int | None) -> None:
        if code is not None:
            raise pynvml.NVMLError(code)

"""The GPUs by NVML, with the package nvidia-ml-py."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePath
from typing import Any, TypeVar

import pynvml

from processors.telemetry.core import Process, Reading, Seen, cuda_version, throttle_words

T = TypeVar("T")

_GONE = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED})
"""The card answers nothing any more."""

_CLOSED = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
"""The driver was taken away, or another one was installed: NVML is to be opened anew."""


class Nvml:
    """Every card that NVML sees. Cards that it saw once and sees no more are told as lost.

    Args:
        library: the module `pynvml`, or what behaves like it.
    """

    def __init__(self, library: Any = pynvml) -> None:
        self._nvml = library
        self._open = False
        self._known: dict[str, Reading] = {}
        """Cards that answered, by uuid: index and name."""

    def look(self) -> Seen:
        """Read every card; see `Gpus`."""
        try:
            if not self._open:
                self._nvml.nvmlInit()
                self._open = True
            cards = [self._card(index) for index in range(self._nvml.nvmlDeviceGetCount())]
            seen = Seen(
                driver=self._told(self._nvml.nvmlSystemGetDriverVersion),
                cuda=self._told(lambda: cuda_version(self._nvml.nvmlSystemGetCudaDriverVersion_v2())),
            )
        except pynvml.NVMLError as error:
            self._close()
            return Seen(cards=self._missing(()), why=f"no NVIDIA GPU ({error})")
        cards += self._missing(cards)
        if all(card.error for card in cards):
            self._close()  # a card that was reset, or plugged in, is seen by an NVML that was opened after that
        return seen._replace(cards=tuple(cards), why="" if cards else "no NVIDIA GPU (NVML sees none)")

    def _missing(self, cards: "list[Reading] | tuple[()]") -> tuple[Reading, ...]:
        there = {card.uuid for card in cards}
        return tuple(
            card._replace(error="NVML sees it no more: it has fallen off the bus, or the driver was unloaded")
            for uuid, card in self._known.items()
            if uuid not in there
        )

    def _card(self, index: int) -> Reading:
        try:
            card = self._read(index)
        except pynvml.NVMLError as error:
            if error.value in _CLOSED:
                raise
            known = next((card for card in self._known.values() if card.device == index), Reading(index))
            return known._replace(error=str(error))
        if card.uuid is not None:
            self._known[card.uuid] = Reading(index, card.uuid, card.name)
        return card

    def _read(self, index: int) -> Reading:
        nvml, told = self._nvml, self._told
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = told(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        rates = told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        reasons = told(lambda: self._reasons(handle))
        return Reading(
            index,
            told(lambda: nvml.nvmlDeviceGetUUID(handle)),
            told(lambda: nvml.nvmlDeviceGetName(handle)) or "GPU",
            utilization=rates and rates.gpu / 100,
            memory_utilization=rates and rates.memory / 100,
            memory_used=memory and memory.total - memory.free,
            memory_total=memory and memory.total,
            temperature=told(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            power=told(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            power_limit=told(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            clock_sm=told(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            clock_memory=told(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            ecc_volatile=told(lambda: self._ecc(handle, nvml.NVML_VOLATILE_ECC)),
            ecc_aggregate=told(lambda: self._ecc(handle, nvml.NVML_AGGREGATE_ECC)),
            throttle_reasons=None if reasons is None else throttle_words(reasons),
            processes=told(lambda: self._processes(handle)),
        )

    def _told(self, ask: Callable[[], T]) -> T | None:
        """The value; None where the card or the driver does not have it.

        Raises:
            NVMLError: the card, or the driver, is gone.
        """
        try:
            return ask()
        except pynvml.NVMLError as error:
            if error.value in _GONE | _CLOSED:
                raise
            return None

    def _reasons(self, handle: Any) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        except pynvml.NVMLError_FunctionNotFound:  # drivers before 535 call it so
            return int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

    def _ecc(self, handle: Any, counter: int) -> int:
        return int(
            self._nvml.nvmlDeviceGetTotalEccErrors(handle, self._nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, counter)
        )

    def _processes(self, handle: Any) -> tuple[Process, ...]:
        """Those that compute and those that draw; one can do both."""
        found = {
            process.pid: process.usedGpuMemory
            for running in (
                self._nvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
                self._nvml.nvmlDeviceGetComputeRunningProcesses(handle),
            )
            for process in running
        }
        return tuple(Process(pid, self._name(pid), memory) for pid, memory in sorted(found.items()))

    def _name(self, pid: int) -> str | None:
        """By NVML: in a container the ids are the host's, and /proc would name strangers."""
        try:
            line = self._told(lambda: self._nvml.nvmlSystemGetProcessName(pid))
        except UnicodeDecodeError:  # cut off in the middle of a letter
            return None
        words = (line or "").split()
        return PurePath(words[0]).name if words else None

    def _close(self) -> None:
        if self._open:
            self._open = False
            with suppress(pynvml.NVMLError):  # a driver that is gone says UNINITIALIZED: it is shut down then
                self._nvml.nvmlShutdown()

"""What `/health` tells of the GPU; None wherever there is none, or it does not tell."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pynvml
import structlog

log = structlog.get_logger(__name__)

_GIB = 2**30

PATIENCE_S = 1.0
"""A sick driver can take for ever; it answers in some ms otherwise, and whoever probes has seconds."""


class Probe:
    """Asks the driver from a thread of its own, one at a time; a daemon, so a process can end while it hangs."""

    def __init__(self, ask: Callable[[str], dict[str, Any]] | None = None, patience_s: float = PATIENCE_S) -> None:
        self._ask = ask or readings
        self._patience_s = patience_s
        self._answer: asyncio.Future[dict[str, Any]] | None = None

    async def readings(self, runtime: str) -> dict[str, Any]:
        """As `readings`; nothing is told of the GPU where the driver does not answer in time."""
        if self._answer is None or self._answer.done():
            self._answer = self._asked(runtime)
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(self._answer)
        except TimeoutError:
            return _untold(runtime)

    def _asked(self, runtime: str) -> asyncio.Future[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()

        def work() -> None:
            try:
                told = self._ask(runtime)
            except Exception:
                log.exception("the GPU cannot be read")
                told = _untold(runtime)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(answer.set_result, told)

        threading.Thread(target=work, name="gpu readings", daemon=True).start()
        return answer


def readings(runtime: str) -> dict[str, Any]:
    """The keys of `/health` about the device; `runtime` is what the detector says. It asks the driver: some ms."""
    found = _untold(runtime)
    if not found["cuda_available"]:
        return found | {"cuda_available": _has_gpu()}
    from torch import cuda  # noqa: PLC0415 - on a GPU the model has imported it; elsewhere it takes seconds

    def used_gb() -> float:
        free, total = cuda.mem_get_info()
        return round((total - free) / _GIB, 3)

    return found | {
        "vram_used_gb": _asked(used_gb),
        "gpu_utilization": _asked(cuda.utilization),  # percent
        "temperature": _asked(cuda.temperature),  # degrees Celsius
        "power_watts": _asked(lambda: cuda.power_draw() / 1000),
    }


def _untold(runtime: str) -> dict[str, Any]:
    on_gpu = runtime.endswith("-cuda")
    return {
        "device": "cuda:0" if on_gpu else "cpu",
        "cuda_available": on_gpu,
        "vram_used_gb": None,
        "gpu_utilization": None,
        "temperature": None,
        "power_watts": None,
    }


def _asked(ask: Callable[[], float]) -> float | None:
    try:
        return ask()
    except Exception:  # noqa: BLE001 (each driver refuses in its own way: MIG has no utilisation, laptops no power)
        return None


def _has_gpu() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()

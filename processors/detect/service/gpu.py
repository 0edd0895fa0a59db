"""What `/health` tells of the GPU; None wherever there is none, or it does not tell."""

from collections.abc import Callable
from typing import Any

import pynvml

_GIB = 2**30


def readings(runtime: str) -> dict[str, Any]:
    """The keys of `/health` about the device; `runtime` is what the detector says. It asks the driver: some ms."""
    on_gpu = runtime.endswith("-cuda")
    found: dict[str, Any] = {
        "device": "cuda:0" if on_gpu else "cpu",
        "cuda_available": on_gpu or _has_gpu(),
        "vram_used_gb": None,
        "gpu_utilization": None,
        "temperature": None,
        "power_watts": None,
    }
    if not on_gpu:
        return found
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

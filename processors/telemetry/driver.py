"""Whether NVIDIA's driver is installed: asked before anything is imported or started for it."""

import ctypes
import sys


def driver_found() -> bool:
    """Whether NVIDIA's driver brings its NVML library here; a card need not be there. It takes microseconds."""
    try:
        ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return False
    return True

"""The port to the GPUs: NVML behind it (`nvml.py`), whose library has a fake beside it (`fakes.py`)."""

from typing import Protocol

from processors.telemetry.core import Seen


class Gpus(Protocol):
    """This host's GPUs."""

    def look(self) -> Seen:
        """Read every card; no card, no driver, no library are in what is seen. It blocks, and may never come back."""

"""A detector that serves by torch at once, and goes over to the fastest runtime when its export is there.

The export costs some 20 s of a core, once a machine and version of the model. So it begins when torch has worked as
long as that: whoever looks at a few frames never pays for it, and nobody pays more than twice (the rule for renting or
buying skis). It runs in a process of its own; the detector goes over between two batches.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import structlog
from PIL import Image

from processors.detect.detector import Detector
from schemas.records import Box

log = structlog.get_logger(__name__)

EXPORT_S = 20.0
"""What an export costs: 18 s of a core for the demo's model, for RT-DETRv2 R18 two to three times that."""

WAITING = ("OMP_WAIT_POLICY", "PASSIVE")
"""An environment variable that torch's OpenMP reads when it is imported: its threads sleep while they wait.

By default they spin, each on the core of one that it waits for, as soon as other processes want the cores too: measured
on two cores with five processes waiting for them, the demo's detector took 26 ms an image so, and 750 ms spinning.
"""

# What is kept of what a failed export said.
_TAIL = 800


class UpgradingDetector:
    """`first`, and later what `after` makes."""

    def __init__(
        self, first: Detector, command: Sequence[str], after: Callable[[], Detector | None], *, due_s: float = EXPORT_S
    ) -> None:
        """Serve by `first`.

        Args:
            first: what serves now.
            command: the process that makes the export.
            after: called in a thread when that process has ended well: the detector to go over to, warmed up; None
                where `first` is the best there is.
            due_s: begin when `first` has worked so long.
        """
        self._current = first
        self._next: Detector | None = None
        self._command = command
        self._after = after
        self._due_s = due_s
        self._worked_s = 0.0
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.name, self.digest = first.name, first.digest

    @property
    def runtime(self) -> str:
        """What ran the last batch."""
        return self._current.runtime

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """The boxes of each image, pixels, best first."""
        if self._next is not None:
            log.info("another runtime from here on", before=self._current.runtime, now=self._next.runtime)
            self._current.close()
            self._current, self._next = self._next, None
        began = time.perf_counter()
        found = self._current.detect(images)
        self._worked_s += time.perf_counter() - began
        if self._thread is None and self._worked_s >= self._due_s:
            self.begin()
        return found

    def begin(self) -> None:
        """Begin the export, beside the work."""
        self._thread = threading.Thread(target=self._upgrade, name="detector export", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until what was begun has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """End the export, if it still runs."""
        self._closed = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._current.close()

    def _upgrade(self) -> None:
        log.info("exporting the model for the CPU's other runtimes, beside the work", model=self.name)
        # The pipe's other end goes with this process, however it ends, and the export ends with the pipe.
        theirs, ours = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 (our own module)
                [sys.executable, *self._command],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=dict([WAITING]) | os.environ,
            )
            said = self._process.communicate()[1]
            if self._process.returncode == 0:
                self._next = self._after()
            elif not self._closed:
                self._failed(said.decode(errors="replace")[-_TAIL:])
        except Exception as error:  # noqa: BLE001 (torch goes on)
            self._failed(repr(error))
        finally:
            os.close(theirs)
            os.close(ours)

    def _failed(self, why: str) -> None:
        log.warning(
            "the model cannot be exported: it goes on as it is",
            runtime=self.runtime,
            why=why,
            fix="set detector.runtime to torch to try no more",
        )

"""A person at a terminal, for tests: starts `rewatch` on a pseudo-terminal, reads what it shows, presses Ctrl-C."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from typing import Self

COMMAND = (sys.executable, "-m", "infra.cli")
# A loaded machine takes tens of seconds to start what an idle one starts in eight.
PATIENCE_S = 150.0

_ESCAPES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Terminal:
    """A context manager: one command on a terminal of its own; killed at the end if it still runs."""

    def __init__(
        self, *arguments: str, columns: int = 100, command: tuple[str, ...] = COMMAND, **environment: str
    ) -> None:
        self.raw = ""
        self.code: int | None = None
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.execve(command[0], [*command, *arguments], os.environ | {"TERM": "xterm-256color"} | environment)
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
        os.close(self._file)

    @property
    def text(self) -> str:
        """What was shown, without colours and cursor movements."""
        return _ESCAPES.sub("", self.raw)

    def until(self, text: str) -> None:
        """Wait until it is shown."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.text:
            assert self._read(), f"it ended before it showed {text!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"it never showed {text!r}:\n{self.text}"

    def press(self, keys: str) -> None:
        """Press keys, one after the other."""
        os.write(self._file, keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.press("\x03")

    def end(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read():
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
        self.code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self.code

    def _read(self) -> bool:
        """Take what is there; False at the end."""
        if select.select([self._file], [], [], 0.1)[0]:
            try:
                data = os.read(self._file, 65536)
            except OSError:  # Linux: the other side is gone
                return False
            self.raw += data.decode(errors="replace")
            return bool(data)
        return True

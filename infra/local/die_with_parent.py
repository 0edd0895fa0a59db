"""Runs a command that the kernel kills when the process that started it dies: no orphans, even after kill -9.

Usage: python -ISE die_with_parent.py PARENT_PID NICENESS COMMAND [ARGUMENT ...]

A launcher, and not a `preexec_fn`: that would run Python between fork and exec in a parent with threads, where a
lock held by another thread never opens again. The mark set here survives the exec. It costs about 15 ms a start.
Linux only (prctl); elsewhere the command runs unmarked and the supervisor's next start ends what is left over.

The kernel watches the *thread* that started the child. Start children from a thread that lives as long as they
should: the main thread, or one that runs the event loop of the supervisor to its end.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Mark this process, then become the command."""
    parent, niceness, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.nice(niceness)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the mark was set: nobody will ever signal us
            sys.exit("the process that started this one is gone")
    os.execvp(command[0], command)  # noqa: S606 - the command comes from a ProcessSpec


if __name__ == "__main__":
    main()

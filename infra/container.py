"""One stage as a container's only work: `python -m infra.container STAGE`, what the processors' image runs.

It starts the worker and watches it, as the supervisor of `rewatch up` does. A worker that stalls is killed, and the
container ends with it: the engine's restart policy starts it anew, which no engine does for one that is only unhealthy.
"""

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from infra.healthy import data_dir, report_path
from infra.watchdog import Watchdog, either

_LOOK_S = 2.0

# What a container that is no more said last; whoever scrapes has missed it for an hour by then (`streams.scraping`).
_FORGOTTEN_S = 24 * 3600.0


def argv_of(stage: str, status: Path, host: str) -> list[str]:
    """The worker's command line. A container keeps its name when it is started again, so its partitions wait for it."""
    return [sys.executable, "-m", "infra.worker", stage, "--status", str(status), "--member", f"{stage}-{host}"]


async def run(argv: Sequence[str], reports: Sequence[Path]) -> int:
    """Run the worker until it ends, is told to by SIGTERM or SIGINT, or stalls.

    Args:
        argv: its command line.
        reports: where it says how it is; they are gone when it has ended.

    Returns:
        Its exit code; 1 where it stalled, 128 and the signal's number where one ended it.
    """
    for report in reports:
        report.unlink(missing_ok=True)
    worker = await asyncio.create_subprocess_exec(*argv)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _tell, worker, number)
    stalled = either(*map(Watchdog, reports))
    try:
        while True:
            with contextlib.suppress(TimeoutError):
                code = await asyncio.wait_for(worker.wait(), _LOOK_S)
                return 128 - code if code < 0 else code
            if (why := await stalled()) is not None:
                print(f"the worker is ended: {why}", file=sys.stderr, flush=True)
                worker.kill()
                await worker.wait()
                return 1
    finally:
        for report in reports:
            report.unlink(missing_ok=True)


def _tell(worker: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.send_signal(number)


def forget_old(status: Path, now: float) -> None:
    """Delete the reports of containers that are long gone."""
    for path in status.glob("*.json"):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > _FORGOTTEN_S:
                path.unlink()


def main() -> int:
    """Parse, run, and return the worker's exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.container", description=__doc__)
    parser.add_argument("stage", help="as for `rewatch run`")
    stage, host = parser.parse_args().stage, socket.gethostname()
    status = report_path(stage, data_dir(), host)
    forget_old(status.parent, time.time())
    # Replays run in analyze's process, and report beside it.
    reports = [status, status.with_name(f"{status.stem}+replay.json")] if stage == "analyze" else [status]
    return asyncio.run(run(argv_of(stage, status, host), reports))


if __name__ == "__main__":
    sys.exit(main())

"""A container's health check: `python -m infra.healthy`, of a stage, or with `--url` of a server.

A container is well while its process says each second how it is, and does not say that it stalls. One that waits for
a broker, a store or an LLM that is away is well, too, and says so: a restart would bring nothing back. Nothing but the
standard library is imported: a check every 30 s in ten containers would otherwise cost a tenth of a core.
"""

import argparse
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

# As long as the watchdog waits (`streams.liveness.STALL_S`) before it ends a silent process.
SILENT_S = 45.0

# Less than what the checks of the images and of compose.yaml are given, 10 s.
_ASK_S = 5.0


def report_path(stage: str, data_dir: Path, host: str) -> Path:
    """Where the stage of the container `host` says how it is: containers share a data directory."""
    return data_dir / "status" / f"{stage}-{host}.json"


def data_dir() -> Path:
    """Where the containers keep their data."""
    return Path(os.environ.get("REWATCH_DATA_DIR", ".rewatch"))


def of_stage(directory: Path, host: str, now: float) -> tuple[bool, str]:
    """Whether the stage of the container `host` is well, and what it says."""
    status = directory / "status"
    # Analyze has a second report, of the replays in its process.
    reports = sorted([*status.glob(f"*-{host}.json"), *status.glob(f"*-{host}+replay.json")])
    if not reports:
        return False, "no process has said how it is yet"
    said = []
    for path in reports:
        try:
            report = json.loads(path.read_text())
            age = now - path.stat().st_mtime
        except (OSError, ValueError) as error:
            return False, f"{path.name}: {error}"
        if age > SILENT_S:
            return False, f"{report['stage']}: silent for {age:.0f} s"
        if report["stall"]:
            return False, f"{report['stage']}: {report['stall']}"
        waits = ", ".join(report["waiting_on"])
        said.append(f"{report['stage']}: " + (f"waits on {waits}" if waits else "at work"))
    return True, "; ".join(said)


def of_server(url: str) -> tuple[bool, str]:
    """Whether the server answers with 200, and what it says."""
    # No proxy of the environment: the server is in this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ASK_S) as answer:
            return answer.status == 200, answer.read(1000).decode(errors="replace")
    except (OSError, urllib.error.URLError) as error:
        return False, str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was said; 0 where it is well, else 1."""
    parser = argparse.ArgumentParser(prog="python -m infra.healthy", description=__doc__)
    parser.add_argument("--url", help="of a server that answers 200 when it is well")
    arguments = parser.parse_args(argv)
    if arguments.url:
        well, said = of_server(arguments.url)
    else:
        well, said = of_stage(data_dir(), socket.gethostname(), time.time())
    print(said)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

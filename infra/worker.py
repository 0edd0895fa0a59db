"""One stage in a process of its own: `python -m infra.worker STAGE`. What the supervisor starts.

It is `rewatch run STAGE` without the rest of the command line, whose imports would cost each process seconds.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import structlog

from infra import logs, topology
from infra.config import ConfigError, Settings, load
from infra.masks import secrets_of
from infra.private import make_private
from infra.stopping import stop_event
from processors.detect.settings import ModelError
from streams.admin import TopicsError
from streams.serving import SettingsError

log = structlog.get_logger(__name__)


async def work(
    settings: Settings,
    stage: str,
    status: Path | None,
    *,
    metrics_port: int | None = None,
    stop: asyncio.Event | None = None,
    member: str | None = None,
) -> None:
    """Run the stage until SIGTERM; every line that it logs names it, and none holds a secret.

    Raises:
        TopicsError, or another error whose message names the setting: it cannot run as it is set.
    """
    logs.to_stderr(settings.log.level, settings.log.format, stage=stage, secrets=secrets_of(settings))
    make_private(settings.data_dir)
    status = status or topology.status_path(settings, stage)
    await topology.run(settings, stage, stop or stop_event(), status, metrics_port=metrics_port, member=member)


def main() -> int:
    """Parse, run, and return the exit code: 2 where the settings are to blame, 1 where something else ended it."""
    parser = argparse.ArgumentParser(prog="python -m infra.worker", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=topology.PROCESSES)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--status", type=Path)
    parser.add_argument("--metrics-port", type=int, help="0 takes a free one")
    parser.add_argument("--member", help="its name in the stage's group; no two processes may have the same")
    arguments = parser.parse_args()
    logs.to_stderr("info")
    try:
        asyncio.run(
            work(
                load(arguments.config),
                arguments.stage,
                arguments.status,
                metrics_port=arguments.metrics_port,
                member=arguments.member,
            )
        )
    except (ConfigError, TopicsError, SettingsError, ModelError) as error:
        print(f"settings: {error}", file=sys.stderr)
        return 2
    except Exception:  # Python's own way would show the secrets that the traceback may hold
        log.exception("ended by an error that nobody expected")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

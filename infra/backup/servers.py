"""The broker and ClickHouse for the time of a backup or a restore, where they are this machine's and do not run."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from infra.config import Settings
from infra.installation import Installation
from infra.local.supervisor import running
from streams.serving import SettingsError


@asynccontextmanager
async def servers(settings: Settings, config: Path | None, *, fresh: bool) -> AsyncIterator[None]:
    """They answer inside; no stage is started. `fresh`: nothing may have been there before, so nothing may run.

    Raises:
        SettingsError: nothing was ever recorded here; or, with `fresh`, `rewatch up` runs here.
        StartError: one of them cannot start.
    """
    local = settings.local_kafka or settings.local_clickhouse
    here = running(settings.data_dir)
    if fresh and here:
        raise SettingsError(
            f"{', '.join(sorted(here))} run on {settings.data_dir} (data_dir): stop `rewatch up`, and restore into an "
            "empty directory (REWATCH_DATA_DIR)"
        )
    if not local or here:
        yield
        return
    if not fresh and not any((settings.data_dir / name).is_dir() for name in ("kafka", "clickhouse")):
        raise SettingsError(f"nothing was recorded in {settings.data_dir} (data_dir) yet: there is nothing to back up")
    stack = Installation(settings, config, only=()).stack
    await stack.start()
    try:
        yield
    finally:
        await stack.stop()

"""A version that is older than its data starts nothing that touches them."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from infra.fitting import start_if_it_fits
from infra.local.process import ProcessSpec
from infra.local.supervisor import Supervisor, running
from processors.store.settings import ClickHouseSettings
from schemas.migrations import MigrationError

pytest_plugins = ["tests.clickhouse_kit"]


@pytest.mark.real
async def test_a_newer_database_ends_the_start_and_what_had_begun_is_stopped(
    database: ClickHouseSettings, ask: Any, tmp_path: Path
) -> None:
    ask.command("INSERT INTO schema_migrations (version, name, sha256) VALUES (900, 'of_tomorrow', 'x')")
    supervisor = Supervisor(tmp_path)
    spec = ProcessSpec(name="stage", argv=["sleep", "600"], ready=asyncio.Event().wait)  # it never is
    supervisor._register(spec)
    with pytest.raises(MigrationError, match="900"):
        await start_if_it_fits(database, supervisor.start())
    assert running(tmp_path) == {}


@pytest.mark.real
async def test_a_database_that_fits_or_is_not_there_yet_holds_nothing_up(database: ClickHouseSettings) -> None:
    done: list[str] = []

    async def start() -> None:
        done.append("up")

    await start_if_it_fits(database, start())
    await start_if_it_fits(database.model_copy(update={"database": "not_made_yet"}), start())
    await start_if_it_fits(ClickHouseSettings(url="http://127.0.0.1:1"), start())
    assert done == ["up"] * 3


async def test_a_start_that_fails_says_why_itself() -> None:
    async def start() -> None:
        raise OSError("no such program")

    with pytest.raises(OSError, match="no such program"):
        await start_if_it_fits(ClickHouseSettings(url="http://127.0.0.1:1"), start())

"""A backup made under load, everything destroyed, and restored from it: each accepted frame is there exactly once."""

import asyncio
import json
import shutil
from contextlib import aclosing
from pathlib import Path

import pytest

from infra.backup.make import backup
from infra.backup.target import Target
from infra.config import Settings, load
from infra.installation import Installation
from infra.local.process import free_port
from processors.store.audit import Report, audit
from processors.store.queries import Queries
from streams.kafka import Kafka
from tests.e2e.installation import CAMERAS, Feeder, pictures, settings_for
from tests.infra.cli_kit import invoke

ROAD = ("ingest", "detect", "batch", "enrich", "analyze", "sink")
FRAMES = 40
"""Of each camera: two stories, so a window is open at each moment of a backup."""


async def drained(settings: Settings) -> Report:
    """The accounting, once nothing is in flight."""
    while True:
        async with aclosing(Queries(settings.clickhouse)) as queries:
            report = await audit(queries, Kafka(settings.kafka), settings.windows.record())
        if not any(report.in_flight.values()):
            return report
        await asyncio.sleep(1)


@pytest.mark.real
@pytest.mark.chaos
@pytest.mark.timeout(900)
async def test_a_backup_made_under_load_restores_every_accepted_frame_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, monkeypatch)
    shots = await asyncio.to_thread(pictures)
    target = Target(str(tmp_path / "backup"))
    async with Installation(settings, only=ROAD):
        feeder = Feeder(settings, shots)
        load_ = [asyncio.create_task(feeder.upload(camera, FRAMES, pause=0.1, story_s=20)) for camera in CAMERAS]
        while len(feeder.accepted) < 5 * len(CAMERAS):
            await asyncio.sleep(0.1)
        first = await backup(settings, target)
        before = dict(feeder.accepted)
        second = await backup(settings, target)
        await asyncio.gather(*load_)
    assert second.manifest.history[: len(first.manifest.history)] == first.manifest.history
    shutil.rmtree(settings.data_dir)

    for name in ("KAFKA", "CLICKHOUSE", "LLAMA"):
        monkeypatch.setenv(f"REWATCH_LOCAL__{name}_PORT", str(free_port()))
    settings = load()
    told = await asyncio.to_thread(invoke, "restore", target.root, "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["todo"]["detect"] > 0, "what was accepted and not processed yet is to be done"
    async with Installation(settings, only=ROAD):
        # Cameras send again what they were not answered for; they send all, for none knows.
        again = Feeder(settings, shots)
        await asyncio.gather(*(again.upload(camera, FRAMES, story_s=20) for camera in CAMERAS))
        await again.end(CAMERAS)
        report = await drained(settings)
        async with aclosing(Queries(settings.clickhouse)) as queries:
            rows = await queries.rows("SELECT frame_id FROM frames FINAL")
    assert report.clean, report
    there = [row["frame_id"] for row in rows]
    assert {*before} <= {*there}
    assert report.accepted == len(there) == len({*there}) == len(CAMERAS) * FRAMES

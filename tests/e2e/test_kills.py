"""kill -9 of every stage, three times each, under load: nothing is lost, nothing is doubled, on the log or in SQL."""

import asyncio
import random
import time
from pathlib import Path

import pytest

from infra.cli.show import collect
from infra.installation import Installation
from tests.e2e.installation import CAMERAS, Audit, Feeder, kill, pictures, settings_for

STAGES = ("ingest", "detect", "batch", "enrich", "analyze", "sink")
KILLS = 3
FRAMES = 200


async def drained(settings, *, within: float = 150.0) -> None:
    """Every stage has done everything, and everything is in ClickHouse."""
    deadline = time.monotonic() + within
    while True:
        state = await collect(settings)
        lags = {stage["stage"]: stage["lag"] for stage in state["stages"] if stage["lag"] != 0}
        missing = [t["topic"] for t in state["topics"] if t["records"] != t["in_clickhouse"]]
        if not lags and not missing and not state["problems"]:
            return
        assert time.monotonic() < deadline, f"not drained: {lags} {missing} {state['problems']}"
        await asyncio.sleep(1)


@pytest.mark.real
@pytest.mark.chaos
@pytest.mark.timeout(420)
async def test_kill_every_stage_three_times_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path, monkeypatch)
    shots = await asyncio.to_thread(pictures)
    order = [stage for stage in STAGES for _ in range(KILLS)]
    random.Random(7).shuffle(order)
    async with Installation(settings) as installation:
        feeder = Feeder(settings, shots)
        load = [asyncio.create_task(feeder.upload(camera, FRAMES, pause=0.25)) for camera in CAMERAS]
        for stage in order:
            await asyncio.sleep(random.Random(len(order)).uniform(1.0, 3.0))
            kill(installation, stage)
        await asyncio.gather(*load)
        await feeder.end(CAMERAS)
        await drained(settings)
        audit = Audit(settings)
        await audit.read()
        assert len(feeder.accepted) == len(CAMERAS) * FRAMES
        assert audit.violations(feeder.accepted) == []
        assert await asyncio.to_thread(audit.violations_in_clickhouse) == []
        assert await audit.violations_of_replay() == []
        # 200 frames a camera, a gap after each 60: at least four windows each, were none cut by 50 frames.
        assert len(audit.records["batches"]) >= 4 * len(CAMERAS)
        restarts = {
            name: process["restarts"] for name, process in installation.stack.supervisor.state()["processes"].items()
        }
        assert all(restarts[stage] >= KILLS - 1 for stage in STAGES), restarts

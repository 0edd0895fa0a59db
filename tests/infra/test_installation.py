"""What the installation tells of its stages, and how one starts without its broker."""

import asyncio
import json
import os
from pathlib import Path

import psutil
import pytest

from infra import topology
from infra.config import load
from infra.installation import Installation, member_name
from infra.local.process import free_port
from streams.liveness import read_report


def test_what_should_be_at_work_here_is_what_has_been_started(tmp_path: Path) -> None:
    settings = load().model_copy(update={"data_dir": tmp_path})
    assert topology.expected(settings) == {}, "nobody runs here"
    states = {
        "kafka": "ready",
        "ingest": "ready",
        "gateway": "ready",
        "detect-1": "ready",
        "detect-2": "starting",
        "batch": "backing off",
        "enrich": "waiting",
        "analyze": "starting",
        "sink": "failed",
    }
    run = {
        "pid": os.getpid(),
        "create_time": psutil.Process().create_time(),
        "processes": {name: {"state": state, "restarts": 0, "log": f"{name}.log"} for name, state in states.items()},
    }
    run["processes"]["analyze"]["restarts"] = 1
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert set(topology.expected(settings)) == {"ingest", "detect", "batch", "analyze", "sink"}
    assert topology.expected(settings)["batch"] == "batch.log"


def test_no_two_processes_have_the_same_name_in_a_group(tmp_path: Path) -> None:
    here, there = (load().model_copy(update={"data_dir": tmp_path / place}) for place in ("here", "there"))
    names = [member_name(where, "batch", index) for where in (here, there) for index in range(2)]
    assert len(set(names)) == 4
    assert names[0] == member_name(here, "batch", 0), "a restarted process has the name that it had"


async def test_a_stage_that_waits_for_its_broker_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    settings = load()
    away = settings.kafka.model_copy(update={"bootstrap_servers": f"127.0.0.1:{free_port()}"})
    settings = settings.model_copy(update={"data_dir": tmp_path, "kafka": away})
    status, stop = tmp_path / "enrich.json", asyncio.Event()

    async def stop_once_said() -> None:
        async with asyncio.timeout(30):
            while (read_report(status) or {}).get("waiting_on") != ["broker"]:
                await asyncio.sleep(0.05)
        stop.set()

    said = asyncio.create_task(stop_once_said())
    with pytest.raises(SystemExit):
        await topology.run(settings, "enrich", stop, status, metrics_port=0)
    await said
    assert not status.exists()


async def test_the_process_of_analyze_is_watched_by_both_of_its_reports_and_none_of_a_predecessor(
    tmp_path: Path,
) -> None:
    settings = load().model_copy(update={"data_dir": tmp_path})
    spec = next(spec for spec in Installation(settings)._specs() if spec.name == "analyze")
    status = tmp_path.resolve() / "status" / "analyze.json"
    beside = topology.report_beside(status)
    status.parent.mkdir()
    assert spec.stalled is not None
    assert spec.prepare is not None
    assert spec.cleanup is not None
    beside.write_text(json.dumps({"stage": "replay", "pid": os.getpid(), "stall": "it hangs"}))
    assert await spec.stalled() == "it hangs"
    await spec.prepare()
    assert await spec.stalled() is None, "who was killed said that"
    for path in (status, beside):
        path.write_text("{}")
    spec.cleanup()
    assert not list(status.parent.iterdir())

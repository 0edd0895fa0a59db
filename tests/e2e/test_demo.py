"""`rewatch demo`, as a person runs it: it ends by itself, everything that went in came out, and can be explained."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.installation import Installation
from tests.e2e.installation import settings_for

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


def rewatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infra.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


async def test_the_demo_ends_with_everything_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path, monkeypatch)
    shown = await asyncio.to_thread(rewatch, "demo")
    assert shown.returncode == 0, shown.stdout[-3000:] + shown.stderr[-3000:]
    assert "the riskiest events" in shown.stdout
    said = json.loads((settings.data_dir / "demo.json").read_text())
    assert set(said["seconds"]) == {"install", "start", "first_event", "total"}
    records = {topic["topic"]: topic["records"] for topic in said["topics"]}
    assert records == {topic["topic"]: topic["in_clickhouse"] for topic in said["topics"]}
    assert records["frames"] == records["detections"] > 100
    assert records["batches"] == records["contexts"] == records["risk_events"] >= 10
    assert records["dead_letters"] == 0
    assert not list((settings.data_dir / "status").glob("*.json")), "a process was left behind"

    async with Installation(settings):  # the data stay, and the questions that the demo suggests have answers
        events = json.loads((await asyncio.to_thread(rewatch, "events", "ls", "--json")).stdout)
        night = max(events, key=lambda event: event["risk_score"])
        assert night["risk_level"] in {"high", "critical"}
        explained = await asyncio.to_thread(rewatch, "explain", night["event_id"])
        assert explained.returncode == 0
        assert "sha256" in explained.stdout
        counted = await asyncio.to_thread(rewatch, "sql", "SELECT count() AS n FROM events", "--json")
        assert json.loads(counted.stdout)[0]["n"] == records["risk_events"]
        for line in shown.stdout.splitlines():
            if ".venv/bin/rewatch sql" in line:
                query = line.split('"')[1]
                answer = await asyncio.to_thread(rewatch, "sql", query)
                assert answer.returncode == 0, f"{query}: {answer.stderr}"
        second = await asyncio.to_thread(rewatch, "up")
        assert second.returncode == 0
        assert "already runs" in second.stdout + second.stderr

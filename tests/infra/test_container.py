"""A stage as a container's only work: it is watched, ended when it stalls, and says how it is."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import container, healthy
from infra.watchdog import Watchdog
from streams.health import workers
from streams.liveness import STALL_S, Liveness

# A worker that reports like one of ours, with the words of its second argument, until it is told to end.
WORKER = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
while True:
    report = {"stage": "batch", "pid": os.getpid(), "stall": sys.argv[2] or None, "waiting_on": []}
    open(sys.argv[1], "w").write(json.dumps(report))
    time.sleep(0.05)
"""


def worker(report: Path, stall: str = "") -> list[str]:
    return [sys.executable, "-c", WORKER, str(report), stall]


def write(directory: Path, name: str, **said: Any) -> Path:
    path = directory / "status" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"stage": "batch", "stall": None, "waiting_on": []} | said))
    return path


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_LOOK_S", 0.1)


@pytest.mark.usefixtures("_soon")
async def test_sigterm_reaches_the_worker_whose_code_is_the_containers(tmp_path: Path) -> None:
    report = tmp_path / "batch-abc.json"
    running = asyncio.create_task(container.run(worker(report), [report]))
    async with asyncio.timeout(30):
        while not report.exists():
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 7
    assert not report.exists(), "what is no more says nothing"


@pytest.mark.usefixtures("_soon")
async def test_a_worker_that_says_that_it_stalls_is_killed_and_the_container_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "batch-abc.json"
    async with asyncio.timeout(30):
        assert await container.run(worker(report, "frames-3 has not advanced"), [report]) == 1
    assert "frames-3 has not advanced" in capsys.readouterr().err


@pytest.mark.usefixtures("_soon")
async def test_a_worker_that_was_killed_ends_the_container_with_its_signal(tmp_path: Path) -> None:
    report = tmp_path / "batch-abc.json"
    code = await container.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], [report])
    assert code == 128 + signal.SIGKILL


async def test_what_a_predecessor_said_is_not_about_its_successor(tmp_path: Path) -> None:
    report = write(tmp_path, "batch-abc.json", stall="long ago", pid=1)
    assert await container.run([sys.executable, "-c", ""], [report]) == 0
    assert await Watchdog(report).stalled() is None


def test_a_container_keeps_its_members_name_when_it_is_started_again(tmp_path: Path) -> None:
    argv = container.argv_of("detect", tmp_path / "detect-abc.json", "abc")
    assert argv[argv.index("--member") + 1] == "detect-abc"
    assert argv[argv.index("--status") + 1] == str(tmp_path / "detect-abc.json")


def test_reports_of_containers_that_are_gone_for_a_day_are_deleted(tmp_path: Path) -> None:
    old, new = write(tmp_path, "batch-old.json"), write(tmp_path, "batch-new.json")
    os.utime(old, (time.time() - 90_000,) * 2)
    container.forget_old(tmp_path / "status", time.time())
    assert not old.exists()
    assert new.exists()


def test_a_stage_is_well_while_it_reports_and_waiting_for_others_is_well_too(tmp_path: Path) -> None:
    assert healthy.of_stage(tmp_path, "abc", time.time()) == (False, "no process has said how it is yet")
    write(tmp_path, "batch-abc.json", waiting_on=["broker"])
    write(tmp_path, "batch-abcd.json", stall="another container's")
    assert healthy.of_stage(tmp_path, "abc", time.time()) == (True, "batch: waits on broker")
    assert healthy.of_stage(tmp_path, "abcd", time.time()) == (False, "batch: another container's")


def test_a_stage_is_not_well_when_it_is_silent_or_when_one_of_two_in_its_process_stalls(tmp_path: Path) -> None:
    write(tmp_path, "analyze-abc.json", stage="analyze")
    well, said = healthy.of_stage(tmp_path, "abc", time.time() + healthy.SILENT_S + 1)
    assert not well
    assert "silent for 46 s" in said
    write(tmp_path, "analyze-abc+replay.json", stage="replay", stall="stuck")
    assert healthy.of_stage(tmp_path, "abc", time.time()) == (False, "replay: stuck")


def test_the_check_reads_what_a_worker_writes(tmp_path: Path) -> None:
    path = healthy.report_path("sink", tmp_path, "abc")
    Liveness("sink").write(path)
    assert healthy.of_stage(tmp_path, "abc", time.time()) == (True, "sink: at work")
    assert healthy.SILENT_S == STALL_S


def test_containers_that_share_a_data_directory_see_each_other(tmp_path: Path) -> None:
    life = Liveness("sink").report()
    write(tmp_path, "sink-there.json", **life | {"host": "another-container", "pid": 2**22 + 1})
    write(tmp_path, "sink-here.json", **life | {"pid": 2**22 + 1})  # a process of this host that is no more
    assert [report["host"] for report in workers(tmp_path)] == ["another-container"]


def test_a_server_is_well_when_it_answers_200() -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()
            self.wfile.write(b"fine")

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert healthy.of_server(f"{url}/health") == (True, "fine")
        assert not healthy.of_server(f"{url}/loading")[0]
    finally:
        server.shutdown()
        server.server_close()
    assert not healthy.of_server(f"{url}/health")[0]

"""The gateway as a process: it starts before everything else, says what is away, recovers by itself, stops soon."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from infra.installation import _ready
from infra.local import clickhouse
from infra.local.process import Process, free_port
from processors.gateway.settings import GatewaySettings
from tests.processors.gateway_kit import AT, event_id, store, window

pytestmark = pytest.mark.real

PAGE = {"accept": "text/html"}


async def until(what, within: float = 60):
    """Whatever it returns, once that is something."""
    async with asyncio.timeout(within):
        while True:
            try:
                found = await what()
            except httpx.TransportError:
                found = None
            if found:
                return found
            await asyncio.sleep(0.1)


async def test_it_runs_without_the_others_and_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, store_port = free_port(), free_port()
    for name in [name for name in os.environ if name.startswith("REWATCH_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "DATA_DIR": str(tmp_path / "data"),
        "KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:9",
        "CLICKHOUSE__URL": f"http://127.0.0.1:{store_port}",
        "GATEWAY__PORT": str(port),
        "METRICS__PORT": "0",
    }.items():
        monkeypatch.setenv(f"REWATCH_{name}", value)
    status = tmp_path / "status.json"
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "infra.worker", "gateway", "--status", str(status)
    )
    engine = Process(clickhouse.spec(tmp_path / "clickhouse", store_port), tmp_path)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            async def serves() -> bool:
                return (await client.get("/health")).status_code == 200

            await until(serves)
            assert await until(lambda: _ready("gateway", status))
            page = await client.get("/", headers=PAGE)
            assert (page.status_code, "clickhouse.url" in page.text) == (503, True)
            assert (await client.get("/api/events")).headers["retry-after"]
            away = (await client.get("/api/health")).json()
            assert {problem["service"] for problem in away["problems"]} == {"broker", "clickhouse"}
            assert away["status"] == "degraded"

            await engine.start()
            from infra.config import load

            made = window("front", AT)
            await store(load(), made)
            [event] = (await client.get("/api/events")).json()["events"]
            assert event["event_id"] == event_id(made)
            assert (await client.get("/", headers=PAGE)).status_code == 200

            # A browser that looks on does not hold the stop up.
            async with client.stream("GET", "/api/events/stream") as stream:
                lines = stream.aiter_lines()
                assert await anext(lines) == "retry: 2000"
                began = asyncio.get_running_loop().time()
                worker.send_signal(signal.SIGTERM)
                assert [line async for line in lines][-1] == ""
            assert await asyncio.wait_for(worker.wait(), 10) == 0
            assert asyncio.get_running_loop().time() - began < 5
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
        await engine.stop()


async def test_it_listens_on_this_machine_alone_by_default() -> None:
    assert GatewaySettings().url == "http://127.0.0.1:8080"

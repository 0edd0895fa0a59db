"""`rewatch serve detector`, as a process of its own with the demo's model: from its first line to its orderly end."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.bench.service_load import picture
from tests.infra.cli_kit import invoke
from tests.infra.terminal import COMMAND

PREFIX = "REWATCH_DETECTOR__"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    environment = {
        f"{PREFIX}SERVICE__PORT": "0",
        f"{PREFIX}RUNTIME": "torch",
        "REWATCH_DATA_DIR": str(tmp_path),
        "RTDETR_URL": "http://127.0.0.1:1",  # meant for the stages: the service does not ask itself
    }
    process = subprocess.Popen(
        [*COMMAND, "serve", "detector"], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    found = re.search(r"detector at (\S+): loading", process.stdout.readline())
    assert found is not None
    yield process, found[1]
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()


def test_it_serves_the_demos_model_and_ends_in_order(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    assert process.stdout is not None
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        assert http.get("/health").json()["status"] == "loading"
        assert process.stdout.readline().startswith("healthy after")
        health = http.get("/health")
        assert (health.status_code, health.json()["runtime"]) == (200, "torch-cpu")
        files = [("files", (f"{n}.jpg", picture((640, 360)))) for n in range(20)]
        said = http.post("/detect/batch", params={"min_confidence": 0.1}, files=files).json()
        assert said["num_images"] == 20
        assert {one["model_digest"] for one in said["results"]} == {health.json()["model_digest"]}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "detector stopped after" in process.stdout.read()


def test_a_stop_while_the_model_loads_waits_for_no_model(served: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = served
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("SERVICE__ENABLED", "false", "REWATCH_DETECTOR__SERVICE__ENABLED"), ("MODEL_PATH", "/no", "detector.model_path")],
)
def test_what_it_cannot_serve_is_one_line_and_a_code(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path))
    monkeypatch.setenv(f"{PREFIX}SERVICE__PORT", "0")
    monkeypatch.setenv(f"{PREFIX}{name}", value)
    result = invoke("serve", "detector")
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv(f"{PREFIX}SERVICE__PORT", str(taken.getsockname()[1]))
        result = invoke("serve", "detector")
    assert result.exit_code == 2
    assert "detector.service.port" in result.output

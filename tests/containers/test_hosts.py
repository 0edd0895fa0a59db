"""The same stack spread over six hosts by infra/compose/hosts: they meet only in what they publish, with TLS.

The tests are one story and run in order: spread, fed, knocked at, read from the wire, grown by a host, a cable pulled.
"""

import io
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.containers import machine
from tests.containers.hosts import NETWORK, Host, Wire, switch
from tests.containers.podman import CommandError, Compose, run, say
from tests.containers.site import COMPOSE, PARTITIONS, Site, cameras, no_secret_in_logs, reports, shared, until
from tests.e2e.installation import pictures

# Longer than the 10 s after which a group gives up a member that it does not hear.
PULLED_S = 20.0

# Each host: its file of settings, the name that others know it by, and what differs here from the file.
HOSTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "log": ("log", "log.lan", {}),
    "store": ("store", "store.lan", {}),
    "models": ("models", "models.lan", {"COMPOSE_PROFILES": "cpu"}),
    "doors": ("doors", "doors.lan", {}),
    "work": ("work", "work.lan", {}),
    "more": ("work", "more.lan", {"COMPOSE_PROFILES": "detect,analyze"}),
}
ADDRESS = {host: f"{NETWORK}.{number}" for number, host in enumerate(HOSTS, 1)}
PUBLISHED = {"log": {9092}, "store": {8443}, "models": {8090, 8091}, "doors": {8080}, "work": set(), "more": set()}

# What the stack listens on anywhere, inside.
PORTS = (8080, 8081, 8090, 8091, 8100, 8123, 8443, 9092, 9093, 9094, 9400, 9410, 9420, 9450, 9644, 33145)

pytestmark = pytest.mark.timeout(1800)


def settings_of(host: str) -> tuple[dict[str, str], set[str]]:
    """What a host's file sets, and the secrets that it says the host needs."""
    text = (COMPOSE / "hosts" / f"{HOSTS[host][0]}.env").read_text()
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)), set(text[text.index("# Secrets:") :].split())


@dataclass
class Spread:
    """The hosts, the stack on each, and the door."""

    site: Site
    hosts: dict[str, Host]
    stacks: dict[str, Compose]
    authority: Path

    def start(self, host: str) -> None:
        """`docker compose up` there."""
        say(f"starting what belongs on the host {host}")
        self.stacks[host]("up", "-d", "--no-deps", within=300)

    def held(self, stage: str, *hosts: str) -> list[set[str]]:
        """The partitions that each process of a stage works on, on these hosts."""
        return [set(r["partitions"]) for host in hosts for r in reports(self.stacks[host], stage, stage)]


def stack_of(host: Host, tools: Path, secrets: Path, images: Path) -> Compose:
    """A host's part of the stack, by its file of settings and with no secrets but those that the file names."""
    settings, needed = settings_of(host.name)
    own = host.folder / "secrets"
    own.mkdir(mode=0o700)
    for secret in secrets.iterdir():
        if secret.name in needed:
            shutil.copy(secret, own)
    address = {name: host.address for name in ("HOST_ADDRESS", "GATEWAY_ADDRESS") if name in settings}
    files = [COMPOSE / name for name in settings["COMPOSE_FILE"].split(":")]
    here = {"SECRETS": str(own), "PARTITIONS": str(PARTITIONS), "AUTO_CREATE": "true", "LOG_FORMAT": "logfmt"}
    return Compose(
        tools / "podman-compose",
        f"rewatch-{host.name}",
        [*files, machine.HERE / "compose.test.yaml"],
        settings | HOSTS[host.name][2] | address | here | {"IMAGES": str(images)} | machine.host_environment(),
        inside=host.inside,
    )


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spread]:
    """Six hosts, on five of which the stack is started."""
    machine.ready()
    secrets, images = tmp_path_factory.mktemp("secrets"), tmp_path_factory.mktemp("images")
    os.chown(images, 65532, 65532)
    run(["sh", str(COMPOSE / "make-secrets.sh"), str(secrets)], within=30)
    named = ("redpanda=log.lan", "clickhouse=store.lan", "detector=models.lan", "llm=models.lan")
    gateway = f"gateway={ADDRESS['doors']}"
    run(["sh", str(COMPOSE / "make-tls.sh"), *named, gateway], within=60, environment={"SECRETS": str(secrets)})
    tools = machine.make_tools()
    names = {called: ADDRESS[host] for host, (_, called, _) in HOSTS.items()}
    hosts: dict[str, Host] = {}
    with switch():
        try:
            for number, name in enumerate(HOSTS, 1):
                hosts[name] = Host(name, number, names)
            stacks = {name: stack_of(host, tools, secrets, images) for name, host in hosts.items()}
            authority = secrets / "tls_ca"
            url = f"https://{ADDRESS['doors']}:8080"
            site = Site(stacks["doors"], url, (secrets / "gateway_api_key").read_text(), authority)
            spread = Spread(site, hosts, stacks, authority)
            for name in ("work", "doors", "models", "store", "log"):  # who waits for others comes first
                spread.start(name)
            site.answers()
            yield spread
        finally:
            if os.environ.get("KEEP_CONTAINERS"):
                say("the hosts are left as they are (KEEP_CONTAINERS)")
            else:
                for host in hosts.values():
                    host.end()


def test_footage_goes_in_at_one_host_and_events_come_out_that_others_made(spread: Spread) -> None:
    site = spread.site
    say("uploading")
    site.feed(8)
    # Above 64 KB a frame is a file, which detect reads on another host than ingest wrote it on.
    large = io.BytesIO()
    with Image.open(io.BytesIO(pictures(1)[0])) as picture:
        picture.resize((1920, 1080)).save(large, "JPEG", quality=95)
    assert len(large.getvalue()) > 100_000
    site.send(cameras()[0], large.getvalue())
    until(lambda: len({event["camera_id"] for event in site.events()}) == PARTITIONS, 300, "an event of each camera")
    site.audit()
    say(f"events of {PARTITIONS} cameras")


def test_each_host_is_given_its_own_secrets_alone_and_is_well(spread: Spread) -> None:
    for name in ("log", "store", "models", "doors", "work"):
        stack = spread.stacks[name]
        for container in stack.names():
            if "migrate" in container:
                assert stack.inspect(container)["State"]["ExitCode"] == 0
            else:
                what = f"{container} to be healthy\n{stack.logs(container)}"
                until(lambda s=stack, c=container: s.well(c), 180, what)
    on_stages = {path.name for path in (spread.hosts["work"].folder / "secrets").iterdir()}
    assert not [secret for secret in on_stages if secret.endswith("_key") and secret.startswith("tls_")]
    assert "clickhouse_admin_password" not in on_stages


def test_a_host_answers_at_what_it_publishes_and_nowhere_else(spread: Spread) -> None:
    for name, host in spread.hosts.items():
        opened = set()
        for port in PORTS:
            try:
                socket.create_connection((host.address, port), 5).close()
                opened.add(port)
            except ConnectionRefusedError:
                pass
        assert opened == PUBLISHED[name], name
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    spread.stacks["work"].exec("batch", "python", "-c", reach, "log.lan", "9092", within=60)
    with pytest.raises(CommandError, match=r"OSError|TimeoutError|unreachable"):
        spread.stacks["work"].exec("batch", "python", "-c", reach, "192.0.2.1", "53", within=60)


def test_every_door_between_hosts_speaks_tls_alone_under_its_own_name(spread: Spread) -> None:
    context = ssl.create_default_context(cafile=spread.authority)
    for name, ports in PUBLISHED.items():
        called = HOSTS[name][1] if name != "doors" else ADDRESS["doors"]
        for port in ports:
            with (
                socket.create_connection((ADDRESS[name], port), 10) as plain,
                context.wrap_socket(plain, server_hostname=called) as tls,
            ):
                assert tls.version() in {"TLSv1.2", "TLSv1.3"}
            with socket.create_connection((ADDRESS[name], port), 10) as plain:
                plain.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
                try:
                    said = plain.recv(100)
                except ConnectionResetError:
                    said = b""
            assert said[:1] in {b"", b"\x15"}, f"{name}:{port} answers without TLS: {said!r}"  # 0x15: a TLS alert
            with (
                pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)mismatch"),
                socket.create_connection((ADDRESS[name], port), 10) as plain,
            ):
                context.wrap_socket(plain, server_hostname="elsewhere.lan").close()


def test_every_door_between_hosts_asks_who_is_there(spread: Spread) -> None:
    context = ssl.create_default_context(cafile=spread.authority)
    context.check_hostname = False
    for url, body, refused in (
        (f"https://{ADDRESS['store']}:8443/", b"SELECT 1", 403),
        (f"https://{ADDRESS['models']}:8090/detect/batch", b"{}", 401),
        (f"https://{ADDRESS['models']}:8091/v1/models", None, 401),
        (f"https://{ADDRESS['doors']}:8080/api/events", None, 401),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url, body, timeout=60, context=context)
        error.value.close()
        assert error.value.code == refused, url
    topics = (
        "import asyncio\nfrom infra.config import load\nfrom streams.kafka import Kafka\n"
        "async def main():\n    async with Kafka(load().kafka).admin() as admin:\n"
        "        print(len(await admin.list_topics()))\n"
        "asyncio.run(asyncio.wait_for(main(), 30))"
    )
    assert int(spread.stacks["doors"].exec("gateway", "python", "-c", topics, within=120)) > 5
    [name] = spread.stacks["doors"].names("gateway")
    for wrong in (
        "REWATCH_KAFKA__SASL_PASSWORD_FILE=/run/secrets/metrics_api_key",
        "REWATCH_KAFKA__SASL_USERNAME=somebody",
        "REWATCH_KAFKA__SSL_CAFILE=/etc/ssl/certs/ca-certificates.crt",
    ):
        with pytest.raises(CommandError):
            spread.stacks["doors"].podman("exec", "-e", wrong, name, "python", "-c", topics, within=120)


def test_what_goes_over_the_wire_can_be_read_by_nobody(spread: Spread) -> None:
    hosts = [host for host in spread.hosts.values() if host.name != "more"]
    secrets = {path for host in hosts for path in (host.folder / "secrets").iterdir() if "tls" not in path.name}
    with Wire(hosts) as wire:
        spread.site.feed(3)
        spread.site.audit()
        # A new connection to each server, whose first packet says in the clear whom it is for.
        context = ssl.create_default_context(cafile=spread.authority)
        for server, port in (("log", 9092), ("store", 8443), ("models", 8091)):
            with socket.create_connection((ADDRESS[server], port), 10) as plain:
                context.wrap_socket(plain, server_hostname=HOSTS[server][1]).close()
    readable = {secret.name: secret.read_bytes() for secret in secrets}
    readable |= {camera: camera.encode() for camera in cameras()}
    # Long enough that they do not come up in some megabytes of cipher by chance.
    words = (
        b"HTTP/1.1",
        b"SELECT ",
        b"\xff\xd8\xff\xe0\x00\x10JFIF",
        b"Exif\x00\x00",
        b"risk_score",
        b"rewatch-detect",
    )
    readable |= {repr(word): word for word in words}
    for host in hosts:
        read = bytes(wire.read[host.name])
        assert len(read) > 10_000, f"nothing was heard of {host.name}"
        assert not [what for what, needle in readable.items() if needle in read], host.name
    for server in ("log", "store", "models"):
        assert HOSTS[server][1].encode() in wire.read[server], "who listens hears nothing"
    heard = sum(map(len, wire.read.values())) / 1e6
    say(f"{heard:.0f} MB read off the wire: no secret, no picture, no word of a record")


def test_a_host_more_takes_its_share(spread: Spread) -> None:
    spread.start("more")

    def both() -> bool:
        spread.site.feed(1)  # a partition is opened at its first record
        return shared(spread.held("detect", "work", "more"))

    until(both, 240, "detect on two hosts to share the partitions")
    spread.site.audit()
    say("two hosts share the partitions of detect; nothing lost, nothing doubled")


def test_a_host_whose_cable_is_pulled_is_stood_in_for_and_comes_back_without_loss(spread: Spread) -> None:
    lost = spread.hosts["work"]

    def stood_in_for() -> bool:
        spread.site.feed(1)  # a partition is opened at its first record
        return [len(held) for held in spread.held("detect", "more")] == [PARTITIONS]

    say(f"pulling the cable of {lost.name}")
    began = time.monotonic()
    lost.unplug()
    try:
        until(stood_in_for, 240, "the other host to take all partitions")
        say(f"the other host has all partitions after {time.monotonic() - began:.0f} s")
        time.sleep(max(0.0, began + PULLED_S - time.monotonic()))
    finally:
        lost.plug()
    spread.site.feed(3)
    spread.site.audit()
    say("plugged in again; nothing lost, nothing doubled")


def test_no_secret_is_in_any_log_of_any_host(spread: Spread) -> None:
    for stack in spread.stacks.values():
        no_secret_in_logs(stack)

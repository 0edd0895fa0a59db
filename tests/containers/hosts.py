"""Hosts of their own for a test: each a network namespace with an engine of its own, all on one switch.

A host has its own podman (containers, networks, published ports), its own names in /etc/hosts and one cable. Nothing
leads from one to another but the switch, and nothing leads out. What a host publishes is reached by the others, and by
the test itself, at the host's address. Images are those of the machine, read only.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.containers import machine
from tests.containers.podman import CommandError, run

SWITCH = "rewatch-lan"
NETWORK = "10.213.77"

# The name of each host's first process, by which a run that was killed is found and cleared away.
_MARK = b"rewatch-test-host"

# What one engine keeps of its containers, networks and locks, the others must not find.
_OWN = ("/run/containers", "/run/libpod", "/run/netns", "/dev/shm", "/etc/containers/networks")

_ETH_P_ALL = 3
_ENOUGH_BYTES = 64 * 1024 * 1024


class Host:
    """One host, made of a process that holds its namespaces."""

    def __init__(self, name: str, number: int, names: Mapping[str, str]) -> None:
        """`number`: the last part of its address; `names`: what the hosts call each other, and the addresses."""
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.cable = f"rewatch-{number}"
        self.folder = machine.CACHE / "hosts" / name
        self._first: subprocess.Popen[bytes] | None = None
        self._clear()
        self.folder.mkdir(parents=True)
        lines = "".join(f"{address} {called}\n" for called, address in names.items())
        (self.folder / "names").write_text(f"127.0.0.1 localhost\n{lines}")
        images = run(["podman", "info", "--format", "{{.Store.GraphRoot}}"], within=60).strip()
        (self.folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/containers"\n'
            f'runroot = "/run/containers/storage"\n[storage.options]\nadditionalimagestores = ["{images}"]\n'
        )
        (self.folder / "containers.conf").write_text('[network]\nnetwork_backend = "netavark"\n')
        self._first = self._start()
        self._pid = self._first.pid
        (self.folder / "pid").write_text(str(self._pid))
        self._connect()

    @property
    def inside(self) -> list[str]:
        """What runs a command on the host."""
        settings = [
            f"CONTAINERS_STORAGE_CONF={self.folder}/storage.conf",
            f"CONTAINERS_CONF={self.folder}/containers.conf",
        ]
        return ["nsenter", "-t", str(self._pid), "-n", "-m", "--", "env", *settings]

    def plug(self) -> None:
        """Put its cable in."""
        run(["ip", "link", "set", self.cable, "up"], within=30)

    def unplug(self) -> None:
        """Pull its cable: nobody on either side is told."""
        run(["ip", "link", "set", self.cable, "down"], within=30)

    def end(self) -> None:
        """Take it away with all that runs on it."""
        with contextlib.suppress(CommandError):
            run([*self.inside, "podman", "rm", "-f", "-a", "-t", "2"], within=120)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        if self._first is not None:
            self._first.wait(timeout=30)
        run(["rm", "-rf", str(self.folder)], within=120)

    def _start(self) -> "subprocess.Popen[bytes]":
        mounts = "".join(f"mkdir -p {at}; mount -t tmpfs tmpfs {at}; " for at in _OWN)
        script = (
            f"set -e; {mounts} mount --bind {self.folder}/names /etc/hosts; ip link set lo up; echo ready; "
            f"exec -a {_MARK.decode()} sleep infinity"
        )
        log = self.folder / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                ["unshare", "--net", "--mount", "bash", "-c", script], stdout=subprocess.PIPE, stderr=said
            )
        assert process.stdout is not None
        with process.stdout as said:
            if said.readline() != b"ready\n":
                process.wait(timeout=30)
                raise CommandError(f"no host can be made here: {log.read_text()}")
        return process

    def _connect(self) -> None:
        peer = ("type", "veth", "peer", "name", "eth0", "netns", str(self._pid))
        run(["ip", "link", "add", self.cable, *peer], within=30)
        run(["ip", "link", "set", self.cable, "master", SWITCH], within=30)
        run([*self.inside, "ip", "address", "add", f"{self.address}/24", "dev", "eth0"], within=30)
        run([*self.inside, "ip", "link", "set", "eth0", "up"], within=30)
        self.plug()

    def _clear(self) -> None:
        """Take away what a run that was killed left under this name."""
        pid = self.folder / "pid"
        if pid.exists():
            self._pid = int(pid.read_text())
            with contextlib.suppress(OSError):
                if Path(f"/proc/{self._pid}/cmdline").read_bytes().startswith(_MARK):
                    self.end()
        if self.folder.exists():
            run(["rm", "-rf", str(self.folder)], within=120)


@contextlib.contextmanager
def switch() -> Iterator[None]:
    """The switch, with this machine on it; it stays where the containers are to."""
    subprocess.run(["ip", "link", "delete", SWITCH], check=False, capture_output=True, timeout=30)
    run(["ip", "link", "add", SWITCH, "type", "bridge"], within=30)
    try:
        run(["ip", "address", "add", f"{NETWORK}.254/24", "dev", SWITCH], within=30)
        run(["ip", "link", "set", SWITCH, "up"], within=30)
        yield
    finally:
        if not os.environ.get("KEEP_CONTAINERS"):
            run(["ip", "link", "delete", SWITCH], within=30)


class Wire:
    """All that goes through some hosts' cables while it listens, as somebody on the switch reads it."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._sockets: dict[socket.socket, str] = {}
        for host in hosts:
            sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024 * 1024)
            sniffer.bind((host.cable, 0))
            self._sockets[sniffer] = host.name
        self.read: dict[str, bytearray] = {host.name: bytearray() for host in hosts}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        for sniffer in self._sockets:
            sniffer.close()

    def _listen(self) -> None:
        while not self._stop.is_set():
            for sniffer in select.select(list(self._sockets), [], [], 0.2)[0]:
                kept = self.read[self._sockets[sniffer]]
                packet = sniffer.recv(1 << 17)
                if len(kept) < _ENOUGH_BYTES:
                    kept += packet

"""Podman and podman-compose as the tests drive them: each command has a time limit, and tells what it said."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# runc on cgroups of both versions: crun fails there, and so do podman's own limits.
LIMITS = ("--ulimit", "nofile=1024:4096", "--ulimit", "nproc=4096:4096")
RUN = ("podman", "--runtime", "runc", "run", "--rm", *LIMITS)

_BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line of the test's progress."""
    print(f"  [{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


class CommandError(AssertionError):
    """A command failed or took too long; the message ends with what it said."""


def run(
    argv: Sequence[str],
    *,
    within: float,
    environment: Mapping[str, str] | None = None,
    codes: Sequence[int] = (0,),
) -> str:
    """Run a command and return what it wrote to stdout.

    Raises:
        CommandError: it ended with another code, or not in time, seconds.
    """
    shown = " ".join(argv)[:300]
    try:
        done = subprocess.run(
            argv,
            check=False,
            capture_output=True,
            timeout=within,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"{shown}: not done after {within:.0f} s\n{_tail(error.stderr)}") from None
    if done.returncode not in codes:
        raise CommandError(f"{shown}: exit code {done.returncode}\n{_tail(done.stdout)}\n{_tail(done.stderr)}")
    return done.stdout.decode(errors="replace")


def _tail(said: bytes | None) -> str:
    lines = (said or b"").decode(errors="replace").splitlines()
    # Without systemd podman says so at every container; the tests run the health checks themselves.
    return "\n".join(line for line in lines if "systemd connection" not in line)[-4000:]


def image(name: str) -> str:
    """The id of an image on this machine; empty where there is none."""
    return run(["podman", "images", "-q", "--no-trunc", name], within=30).strip()


def build(name: str, dockerfile: Path, context: Path, *, within: float, target: str = "", **arguments: str) -> None:
    """Build an image, with the layers of the last time where nothing changed; its predecessor goes."""
    before = image(name)
    options = [f"--build-arg={key.upper()}={value}" for key, value in arguments.items()]
    options += ["--target", target] if target else []
    run(
        [
            *("podman", "build", "--runtime", "runc", "--format", "docker", "--layers", *LIMITS),
            *(*options, "-f", str(dockerfile), "-t", name, str(context)),
        ],
        within=within,
    )
    if before and before != image(name):
        # Fails where a container of somebody else still uses it.
        subprocess.run(["podman", "rmi", before], check=False, capture_output=True, timeout=120)


class Compose:
    """One project of podman-compose."""

    def __init__(
        self,
        command: Path,
        project: str,
        files: Sequence[Path],
        environment: Mapping[str, str],
        *,
        inside: Sequence[str] = (),
    ) -> None:
        """`command`: podman-compose; `environment`: the files' variables; `inside`: runs a command on another host."""
        self.project = project
        self.environment = dict(environment)
        self._inside = tuple(inside)
        self._argv = [*inside, str(command), "--podman-args=--runtime runc", "-p", project]
        self._argv += [part for file in files for part in ("-f", str(file))]

    def __call__(self, *arguments: str, within: float) -> str:
        """Run one of its commands."""
        return run([*self._argv, *arguments], within=within, environment=self.environment)

    def podman(self, *arguments: str, within: float, codes: Sequence[int] = (0,)) -> str:
        """Run podman where the project is."""
        return run([*self._inside, "podman", *arguments], within=within, codes=codes)

    def names(self, service: str = "") -> list[str]:
        """Its containers, or those of one service."""
        filters = ["--filter", f"label=io.podman.compose.project={self.project}"]
        filters += ["--filter", f"label=com.docker.compose.service={service}"] if service else []
        return sorted(self.podman("ps", "-a", *filters, "--format", "{{.Names}}", within=60).split())

    def clear(self) -> None:
        """Remove all of it: podman-compose's own `down` leaves containers that `--scale` made."""
        label = f"label=io.podman.compose.project={self.project}"
        for kind, remove in (("ps", ("rm", "-f", "-t", "2")), ("volume", ("volume", "rm", "-f")), ("network", ())):
            listing = ["ps", "-aq"] if kind == "ps" else [kind, "ls", "-q"]
            found = self.podman(*listing, "--filter", label, within=60).split()
            if found:
                self.podman(*(remove or ("network", "rm", "-f")), *found, within=120)

    def inspect(self, name: str) -> dict[str, Any]:
        """What podman knows of a container."""
        found: list[dict[str, Any]] = json.loads(self.podman("inspect", name, within=60))
        return found[0]

    def exec(self, service: str, *argv: str, within: float, codes: Sequence[int] = (0,)) -> str:
        """Run a command in the first container of a service."""
        return self.podman("exec", self.names(service)[0], *argv, within=within, codes=codes)

    def logs(self, name: str, lines: int = 15) -> str:
        """The last lines of a container."""
        done = subprocess.run(
            [*self._inside, "podman", "logs", "--tail", str(lines), name], check=False, capture_output=True, timeout=60
        )
        return (done.stdout + done.stderr).decode(errors="replace")

    def well(self, name: str) -> bool:
        """Whether the container's own health check says so now. Without systemd nobody else runs it."""
        return (
            subprocess.run(
                [*self._inside, "podman", "healthcheck", "run", name], check=False, capture_output=True, timeout=60
            ).returncode
            == 0
        )

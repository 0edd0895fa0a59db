"""The units of infra/systemd: systemd takes them, they are locked down, and what they start answers as they expect."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from infra.cli.main import app
from infra.config import Settings
from infra.notify import Notifier, keep_telling, tell_of_stage

UNITS = Path(__file__).parents[2] / "infra" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
PROGRAM = "/opt/rewatch/.venv/bin/rewatch"

with_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


class Systemd:
    """Where systemd listens: the datagrams that it gets, as lists of lines."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)

    def next(self, timeout: float = 90) -> list[str]:
        self._socket.settimeout(timeout)
        return self._socket.recv(4096).decode().splitlines()

    def until(self, line: str) -> list[str]:
        """Wait for a datagram with this line."""
        while line not in (said := self.next()):
            pass
        return said

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with contextlib.closing(Systemd(tmp_path / "notify")) as listening:
        yield listening


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units as on a machine where the program lies where this one does: systemd looks for it."""
    directory = tmp_path_factory.mktemp("units")
    program = Path(sys.executable).parent / "rewatch"
    for unit in (*SERVICES, *UNITS.glob("*.timer")):
        (directory / unit.name).write_text(unit.read_text().replace(PROGRAM, str(program)))
    return directory


def words_of(unit: Path, name: str) -> list[str]:
    [line] = [line for line in unit.read_text().splitlines() if line.startswith(f"{name}=")]
    return line.removeprefix(f"{name}=").split()


@with_systemd
def test_systemd_takes_every_unit_without_a_word(installed: Path) -> None:
    units = [str(path) for path in sorted(installed.iterdir())]
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{installed}:", "SYSTEMD_LOG_LEVEL": "warning"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Words about the machine's own units are not about ours.
    about = [line for line in found.stderr.splitlines() if "rewatch" in line]
    assert (found.returncode, about) == (0, [])


@with_systemd
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_every_service_is_locked_down(unit: Path, installed: Path) -> None:
    """Exposure of at most 2.0 of 10, by systemd's own account: what is left is the network, and a user of its own."""
    found = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(installed / unit.name)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_every_service_starts_a_command_that_there_is(unit: Path) -> None:
    lines = [words_of(unit, "ExecStart")]
    lines += [words_of(unit, "ExecStop")] if "ExecStop=" in unit.read_text() else []
    root: Any = typer.main.get_command(app)
    for program, name, *words in lines:
        assert program == PROGRAM
        assert name in root.commands
        command = root.commands[name]
        if words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        # Its options and arguments are those that it takes.
        command.make_context(name, ["detect" if word == "%i" else word for word in words]).close()


def test_nobody_answers_the_timer_of_retention() -> None:
    assert "--yes" in words_of(UNITS / "rewatch-gc.service", "ExecStart")


def test_every_timer_has_its_service_and_a_start_that_was_missed_is_made_up_for() -> None:
    timers = sorted(UNITS.glob("*.timer"))
    assert [timer.stem for timer in timers] == ["rewatch-backup", "rewatch-gc"]
    for timer in timers:
        assert timer.with_suffix(".service").exists()
        assert words_of(timer, "Persistent") == ["yes"]


def test_wrong_settings_are_not_tried_again_and_what_fails_is() -> None:
    for unit in SERVICES:
        if "Restart=on-failure" in unit.read_text():
            assert words_of(unit, "RestartPreventExitStatus") == ["2"], unit.name
            assert words_of(unit, "StartLimitIntervalSec") == ["0"], unit.name
    assert [unit.name for unit in SERVICES if "Restart=" not in unit.read_text()] == [
        "rewatch-backup.service",
        "rewatch-gc.service",
    ]


@pytest.mark.real
def test_up_and_a_stage_tell_systemd_that_they_are_up_alive_and_stopping(settings: Settings, systemd: Systemd) -> None:
    asks = {"NOTIFY_SOCKET": systemd.path, "WATCHDOG_USEC": "1000000"}
    light = {
        **{f"REWATCH_STAGES__{stage}__PROCESSES": "0" for stage in ("DETECT", "BATCH", "ANALYZE", "SINK")},
        "REWATCH_GATEWAY__ENABLED": "false",
        "REWATCH_INGEST__UPLOAD__ENABLED": "false",
        "REWATCH_METRICS__PORT": "0",
    }
    for arguments, status in ((["up"], "STATUS=2 processes run"), (["run", "enrich"], "STATUS=at work")):
        with subprocess.Popen(
            [sys.executable, "-m", "infra.cli", *arguments], env=os.environ | light | asks, stdout=subprocess.DEVNULL
        ) as process:
            systemd.until("READY=1")
            systemd.until("WATCHDOG=1")
            while status not in systemd.until("WATCHDOG=1"):  # a stage says meanwhile what it waits on
                pass
            process.send_signal(signal.SIGTERM)
            systemd.until("STOPPING=1")
            assert process.wait(timeout=60) == 0
            assert (Path(settings.data_dir) / "status").is_dir()


async def test_a_stage_that_says_that_it_stalls_gives_no_sign_of_life_any_more(
    systemd: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"NOTIFY_SOCKET": systemd.path, "WATCHDOG_USEC": "20000"}
    notifier = Notifier.of_environment(environment)
    assert environment == {}  # children must not answer in its place
    report = tmp_path / "enrich.json"

    def says(stall: str | None, pid: int = os.getpid(), *waits: str) -> None:
        report.write_text(json.dumps({"pid": pid, "stall": stall, "waiting_on": waits}))

    says(None, 1)  # a predecessor's
    telling = asyncio.create_task(tell_of_stage(notifier, report, tmp_path / "none.json"))
    await asyncio.sleep(0)  # it has looked
    says(None, os.getpid(), "broker")
    assert await asyncio.to_thread(systemd.next, 10) == ["READY=1", "STATUS=waiting on broker"]
    assert await asyncio.to_thread(systemd.next, 10) == ["WATCHDOG=1", "STATUS=waiting on broker"]
    says("front-0 has 3 records in hand")
    with contextlib.suppress(BlockingIOError):
        while True:  # those that were on their way
            systemd.next(0)
    await asyncio.sleep(0.1)
    with pytest.raises(BlockingIOError):
        systemd.next(0)
    telling.cancel()


async def test_nobody_listens_or_listens_no_more_and_nothing_fails(tmp_path: Path) -> None:
    nobody = Notifier.of_environment({})
    nobody.ready("up")
    await asyncio.wait_for(keep_telling(nobody, lambda: "up"), 1)
    gone = Notifier(str(tmp_path / "gone"), 1.0)
    gone.ready("up")
    gone.stopping()
    others = Notifier.of_environment({"NOTIFY_SOCKET": str(tmp_path / "x"), "WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"})
    assert others.every_s > 1  # the watchdog of another process is not ours


async def test_signs_of_life_come_twice_as_often_as_they_must_and_tell_how_it_is(systemd: Systemd) -> None:
    notifier = Notifier(systemd.path, 0.2)
    states = iter(["2 processes run", "1 processes run; detect is backing off", *["x"] * 100])
    began = time.monotonic()
    telling = asyncio.create_task(keep_telling(notifier, lambda: next(states)))
    assert await asyncio.to_thread(systemd.next, 10) == ["WATCHDOG=1", "STATUS=2 processes run"]
    assert await asyncio.to_thread(systemd.next, 10) == ["WATCHDOG=1", "STATUS=1 processes run; detect is backing off"]
    assert time.monotonic() - began >= 0.09
    telling.cancel()

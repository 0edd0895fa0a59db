"""The data directory is for its owner alone, whoever makes it first; one that is there is told of, not changed."""

import asyncio
import stat
import sys
from pathlib import Path

import pytest

from infra.checks import machine
from infra.checks.check import Context
from infra.config import load
from infra.local.supervisor import Supervisor
from infra.private import make_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_whoever_makes_the_data_directory_makes_it_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Supervisor(tmp_path / "up" / "data"):
        assert mode(tmp_path / "up" / "data") == 0o700
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("REWATCH_GATEWAY__ENABLED", "false")
    worker = await asyncio.create_subprocess_exec(sys.executable, "-m", "infra.worker", "gateway")
    assert await worker.wait() == 2, "it ends where it finds that it is not wanted"
    assert mode(tmp_path / "run") == 0o700


async def test_a_directory_that_others_look_into_stays_so_and_doctor_tells(tmp_path: Path) -> None:
    settings = load().model_copy(update={"data_dir": tmp_path / "data"})
    (tmp_path / "data").mkdir(mode=0o755)
    make_private(tmp_path / "data")
    [problem] = [c for c in await machine.data_dir(Context(settings, {})) if c.name == "data_dir for others"]
    assert (problem.status, problem.fix) == ("warning", f"chmod o-rwx {tmp_path / 'data'}")
    (tmp_path / "data").chmod(0o750)
    assert "data_dir for others" not in {c.name for c in await machine.data_dir(Context(settings, {}))}

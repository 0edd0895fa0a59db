"""`python -m tests.chaos` as its user meets it: its help, what it refuses, and how it is stopped."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.chaos import __main__ as command


def test_the_schedule_is_shown_by_count_or_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert "SIGKILL of the broker" in capsys.readouterr().out
    assert command.main(["--list", "--n", "3", "--seed", "7"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 + 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--n", "0"], "at least 1"),
        (["--gap", "0"], "more than 0"),
        (["--only", "kill-time"], "invalid choice"),
        (["--out", "/nowhere/chaos.json"], "is no directory that can be written to"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_told_to_stop_it_leaves_no_child_and_no_data(tmp_path: Path, number: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chaos", "--n", "1", "--seed", "1", "--out", str(tmp_path / "chaos.json")),
        cwd=root,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=asyncio.subprocess.PIPE,
    )
    told = psutil.Process(process.pid)
    try:
        async with asyncio.timeout(60):
            while not (children := told.children(recursive=True)):
                await asyncio.sleep(0.1)
            process.send_signal(number)
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}: no child runs, nothing was kept" in said.decode()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert list(tmp_path.iterdir()) == []

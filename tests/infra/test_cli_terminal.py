"""The command line on real terminals and pipes: colours, encodings, a reader that goes away, Ctrl-C at any instant."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import psutil
import pytest

from infra.cli import lifecycle
from infra.config import Settings
from infra.demo import next_day
from streams.survey import Count, Survey
from tests.e2e.installation import settings_for
from tests.infra.terminal import COMMAND, Terminal

COLOUR = re.compile(r"\x1b\[(\d+;)*3\dm")


def piped(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """An installation of its own without its heavy stages; nothing of it may be left over."""
    settings = settings_for(
        tmp_path,
        monkeypatch,
        GATEWAY__ENABLED="false",
        METRICS__PORT="0",
        STAGES__DETECT__PROCESSES="0",
        STAGES__BATCH__PROCESSES="0",
        STAGES__ANALYZE__PROCESSES="0",
        STAGES__SINK__PROCESSES="0",
        LLM__URL="http://127.0.0.1:1",
    )
    yield settings
    deadline = time.monotonic() + 10  # after a second Ctrl-C the kernel ends them
    while left := [p for p in psutil.process_iter() if _is_of(p, tmp_path)]:
        assert time.monotonic() < deadline, [p.cmdline() for p in left]
        time.sleep(0.05)


def _is_of(process: psutil.Process, directory: Path) -> bool:
    try:
        return any(str(directory) in word for word in process.cmdline())
    except psutil.Error:
        return False


def test_a_pipe_gets_no_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("--help",), ("config", "show"), ("evnts",)):
        found = piped(*command)
        assert "\x1b" not in found.stdout + found.stderr


def test_a_terminal_gets_colours_unless_it_wants_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = {}
    for name, environment in {"": {}, "NO_COLOR": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}.items():
        with Terminal("--help", columns=60, **environment) as terminal:
            assert terminal.end() == 0
            shown[name] = terminal.raw
            # A dumb terminal cannot be asked how wide it is.
            assert max(map(len, terminal.text.splitlines())) <= (80 if name == "dumb" else 60)
    assert COLOUR.search(shown[""])
    assert not COLOUR.search(shown["NO_COLOR"])
    assert "\x1b" not in shown["dumb"]


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    line = f"set -o pipefail; {' '.join(COMMAND)} config show | head -1"
    found = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert found.stderr == ""


def test_an_encoding_that_knows_few_characters_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewatch.yaml").write_text("images: /mnt/Überwachung\n")
    found = piped("config", "show", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert found.returncode == 0, found.stderr
    assert "/mnt/\\xdcberwachung" in found.stdout


def test_ctrl_c_while_python_still_reads_modules_shows_no_traceback() -> None:
    script = """
import sys

class CtrlC:
    def find_spec(self, name, *_):
        if name == "infra.cli.cameras":
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
from infra.cli import main
main()
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


@pytest.mark.real
def test_ctrl_c_while_up_starts_stops_what_had_begun(here: Settings) -> None:
    with Terminal("up") as terminal:
        terminal.until("clickhouse  ready")
        terminal.interrupt()
        assert terminal.end() == 0
        assert "stopped before it was up; data stay in" in terminal.text
        assert "Traceback" not in terminal.text


@pytest.mark.real
def test_ctrl_c_while_the_demo_starts_is_130(here: Settings) -> None:
    with Terminal("demo") as terminal:
        terminal.until("starting ")
        terminal.interrupt()
        assert terminal.end() == 130
        assert "stopped before anything was played" in terminal.text


@pytest.mark.real
def test_up_says_what_to_do_what_died_and_what_was_done(here: Settings) -> None:
    with Terminal("up", columns=160) as terminal:
        terminal.until("rewatch is up")
        terminal.until("logs ")
        assert f"{here.ingest.folder.root}/<camera>/" in terminal.text
        assert f"{here.ingest.upload.url}/api/upload" in terminal.text
        enrich = json.loads((here.data_dir / "run.json").read_text())["processes"]["enrich"]
        os.kill(enrich["pid"], signal.SIGKILL)
        terminal.until("enrich runs again (restart 1)")
        assert f"enrich ended with code -9; starting it again. Its log: {enrich['log']}" in terminal.text
        terminal.interrupt()
        assert terminal.end() == 0
        for line in ("0 frames taken, 0 events, 0 dead letters", f"data stay in {here.data_dir}"):
            assert line in terminal.text


@pytest.mark.real
def test_a_second_ctrl_c_stops_at_once_and_leaves_nothing_behind(here: Settings) -> None:
    with Terminal("up") as terminal:
        terminal.until("kafka       ready")
        terminal.interrupt()
        terminal.until("Ctrl-C again stops at once")
        terminal.interrupt()
        assert terminal.end() == 130
        assert "stopped at once" in terminal.text


def look(frames: int, *, exact: bool = True) -> Survey:
    return Survey({}, {"frames": Count(frames, exact), "risk_events": Count(0, exact=True)}, {})


def test_what_was_done_is_the_difference_of_two_looks_and_an_estimate_says_so() -> None:
    assert lifecycle._since(look(3), look(10), "frames") == "7"
    assert lifecycle._since(look(3), look(100_000, exact=False), "frames") == "about 99997"
    assert lifecycle._since(look(10), look(3), "frames") == "0"  # retention took more than came
    assert lifecycle._since(look(1), look(1), "dead_letters") == "0"


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.2, "3 s"), (61, "1 min 1 s"), (3 * 3600 + 300, "3 h 5 min"), (59.9, "60 s")]
)
def test_spans_are_told_as_people_tell_them(seconds: float, said: str) -> None:
    assert lifecycle.duration(seconds) == said


def test_the_demo_never_draws_a_day_twice() -> None:
    drawn: set[date] = set()
    today = date(2026, 11, 2)
    for run in range(90):
        day = next_day(drawn, today + timedelta(days=run // 7))
        assert day not in drawn
        assert day < today + timedelta(days=run // 7)
        drawn.add(day)
    assert min(drawn) < date(2026, 10, 3) == today - timedelta(days=30)


def test_a_demo_of_many_days_draws_them_one_after_another_and_none_in_the_future() -> None:
    drawn: list[date] = []
    today = date(2026, 11, 2)
    for _ in range(45):
        drawn.append(next_day(set(drawn), today, 45))
    assert drawn == sorted(drawn)
    assert drawn[-1] < today

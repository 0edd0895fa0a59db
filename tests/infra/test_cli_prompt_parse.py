"""`rewatch prompt parse`: a verdict and 0, a repair and 3, or 2 for what cannot be read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cli.main import app
from tests.infra.cli_kit import invoke
from tests.processors.analyze_samples import answer


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_verdict_comes_with_its_level_and_what_was_forgiven() -> None:
    Path("answer.txt").write_text(f"<think>90?</think>\n```json\n{answer(71, summary='Ein Mann an der Tür')}\n```")
    result = invoke("prompt", "parse", "answer.txt")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        **json.loads(answer(71, summary="Ein Mann an der Tür")),
        "risk_level": "high",
        "forgiven": ["reasoning", "fence"],
    }
    assert "Tür" in result.stdout


def test_what_must_be_repaired_is_3_and_why() -> None:
    Path("answer.txt").write_text(answer(101))
    result = invoke("prompt", "parse", "answer.txt")
    assert (result.exit_code, result.stderr) == (3, "")
    assert json.loads(result.stdout) == {"repair": "at $.risk_score: 101 is greater than the maximum of 100."}


def test_it_reads_standard_input() -> None:
    result = CliRunner().invoke(app, ["prompt", "parse", "-"], input=answer(8))
    assert result.exit_code == 0
    assert json.loads(result.stdout)["risk_level"] == "low"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("gone.txt", None, "gone.txt: No such file or directory"),
        (".", None, "Is a directory"),
        ("latin.txt", b'{"summary": "T\xfcr"}', "latin.txt is not UTF-8: invalid start byte at byte 14"),
    ],
)
def test_what_cannot_be_read_is_2(name: str, content: bytes | None, complaint: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    result = invoke("prompt", "parse", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "infra.cli", "prompt", "parse", "-"]
    found = subprocess.run(command, input=b"\xff", capture_output=True, check=False)
    assert (found.returncode, found.stdout) == (2, b"")
    assert b"standard input is not UTF-8" in found.stderr
    found = subprocess.run(command, input=b"I cannot help with that.", capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (3, b"")
    assert json.loads(found.stdout) == {"repair": "it holds no JSON object."}

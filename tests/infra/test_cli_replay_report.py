"""`rewatch replay report`: where the file goes, what is said of it, and what is said when it cannot be made."""

import json
import os
import stat
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner, Result

from infra import replaying
from infra.cli import replay_report
from infra.config import Settings, load
from processors.replay import compare, gathering
from processors.replay.comparison import Comparison, Coverage, Labelled, Pairing, Side, Spread
from processors.replay.report import Report
from processors.replay.sides import SideError
from processors.replay.statistics import labelled
from streams.errors import UnavailableError


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith("REWATCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "data"))
    return load()


def comparison(name: str, against: str) -> Comparison:
    nothing: Labelled = labelled(Pairing(), [])
    return Comparison(
        a=Side(id=against, name=against),
        b=Side(id="r1", name=name, kind="change"),
        coverage=Coverage(complete=True),
        pairing=Pairing(),
        flips=(),
        deltas=Spread(),
        scores_a=Spread(),
        scores_b=Spread(),
        transitions={},
        by_camera=(),
        by_hour=(),
        by_class=(),
        labels=nothing,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asked for; `error` is raised instead of an answer, `name` is what the replay is called."""
    found: dict[str, Any] = {}

    @asynccontextmanager
    async def store(_: Settings) -> AsyncIterator[None]:
        found["store"] = "opened"
        yield
        found["store"] = "closed"

    async def compared(_: object, a: str, b: str) -> Comparison:
        found["sides"] = (a, b)
        if "error" in found:
            raise found["error"]
        return comparison(found.get("name", b), a)

    async def gathered(_: object, claims: object, of: Comparison, **more: Any) -> Report:
        found["more"] = more
        return Report(comparison=of, made_at=more["made_at"], time_zone=more["time_zone"], version=more["version"])

    monkeypatch.setattr(replaying, "store", store)
    monkeypatch.setattr(compare, "compare", compared)
    monkeypatch.setattr(gathering, "gather", gathered)
    return found


def invoke(settings: Settings, *arguments: str) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    replay_report.register(app)
    return CliRunner().invoke(app, ["report", *arguments], obj=settings)


def test_it_goes_below_the_data_and_says_where(settings: Settings, asked: dict[str, Any]) -> None:
    result = invoke(settings, "stricter")
    path = settings.data_dir / "replays" / "stricter.html"
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(path.absolute()), path.absolute().as_uri()]
    assert path.read_text().startswith("<!doctype html>")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_mask()
    assert asked["sides"] == ("live", "stricter")
    assert asked["store"] == "closed"
    assert list(path.parent.iterdir()) == [path]


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_programs_get_path_and_length(settings: Settings, asked: dict[str, Any]) -> None:
    out = settings.data_dir.parent / "elsewhere.html"
    result = invoke(settings, "b", "--against", "a", "--out", str(out), "--json")
    assert json.loads(result.stdout) == {"path": str(out), "bytes": out.stat().st_size}
    assert asked["sides"] == ("a", "b")


def test_a_report_against_another_replay_leaves_the_one_against_live(settings: Settings, asked: dict[str, Any]) -> None:
    assert invoke(settings, "b").exit_code == 0
    assert invoke(settings, "b", "--against", "a").exit_code == 0
    names = {path.name for path in (settings.data_dir / "replays").iterdir()}
    assert names == {"b.html", "b-against-a.html"}


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "ünï cøde", "...", "x" * 300, "\x1b[2J"])
def test_a_replays_name_never_leads_out_of_the_folder(settings: Settings, asked: dict[str, Any], name: str) -> None:
    asked["name"] = name
    result = invoke(settings, "r1")
    assert result.exit_code == 0, result.output
    [path] = (settings.data_dir / "replays").iterdir()
    assert path.suffix == ".html"
    assert not path.name.startswith(".")
    assert "\x1b" not in result.stdout


def test_what_is_there_stays_where_the_new_one_cannot_be_written(settings: Settings, asked: dict[str, Any]) -> None:
    result = invoke(settings, "b", "--out", str(settings.data_dir / "no" / "such" / "folder.html"))
    assert result.exit_code == 2
    assert "No such file or directory; name another file by --out" in result.stderr
    out = settings.data_dir.parent / "folder"
    out.mkdir()
    result = invoke(settings, "b", "--out", str(out))
    assert result.exit_code == 2
    assert list(out.parent.glob(".folder*")) == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (SideError("there is no replay x; near it: stricter (r1)"), 1, "near it: stricter"),
        (UnavailableError("store", "ClickHouse at http://127.0.0.1:1 does not answer"), 3, "does not answer"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    settings: Settings, asked: dict[str, Any], error: Exception, code: int, words: str
) -> None:
    asked["error"] = error
    result = invoke(settings, "x")
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (settings.data_dir / "replays").exists()


@pytest.mark.parametrize(("can", "code"), [(True, 0), (False, 1)])
def test_it_opens_in_the_browser_when_asked(
    settings: Settings, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, can: bool, code: int
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or can)
    result = invoke(settings, "b", "--open")
    assert result.exit_code == code
    assert opened == [(settings.data_dir / "replays" / "b.html").absolute().as_uri()]
    assert ("no browser" in result.stderr) is not can


def test_the_first_side_is_named_by_what_it_is(settings: Settings, asked: dict[str, Any]) -> None:
    report = Report(comparison=comparison("b", "live"), made_at=0)
    assert replay_report._place(settings, report).name == "b.html"
    other = replace(report, comparison=comparison("b", "r9"))
    assert replay_report._place(settings, other).name == "b-against-r9.html"

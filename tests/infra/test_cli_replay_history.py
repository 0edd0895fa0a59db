"""`rewatch replay history` on the real engine, and what `rewatch explain` says of it."""

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from infra.cli import events, replay_history
from infra.cli.replay_history import bar
from infra.config import load
from processors.store.settings import ClickHouseSettings
from schemas import ids
from tests.schemas import history_kit
from tests.schemas.history_kit import FIRST, MADE, SECOND, STRICT

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real


MODEL = "nemotron-demo"
REUSED = "name of r3 (change, reused)"


@pytest.fixture(scope="module")
def told(clickhouse_url: str) -> ClickHouseSettings:
    return history_kit.told(clickhouse_url)


@pytest.fixture
def settings(told: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", told.url)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", told.database)
    return load()


@pytest.fixture
def invoke(settings: Any) -> Any:
    """Runs `history` or `explain` with these settings."""
    app = typer.Typer()
    replay_history.register(app)
    events.register(app)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), obj=settings, env={"COLUMNS": "200"})

    return run


def table(result: Result) -> list[list[str]]:
    """The cells of the rows that begin with a time."""
    lines = [line for line in result.stdout.splitlines() if line.strip().startswith("2026-")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_a_window_is_shown_with_every_verdict_in_the_order_in_which_they_were_given(invoke: Any) -> None:
    result = invoke("history", ids.event_id(FIRST))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"window {FIRST}, 2026-11-02 10:00:00+00:00"
    assert result.stdout.splitlines()[1] == "labelled true alarm by jo, 2026-11-02 10:09:00+00:00: that was the post"
    assert table(result) == [
        ["2026-11-02 10:02:30+00:00", "live", "plain", MODEL, "███████░░░", "72 high", "72 in live"],
        ["2026-11-02 10:07:00+00:00", "name of r1 (change)", "strict", MODEL, "████░░░░░░", "40 medium", "40 in r1"],
        ["2026-11-02 10:07:00+00:00", REUSED, "strict", MODEL, "████░░░░░░", "40 medium", "40 in r3"],
        ["2026-11-02 10:07:30+00:00", "name of r2 (baseline)", "plain", MODEL, "███████░░░", "70 high", "70 in r2"],
    ]


@pytest.mark.parametrize("named", [FIRST, f"{FIRST}:r2", FIRST[:10], FIRST.removeprefix("front:")[:8]])
def test_a_window_is_found_by_any_of_its_events_or_a_beginning(invoke: Any, named: str) -> None:
    told = json.loads(invoke("history", named, "--json").stdout)
    assert (told["batch_id"], told["camera_id"], told["started_at"]) == (FIRST, "front", "2026-11-02T10:00:00+00:00")
    assert [row["run"] for row in told["verdicts"]] == ["live", "r1", "r3", "r2"]
    assert told["label"]["verdict"] == "true_alarm"
    assert told["verdicts"][1]["prompt_digest"] == STRICT


def test_a_window_that_only_a_replay_made_has_its_history_too(invoke: Any) -> None:
    told = json.loads(invoke("history", MADE, "--json").stdout)
    assert [(row["run"], row["risk_score"]) for row in told["verdicts"]] == [("r4", 90)]
    assert told["label"] is None


@pytest.mark.parametrize(("named", "says"), [("front:", SECOND), ("nowhere", ids.event_id(FIRST)), ("", SECOND)])
def test_an_unknown_or_ambiguous_name_says_what_is_near_and_ends_with_1(invoke: Any, named: str, says: str) -> None:
    result = invoke("history", named)
    assert result.exit_code == 1
    assert says in result.stderr


def test_explain_says_how_an_event_was_judged_again(invoke: Any) -> None:
    told = invoke("explain", ids.event_id(SECOND)).stdout
    assert (
        "judged again: name of r1 (change), prompt strict: 25 low; name of s1 (shadow), prompt plain: 61 high" in told
    )
    plain = json.loads(invoke("explain", ids.event_id(SECOND), "--json").stdout)
    assert [row["run"] for row in plain["judged_again"]] == ["r1", "s1"]


@pytest.mark.parametrize(
    ("score", "shown"), [(0, ".........."), (1, "#........."), (50, "#####....."), (100, "#" * 10)]
)
def test_a_score_is_a_bar_of_ten_cells_and_never_empty_above_zero(score: int, shown: str) -> None:
    assert bar(score, "low", ascii_only=True).plain == shown

"""`rewatch replay diff` on the real ClickHouse engine: what people read, what programs get, what fails a build."""

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from infra.cli import complete, replay_diff
from infra.config import load
from processors.replay.figures import FIGURES
from processors.replay.plan import Change, Plan
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from tests.processors.compare_store_kit import STRICT, Past, batch

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real

CUT = Plan(kind="change", change=Change(threshold=0.7))
AGAIN = Plan(kind="baseline", mode="strict")
STRICTER = Plan(kind="change", change=Change(prompt="b" * 32), baseline="ragain", windows=4)


@pytest.fixture(scope="module")
def recorded(clickhouse_url: str) -> ClickHouseSettings:
    """Four windows judged live, again, by another prompt, and cut anew; two are labelled."""
    made = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")
    past = Past()
    for replay_id, name, plan in (
        ("ragain", "again", AGAIN),
        ("rstricter", "stricter", STRICTER),
        ("rfiner", "finer", CUT),
        ("rsoon", "soon", STRICTER),
    ):
        past.replay(replay_id, name=name, plan=plan)
    for n, (live, again, stricter) in enumerate(((10, 10, 10), (40, 41, 95), (70, 70, 20), (95, 95, 95))):
        of = past.window("gate", range(10 * n, 10 * n + 4))
        event = past.live(of, live, summary=f"[red]Window\x1b[2J {n}", conditions=STRICT | {"slots": "8" if n else "1"})
        past.again("ragain", of, again)
        past.again("rstricter", of, stricter, prompt_digest="b" * 32, summary=f"Window {n}")
        past.label("true_alarm" if n > 1 else "false_alarm", event) if n else None
    for frames in (range(2), range(2, 4), range(10, 14), range(22, 34), range(90, 92)):
        past.again("rfiner", batch("gate", frames), 70)

    async def main() -> None:
        store = ClickHouseStore(made)
        await store.migrate()
        await store.close()
        await past.keep(made)

    asyncio.run(main())
    return made


@pytest.fixture(autouse=True)
def _settings(recorded: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", recorded.url)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", recorded.database)


def diff(*arguments: str) -> Result:
    root = typer.Typer()

    @root.callback()
    def settings(ctx: typer.Context) -> None:
        ctx.obj = load()

    replay_diff.register(root)
    return CliRunner().invoke(root, ["diff", *arguments])


def told(*arguments: str, code: int = 0) -> Any:
    result = diff(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_json_has_the_figures_and_the_flips_by_harm() -> None:
    found = told("live", "stricter")
    assert [found[name] for name in ("compared", "identical", "flips", "flips_in_noise")] == [4, 2, 2, 0]
    assert (found["noise_floor"], found["p_value"]) == (0.0, pytest.approx(0.428571, abs=1e-6))
    lost, new = found["flip_list"]
    assert (lost["kind"], lost["harm"], lost["label"], lost["delta"]) == ("alarm_lost", 0, "true_alarm", -50)
    assert (new["kind"], new["harm"], new["label"], new["in_noise"]) == ("alarm_new", 2, "false_alarm", False)
    assert (lost["a"]["risk_level"], lost["b"]["risk_level"]) == ("high", "low")
    assert found["figures"]["flips"] == 0.5
    assert found["labels"]["a"]["recall"]["value"] == 1.0
    assert found["labels"]["b"]["recall"]["value"] == 0.5
    assert found["coverage"]["planned"] == 4
    assert found["strict"] is None
    assert len(told("live", "stricter", "--limit", "1")["flip_list"]) == 1


def test_people_read_the_worst_first_and_nothing_steers_their_terminal() -> None:
    result = diff("live", "stricter")
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert shown.startswith("2 of 4 windows changed")
    assert shown.index("alarm lost") < shown.index("new alarm") < shown.index("Risk levels") < shown.index("precision")
    assert "[red]Window\\x1b[2J 2" in shown
    assert "70 high" in shown
    assert "20 low" in shown
    assert "By hour of the day" in shown
    assert "2026-05-28 22:27" in shown  # by the clock where the camera is


def test_windows_that_split_vanished_or_appeared_are_told() -> None:
    found = told("live", "finer")
    assert (len(found["split"]), len(found["merged"]), len(found["appeared"])) == (1, 1, 1)
    assert found["flips"] == 1  # neither of those is one
    shown = diff("live", "finer").stdout
    for title in ("Windows of A that are several in B", "Windows of A that are one in B", "Windows of B alone (1)"):
        assert title in shown


@pytest.mark.parametrize(
    ("conditions", "named"),
    [
        (["flips>0.02"], ["flips is 0.5"]),
        (["flips > 2%"], ["flips is 0.5"]),
        (["flips>0.9", "recall<0.9"], ["recall is 0.5"]),
        (["alarms_lost>=1", "alarms_new>=1"], ["alarms_lost is 1", "alarms_new is 1"]),
        (["recall_gain<0"], ["recall_gain is -0.5"]),
        (["different>0"], ["different is not known"]),
        (["flips>0.5", "missed>1", "identical<.5", "compared<4"], []),
    ],
)
def test_a_condition_that_holds_or_cannot_be_told_is_1_and_named(conditions: list[str], named: list[str]) -> None:
    options = [option for one in conditions for option in ("--fail-on", one)]
    result = diff("live", "stricter", *options)
    assert result.exit_code == (1 if named else 0), result.output
    assert result.stderr.count("fails: ") == len(named)
    assert all(name in result.stderr for name in named)
    assert len(told("live", "stricter", *options, code=result.exit_code)["failed_on"]) == len(named)


@pytest.mark.parametrize(
    "text", ["flips", "flips>", "flips>much", "flips=>1", "flipz>0.1", "0.1>flips", "flips>1e9999", ""]
)
def test_a_condition_that_is_none_is_2_and_lists_the_figures(text: str) -> None:
    result = diff("live", "stricter", "--fail-on", text)
    assert result.exit_code == 2
    assert "flips" in result.stderr
    assert "flips>0.02" in result.stderr or all(name in result.stderr for name in FIGURES)


def test_the_figures_that_conditions_name_are_listed() -> None:
    result = diff("live", "stricter", "--fail-on", "help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in FIGURES)


def test_a_strict_comparison_that_fails_is_1_and_says_where_it_differs() -> None:
    result = diff("live", "again")  # its replay was strict
    assert result.exit_code == 0, result.output
    assert "Strict: 1 of 1 identical (100.0 %), 4 calls made." in result.stdout
    assert "recorded with 8 slots" in result.stdout
    other = diff("live", "stricter", "--strict")
    assert other.exit_code == 1
    assert "0 of 0" in other.stdout
    assert "another prompt version" in other.stdout


def test_a_side_that_is_not_there_is_1_and_names_what_is_near() -> None:
    result = diff("live", "strictr")
    assert result.exit_code == 1
    assert "stricter (rstricter)" in result.stderr


def test_a_replay_that_judged_nothing_yet_says_so() -> None:
    result = diff("live", "soon")
    assert result.exit_code == 0, result.output
    assert "Nothing could be compared" in result.stdout
    assert told("live", "soon")["compared"] == 0


def test_tab_completes_live_and_the_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete, "replays", lambda _ctx, _text: iter([("lively", "done")]))
    context: Any = None
    assert [name for name, _ in replay_diff._sides(context, "liv")] == ["live", "lively"]
    assert [name for name, _ in replay_diff._sides(context, "lively")] == ["lively"]


def test_clickhouse_away_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", "http://127.0.0.1:1")
    result = diff("live", "stricter")
    assert result.exit_code == 3
    assert "clickhouse.url" in result.stderr

"""The views of history on the real engine: a small story is told, then asked of as it stood at each of its minutes."""

import re
import secrets
from datetime import UTC, datetime
from pathlib import Path

import pytest

from processors.sink import store as sink_store
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries, QueryError
from processors.store.settings import ClickHouseSettings
from schemas.migrations import migrations, split
from tests.schemas import history_kit
from tests.schemas.history_kit import FIRST, MADE, PLAIN, PLANS, SECOND, STORY, STRICT, clock, minute, sunk

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real

DOCUMENT = Path(__file__).parents[2] / "docs" / "replay.md"

WITH_PARAMETERS = {
    "events_as_of": "at = now('UTC')",
    "prompts_as_of": "at = now('UTC')",
    "cameras_as_of": "at = now('UTC')",
    "events_by_prompt": "prompt = ''",
    "events_by_prompt_as_of": "prompt = '', at = now('UTC')",
}


@pytest.fixture(scope="module")
def told(clickhouse_url):
    return history_kit.told(clickhouse_url)


@pytest.fixture
def asked(told, reading):
    return reading(told)


def test_a_windows_history_has_every_verdict_on_it_once(asked):
    assert asked.rows(
        "SELECT run, run_name, kind, prompt_name, risk_score, risk_level, reused FROM score_history "
        f"WHERE camera_id = 'front' AND batch_id = '{FIRST}' ORDER BY judged_at, run"
    ) == [
        ("live", "live", "live", "plain", 72, "high", False),
        ("r1", "name of r1", "change", "strict", 40, "medium", False),
        ("r3", "name of r3", "change", "strict", 40, "medium", True),
        ("r2", "name of r2", "baseline", "plain", 70, "high", False),
    ]
    assert asked.rows(f"SELECT run, kind FROM score_history WHERE batch_id = '{SECOND}' ORDER BY run") == [
        ("live", "live"),
        ("r1", "change"),
        ("s1", "shadow"),
    ]


@pytest.mark.parametrize(
    ("at", "known"),
    [
        (2.4, []),
        (2.5, [(FIRST, 72, "", "")]),
        (3, [(FIRST, 72, "false_alarm", "kim")]),
        (6, [(FIRST, 72, "false_alarm", "kim"), (SECOND, 20, "", "")]),
        (8, [(FIRST, 72, "false_alarm", "kim"), (SECOND, 20, "false_alarm", "kim")]),
        (9, [(FIRST, 72, "true_alarm", "jo"), (SECOND, 20, "false_alarm", "kim")]),
    ],
)
def test_the_events_of_a_time_are_those_judged_by_then_with_their_labels_of_then(asked, at, known):
    query = f"SELECT batch_id, risk_score, label, label_author FROM events_as_of(at = '{clock(at)}') ORDER BY batch_id"
    assert asked.rows(query) == known


def test_the_events_of_now_are_those_of_the_view(asked):
    now = asked.rows(
        "SELECT * EXCEPT (label, label_author, label_note, labelled_at) FROM events_as_of(at = '2299-01-01')"
    )
    assert sorted(now) == sorted(asked.rows("SELECT * FROM events"))
    assert asked.rows("SELECT camera_name FROM events_as_of(at = '2299-01-01') ORDER BY batch_id") == [
        ("Front",),
        ("Main gate",),
    ]


def test_a_time_can_be_written_in_many_ways_and_is_utc_where_it_names_no_zone(asked):
    ways = ["'2026-11-02 10:03:00'", "'2026-11-02T11:03:00+01:00'", f"'{minute(3) // 1000}'", f"{minute(3) // 1000}"]
    ways.append("(SELECT min(labelled_at) FROM labels)")
    for way in ways:
        assert asked.rows(f"SELECT batch_id, label FROM events_as_of(at = {way})") == [(FIRST, "false_alarm")]
    assert asked.value("SELECT count() FROM events_as_of(at = '2026-11-02')") == 0


async def test_a_time_that_is_none_is_refused_with_the_engines_words(told):
    store = Queries(told)
    with pytest.raises(QueryError, match="Cannot read DateTime"):
        await store.raw("SELECT * FROM events_as_of(at = 'soon')", "JSON", limit=0)
    await store.aclose()


@pytest.mark.parametrize(
    ("at", "front", "yard"),
    [
        (0.9, None, None),
        (1, ("default", PLAIN, "plain"), None),
        (2, ("front", STRICT, "strict"), ("default", PLAIN, "plain")),
        (4, ("default", PLAIN, "plain"), ("default", PLAIN, "plain")),
        (5, ("default", STRICT, "strict"), ("default", STRICT, "strict")),
        (11, ("default", PLAIN, "plain"), ("default", PLAIN, "plain")),
    ],
)
def test_the_prompt_in_force_follows_each_move_of_a_pointer(asked, at, front, yard):
    found = {
        camera: tuple(rest)
        for camera, *rest in asked.rows(f"SELECT camera_id, scope, digest, name FROM prompts_as_of(at = '{clock(at)}')")
    }
    assert (found.get("front"), found.get("yard")) == (front, yard)
    assert found["default"] == (("", "", "") if at < 1 else found.get("yard", ("default", PLAIN, "plain")))


def test_a_move_of_a_pointer_says_since_when_and_on_what_evidence(asked):
    query = (
        "SELECT toUnixTimestamp64Milli(since), comment, evidence FROM prompts_as_of(at = '{}') WHERE camera_id = '{}'"
    )
    assert asked.rows(query.format(clock(3), "front")) == [(minute(2), "too many alarms", "r1")]
    assert asked.rows(query.format(clock(3), "default")) == [(minute(1), "to begin with", "")]
    assert asked.rows(query.format(clock(0.2), "default")) == [(None, "", "")]


def test_the_order_of_the_log_counts_where_clocks_disagree(asked):
    assert asked.value(f"SELECT digest FROM prompts_as_of(at = '{clock(3)}') WHERE camera_id = 'shed'") == PLAIN


def test_what_was_set_for_a_camera_is_what_was_newest_then_and_ends_with_its_topic(asked):
    def names(at):
        return asked.rows(f"SELECT camera_id, name FROM cameras_as_of(at = '{clock(at)}') ORDER BY camera_id")

    assert names(0) == []
    assert names(2) == [("front", "Front"), ("yard", "Yard")]
    assert names(3) == [("front", "Main gate"), ("yard", "Yard")]
    assert names(11) == [("yard", "Court")]
    assert asked.rows(f"SELECT toUnixTimestamp64Milli(since) FROM cameras_as_of(at = '{clock(11)}')") == [(minute(11),)]


@pytest.mark.parametrize("prompt", ["strict", STRICT, STRICT[:6]])
def test_a_prompt_version_is_found_by_its_name_of_which_the_newest_counts_or_by_its_digest(asked, prompt):
    # A reused verdict is no newer than the one that it repeats.
    assert asked.rows(
        f"SELECT batch_id, run, risk_score FROM events_by_prompt(prompt = '{prompt}') ORDER BY batch_id"
    ) == [(FIRST, "r1", 40), (SECOND, "r1", 25)]


def test_of_several_verdicts_of_a_version_the_newest_by_then_counts(asked):
    def seen(prompt, at):
        query = (
            f"SELECT batch_id, run FROM events_by_prompt_as_of(prompt = '{prompt}', at = '{clock(at)}') ORDER BY ALL"
        )
        return asked.rows(query)

    assert seen("plain", 2.4) == []
    assert seen("plain", 3) == [(FIRST, "live")]
    assert seen("plain", 7.8) == [(FIRST, "r2"), (MADE, "r4")]
    assert seen("strict", 1) == []
    assert seen("strict", 6) == [(SECOND, "live")]
    assert seen("", 20) == [(FIRST, "r2"), (SECOND, "s1"), (MADE, "r4")]


def test_a_name_that_no_version_has_finds_nothing(asked):
    assert asked.rows("SELECT * FROM events_by_prompt(prompt = 'stri')") == []


def test_the_state_of_a_replay_is_its_newest_step_with_its_plan_unpacked(asked):
    found = {row["replay_id"]: row for row in asked.dicts("SELECT * FROM replay_state")}
    assert found.keys() == PLANS.keys()
    assert {name: row["state"] for name, row in found.items()} == {
        "r1": "done",
        "r2": "planned",
        "r3": "planned",
        "r4": "planned",
        "s1": "running",
    }
    for name, plan in PLANS.items():
        row, scope, change = found[name], plan.scope, plan.change
        assert (row["kind"], row["mode"], row["share"], row["max_tokens"], row["baseline"]) == (
            plan.kind,
            plan.mode,
            plan.share,
            plan.max_tokens,
            plan.baseline,
        )
        assert row["entry"] == change.entry
        assert (row["threshold"], row["idle_ms"], row["max_ms"]) == (change.threshold, change.idle_ms, change.max_ms)
        assert (row["prompt_digest"], row["detector"]) == (change.prompt, change.detector)
        assert (row["llm"], row["model"]) == (("http://gpu:8091", "nano") if change.llm else ("", ""))
        since = row["scope_since"] and int(row["scope_since"].timestamp() * 1000)
        assert (since, row["scope_until"], row["sample"]) == (scope.since, scope.until, scope.sample)
        assert (row["cameras"], row["where"]) == (list(scope.cameras), scope.where)
        assert (row["windows"], row["frames"]) == (plan.windows, plan.frames)
    first = found["r1"]
    assert (first["name"], first["detail"], first["prompt_name"]) == ("name of r1", "1 judged", "strict")
    assert first["updated_at"] == datetime.fromtimestamp(minute(8.5) / 1000, UTC)
    assert first["created_at"] == datetime.fromtimestamp(minute(6.5) / 1000, UTC)


def test_what_a_replay_has_done_is_counted_once_and_what_was_reused_took_nothing(asked):
    columns = "units, results, reused, failed, tokens, seconds"
    rows = asked.rows(f"SELECT replay_id, {columns} FROM replay_state")
    assert {name: tuple(rest) for name, *rest in rows} == {
        "r1": (3, 2, 0, 1, 700, 3.0),
        "r2": (1, 1, 0, 0, 350, 1.5),
        "r3": (0, 1, 1, 0, 0, 0.0),
        "r4": (0, 1, 0, 0, 350, 1.5),
        "s1": (0, 1, 0, 1, 350, 1.5),
    }
    assert asked.value("SELECT last_at FROM replay_state WHERE replay_id = 'r3'") is None


@pytest.mark.parametrize(("view", "parameters"), WITH_PARAMETERS.items())
def test_the_columns_of_a_view_with_parameters_are_documented_where_it_was_made(asked, view, parameters):
    made = asked.value(f"SHOW CREATE VIEW {view}")
    documented = dict(re.findall(r"^    `([\w.]+)` .*? COMMENT '(.+)',?$", made.split("\nAS ")[0], re.MULTILINE))
    assert list(documented) == [name for name, *_ in asked.rows(f"DESCRIBE {view}({parameters})")]


def test_the_examples_of_the_document_can_be_asked(asked):
    [block] = re.findall(r"```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    examples = list(split(block))
    assert len(examples) == 4
    for example in examples:
        asked.rows(example)


async def test_a_database_of_the_version_before_is_brought_up_to_date(clickhouse_url, reading, monkeypatch):
    settings = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")
    monkeypatch.setattr(sink_store, "migrations", lambda: migrations()[:8])
    store = ClickHouseStore(settings)
    await store.migrate()
    for topic, life, records in STORY:
        await sunk(settings, topic, life, records)
    monkeypatch.undo()
    assert [migration.version for migration in await store.migrate()] == [m.version for m in migrations()[8:]]
    ask = reading(settings)
    assert ask.value("SELECT count() FROM score_history") == 8
    # A view that somebody dropped is made again, whatever it is made of.
    ask.command("DROP VIEW score_history")
    ask.command("DROP VIEW events_by_prompt_as_of")
    await store.restore()
    assert ask.value("SELECT count() FROM events_by_prompt(prompt = 'strict')") == 2
    await store.close()
    ask.command(f"DROP DATABASE {settings.database}")

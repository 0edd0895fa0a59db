"""`rewatch audit` and `rewatch rebuild`: what they say and how they end; on fakes, and once on the real servers."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from infra.config import Settings
from processors.sink.rebuild import Progress, Rebuilt
from processors.store.audit import Report, Violation
from streams.errors import UnavailableError
from streams.survey import Survey
from tests.infra.cli_kit import answer, invoke, put_in_store, put_on_log

CLEAN = Report(accepted=3, counts={}, violations=[], in_flight={"detect": 0, "batch": 2}, took_s=0.1)
WRONG = Report(
    accepted=3,
    counts={"lost": 2, "doubled": 1, "wrong_id": 1},
    violations=[Violation("lost", "frames:e:0:4", "detect has passed it\x1b"), Violation("wrong_id", "gate:1", "no")],
    in_flight={"detect": 0},
    dead_letters=[{"stage": "detect", "kind": "error", "status": "open", "count": 7}],
    unread=("frames",),
    notes=("gate had windows by settings that nobody knows any more",),
)


class Audited:
    """Stands where the accounting does."""

    def __init__(self, report: Report | Exception) -> None:
        self.report = report
        self.asked: dict[str, Any] = {}

    async def __call__(self, *_: Any, **asked: Any) -> Report:
        self.asked = asked
        if isinstance(self.report, Exception):
            raise self.report
        return self.report


@pytest.fixture
def audited(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Audited:
    monkeypatch.chdir(tmp_path)
    fake = Audited(CLEAN)
    monkeypatch.setattr("processors.store.audit.audit", fake)
    return fake


def test_a_clean_audit_is_0_and_says_what_is_still_in_flight(audited: Audited) -> None:
    result = invoke("audit")
    assert result.exit_code == 0
    assert "everything is accounted for" in result.output
    assert "in flight before batch" in result.output
    assert audited.asked["camera"] is None


def test_what_is_wrong_is_named_and_the_exit_code_is_1(audited: Audited) -> None:
    audited.report = WRONG
    result = invoke("audit")
    assert result.exit_code == 1
    assert "frames:e:0:4" in result.stdout
    assert "\x1b" not in result.stdout
    assert "4 violations, the first 2 are shown" in result.stderr
    assert "dead letters of detect (error), open" in result.stdout
    assert "settings that nobody knows" in result.stdout
    found = answer("audit", code=1)
    assert {name: found[name] for name in ("accepted", "lost", "duplicates", "unexplained_dead_letters")} == {
        "accepted": 3,
        "lost": 2,
        "duplicates": 1,
        "unexplained_dead_letters": 0,
    }
    assert found["violations"][0]["id"] == "frames:e:0:4"
    assert found["in_flight"] == {"detect": 0}


def test_bounds_are_handed_on_and_wrong_ones_are_2(audited: Audited) -> None:
    invoke("audit", "--camera", "gate", "--since", "2026-11-02T18:00", "--until", "2026-11-03")
    assert audited.asked["camera"] == "gate"
    assert audited.asked["since"] == datetime(2026, 11, 2, 18, tzinfo=UTC)
    assert audited.asked["until"] == datetime(2026, 11, 3, tzinfo=UTC)
    assert invoke("audit", "--since", "yesterday").exit_code == 2


def test_a_store_that_is_away_is_3(audited: Audited) -> None:
    audited.report = UnavailableError("store", "does not answer (clickhouse.url)")
    assert invoke("audit").exit_code == 3


def test_wait_looks_until_nothing_is_in_flight(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [{"detect": 3}, {"batch": 1}, {"batch": 0}]

    async def look(*_: Any, **__: Any) -> Survey:
        return Survey({}, {}, {})

    monkeypatch.setattr("streams.survey.survey", look)
    monkeypatch.setattr("processors.store.audit.in_flight", lambda _: looks.pop(0))
    monkeypatch.setattr("infra.cli.audit._LOOK_EVERY_S", 0.0)
    assert invoke("audit", "--wait").exit_code == 0
    assert looks == []
    assert audited.asked


class FakeRebuild:
    """Stands where `Rebuild` does."""

    done: list[str]

    def __init__(self, _store: Any, told: Any = lambda _: None) -> None:
        self._told = told

    async def plan(self, tables: Any) -> list[tuple[str, int, int]]:
        return [(table, 5, 4) for table in tables]

    async def views(self) -> None:
        self.done.append("views")

    async def table(self, table: str) -> Rebuilt:
        self._told(Progress(table, 5, 5))
        self.done.append(table)
        return Rebuilt(table, 5, 5, 4, 0, 1)


class FakeStore:
    def __init__(self, _settings: Any) -> None: ...

    async def migrate(self) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
def rebuilt(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("processors.sink.rebuild.Rebuild", FakeRebuild)
    monkeypatch.setattr("processors.sink.store.ClickHouseStore", FakeStore)
    done: list[str] = []
    monkeypatch.setattr(FakeRebuild, "done", done, raising=False)
    return done


def test_a_dry_run_changes_nothing(rebuilt: list[str]) -> None:
    assert answer("rebuild", "--dry-run", "--table", "frames") == [{"table": "frames", "records": 5, "rows": 4}]
    assert "risk_events" in invoke("rebuild", "--dry-run").stdout
    assert rebuilt == []


def test_without_yes_nothing_is_replaced_where_nobody_can_be_asked(rebuilt: list[str]) -> None:
    result = invoke("rebuild")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert rebuilt == []


def test_views_come_first_and_then_each_table_once(rebuilt: list[str]) -> None:
    result = invoke("rebuild", "--yes", "--table", "labels", "--table", "frames", "--table", "labels")
    assert result.exit_code == 0, result.output
    assert rebuilt == ["views", "labels", "frames"]
    assert "2 records are read otherwise" in result.output
    assert [one["rows"] for one in answer("rebuild", "--yes", "--table", "frames")] == [5]


def test_a_table_that_is_none_is_2(rebuilt: list[str]) -> None:
    result = invoke("rebuild", "--table", "log")
    assert result.exit_code == 2
    assert "dead_letter_status" in result.stderr
    assert rebuilt == []


@pytest.mark.real
def test_on_the_real_servers_both_find_what_is_there(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"audit_{settings.kafka.system}")
    mine = settings.model_copy(
        update={"clickhouse": settings.clickhouse.model_copy(update={"database": f"audit_{settings.kafka.system}"})}
    )
    camera = f"cam-{settings.kafka.system}"

    async def tell() -> None:
        await put_in_store(mine, await put_on_log(mine, camera))

    asyncio.run(tell())
    # This story's stages never ran: their groups have no positions, so all of it is in flight, and nothing is lost.
    found = answer("audit", "--camera", camera, code=1)
    assert found["accepted"] == 3
    assert found["lost"] == 0
    assert found["in_flight"]["detect"] >= 3
    # Who wrote it named no sources.
    assert {one["kind"] for one in found["violations"]} <= {"from_nowhere", "unexplained_dead_letter"}
    done = answer("rebuild", "--yes", "--table", "frames")
    assert [(one["table"], one["rows"], one["rows_before"]) for one in done] == [("frames", 3, 3)]
    assert json.loads(invoke("rebuild", "--dry-run", "--table", "frames", "--json").stdout)[0]["rows"] == 3

"""`rewatch sql` on a fake store: formats and limits; the engine itself is asked in test_cli_real."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.cli.main import app
from processors.store.queries import QueryError
from streams.errors import UnavailableError
from tests.infra.cli_kit import FakeQueries, invoke


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("processors.store.queries.Queries", FakeQueries)
    monkeypatch.setattr(FakeQueries, "away", None)
    monkeypatch.setattr(FakeQueries, "asked", [])


def says(monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> None:
    meta = [{"name": "n", "type": "UInt8"}]
    monkeypatch.setattr(FakeQueries, "raw_answer", json.dumps({"meta": meta, "data": rows}).encode())


def test_a_table_asks_for_one_row_more_than_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [[1], [2], [3]])
    result = invoke("sql", "SELECT n FROM t;", "--limit", "2")
    assert FakeQueries.asked == [{"query": "SELECT n FROM t", "fmt": "JSONCompact", "limit": 3}]
    assert "the first 2 rows" in result.stderr
    assert "3" not in result.stdout


def test_all_rows_are_no_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [[1], [2]])
    result = invoke("sql", "SELECT 1", "--limit", "2")
    assert result.stderr == ""


def test_json_is_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [{"n": 1}])
    assert json.loads(invoke("sql", "SELECT 1", "--json").stdout) == [{"n": 1}]


def test_csv_is_the_engines_byte_for_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeQueries, "raw_answer", b'"n"\n1\n')
    assert invoke("sql", "SELECT 1", "--csv").stdout == '"n"\n1\n'
    assert FakeQueries.asked == [{"query": "SELECT 1", "fmt": "CSVWithNames", "limit": 1000}]


def test_a_query_can_come_by_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [])
    CliRunner().invoke(app, ["sql", "-"], input="SELECT 2")
    assert FakeQueries.asked[0]["query"] == "SELECT 2"


@pytest.mark.parametrize("arguments", [("",), (" ; ",), ("SELECT 1", "--json", "--csv")])
def test_what_cannot_be_asked_is_2(arguments: tuple[str, ...]) -> None:
    assert invoke("sql", *arguments).exit_code == 2
    assert FakeQueries.asked == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(QueryError("Unknown table x"), 1), (UnavailableError("store", "does not answer (clickhouse.url)"), 3)],
)
def test_errors_are_the_engines_words_and_an_exit_code(error: Exception, code: int) -> None:
    FakeQueries.away = error
    result = invoke("sql", "SELECT * FROM x")
    assert (result.exit_code, result.stdout) == (code, "")
    assert str(error) in result.stderr

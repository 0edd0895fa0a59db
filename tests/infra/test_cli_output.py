"""How commands speak: nothing steers a terminal, pipes stay plain, failures are one line with an exit code."""

import json
from datetime import UTC, datetime

import pytest
import typer
from aiokafka.errors import KafkaConnectionError

from infra.cli import output
from infra.cli.errors import run
from infra.cli.output import print_json, print_table, printable, text_of, when
from infra.config import Settings
from processors.store.queries import QueryError
from streams.admin import TopicsError
from streams.errors import UnavailableError


def test_text_of_strangers_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\nc\u202e") == "a\\x1b[2Jb\\x07\nc\\u202e"


def test_a_piped_table_has_no_colour_and_no_markup_and_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 150
    print_table(("a", "n"), [("[red]not markup[/red]", 1), (output.level_text("high", 72), 22), (long, None)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]not markup[/red]" in out
    assert "72 high" in out
    assert long in out


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (0.5, "0.5"),
        (1e9, "1000000000"),
        (b"\x00a", "\\x00a"),
        (["a", 1], '["a", 1]'),
        (datetime(2026, 11, 2, 10, tzinfo=UTC), "2026-11-02 10:00:00+00:00"),
    ],
)
def test_cells_read_well(cell: object, text: str) -> None:
    assert text_of(cell) == text


def test_json_holds_times_with_their_zone_and_bytes_as_text_or_hex(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"at": datetime(2026, 11, 2, 10), "text": b"abc", "bytes": b"\xff"})  # noqa: DTZ001 (as clients give it)
    assert json.loads(capsys.readouterr().out) == {
        "at": "2026-11-02T10:00:00+00:00",
        "text": "abc",
        "bytes": {"hex": "ff"},
    }


def test_when_is_told_by_the_clock_of_the_zone() -> None:
    assert when(1_793_613_600_000, "Europe/Berlin") == "2026-11-02 11:00:00+01:00"
    assert when(None) == "-"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KafkaConnectionError("refused"), 3, "kafka.bootstrap_servers"),
        (TimeoutError(), 3, "kafka.bootstrap_servers"),
        (UnavailableError("store", "ClickHouse at http://x does not answer (clickhouse.url)"), 3, "clickhouse.url"),
        (QueryError("Syntax error"), 1, "Syntax error"),
        (TopicsError("topic frames has 4 partitions, kafka.partitions says 16"), 2, "kafka.partitions"),
    ],
)
def test_expected_failures_are_one_line_and_an_exit_code(
    error: Exception, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        run(Settings(), main)
    assert ended.value.exit_code == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert says in said.err
    assert len(said.err.splitlines()) == 1


def test_what_nobody_expects_keeps_its_traceback() -> None:
    async def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Settings(), main)

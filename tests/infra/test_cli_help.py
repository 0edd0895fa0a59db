"""`--help`: every command tells what it does, with examples that can be typed; and it comes at once."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text
from typer.core import TyperGroup

from infra import topology
from infra.cli import complete
from infra.cli.help import PANELS
from infra.cli.main import app
from streams.topics import STORED
from tests.infra.cli_kit import invoke

ROOT: Any = typer.main.get_command(app)

# What takes long to import: none of it may be needed to tell what there is.
HEAVY = (
    *("aiokafka", "clickhouse_connect", "faust", "fastapi", "httpx", "pydantic", "structlog", "torch", "transformers"),
    *("uvicorn", "yaml", "numpy", "PIL", "fsspec"),
)


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the tree with the words that name it."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, TyperGroup):
            yield from commands(command, (*path, name))


ALL = dict(commands())


def examples(command: Any) -> list[str]:
    return [line.strip() for line in Text.from_markup(command.epilog or "").plain.splitlines() if "rewatch " in line]


def words_of(example: str) -> list[str]:
    """The words behind `rewatch` in a line of a shell, up to the end of its command."""
    lexer = shlex.shlex(example, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    words = words[words.index("rewatch") + 1 :]
    end = next((number for number, word in enumerate(words) if word and set(word) <= set("|&;<>")), len(words))
    return words[:end]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_a_summary_that_fits_a_line_and_examples(path: tuple[str, ...]) -> None:
    command = ALL[path]
    summary = (command.help or "").strip().split("\n\n")[0]
    assert summary.endswith(".")
    assert len(summary) <= 90, summary
    assert 1 <= len(examples(command)) <= 5


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_option_and_argument_is_explained(path: tuple[str, ...]) -> None:
    assert [parameter.name for parameter in ALL[path].params if not getattr(parameter, "help", None)] == []


@pytest.mark.parametrize(
    ("path", "example"), [(path, line) for path, command in ALL.items() for line in examples(command)]
)
def test_every_example_parses_and_is_of_its_command(
    path: tuple[str, ...], example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in words_of(example):
        if name.endswith((".mp4", ".mkv")):  # a recording that must be there
            Path(name).touch()
    context, command, words = ROOT.make_context("rewatch", words_of(example), resilient_parsing=False), ROOT, ()
    while isinstance(command, TyperGroup):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        words = (*words, name)
        if rest or not isinstance(command, TyperGroup):
            context = command.make_context(name, rest, parent=context)
    assert words[: len(path)] == path


def test_the_root_groups_its_commands_and_tells_the_exit_codes() -> None:
    shown = invoke("--help").output
    places = [shown.index(f"─ {panel} ") for panel in PANELS]
    assert places == sorted(places)
    assert "─ Commands " not in shown, "a command without a panel"
    assert "Exit codes" in shown
    assert invoke("-h").output == shown


def test_names_of_options_are_the_same_everywhere() -> None:
    names: dict[str, set[str]] = {}
    for command in ALL.values():
        for parameter in command.params:
            names.setdefault(parameter.name, set()).update(option for option in parameter.opts if "--" in option)
    assert names["as_json"] == {"--json"}
    assert names["limit"] == {"--limit"}
    assert names["camera"] == {"--camera"}
    # Whoever answers can answer programs; what runs until it is stopped has nothing to answer.
    silent = (
        {path for path, c in ALL.items() if not isinstance(c, TyperGroup)}
        - {path for path, c in ALL.items() if any("--json" in parameter.opts for parameter in c.params)}
        - {("prompt", "parse")}
    )  # JSON is all that it says
    assert {path[0] for path in silent} <= {"up", "demo", "run", "config", "serve"}


def test_help_of_a_command_comes_also_where_the_settings_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewatch.yaml").write_text("kafk: {}")
    for words in (("events", "ls", "--help"), ("up", "-h"), ("camera", "--help")):
        result = invoke(*words)
        assert result.exit_code == 0, result.exception
        assert "Usage: " in result.output


def test_the_command_line_imports_nothing_that_takes_time() -> None:
    code = f"import sys; import infra.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_completion_knows_the_stages_and_tables_that_there_are() -> None:
    assert complete.STAGES == topology.PROCESSES
    assert complete.TABLES == STORED

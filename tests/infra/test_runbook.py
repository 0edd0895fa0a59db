"""The runbook has a part for everything that can call somebody, and names no command that there is not."""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from infra.checks import work
from infra.cli import complete
from infra.cli.main import app
from streams.errors import UnprocessableError

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("streams", "processors", "infra") for path in sorted((ROOT / room).rglob("*.py"))]

COMMANDS: Any = typer.main.get_command(app)

ASKS = ("Means", "Look", "Do", "Wake somebody")
"""What each part answers."""

ALERTS = "Alerts"
KINDS = "Dead letters, by kind"
WAITS = "What a stage waits on"


def parts() -> dict[str, dict[str, str]]:
    """The runbook's texts by chapter and heading."""
    found: dict[str, dict[str, str]] = {}
    for chapter in re.split(r"^## ", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE)[1:]:
        title, *sections = re.split(r"^### ", chapter, flags=re.MULTILINE)
        found[title.splitlines()[0]] = {
            section.splitlines()[0].strip("`"): section.partition("\n")[2] for section in sections
        }
    return found


@cache
def nodes() -> tuple[ast.Call | ast.Assign, ...]:
    """Every call and assignment of the sources in which something waits or becomes a dead letter."""
    told = [text for path in SOURCES if re.search(r"Unavailable|waiting_on|kind=", text := path.read_text())]
    found = (node for text in told for node in ast.walk(ast.parse(text)))
    return tuple(node for node in found if isinstance(node, ast.Call | ast.Assign))


def calls() -> Iterator[ast.Call]:
    return (node for node in nodes() if isinstance(node, ast.Call))


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def first_word(node: ast.expr | None) -> str | None:
    """What a text says first, also one that is put together: `camera gate` is about a camera."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        return node.value.split()[0]
    return None


def waited_for() -> set[str]:
    """Everything that any code can say it waits on."""
    found = {first_word(call.args[0]) for call in calls() if name_of(call).endswith("UnavailableError") and call.args}
    found |= {first_word(keyword.value) for call in calls() for keyword in call.keywords if keyword.arg == "waiting_on"}
    for node in nodes():
        if isinstance(node, ast.Assign) and any(getattr(one, "attr", "") == "waiting_on" for one in node.targets):
            found.add(first_word(node.value))
    return {word for word in found if word is not None}


def kinds() -> set[str]:
    """Every kind of dead letter that any code makes."""
    makes = {"DeadLetter", "UnprocessableError", "__init__"}
    made = {
        keyword.value.value
        for call in calls()
        for keyword in call.keywords
        if keyword.arg == "kind" and name_of(call) in makes and isinstance(keyword.value, ast.Constant)
    }
    return made | {inspect.signature(UnprocessableError).parameters["kind"].default}


def test_every_alert_has_its_part() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    table = text.partition("Alerts worth having")[2].partition("\n## ")[0]
    alerts = re.findall(r"^\| `(.+?)`", table, flags=re.MULTILINE)
    assert len(alerts) >= 9
    told = [line for part in parts()[ALERTS].values() for line in re.findall(r"^\n`(.+?)`", part)]
    assert sorted(told) == sorted(alerts)


def test_every_kind_of_dead_letter_has_its_part() -> None:
    assert kinds() >= {"error", "gap", "rejected", "shed"}
    assert set(parts()[KINDS]) == kinds()


def test_everything_that_is_waited_on_has_its_part_and_nothing_else() -> None:
    found = waited_for()
    assert found >= {"broker", "camera", "disk", "group", "llm", "settings", "store"}
    assert set(parts()[WAITS]) == found | set(work._WAITS)


@pytest.mark.parametrize("chapter", [ALERTS, KINDS, WAITS])
def test_every_part_says_what_it_means_where_to_look_what_to_do_and_when_to_wake_somebody(chapter: str) -> None:
    for heading, text in parts()[chapter].items():
        assert re.findall(r"^- ([A-Z][a-z ]+):", text, flags=re.MULTILINE) == list(ASKS), heading


@pytest.mark.parametrize("document", ["runbook.md", "upgrades.md"])
def test_every_command_that_is_named_is_there(document: str) -> None:
    text = (ROOT / "docs" / document).read_text()
    named = re.findall(r"`rewatch ([^`\n]+)`", text) + re.findall(r"^rewatch (.+?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(named) > 5
    for line in named:
        command = COMMANDS
        words = line.split(" && ")[0].split()
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        # A group that stands alone, or one that takes an argument itself, is a command as well.
        assert command.name, line
        options = {option for parameter in command.params for option in parameter.opts}
        options |= {o for sub in getattr(command, "commands", {}).values() for p in sub.params for o in p.opts}
        assert {word for word in words if word.startswith("--")} <= options, line
        if hasattr(command, "commands"):
            assert not words or re.search(r"[/:.A-Z]", words[0]), line


def test_links_inside_lead_somewhere() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    headings = {
        re.sub(r"[^a-z -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_completion_and_runbook_know_the_same_kinds() -> None:
    assert set(complete.kinds("")) == kinds()

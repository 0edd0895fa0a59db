"""The documents keep their word: every test and file that they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))))

_NAMED = re.compile(r"`((?:tests|streams|processors|schemas|infra|docs)/[\w./-]+\.(?:py|md|sql|json))(?:::(\w+))?`")
_LINKS = re.compile(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_test_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    missing = [
        f"{file}::{test}" if test else file
        for file, test in _NAMED.findall(text)
        if not (ROOT / file).exists() or (test and f"def {test}(" not in (ROOT / file).read_text())
    ]
    here = (ROOT / document).parent
    missing += [a or b for a, b in _LINKS.findall(text) if not (here / (a or b)).exists()]
    assert missing == []


def test_the_failure_table_names_a_test_in_each_row() -> None:
    text = (ROOT / "docs" / "failures.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) > 30
    assert [row for row in rows if "`tests/" not in row and "`make " not in row] == []


def test_the_threat_table_names_a_test_in_each_row() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    table = text.partition("\n## Threats\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    assert len(rows) > 30
    assert [row for row in rows if "`tests/" not in row.split("|")[3]] == []

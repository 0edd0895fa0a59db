"""The shipped weights are the ones that were measured."""

import hashlib
from pathlib import Path

import pytest

WEIGHTS = Path(__file__).parents[2] / "infra" / "models" / "weights"


def test_every_shipped_file_has_the_digest_that_is_written_down():
    lines = (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    written = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [p for p in WEIGHTS.rglob("*") if p.is_file() and p.name != "SHA256SUMS" and p.suffix != ".md"]
    found = {p.relative_to(WEIGHTS).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert found == written


def test_the_weights_stay_small():
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) < 20e6


@pytest.mark.parametrize("card", ["detector/README.md", "analyst.md"])
def test_a_card_beside_the_weights_says_that_they_guard_nothing(card: str):
    text = (WEIGHTS / card).read_text()
    assert "a toy" in text.splitlines()[0]
    assert "**No security device" in text
    assert "make eval" in text

"""`rewatch sizing`, and docs/sizing.md: its table is the product's arithmetic, its bytes are the product's constants.

That the bytes are those of real footage, `tests/e2e/test_demo.py` holds.
"""

import re
from pathlib import Path

import pytest

from infra import sizing
from infra.cli.sizing import amount
from infra.sizing import Site, size
from streams.claims import INLINE_LIMIT
from tests.infra.cli_kit import answer, invoke

DOC = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text()

SITES = (
    Site(4, 0.2),
    Site(16, 0.5),
    Site(16, 0.5, 113_000),
    Site(64, 1, 113_000),
    Site(500, 2, 113_000),
)


def row(site: Site) -> str:
    """A site as the page's table has it."""
    found = size(site)
    cells = (
        *(site.cameras, f"{site.fps:g}", f"{site.image // 1000} KB", f"{found.frames:,.4g}"),
        *(f"{found.written / 1e6:.2g} MB/s", amount(found.broker), amount(found.store), amount(found.images)),
        *(found.detectors, found.slots, found.partitions),
    )
    return f"| {' | '.join(map(str, cells))} |"


@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_pages_table_is_what_the_arithmetic_says(site: Site) -> None:
    assert row(site) in DOC.splitlines()


def test_the_pages_bytes_are_those_that_the_arithmetic_takes() -> None:
    lines = re.findall(r"^\| `([A-Z_]+)` \| ([\d,]+) \|", DOC, re.MULTILINE)
    told = {name: int(value.replace(",", "")) for name, value in lines}
    assert told == {name: getattr(sizing, name) for name in told}
    assert len(told) == 7


def test_an_image_is_paid_for_where_it_lies() -> None:
    small, large = (size(Site(10, 1, image, windows=0)) for image in (INLINE_LIMIT, INLINE_LIMIT + 1))
    frames = 10 * sizing.DAY_S * 30
    assert (small.images, large.images) == (0, frames * (INLINE_LIMIT + 1))
    assert small.store - large.store == frames * INLINE_LIMIT
    assert small.broker - large.broker > 7 / 30 * frames * INLINE_LIMIT


def test_workers_and_partitions_follow_the_models() -> None:
    quick, slow = (size(Site(500, 2, inference_ms=ms)) for ms in (1, 20))
    assert (quick.detectors, slow.detectors) == (2, 29)
    assert (quick.partitions, slow.partitions) == (32, 64)
    assert size(Site(1, 0.01)).partitions == 16


def test_the_command_says_the_same_and_refuses_nonsense() -> None:
    said = answer("sizing", "--cameras", "16", "--fps", "0.5", "--image-kb", "113")
    assert said == size(Site(16, 0.5, 113_000))._asdict()
    shown = invoke("sizing", "--cameras", "64", "--fps", "1", "--keep-days", "90").output
    assert "64 cameras x 1/s" in shown
    assert "90 days" in shown
    assert invoke("sizing", "--cameras", "0", "--fps", "1").exit_code == 2
    assert invoke("sizing", "--cameras", "1").exit_code == 2

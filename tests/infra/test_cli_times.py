"""Times and spans as people write them."""

from datetime import UTC, datetime

import pytest

from infra.cli.times import moment, seconds

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("30m", datetime(2026, 11, 2, 11, 30, tzinfo=UTC)),
        ("1.5h", datetime(2026, 11, 2, 10, 30, tzinfo=UTC)),
        ("7d", datetime(2026, 10, 26, 12, tzinfo=UTC)),
        (" 2 w", datetime(2026, 10, 19, 12, tzinfo=UTC)),
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T01:00+01:00", datetime(2026, 11, 1, tzinfo=UTC)),
    ],
)
def test_a_moment_is_an_age_or_a_time(text: str, time: datetime) -> None:
    assert moment(text, NOW) == time


@pytest.mark.parametrize("text", ["", "soon", "30", "-1h", "5 y", "99999999w", "9" * 400 + "d"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither an age|before all years"):
        moment(text, NOW)


@pytest.mark.parametrize(("text", "is_"), [("500ms", 0.5), ("1s", 1), ("1.5", 1.5), ("10 m", 600), ("2h", 7200)])
def test_a_span_is_a_number_and_a_unit(text: str, is_: float) -> None:
    assert seconds(text) == is_


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1 year"])
def test_what_is_no_span_names_some(text: str) -> None:
    with pytest.raises(ValueError, match="write 500ms, 1s, 10m or 2h"):
        seconds(text)

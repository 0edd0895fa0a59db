"""Times and spans as people write them on the command line."""

import re
from datetime import UTC, datetime, timedelta

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w|)")
_SECONDS = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def seconds(text: str) -> float:
    """A span, `500ms`, `1s`, `10m`, `2h`, in seconds; a number alone is seconds.

    Raises:
        ValueError: it is none.
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError("no time: write 500ms, 1s, 10m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def moment(text: str, now: datetime) -> datetime:
    """A time: an age (`30m`, `12h`, `7d`) or ISO 8601, UTC where it names no offset.

    Raises:
        ValueError: it is neither, or lies before all years.
    """
    if (match := _SPAN.fullmatch(text.strip())) and match[2]:
        try:
            return now - timedelta(seconds=seconds(text))
        except OverflowError:
            raise ValueError("that is before all years") from None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("neither an age (30m, 12h, 7d) nor a time (2026-11-02T18:00)") from None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)

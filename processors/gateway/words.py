"""How pages put times, spans, counts and levels into words. Nothing here reads a clock."""

from datetime import UTC, date, datetime
from typing import NamedTuple
from urllib.parse import quote
from zoneinfo import ZoneInfo

from processors.gateway.models import Level

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


class Band(NamedTuple):
    """One level and the scores that it stands for."""

    level: Level
    low: int
    high: int


BANDS = (Band("low", 0, 29), Band("medium", 30, 59), Band("high", 60, 84), Band("critical", 85, 100))
"""As `processors.analyze.core` computes levels from scores; a test holds the two together."""

VERDICTS = {"true_alarm": "true alarm", "false_alarm": "false alarm", "missed": "missed"}

ACTIONS = {
    "none": "no action needed",
    "review": "review it",
    "notify": "tell someone",
    "call": "call for help",
}
"""The actions of the default prompt; another prompt's are shown as they are written."""


def zone(name: str) -> ZoneInfo:
    """A zone by its IANA name; UTC where it is unknown here, as ClickHouse's views do."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown, no name at all, or a folder of names
        return ZoneInfo("UTC")


def day(at: datetime, time_zone: str) -> str:
    """`Saturday 14 March 2026`, by the clock of that zone."""
    local = at.astimezone(zone(time_zone))
    return f"{local:%A} {local.day} {local:%B %Y}"


def clock(at: datetime, time_zone: str) -> str:
    """`23:14:08`, by the clock of that zone."""
    return f"{at.astimezone(zone(time_zone)):%H:%M:%S}"


def local_date(at: datetime, time_zone: str) -> date:
    """The day by the clock of that zone."""
    return at.astimezone(zone(time_zone)).date()


def moment(at: datetime, time_zone: str) -> str:
    """`14 Mar 2026, 23:14:08 CET`."""
    local = at.astimezone(zone(time_zone))
    return f"{local.day} {local:%b %Y, %H:%M:%S} {local:%Z}"


def iso(at: datetime) -> str:
    """For `<time datetime>`: UTC, to the second."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ago(at: datetime, now: datetime) -> str:
    """`12 s ago`; app.js counts on from there in the same words."""
    seconds = int((now - at).total_seconds())
    if seconds < 5:
        return "just now"
    if seconds < _MINUTE:
        return f"{seconds} s ago"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE} min ago"
    if seconds < 2 * _DAY:
        return f"{seconds // _HOUR} h ago"
    return f"{seconds // _DAY} days ago"


def lasting(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        minutes, rest = divmod(whole, _MINUTE)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(whole // _MINUTE, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def milliseconds(value: float | None) -> str:
    """`340 ms`, `2.1 s`, `3 min 5 s`; `-` where it is unknown."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f} ms"
    return f"{value / 1000:.1f} s" if value < 60_000 else lasting(value / 1000)


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 frame`, `1,204 frames`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def action(text: str) -> str:
    """A recommended action for people."""
    return ACTIONS.get(text, text)


def verdict(name: str) -> str:
    """A label's verdict for people."""
    return VERDICTS.get(name, name)


def url_part(text: str) -> str:
    """One segment of a path."""
    return quote(text, safe=":")


def shortened(text: str, most: int = 12) -> str:
    """The beginning of a digest, which is enough to tell it from others."""
    return text if len(text) <= most else f"{text[:most]}…"

"""The report's drawings: small pure functions from figures to inline SVG, escaped, without scripts and styles.

A drawing is 360 units wide, which is about what a phone shows of it in pixels, so that its text can be read there; the
report's style sheet gives the colours, in light and in dark. Each has a title for who cannot see it; what it says in
figures stands beside it as text or as a table.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

WIDE = 360

_BOUNDS = (0, 30, 60, 85, 100)
"""Where levels begin, and the end: as `processors.analyze.answers` computes them."""
LEVELS = ("low", "medium", "high", "critical")

# 500 windows give at most 500 marks; of a hundred thousand, those within 4 points of one another share one.
_MANY_MARKS = 600
_COARSE = 4

_BIN = 5
"""Points in a bar of the distribution: all bounds of levels are multiples of it."""

# A name on the left of a row; what is longer is shortened, and whole in the title.
_NAME_LETTERS = 30


class Moved(NamedTuple):
    """How many windows of one kind (a camera, an hour, a class) changed their level."""

    name: str
    compared: int
    raised: int
    lowered: int


class Share(NamedTuple):
    """A share with its interval, all 0 to 1; `said` is it in words."""

    name: str
    value: float
    low: float
    high: float
    said: str
    kind: str = "after"
    """`before`, `after` or `noise`: how it is marked."""


def scores(pairs: Mapping[tuple[int, int], int], noise: float | None = None) -> Markup:
    """Each window's score before (to the right) and after (up), with the levels' squares on the diagonal.

    Args:
        pairs: windows by score before and after.
        noise: differences up to it are within the noise: the corridor along the diagonal.
    """
    left, top, side = 40, 10, 304
    marks = _merged(pairs)

    def at(before: float, after: float) -> tuple[float, float]:
        return left + side * before / 100, top + side * (1 - after / 100)

    parts = [_tag("rect", x=left, y=top, width=side, height=side, class_="plot")]
    for level, (low, high) in zip(LEVELS, pairwise(_BOUNDS), strict=True):
        x, y = at(low, high)
        size = side * (high - low) / 100
        parts.append(_tag("rect", x=x, y=y, width=size, height=size, class_=f"square square-{level}"))
    if noise:
        corner = (at(0, 0), at(0, noise), at(100 - noise, 100), at(100, 100), at(100, 100 - noise), at(noise, 0))
        parts.append(_tag("path", d="M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in corner) + "Z", class_="corridor"))
    (x0, y0), (x1, y1) = at(0, 0), at(100, 100)
    parts.append(_tag("line", x1=x0, y1=y0, x2=x1, y2=y1, class_="diagonal"))
    for bound in _BOUNDS:
        (x, _), (_, y) = at(bound, 0), at(0, bound)
        parts += [
            _tag("text", bound, x=x, y=top + side + 16, class_="tick middle"),
            _tag("text", bound, x=left - 6, y=y + 4, class_="tick end"),
        ]
        if 0 < bound < 100:
            parts += [
                _tag("line", x1=x, y1=top, x2=x, y2=top + side, class_="bound"),
                _tag("line", x1=left, y1=y, x2=left + side, y2=y, class_="bound"),
            ]
    most = max(marks.values(), default=1)
    for (before, after), count in sorted(marks.items(), key=lambda mark: -mark[1]):
        x, y = at(before, after)
        # By area: four windows at one place are twice as wide as one, the fullest place seven units.
        radius = max(2.6, 7 * math.sqrt(count / most)) if most > 1 else 3.2
        parts.append(_mark(x, y, radius, _way(before, after), f"{before} → {after}: {_windows(count)}"))
    parts += [
        _tag("text", "score before", x=left + side / 2, y=top + side + 34, class_="axis middle"),
        _tag(
            "text",
            "score after",
            x=12,
            y=top + side / 2,
            class_="axis middle",
            transform=f"rotate(-90 12 {_n(top + side / 2)})",
        ),
    ]
    total = sum(pairs.values())
    raised = sum(count for (before, after), count in pairs.items() if after > before)
    lowered = sum(count for (before, after), count in pairs.items() if after < before)
    stayed = total - raised - lowered
    title = f"Scores before and after of {_windows(total)}: {raised} rose, {lowered} fell, {stayed} stayed"
    return _drawing(title, top + side + 42, parts)


def spread(before: Sequence[int], after: Sequence[int]) -> Markup:
    """How scores are spread: bars of five points, those of before upwards, those of after downwards."""
    left, side, tall, middle = 8, 344, 84, 108
    up, down = _bins(before), _bins(after)
    most = max((*up, *down, 1))
    wide = side / len(up)
    parts = []
    for n, (above, below) in enumerate(zip(up, down, strict=True)):
        x, level = left + n * wide, level_of(n * _BIN)
        until = 100 if n == len(up) - 1 else (n + 1) * _BIN - 1
        for count, side_of, y in ((above, "before", middle - tall * above / most), (below, "after", middle + 18)):
            if count:
                title = f"{n * _BIN} to {until}, {side_of}: {_windows(count)}"
                parts.append(
                    _tag(
                        "rect",
                        _tag("title", title),
                        x=x + 1,
                        y=y,
                        width=wide - 2,
                        height=max(1.5, tall * count / most),
                        class_=f"fill-{level} side-{side_of}",
                    )
                )
    parts += [_tag("line", x1=left, y1=y, x2=left + side, y2=y, class_="ground") for y in (middle, middle + 18)]
    parts += [
        _tag("text", bound, x=left + side * bound / 100, y=middle + 13.5, class_=f"tick {_anchor(bound)}")
        for bound in _BOUNDS
    ]
    parts += [
        _tag("text", f"before ({len(before):,})", x=left, y=16, class_="axis"),
        _tag("text", f"after ({len(after):,})", x=left, y=middle + 18 + tall + 16, class_="axis"),
    ]
    title = f"How scores are spread: {_spread_words(before)} before, {_spread_words(after)} after"
    return _drawing(title, middle + 18 + tall + 24, parts)


def moved(rows: Sequence[Moved], what: str) -> Markup:
    """A bar for each row: the share of its windows that changed their level, raised and lowered."""
    each, side = 40, 344
    most = max(((row.raised + row.lowered) / row.compared for row in rows if row.compared), default=0) or 1
    parts: list[Markup] = []
    for n, row in enumerate(rows):
        y = 4 + n * each
        parts += [
            _tag("text", _tag("title", row.name), _shortened(row.name), x=8, y=y + 13, class_="name"),
            _tag("text", _ways(row), x=8 + side, y=y + 13, class_="value end"),
            _tag("rect", x=8, y=y + 19, width=side, height=12, rx=3, class_="rail"),
        ]
        x = 8.0
        for count, way in ((row.raised, "raised"), (row.lowered, "lowered")):
            if count:
                wide = side * count / row.compared / most
                title = f"{row.name}: {count} {way} of {row.compared}"
                parts.append(
                    _tag("rect", _tag("title", title), x=x, y=y + 19, width=wide, height=12, class_=f"way-{way}")
                )
                x += wide
    title = f"Changed levels by {what}: " + ", ".join(f"{r.name} {r.raised + r.lowered} of {r.compared}" for r in rows)
    return _drawing(title, 4 + each * len(rows), parts)


def hours(rows: Sequence[Moved]) -> Markup:
    """A day of 24 columns: windows whose level was raised upwards, lowered downwards. `rows` are the hours 0 to 23."""
    left, side, tall, middle = 8, 344, 56, 76
    wide = side / 24
    most = max((*(row.raised for row in rows), *(row.lowered for row in rows), 1))
    parts: list[Markup] = []
    for n, row in enumerate(rows):
        x = left + n * wide
        for count, way, y in (
            (row.raised, "raised", middle - tall * row.raised / most),
            (row.lowered, "lowered", middle),
        ):
            if count:
                title = f"{n:02d}:00 to {n:02d}:59: {count} {way} of {row.compared}"
                parts.append(
                    _tag(
                        "rect",
                        _tag("title", title),
                        x=x + 1,
                        y=y,
                        width=wide - 2,
                        height=tall * count / most,
                        class_=f"way-{way}",
                    )
                )
        if n % 6 == 0:
            parts.append(_tag("text", f"{n:02d}", x=x, y=middle + tall + 20, class_="tick"))
    parts.append(_tag("line", x1=left, y1=middle, x2=left + side, y2=middle, class_="ground"))
    parts += [
        _tag(
            "text",
            f"↑ raised, {most} at most" if any(r.raised for r in rows) else "none raised",
            x=left,
            y=14,
            class_="axis",
        ),
        _tag(
            "text",
            "lowered ↓" if any(r.lowered for r in rows) else "none lowered",
            x=left + side,
            y=14,
            class_="axis end",
        ),
    ]
    busy = [f"{n:02d}:00 {row.raised + row.lowered}" for n, row in enumerate(rows) if row.raised + row.lowered]
    return _drawing(f"Changed levels by hour of the day: {', '.join(busy) or 'none'}", middle + tall + 26, parts)


def shares(rows: Sequence[Share], what: str, *, whole: bool = False) -> Markup:
    """A dot with its interval for each share; the scale ends at 1 where `whole`, else a little above the highest."""
    each, side = 44, 336
    top = 1.0 if whole else _nice(max((row.high for row in rows), default=0.01))
    parts: list[Markup] = []
    for n, row in enumerate(rows):
        y = 6 + n * each

        def at(value: float) -> float:
            return 12 + side * min(1.0, value / top)

        parts += [
            _tag("text", _tag("title", row.name), _shortened(row.name), x=8, y=y + 12, class_="name"),
            _tag("text", row.said, x=352, y=y + 12, class_="value end"),
            _tag("line", x1=12, y1=y + 26, x2=12 + side, y2=y + 26, class_="rail-line"),
            _tag("line", x1=at(row.low), y1=y + 26, x2=at(row.high), y2=y + 26, class_=f"whisker whisker-{row.kind}"),
            _tag("circle", cx=at(row.value), cy=y + 26, r=5.5, class_=f"dot dot-{row.kind}"),
        ]
    bottom = 6 + each * len(rows)
    for value in (0.0, top / 2, top):
        x = 12 + side * value / top
        parts.append(_tag("text", _percent(value), x=x, y=bottom + 8, class_=f"tick {_anchor(100 * value / top)}"))
    title = f"{what}: " + "; ".join(f"{row.name} {row.said}" for row in rows)
    return _drawing(title, bottom + 14, parts)


def level_of(score: int) -> str:
    """The level of a score."""
    return next(level for level, low in reversed([*zip(LEVELS, _BOUNDS, strict=False)]) if score >= low)


def _merged(pairs: Mapping[tuple[int, int], int]) -> Mapping[tuple[int, int], int]:
    """The pairs as so many marks as can be drawn: near ones together, where there are too many."""
    if len(pairs) <= _MANY_MARKS:
        return pairs
    merged: dict[tuple[int, int], int] = {}
    for (before, after), count in pairs.items():
        place = (_coarse(before), _coarse(after))
        merged[place] = merged.get(place, 0) + count
    return merged


def _coarse(score: int) -> int:
    return min(100, _COARSE * round(score / _COARSE))


def _bins(found: Sequence[int]) -> list[int]:
    bins = [0] * (100 // _BIN)
    for score in found:
        bins[min(score // _BIN, len(bins) - 1)] += 1
    return bins


def _spread_words(found: Sequence[int]) -> str:
    counts = dict.fromkeys(LEVELS, 0)
    for score in found:
        counts[level_of(score)] += 1
    return ", ".join(f"{count} {level}" for level, count in counts.items())


def _way(before: int, after: int) -> str:
    old, new = LEVELS.index(level_of(before)), LEVELS.index(level_of(after))
    return "same" if old == new else "raised" if new > old else "lowered"


def _mark(x: float, y: float, radius: float, way: str, title: str) -> Markup:
    """A shape of its own for each way: a ring, and triangles that point where the level went."""
    if way == "same":
        return _tag("circle", _tag("title", title), cx=x, cy=y, r=radius, class_="way-same")
    up = -1 if way == "raised" else 1
    wide, tall = radius * 1.15, radius * 1.1
    corners = ((x, y + up * tall), (x - wide, y - up * tall * 0.8), (x + wide, y - up * tall * 0.8))
    return _tag(
        "path",
        _tag("title", title),
        d="M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in corners) + "Z",
        class_=f"way-{way}",
    )


def _nice(value: float) -> float:
    """A round share at or above this one."""
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    return next((step for step in steps if step >= value), 1.0)


def _ways(row: Moved) -> str:
    """`3↑ 9↓ of 41`: what the colours say, without them."""
    parts = [f"{count:,}{sign}" for count, sign in ((row.raised, "↑"), (row.lowered, "↓")) if count]
    return f"{' '.join(parts) or '0'} of {row.compared:,}"


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


def _anchor(percent: float) -> str:
    return "start" if percent == 0 else "end" if percent == 100 else "middle"


def _windows(count: int) -> str:
    return f"{count:,} window" + ("" if count == 1 else "s")


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 1] + "…"


def _drawing(title: str, tall: float, parts: Sequence[Markup]) -> Markup:
    return _tag(
        "svg",
        _tag("title", title),
        *parts,
        viewBox=f"0 0 {WIDE} {_n(tall)}",
        role="img",
        class_="chart",
        aria_label=title,
    )


def _n(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def _tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element; every text and attribute is escaped, and `class_` and `aria_label` are written as HTML has them."""
    return Markup("<{}{}>{}</{}>").format(
        name,
        Markup("").join(_attributes(attributes)),
        Markup("").join(escape(part) for part in content),
        name,
    )


def _attributes(attributes: Mapping[str, object]) -> Iterator[Markup]:
    for name, value in attributes.items():
        text = _n(value) if isinstance(value, float) else value
        yield Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-") if name != "viewBox" else name, text)

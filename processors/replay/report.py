"""The report of a comparison: one HTML file that stands alone, for people who decide on the strength of it.

Pure: records in, a page out. It loads nothing, runs nothing and asks nobody: pictures are inside it, and its content
security policy refuses the rest. Whatever cameras, models and people wrote is escaped. However many windows were
compared, it stays below `MOST_BYTES`: what is not in it is counted, and it says where to find it.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from processors.replay import charts
from processors.replay.comparison import LEVELS, Comparison, Estimate, Flip, Regrouping, Side, Slice, Verdict
from processors.replay.conclusion import Tone, conclude, counted, percent
from processors.replay.statistics import wilson
from schemas.records import Record

MOST_BYTES = 5_000_000
"""A report is at most so long: mail takes it as an attachment, a phone opens it at once."""
PICTURED = 100
"""Flips that are shown whole, with a picture, at the most: who looks at more of them has long made up his mind."""
LISTED = 400
"""Flips that get a line in a table, beyond those: at some 300 bytes each."""

# Whole where a model wrote as it was asked to; what is longer ran away.
_SUMMARY, _REASONING, _FACTOR, _FACTORS = 600, 2_400, 160, 12
_NAME = 120
# Of all prompts' differences, of a plan, of a list: more is nobody's reading.
_DIFF_LETTERS, _PLAN_LETTERS = 150_000, 60_000
# A line up to which its words are compared: that takes the square of its length, and 4,000 letters take 50 ms.
_COMPARED = 4_000
_ROWS = 60
# Cameras or classes in a drawing; the table beside it has the others.
_BARS = 8
# A monospaced letter is 0.6 em at 11 px; a pill has 4 px of air on either side.
_LETTER_PX, _AIR_PX, _PILL_PX = 6.6, 4.0, 16.0
# A pill that would leave the picture hangs from the box's other edge.
_RIGHT, _TOP = 0.6, 0.1

# Words, and what stands between them.
_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
# Lines less alike than this are other lines.
_ALIKE = 0.4

_KINDS = {
    "alarm_lost": ("Alarms that would be gone", "no alarm any more"),
    "alarm_new": ("New alarms", "a new alarm"),
    "raised": ("Raised, without an alarm coming or going", "raised"),
    "lowered": ("Lowered, without an alarm coming or going", "lowered"),
}
_LABELS = {"true_alarm": "true alarm", "false_alarm": "false alarm", "missed": "missed"}
_ACTIONS = {"none": "no action needed", "review": "review it", "notify": "tell someone", "call": "call for help"}
_TONES: Mapping[Tone, str] = {
    "more": "More than noise",
    "noise": "Not more than noise",
    "unknown": "Noise not known",
    "same": "No change",
    "exact": "Reproduced",
    "failed": "Strict check failed",
}


class Told(Record, frozen=True, kw_only=True):
    """What else a verdict says: what lists leave out."""

    reasoning: str = ""
    risk_factors: tuple[str, ...] = ()


class SeenBox(Record, frozen=True, kw_only=True):
    """One box of a frame, as shares of its width and height, 0 to 1."""

    label: str
    score: float
    x: float
    y: float
    width: float
    height: float


class Picture(Record, frozen=True, kw_only=True):
    """The frame of a window that tells the most of it."""

    jpeg: bytes = b""
    """A small picture; empty: there is none, and `missing` says why."""
    missing: str = ""
    width: int = 320
    """Pixels of the small picture."""
    height: int = 180
    boxes: tuple[SeenBox, ...] = ()
    """Those that matter."""
    n: int = 1
    """Its place in the window, from 1."""
    of: int = 1
    at: int | None = None
    """Event time, milliseconds since the Unix epoch."""
    seen_by: str = ""
    """Whose boxes they are, where it is not what was recorded."""


class Part(Record, frozen=True, kw_only=True):
    """What differs in one file of a prompt version: lines with their mark, `+`, `-`, a blank or `@`."""

    file: str
    lines: tuple[tuple[str, str], ...]


class PromptChange(Record, frozen=True, kw_only=True):
    """Two prompt versions that judged the same windows."""

    before: str
    """Name and digest, for people."""
    after: str
    windows: int
    parts: tuple[Part, ...] = ()
    missing: str = ""
    """Why it cannot be shown; empty where it can."""


class Life(Record, frozen=True, kw_only=True):
    """A replay as its records tell it."""

    replay_id: str
    name: str
    role: str
    """Side A, side B or noise."""
    state: str
    detail: str = ""
    plan: str = ""
    """JSON."""
    planned_at: int | None = None
    """Milliseconds since the Unix epoch."""
    updated_at: int | None = None
    first_at: int | None = None
    """When the first and the last of its verdicts were made."""
    last_at: int | None = None
    calls: int = 0
    """Verdicts for which a model was asked."""
    reused: int = 0
    conditions: Mapping[str, str] = {}
    """Conditions under which it was asked, by name."""


class LeftOut(Record, frozen=True, kw_only=True):
    """Something that is not in the comparison, by name, and why."""

    what: str
    count: int
    why: str
    names: tuple[str, ...] = ()
    """Some of them."""


class Report(Record, frozen=True, kw_only=True):
    """All that a page is made of."""

    comparison: Comparison
    told: Mapping[str, Told] = {}
    """By event id, of the flips that are shown."""
    pictures: Mapping[str, Picture] = {}
    """By event id of side A, of the flips that are shown."""
    prompts: tuple[PromptChange, ...] = ()
    lives: tuple[Life, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    made_at: int
    """Milliseconds since the Unix epoch."""
    time_zone: str = "UTC"
    """Where whoever reads it is: of times that are no camera's."""
    version: str = ""


class _DrawnBox(NamedTuple):
    """A box over a picture: percentages, and its pill in pixels from the box's corner."""

    x: str
    y: str
    width: str
    height: str
    pill_at: str
    pill_x: float
    pill_y: float
    pill_width: float
    text: str


class _Group(NamedTuple):
    """Flips of one kind, the worst first, numbered through the page."""

    kind: str
    title: str
    flips: list[tuple[int, Flip]]


class _Figure(NamedTuple):
    """A drawing with its heading and what is to be said of it."""

    title: str
    drawing: Markup
    text: str = ""
    legend: str = ""


def render(report: Report, *, pictured: int = PICTURED, most_bytes: int = MOST_BYTES) -> str:
    """The page. Where it would be longer than `most_bytes`, fewer flips are shown whole."""
    while True:
        page = _page(report, pictured)
        if len(page.encode()) <= most_bytes or not pictured:
            return page
        pictured //= 2


def _page(report: Report, pictured: int) -> str:
    found = report.comparison
    shown, listed = found.flips[:pictured], found.flips[pictured : pictured + LISTED]
    said = conclude(found)
    style = _style()
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            found=found,
            said=said,
            tone_name=_TONES[said.tone],
            changed=_changed(found),
            style=Markup(style),  # noqa: S704 (our own file)
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            groups=_grouped(shown),
            listed=listed,
            first_listed=len(shown) + 1,
            more=len(found.flips) - len(shown) - len(listed),
            figures=list(_figures(found)),
            transitions=_transitions(found),
            accuracy=_accuracy(found),
            regrouped=list(_regrouped(found)),
            prompts=list(_told_apart(report.prompts)),
            sides=_sides(report),
            slices=[(what, rows[:_ROWS], len(rows) - _ROWS) for what, rows in _slices(found) if rows],
            rows_most=_ROWS,
            levels=LEVELS,
        )
    )


def _changed(found: Comparison) -> str:
    """What is different on side B; empty where nothing was meant to be."""
    change = found.b.change
    before, after = next(iter(found.a.prompts), ""), next(iter(found.b.prompts), "")
    if not change or before == after or not before:
        return change
    return f"{change}, in place of {found.a.prompt_names.get(before) or before[:12]}"


def _grouped(flips: Sequence[Flip]) -> list[_Group]:
    """By kind, in the order in which they come: the worst first."""
    groups: dict[str, _Group] = {}
    for number, flip in enumerate(flips, 1):
        groups.setdefault(flip.kind, _Group(flip.kind, _KINDS[flip.kind][0], [])).flips.append((number, flip))
    return list(groups.values())


def _figures(found: Comparison) -> Iterator[_Figure]:
    if not found.compared:
        return
    noise = found.noise
    yield _Figure(
        "Does it stand out from the noise?",
        charts.shares(list(_flip_shares(found)), "Share of windows that changed their level"),
        "Share of windows that changed their level, with its 95 % interval."
        + ("" if noise is not None else " Without a baseline there is nothing to hold it against."),
    )
    pairs = Counter((pair.a.risk_score, pair.b.risk_score) for pair in found.pairing.pairs)
    yield _Figure(
        "Each window's score, before and after",
        charts.scores(pairs, noise.band if noise is not None else None),
        "On the line nothing moved."
        + (f" In the shaded corridor scores moved by no more than the noise, {noise.band:g} points." if noise else ""),
        legend="ways",
    )
    before = [pair.a.risk_score for pair in found.pairing.pairs]
    after = [pair.b.risk_score for pair in found.pairing.pairs]
    mean = found.deltas.mean or 0.0
    yield _Figure(
        "How the scores are spread",
        charts.spread(before, after),
        f"Windows by score; a mean move of {mean:+.1f} points, {found.deltas.mean_abs or 0.0:.1f} in size.",
        legend="levels",
    )
    if found.flips:
        yield _Figure(
            "Changed levels by camera",
            charts.moved([_bar(row) for row in _worst(found.by_camera)], "camera"),
            _beyond(found.by_camera, "camera"),
            legend="ways",
        )
        by_hour = {row.name: row for row in found.by_hour}
        day = [by_hour.get(f"{hour:02d}") for hour in range(24)]
        yield _Figure(
            "Changed levels by hour of the day",
            charts.hours([_bar(row) if row else charts.Moved(f"{n:02d}", 0, 0, 0) for n, row in enumerate(day)]),
            "By the clock where the camera is.",
            legend="ways",
        )
        if found.by_class:
            yield _Figure(
                "Changed levels by what was seen",
                charts.moved([_bar(row) for row in _worst(found.by_class)], "class"),
                "A window counts for each class in it. " + _beyond(found.by_class, "class"),
                legend="ways",
            )


def _flip_shares(found: Comparison) -> Iterator[charts.Share]:
    flips, compared = len(found.flips), found.compared
    if found.noise is None or not found.noise.itself:
        low, high = wilson(flips / compared, compared)
        yield charts.Share(
            "this change", flips / compared, low, high, f"{percent(flips / compared)}, {flips:,} of {compared:,}"
        )
    if (noise := found.noise) is not None and noise.compared:
        low, high = wilson(noise.floor, noise.compared)
        said = f"{percent(noise.floor)}, {noise.flips:,} of {noise.compared:,}"
        yield charts.Share("the same again (noise)", noise.floor, low, high, said, "noise")


def _bar(row: Slice) -> charts.Moved:
    raised, lowered = row.raised + row.alarms_new, row.lowered + row.alarms_lost
    return charts.Moved(_cut(row.title or row.name, _NAME), row.compared, raised, lowered)


def _worst(rows: Sequence[Slice]) -> list[Slice]:
    return sorted((row for row in rows if row.compared), key=lambda row: (-row.flips, -row.compared, row.name))[:_BARS]


def _beyond(rows: Sequence[Slice], one: str) -> str:
    """What a drawing of rows leaves open: how long the longest bar is, and how many rows are not in it."""
    longest = max((row.flip_share for row in rows), default=0.0)
    text = f"Shares of the windows of each {one}; the longest bar is {percent(longest)}."
    return text + (f" {len(rows) - _BARS:,} more in the tables below." if len(rows) > _BARS else "")


def _transitions(found: Comparison) -> list[tuple[str, list[tuple[str, int, int]], int]]:
    """Rows of the matrix: level before, then by level after its count and how dark it is, 0 to 5; and the sum."""
    table = [(a, [(b, found.transitions.get(a, {}).get(b, 0)) for b in LEVELS]) for a in LEVELS]
    rows = []
    for level, counts in table:
        total = sum(count for _, count in counts)
        rows.append((level, [(b, n, -(-5 * n // total) if total else 0) for b, n in counts], total))
    return rows


def _accuracy(found: Comparison) -> list[tuple[str, str, Estimate, Estimate, Markup]]:
    """Precision, recall and false-alarm rate of both sides; none where no label tells."""
    a, b = found.labels.a, found.labels.b
    rows = (
        ("Precision", "of the alarms, how many were right", a.precision, b.precision),
        ("Recall", "of what was worth an alarm, how much got one", a.recall, b.recall),
        ("False-alarm rate", "of what was worth none, how much got one", a.false_alarm_rate, b.false_alarm_rate),
    )
    return [
        (name, what, before, after, charts.shares(list(_estimates(before, after)), name, whole=True))
        for name, what, before, after in rows
        if before.value is not None or after.value is not None
    ]


def _estimates(before: Estimate, after: Estimate) -> Iterator[charts.Share]:
    for name, kind, one in (("before", "before", before), ("after", "after", after)):
        if one.value is not None:
            low, high = one.low if one.low is not None else 0.0, one.high if one.high is not None else 1.0
            said = f"{percent(one.value)} ({100 * low:.0f} to {100 * high:.0f} %), {counted(one.count, 'label')}"
            yield charts.Share(name, one.value, low, high, said, kind)


_Words = list[tuple[str, bool]]
"""A line in pieces, and whether each is what changed in it."""


def _told_apart(
    changes: Sequence[PromptChange],
) -> Iterator[tuple[PromptChange, list[tuple[Part, list[tuple[str, _Words]], int]], int]]:
    """Each change of prompts with its files' lines in pieces, and how many more there are; and all its lines.

    Lines are shown whole as long as there are letters left for all.
    """
    left = _DIFF_LETTERS
    for change in changes:
        parts = []
        for part in change.parts:
            shown: list[tuple[str, str]] = []
            for sign, text in part.lines:
                if left <= 0:
                    break
                shown.append((sign, _cut(text, left)))
                left -= len(text)
            parts.append((part, list(_in_words(shown)), len(part.lines) - len(shown)))
        yield change, parts, sum(len(part.lines) for part in change.parts)


def _in_words(lines: Sequence[tuple[str, str]]) -> Iterator[tuple[str, _Words]]:
    """Lines of a difference, with the words marked that differ where as many lines come as go."""
    at = 0
    while at < len(lines):
        gone = [text for sign, text in takewhile(lambda line: line[0] == "-", lines[at:])]
        new = [text for sign, text in takewhile(lambda line: line[0] == "+", lines[at + len(gone) :])]
        if not gone and not new:
            yield lines[at][0], [(lines[at][1], False)]
            at += 1
            continue
        if len(gone) == len(new):
            both = [_words(old, now) for old, now in zip(gone, new, strict=True)]
            yield from (("-", old) for old, _ in both)
            yield from (("+", now) for _, now in both)
        else:
            yield from (("-", [(text, False)]) for text in gone)
            yield from (("+", [(text, False)]) for text in new)
        at += len(gone) + len(new)


def _words(old: str, new: str) -> tuple[_Words, _Words]:
    """Both lines in pieces; nothing is marked where they have little in common: then everything would be."""
    if max(len(old), len(new)) > _COMPARED:
        return [(old, False)], [(new, False)]
    before, after = _TOKEN.findall(old), _TOKEN.findall(new)
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return [(old, False)], [(new, False)]
    blocks = matcher.get_opcodes()
    return (
        [("".join(before[i:j]), kind != "equal") for kind, i, j, _, _ in blocks if i < j],
        [("".join(after[i:j]), kind != "equal") for kind, _, _, i, j in blocks if i < j],
    )


def _sides(report: Report) -> list[tuple[str, Side | Life, Life | None]]:
    """What judged: both sides, each with its life where it is a replay, then the baseline."""
    found, lives = report.comparison, {life.replay_id: life for life in report.lives}
    both: list[tuple[str, Side | Life, Life | None]] = [
        (name, side, lives.pop(side.id, None)) for name, side in (("Side A", found.a), ("Side B", found.b))
    ]
    return both + [(life.role, life, life) for life in lives.values()]


def _regrouped(found: Comparison) -> Iterator[tuple[str, str, list[Regrouping], int]]:
    """Lists of windows that are no pair: heading, what it means, the first ones, how many more."""
    paired = found.pairing
    for title, what, groups in (
        ("Split", "one window before, several after", paired.split),
        ("Merged", "several windows before, one after", paired.merged),
        ("Regrouped", "several windows on both sides, which cannot be told apart", paired.regrouped),
        ("Appeared", "windows that only the second side has", tuple(Regrouping(a=(), b=(v,)) for v in paired.appeared)),
        ("Vanished", "windows that only the first side has", tuple(Regrouping(a=(v,), b=()) for v in paired.vanished)),
    ):
        if groups:
            # Alarms first: a window that nobody would have heard of does no harm by going.
            alarms = sorted(groups, key=lambda g: (g.alarm_a == g.alarm_b, not (g.alarm_a or g.alarm_b)))
            yield title, what, alarms[:_ROWS], max(0, len(groups) - _ROWS)


def _slices(found: Comparison) -> tuple[tuple[str, tuple[Slice, ...]], ...]:
    return ("camera", found.by_camera), ("class", found.by_class), ("hour", found.by_hour)


def drawn(picture: Picture) -> Iterator[_DrawnBox]:
    """The picture's boxes as SVG takes them, the surest last, so that they lie on top."""
    for box in sorted(picture.boxes, key=lambda box: box.score):
        # A detector's boxes may stick out of the frame.
        x0, y0 = max(0.0, box.x), max(0.0, box.y)
        x1, y1 = min(1.0, box.x + box.width), min(1.0, box.y + box.height)
        if x1 <= x0 or y1 <= y0:
            continue
        text = f"{_cut(box.label, 24)} {box.score:.2f}"
        wide, left = len(text) * _LETTER_PX + 2 * _AIR_PX, x0 <= _RIGHT
        yield _DrawnBox(
            x=_percent(x0),
            y=_percent(y0),
            width=_percent(x1 - x0),
            height=_percent(y1 - y0),
            pill_at=_percent(x0 if left else x1),
            pill_x=0.0 if left else -round(wide, 1),
            pill_y=0.0 if y0 < _TOP else -_PILL_PX,
            pill_width=round(wide, 1),
            text=text,
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _seen(picture: Picture) -> str:
    """What is in the picture, in words."""
    counts = Counter(_cut(box.label, 24) for box in picture.boxes).most_common(6)
    return ", ".join(label if n == 1 else f"{n} \N{MULTIPLICATION SIGN} {label}" for label, n in counts) or "no boxes"


def _data(jpeg: bytes) -> Markup:
    return Markup("data:image/jpeg;base64,") + base64.b64encode(jpeg).decode()


def _cut(text: str, most: int) -> str:
    """A text that ran away, to where nobody reads on; of a long one it says how much is missing."""
    if len(text) <= most:
        return text
    return f"{text[:most]}… ({len(text) - most:,} letters more)" if most > _NAME else f"{text[: most - 1]}…"


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown, no name at all, or a folder of names
        return ZoneInfo("UTC")


def _moment(at: int | None, time_zone: str) -> str:
    """`14 Mar 2026, 23:14:08 CET`; a dash for none."""
    if at is None:
        return "-"
    local = datetime.fromtimestamp(at / 1000, UTC).astimezone(_zone(time_zone))
    return f"{local.day} {local:%b %Y, %H:%M:%S} {local:%Z}"


def _iso(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _pretty(text: str) -> str:
    """JSON for people; what is none as it is."""
    try:
        return _cut(json.dumps(json.loads(text), indent=2, ensure_ascii=False), _PLAN_LETTERS)
    except (ValueError, RecursionError):
        return _cut(text, _PLAN_LETTERS)


def _signed(delta: int) -> str:
    """`+12`, `-7` with a minus as wide as the plus, `±0`."""
    return f"+{delta}" if delta > 0 else f"\N{MINUS SIGN}{-delta}" if delta else "±0"


def _named(verdict: Verdict) -> str:
    return _cut(verdict.camera_name or verdict.camera_id, _NAME)


@lru_cache(maxsize=1)
def _style() -> str:
    return (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    plain: Mapping[str, Any] = {
        "action": lambda text: _ACTIONS.get(text, _cut(text, _NAME)),
        "counted": counted,
        "cut": _cut,
        "data": _data,
        "drawn": drawn,
        "factors": lambda found: [_cut(factor, _FACTOR) for factor in found[:_FACTORS]],
        "iso": _iso,
        "label": lambda verdict: _LABELS.get(verdict, verdict),
        "moment": _moment,
        "named": _named,
        "percent": percent,
        "pretty": _pretty,
        "reasoning": lambda text: _cut(text, _REASONING),
        "seen": _seen,
        "signed": _signed,
        "summary": lambda text: _cut(text, _SUMMARY),
        "what_kind": lambda kind: _KINDS[kind][1],
    }
    made.filters |= plain
    made.globals |= {"empty": Told()}
    return made

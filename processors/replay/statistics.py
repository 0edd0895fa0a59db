"""The figures of a comparison: flips and their harm, spreads, slices, what labels say, and the noise. Pure.

Quantiles are interpolated linearly between order statistics (type 7 of Hyndman and Fan, "Sample quantiles in
statistical packages", The American Statistician 50, 1996): what numpy's `quantile` and ClickHouse's
`quantileExactInclusive` give. Intervals are of 95 %.
"""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from statistics import NormalDist
from zoneinfo import ZoneInfo

from processors.replay.comparison import (
    LEVELS,
    Accuracy,
    Bin,
    Comparison,
    Coverage,
    Estimate,
    Flip,
    FlipKind,
    Labelled,
    LabelVerdict,
    Noise,
    Pair,
    Pairing,
    Side,
    Slice,
    Spread,
    Strict,
    Verdict,
)
from schemas.records import Record

_Z = NormalDist().inv_cdf(0.975)
"""Standard normal deviate of a two-sided interval of 95 %."""

# A bar a decade of the score: 21 for differences (-100 to 109), 10 for scores, of which 100 joins the nineties.
_BAR = 10

NO_CLASS = "none"
"""The class of windows in which no box that matters is known."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR_MS = 3_600_000


class GivenLabel(Record, frozen=True, kw_only=True):
    """What a person said of an event, or of a span of a camera's time."""

    label_id: str
    camera_id: str
    started_at: int
    ended_at: int
    verdict: LabelVerdict
    event_id: str | None = None
    frame_ids: tuple[str, ...] = ()
    """Frames of the event that it was given on; empty where it was given on none, or that is not known any more."""
    labelled_at: int
    chance: float = 0.0
    """Probability with which a session chose it; 0: unknown."""

    @property
    def known_chance(self) -> float | None:
        """The probability where it is one."""
        return self.chance if 0 < self.chance <= 1 else None

    @property
    def worth_an_alarm(self) -> bool:
        """Whether there was something: a true alarm, or what was missed."""
        return self.verdict != "false_alarm"


# --- spreads ---------------------------------------------------------------------------------------------------------


def quantile(ordered: Sequence[int], share: float) -> float:
    """The quantile of whole numbers in ascending order, at least one; see the module for the kind."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Iterable[int], least: int, most: int) -> Spread:
    """How values are spread, with bars of 10 from `least` on; what lies outside is in the first or the last bar."""
    ordered = sorted(values)
    starts = range(least, most, _BAR)
    bars = Counter(min(max((value - least) // _BAR, 0), len(starts) - 1) for value in ordered)
    histogram = tuple(
        Bin(least=start, most=most if start == starts[-1] else start + _BAR - 1, count=bars[index])
        for index, start in enumerate(starts)
    )
    if not ordered:
        return Spread(histogram=histogram)
    return Spread(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        mean_abs=sum(map(abs, ordered)) / len(ordered),
        minimum=ordered[0],
        p05=quantile(ordered, 0.05),
        p25=quantile(ordered, 0.25),
        median=quantile(ordered, 0.5),
        p75=quantile(ordered, 0.75),
        p95=quantile(ordered, 0.95),
        maximum=ordered[-1],
        histogram=histogram,
    )


def deltas(pairs: Iterable[Pair]) -> Spread:
    """The score differences; the bar from 0 on holds those that stayed the same."""
    return spread((pair.delta for pair in pairs), -100, 100)


def scores(verdicts: Iterable[Verdict]) -> Spread:
    """The scores."""
    return spread((verdict.risk_score for verdict in verdicts), 0, 100)


# --- slices ----------------------------------------------------------------------------------------------------------


def transitions(pairs: Iterable[Pair]) -> dict[str, dict[str, int]]:
    """How many pairs went from which level to which."""
    found = {level: dict.fromkeys(LEVELS, 0) for level in LEVELS}
    for pair in pairs:
        row = found.setdefault(pair.a.risk_level, dict.fromkeys(LEVELS, 0))
        row[pair.b.risk_level] = row.get(pair.b.risk_level, 0) + 1
    return found


def by_camera(pairs: Iterable[Pair]) -> tuple[Slice, ...]:
    """Camera by camera, those with the most flips first."""
    titles: dict[str, str] = {}

    def camera(pair: Pair) -> tuple[str, ...]:
        titles[pair.a.camera_id] = pair.a.camera_name or pair.a.camera_id
        return (pair.a.camera_id,)

    found = _slices(pairs, camera, titles)
    return tuple(sorted(found, key=lambda one: (-one.flips, -one.compared, one.name)))


def by_hour(pairs: Iterable[Pair]) -> tuple[Slice, ...]:
    """Hour by hour of the day where the camera is, from 00 on; hours without a pair are left out."""
    return tuple(sorted(_slices(pairs, lambda pair: (f"{hour(pair.a):02d}",)), key=lambda one: one.name))


def by_class(pairs: Iterable[Pair]) -> tuple[Slice, ...]:
    """Class by class of what was seen; a pair with several counts for each, so they add up to more than there are."""
    found = _slices(pairs, lambda pair: sorted({*pair.a.classes, *pair.b.classes}) or (NO_CLASS,))
    return tuple(sorted(found, key=lambda one: (-one.compared, one.name)))


def hour(verdict: Verdict) -> int:
    """The hour of the day in which the window began, by the clock where the camera is; UTC where the zone is none."""
    try:
        at = _EPOCH + timedelta(milliseconds=verdict.started_at)
        return at.astimezone(_zone(verdict.time_zone)).hour
    except OverflowError:  # before or behind all years
        return verdict.started_at // _HOUR_MS % 24


@cache
def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown; no name of a zone; a directory of them
        return ZoneInfo("UTC")


def _slices(
    pairs: Iterable[Pair], names: Callable[[Pair], Iterable[str]], titles: Mapping[str, str] | None = None
) -> list[Slice]:
    parts: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        for name in names(pair):
            parts[name].append(pair)
    return [_slice(name, (titles or {}).get(name, name), part) for name, part in parts.items()]


def _slice(name: str, title: str, pairs: Sequence[Pair]) -> Slice:
    kinds = Counter(kind(pair) for pair in pairs if pair.flipped)
    return Slice(
        name=name,
        title=title,
        compared=len(pairs),
        flips=kinds.total(),
        alarms_a=sum(pair.a.alarm for pair in pairs),
        alarms_b=sum(pair.b.alarm for pair in pairs),
        alarms_lost=kinds["alarm_lost"],
        alarms_new=kinds["alarm_new"],
        raised=kinds["raised"],
        lowered=kinds["lowered"],
        mean_delta=sum(pair.delta for pair in pairs) / len(pairs),
    )


# --- flips -----------------------------------------------------------------------------------------------------------


def kind(pair: Pair) -> FlipKind:
    """What became of the window: the alarm was lost or is new, or the level went up or down beside that."""
    if pair.a.alarm != pair.b.alarm:
        return "alarm_lost" if pair.a.alarm else "alarm_new"
    return "raised" if _rank(pair.b) > _rank(pair.a) else "lowered"


def _rank(verdict: Verdict) -> tuple[int, int]:
    level = verdict.risk_level
    return LEVELS.index(level) if level in LEVELS else -1, verdict.risk_score


def compared(
    paired: Pairing,
    labels: Sequence[GivenLabel],
    measured: Noise | None,
    *,
    a: Side,
    b: Side,
    coverage: Coverage,
    strict: Strict | None = None,
    notes: tuple[str, ...] = (),
) -> Comparison:
    """Every figure of two sides whose windows are paired; what figures do not tell is given."""
    pairs = paired.pairs
    found = flips(pairs, labels, None if measured is None else measured.band)
    return Comparison(
        a=a,
        b=b,
        coverage=coverage,
        pairing=paired,
        flips=found,
        deltas=deltas(pairs),
        scores_a=scores(pair.a for pair in pairs),
        scores_b=scores(pair.b for pair in pairs),
        transitions=transitions(pairs),
        by_camera=by_camera(pairs),
        by_hour=by_hour(pairs),
        by_class=by_class(pairs),
        labels=labelled(paired, labels),
        noise=measured,
        p_value=p_value(len(found), len(pairs), measured),
        strict=strict,
        notes=notes,
    )


def flips(pairs: Iterable[Pair], labels: Sequence[GivenLabel], band: float | None) -> tuple[Flip, ...]:
    """The pairs whose level is another, by harm, then by how far the score moved.

    Args:
        pairs: any.
        labels: what people said.
        band: how far the noise moves a score; None where that is not known.
    """
    flipped = [pair for pair in pairs if pair.flipped]
    said: list[list[GivenLabel]] = [[] for _ in flipped]
    for side in ([pair.a for pair in flipped], [pair.b for pair in flipped]):
        for label, places in zip(labels, applied(labels, side), strict=True):
            for place in places:
                said[place].append(label)
    found = [_flip(pair, newest_of(about), band) for pair, about in zip(flipped, said, strict=True)]
    return tuple(sorted(found, key=_by_harm))


def newest_of(labels: Iterable[GivenLabel]) -> GivenLabel | None:
    """The label that was given last."""
    return max(labels, key=lambda label: (label.labelled_at, label.label_id), default=None)


def _flip(pair: Pair, label: GivenLabel | None, band: float | None) -> Flip:
    what = kind(pair)
    harm: int
    match what:
        case "alarm_lost":
            harm = 0 if label is not None and label.worth_an_alarm else 1
        case "alarm_new":
            harm = 2 if label is not None and not label.worth_an_alarm else 3
        case "raised":
            harm = 4
        case "lowered":
            harm = 5
    return Flip(
        pair=pair,
        kind=what,
        harm=harm,
        label=None if label is None else label.verdict,
        in_noise=None if band is None else abs(pair.delta) <= band,
    )


def _by_harm(flip: Flip) -> tuple[int, int, int, str]:
    return flip.harm, -abs(flip.pair.delta), flip.pair.a.started_at, flip.pair.a.event_id


# --- labels ----------------------------------------------------------------------------------------------------------


def in_force(labels: Iterable[GivenLabel]) -> list[GivenLabel]:
    """The newest of each event, and of each span that was given without one: people change their minds."""
    found: dict[tuple[object, ...], GivenLabel] = {}
    for label in labels:
        about = (label.event_id or "", *(() if label.event_id else (label.camera_id, label.started_at, label.ended_at)))
        newest = newest_of(filter(None, (found.get(about), label)))
        found[about] = newest or label
    return sorted(found.values(), key=lambda label: (label.started_at, label.label_id))


def applied(labels: Sequence[GivenLabel], verdicts: Sequence[Verdict]) -> list[list[int]]:
    """Of each label the places of the verdicts that it applies to, in ascending order.

    A label on an event applies to what shares at least half of the event's frames. What was missed applies to what
    overlaps its span. A label on a span alone applies to what it covers at least half of.
    """
    holding: dict[tuple[str, str], list[int]] = defaultdict(list)
    spans: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    wanted = {(label.camera_id, frame_id) for label in labels for frame_id in label.frame_ids}
    for place, verdict in enumerate(verdicts):
        spans[verdict.camera_id].append((verdict.started_at, verdict.ended_at, place))
        for frame_id in set(verdict.frame_ids):
            if (verdict.camera_id, frame_id) in wanted:
                holding[verdict.camera_id, frame_id].append(place)
    longest = {camera: max(ended - started for started, ended, _ in of) for camera, of in spans.items()}
    for of in spans.values():
        of.sort()

    def by_frames(label: GivenLabel) -> list[int]:
        frames = set(label.frame_ids)
        common = Counter(place for frame_id in frames for place in holding.get((label.camera_id, frame_id), ()))
        return sorted(place for place, shared in common.items() if 2 * shared >= len(frames))

    def by_span(label: GivenLabel) -> list[int]:
        of = spans.get(label.camera_id, [])
        found: list[int] = []
        # None begins so early that it could not reach the label.
        first = bisect_left(of, (label.started_at - longest.get(label.camera_id, 0),))
        for started, ended, place in of[first : bisect_left(of, (label.ended_at + 1,))]:
            common = min(label.ended_at, ended) - max(label.started_at, started)
            if common >= 0 and (label.verdict == "missed" or common * 2 >= ended - started):
                found.append(place)
        return sorted(found)

    return [by_frames(label) if label.frame_ids and label.verdict != "missed" else by_span(label) for label in labels]


def labelled(pairing: Pairing, labels: Iterable[GivenLabel]) -> Labelled:
    """What the labels say of both sides.

    A label on an event counts where it applies to a verdict of either side. Every label of something missed counts:
    give only those within what is compared. Each label counts once, however many windows it applies to: there is an
    alarm on it where one of them has one. Without a window there is no alarm.
    """
    side_a, side_b = sides(pairing)
    given = in_force(labels)
    about_a, about_b = applied(given, side_a), applied(given, side_b)
    counts = [bool(a or b or label.verdict == "missed") for label, a, b in zip(given, about_a, about_b, strict=True)]
    counted = [label for label, counting in zip(given, counts, strict=True) if counting]
    of_a = [places for places, counting in zip(about_a, counts, strict=True) if counting]
    of_b = [places for places, counting in zip(about_b, counts, strict=True) if counting]
    verdicts = Counter(label.verdict for label in counted)
    windows = _windows(pairing)
    told = {id(side_a[place]) for places in of_a for place in places}
    told |= {id(side_b[place]) for places in of_b for place in places}
    return Labelled(
        labels=len(counted),
        true_alarms=verdicts["true_alarm"],
        false_alarms=verdicts["false_alarm"],
        missed=verdicts["missed"],
        known_chance=sum(label.known_chance is not None for label in counted),
        events=len(windows),
        labelled_events=sum(any(id(verdict) in told for verdict in window) for window in windows),
        a=_accuracy(counted, of_a, side_a),
        b=_accuracy(counted, of_b, side_b),
    )


def sides(pairing: Pairing) -> tuple[list[Verdict], list[Verdict]]:
    """All verdicts of side A, and all of side B."""
    groups = (*pairing.split, *pairing.merged, *pairing.regrouped)
    return (
        [*(pair.a for pair in pairing.pairs), *(one for group in groups for one in group.a), *pairing.vanished],
        [*(pair.b for pair in pairing.pairs), *(one for group in groups for one in group.b), *pairing.appeared],
    )


def _windows(pairing: Pairing) -> list[tuple[Verdict, ...]]:
    groups = (*pairing.split, *pairing.merged, *pairing.regrouped)
    return [
        *((pair.a, pair.b) for pair in pairing.pairs),
        *((*group.a, *group.b) for group in groups),
        *((verdict,) for verdict in (*pairing.appeared, *pairing.vanished)),
    ]


def _accuracy(labels: Sequence[GivenLabel], places: Sequence[Sequence[int]], verdicts: Sequence[Verdict]) -> Accuracy:
    cells: dict[tuple[bool, bool], list[GivenLabel]] = defaultdict(list)
    for label, of in zip(labels, places, strict=True):
        cells[label.worth_an_alarm, any(verdicts[place].alarm for place in of)].append(label)
    told = {place for of in places for place in of}
    right, lost, wrong, quiet = (cells[cell] for cell in ((True, True), (True, False), (False, True), (False, False)))
    return Accuracy(
        true_positives=len(right),
        false_negatives=len(lost),
        false_positives=len(wrong),
        true_negatives=len(quiet),
        precision=estimate(right, wrong),
        recall=estimate(right, lost),
        false_alarm_rate=estimate(wrong, quiet),
        labelled=len(told),
        verdicts=len(verdicts),
        labelled_alarms=sum(verdicts[place].alarm for place in told),
        alarms=sum(verdict.alarm for verdict in verdicts),
    )


def estimate(hits: Sequence[GivenLabel], others: Sequence[GivenLabel]) -> Estimate:
    """The share of hits among both, with its interval.

    Where it is known of every label with which probability it was chosen, each stands for 1 / chance events: Hajek's
    ratio (Särndal, Swensson and Wretman, "Model Assisted Survey Sampling", 1992, 5.7), which holds for all events that
    could have been chosen. Else each stands for itself, and the share is that of what was labelled.

    The interval is Wilson's with the effective sample size (sum w)^2 / sum w^2 of Kish ("Survey Sampling", 1965) for n,
    as compared in Franco, Little, Louis and Slud, "Comparative study of confidence intervals for proportions in
    complex sample surveys", J. of Survey Statistics and Methodology 7, 2019.
    """
    chances = [label.known_chance for label in (*hits, *others)]
    weighted = bool(chances) and None not in chances
    weights = [1 / chance if weighted and chance is not None else 1.0 for chance in chances]
    total = sum(weights)
    if not weights:
        return Estimate(value=None, low=None, high=None, count=0, effective=0.0, weighted=False)
    # Weights of at most 1 keep squares of the smallest chances within what a float holds.
    largest = max(weights)
    effective = (total / largest) ** 2 / sum((weight / largest) ** 2 for weight in weights)
    share = min(sum(weights[: len(hits)]) / total, 1.0)
    low, high = wilson(share, effective)
    return Estimate(value=share, low=low, high=high, count=len(weights), effective=effective, weighted=weighted)


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of 95 % for a share of `count` trials, which need not be a whole number.

    Wilson, "Probable inference, the law of succession, and statistical inference", J. of the American Statistical
    Association 22, 1927. scipy's `binomtest(...).proportion_ci(method="wilson")` gives the same, of whole numbers.
    """
    square = _Z**2 / count
    middle = share + square / 2
    around = math.sqrt(square * (share * (1 - share) + square / 4))
    return max((middle - around) / (1 + square), 0.0), min((middle + around) / (1 + square), 1.0)


# --- noise -----------------------------------------------------------------------------------------------------------


def noise(pairs: Sequence[Pair], replay_id: str, name: str, *, itself: bool = False) -> Noise | None:
    """What a baseline measured: its pairs with what was live. None where there are none."""
    if not pairs:
        return None
    flipped = sum(pair.flipped for pair in pairs)
    return Noise(
        replay_id=replay_id,
        name=name,
        compared=len(pairs),
        flips=flipped,
        identical=sum(pair.identical for pair in pairs),
        floor=flipped / len(pairs),
        band=quantile(sorted(abs(pair.delta) for pair in pairs), 0.95),
        itself=itself,
    )


def p_value(flipped: int, compared: int, measured: Noise | None) -> float | None:
    """Fisher's exact test, two-sided: are the flips more, or fewer, than the noise makes them?

    Fisher, "The Design of Experiments", 1935; two-sided as scipy's `fisher_exact` has it: tables as likely as this one
    or less. It takes windows for independent of one another.
    """
    if measured is None or not compared:
        return None
    from scipy.stats import fisher_exact  # noqa: PLC0415 (it takes a second, and not every comparison needs it)

    table = [[flipped, compared - flipped], [measured.flips, measured.compared - measured.flips]]
    return min(float(fisher_exact(table).pvalue), 1.0)

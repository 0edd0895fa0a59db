"""What a comparison comes to, in sentences for people: what changed, whether it is more than noise, what speaks for it.

Pure. No sentence says more than the figures do: what no baseline measured is not called noise or more than it, and what
nobody labelled is not called better or worse.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from processors.replay.comparison import Comparison, Flip, Noise, Strict

SIGNIFICANT = 0.05
"""From which p-value down a difference is called more than noise: the customary one; the value itself stands beside."""

Tone = Literal["more", "noise", "unknown", "same", "exact", "failed"]
"""More than noise; not to be told from it; not known; no change at all; strictly reproduced; strictly not."""


class Alarms(NamedTuple):
    """Alarms that one side has and the other has not, by what people say of them."""

    of_true: int
    """Labelled a true alarm, or missed."""
    of_false: int
    unlabelled: int
    in_noise: int
    """Flips among them whose score moved no further than the noise moves scores."""
    of_windows: int
    """Not flips: they came or went with their windows, which only one side has; nobody's label is asked there."""

    @property
    def flips(self) -> int:
        """Those on windows that both sides have."""
        return self.of_true + self.of_false + self.unlabelled

    @property
    def all(self) -> int:
        """Those on any window."""
        return self.flips + self.of_windows


class Conclusion(NamedTuple):
    """What there is to say."""

    headline: str
    """What changed, in one sentence."""
    tone: Tone
    verdict: str
    """Whether it is more than noise, in one sentence."""
    because: str
    """The figures behind it; empty where there are none."""
    gone: Alarms
    """Alarms of side A that side B would not have raised."""
    new: Alarms
    """Alarms that side B raises and side A did not."""
    doubts: tuple[str, ...]
    """What keeps it from being the whole truth, a sentence each."""


def conclude(found: Comparison) -> Conclusion:
    """The comparison in sentences."""
    tone, verdict, because = _strictly(found.strict) if found.strict is not None else _noise(found)
    gone = _alarms(found, "alarm_lost", of_windows=_only(found, of_a=True))
    new = _alarms(found, "alarm_new", of_windows=_only(found, of_a=False))
    return Conclusion(_headline(found), tone, verdict, because, gone, new, tuple(_doubts(found, gone, new)))


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 window`, `1,204 windows`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def percent(share: float) -> str:
    """`7.4 %`; two digits after the point below one percent."""
    return f"{100 * share:.{2 if 0 < share < 0.01 else 1}f} %"


def chance(p_value: float) -> str:
    """`3 in 1,000`: how often chance alone would do it."""
    if p_value >= 0.95:
        return "nearly all"
    if p_value >= 0.095:
        return f"{round(10 * p_value)} in 10"
    for whole in (100, 1_000, 10_000):
        if p_value * whole >= 0.95:
            return f"{round(p_value * whole)} in {whole:,}"
    return "less than 1 in 10,000"


def _p(p_value: float) -> str:
    return "< 0.0001" if p_value < 0.0001 else f"= {p_value:.2g}"


def _headline(found: Comparison) -> str:
    flips, compared = len(found.flips), found.compared
    if not compared:
        return "Nothing could be compared: the two sides have no window in common."
    if not flips and found.identical == compared:
        return f"All of {counted(compared, 'window')} got the same answer, byte for byte."
    if not flips:
        return f"None of {counted(compared, 'window')} changed its level."
    return f"{flips:,} of {counted(compared, 'window')} changed {'its' if flips == 1 else 'their'} level."


def _noise(found: Comparison) -> tuple[Tone, str, str]:
    noise, flips, compared = found.noise, len(found.flips), found.compared
    if not compared:
        return "unknown", "There is nothing to conclude from.", ""
    if noise is not None and noise.itself:
        moved = (
            f"{percent(flips / compared)} of the windows changed their level by that alone; in 95 of 100 the score "
            f"moved by no more than {noise.band:g} points."
        )
        return "noise", "This is the noise itself: the same prompt and model, asked again.", moved
    if noise is None or found.p_value is None or not noise.compared:
        none = (
            "No baseline was run over these windows: nothing says how many would change if the same prompt and model "
            "were asked again."
        )
        return "unknown", "Whether this is more than noise is not known.", none
    share = flips / compared
    here = f"{percent(share)} of the windows changed here"
    there = (
        f"{percent(noise.floor)} did ({noise.flips:,} of {noise.compared:,}) when the same prompt and model were asked "
        "again"
    )
    by_chance = f"Shares at least so far apart would come by chance alone in {chance(found.p_value)} such comparisons"
    figures = f"{here}, {there}. {by_chance} (p {_p(found.p_value)})."
    if share <= noise.floor:
        return "noise", "This is no more than noise.", f"{here}, {there}."
    if found.p_value >= SIGNIFICANT:
        return "noise", "This cannot be told from noise.", f"{figures} More windows, or a larger baseline, may tell."
    return "more", "This is more than noise.", f"{figures} {_each(found, noise)}"


def _each(found: Comparison, noise: Noise) -> str:
    """That a whole is more than noise does not make each part of it so."""
    within = found.flips_in_noise or 0
    if not within:
        return f"Each of the changes moved its score by more than the noise does ({noise.band:g} points)."
    return (
        f"Yet {counted(within, 'change')} of them moved the score by no more than the noise does "
        f"({noise.band:g} points): those are marked."
    )


def _strictly(strict: Strict) -> tuple[Tone, str, str]:
    if strict.models:
        before, after = strict.models[0]
        return (
            "failed",
            "The strict check failed: other weights answered than those on record.",
            f"Recorded: {before or 'unknown weights'}. Now: {after or 'unknown weights'}.",
        )
    if not strict.eligible:
        return (
            "failed",
            "The strict check failed: there was nothing to check.",
            "No event was recorded under strict conditions (one slot, no prompt cache, and the rest as now).",
        )
    calls = f"{counted(strict.calls, 'call')} {'was' if strict.calls == 1 else 'were'} really made."
    if strict.identical < strict.eligible:
        other = strict.eligible - strict.identical
        return (
            "failed",
            f"The strict check failed: {other:,} of {strict.eligible:,} answers came back different.",
            calls,
        )
    return "exact", f"Reproduced: all of {counted(strict.eligible, 'answer')} came back byte for byte.", calls


def _alarms(found: Comparison, kind: Literal["alarm_lost", "alarm_new"], *, of_windows: int) -> Alarms:
    flips: list[Flip] = [flip for flip in found.flips if flip.kind == kind]
    of_true = sum(flip.label in {"true_alarm", "missed"} for flip in flips)
    of_false = sum(flip.label == "false_alarm" for flip in flips)
    in_noise = sum(flip.in_noise is True for flip in flips)
    return Alarms(of_true, of_false, len(flips) - of_true - of_false, in_noise, of_windows)


def _only(found: Comparison, *, of_a: bool) -> int:
    """Alarms that one side alone has, on windows that are no pair."""
    paired = found.pairing
    groups = (*paired.split, *paired.merged, *paired.regrouped)
    if of_a:
        return sum(v.alarm for v in paired.vanished) + sum(g.alarm_a and not g.alarm_b for g in groups)
    return sum(v.alarm for v in paired.appeared) + sum(g.alarm_b and not g.alarm_a for g in groups)


def _doubts(found: Comparison, gone: Alarms, new: Alarms) -> Iterable[str]:
    coverage = found.coverage
    if (coverage.planned or coverage.units) and not coverage.complete:
        planned = max(coverage.planned, coverage.units)
        yield f"The replay is not done: {coverage.judged:,} of {counted(planned, 'window')} judged so far."
    if coverage.failed:
        lack = "is" if coverage.failed == 1 else "are"
        yield f"{counted(coverage.failed, 'window')} could not be judged, and {lack} missing here."
    changed = gone.all + new.all
    if changed and not (gone.of_true + gone.of_false + new.of_true + new.of_false):
        yield (
            "No label says which of these alarms were right: whether the change is better or worse is not known. "
            "`rewatch label session` asks for the most telling ones."
        )
    elif unlabelled := gone.unlabelled + new.unlabelled:
        yield f"Nobody labelled {unlabelled:,} of the alarms that changed: of those it is not known who is right."
    yield from found.notes

"""The figures of a comparison by name, conditions on them as a build server states them, and all of it for programs.

Pure. A share goes from 0 to 1. A figure is None where nothing tells: no label, no baseline, no strict comparison.
"""

import operator
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec

from processors.replay.comparison import Comparison, Flip, Pair, Regrouping, Verdict

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ConditionError(ValueError):
    """This is no condition; the message says how one is written, and which figures there are."""


class Figure(NamedTuple):
    """One number that a comparison gives."""

    words: str
    """What it is, for people."""
    of: Callable[[Comparison], float | None]


def _share(part: Callable[[Comparison], int | None]) -> Callable[[Comparison], float | None]:
    """Of the pairs."""

    def share(found: Comparison) -> float | None:
        count = part(found)
        return count / found.compared if count is not None and found.compared else None

    return share


def _gain(name: str) -> Callable[[Comparison], float | None]:
    """By how much a share that labels give rose from A to B."""

    def gain(found: Comparison) -> float | None:
        before, after = (getattr(side, name).value for side in (found.labels.a, found.labels.b))
        return None if before is None or after is None else after - before

    return gain


FIGURES: Mapping[str, Figure] = {
    "compared": Figure("windows compared", lambda c: c.compared),
    "identical": Figure("share of them with the same completion, byte for byte", _share(lambda c: c.identical)),
    "flips": Figure("share of them with another risk level", _share(lambda c: len(c.flips))),
    "flips_in_noise": Figure("share of them with a flip that the noise explains", _share(lambda c: c.flips_in_noise)),
    "flips_beyond_noise": Figure(
        "share of them with a flip that it does not",
        _share(lambda c: None if c.flips_in_noise is None else len(c.flips) - c.flips_in_noise),
    ),
    "alarms_lost": Figure("flips from high or critical to less", lambda c: c.flips_of("alarm_lost")),
    "alarms_new": Figure("flips to high or critical", lambda c: c.flips_of("alarm_new")),
    "true_alarms_lost": Figure(
        "of the alarms lost, those labelled a true alarm, or missed", lambda c: sum(flip.harm == 0 for flip in c.flips)
    ),
    "false_alarms_new": Figure(
        "of the new alarms, those labelled a false alarm", lambda c: sum(flip.harm == 2 for flip in c.flips)
    ),
    "raised": Figure("flips upwards beside those", lambda c: c.flips_of("raised")),
    "lowered": Figure("flips downwards beside those", lambda c: c.flips_of("lowered")),
    "split": Figure("windows that became several", lambda c: len(c.pairing.split)),
    "merged": Figure("windows that several became", lambda c: len(c.pairing.merged)),
    "regrouped": Figure("groups of windows that became other groups", lambda c: len(c.pairing.regrouped)),
    "appeared": Figure("windows of B alone", lambda c: len(c.pairing.appeared)),
    "vanished": Figure("windows of A alone", lambda c: len(c.pairing.vanished)),
    "alarms_vanished": Figure(
        "windows of A alone that are an alarm", lambda c: sum(verdict.alarm for verdict in c.pairing.vanished)
    ),
    "mean_delta": Figure("mean of the score differences", lambda c: c.deltas.mean),
    "mean_abs_delta": Figure("mean of the absolute score differences", lambda c: c.deltas.mean_abs),
    "missed": Figure("labels worth an alarm that B has none for", lambda c: c.labels.b.false_negatives),
    "false_alarms": Figure("labels worth none that B has an alarm for", lambda c: c.labels.b.false_positives),
    "precision": Figure("of B's alarms, the share that labels call right", lambda c: c.labels.b.precision.value),
    "recall": Figure("of what labels call worth an alarm, the share with one", lambda c: c.labels.b.recall.value),
    "false_alarm_rate": Figure(
        "of what labels call worth none, the share with one", lambda c: c.labels.b.false_alarm_rate.value
    ),
    "precision_gain": Figure("precision of B less that of A", _gain("precision")),
    "recall_gain": Figure("recall of B less that of A", _gain("recall")),
    "false_alarm_gain": Figure("false-alarm rate of B less that of A", _gain("false_alarm_rate")),
    "labelled": Figure("share of the windows that a label applies to", lambda c: c.labels.coverage),
    "noise_floor": Figure(
        "share of flips that the same prompt and model make", lambda c: None if c.noise is None else c.noise.floor
    ),
    "p_value": Figure("probability of it all by the noise alone", lambda c: c.p_value),
    "failed": Figure("windows that could not be judged", lambda c: c.coverage.failed),
    "judged": Figure(
        "share of the planned windows that are judged",
        lambda c: c.coverage.judged / c.coverage.planned if c.coverage.planned else None,
    ),
    "different": Figure(
        "strict: events that came back different",
        lambda c: None if c.strict is None else c.strict.eligible - c.strict.identical,
    ),
}
"""Every figure that a condition can name."""

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|==|!=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(%?)\s*")


class Condition(NamedTuple):
    """A figure, an operator and a number: `flips>0.02`."""

    text: str
    name: str
    operator: str
    number: float

    def holds(self, found: Comparison) -> bool | None:
        """Whether it does; None where the figure is not known."""
        value = FIGURES[self.name].of(found)
        return None if value is None else _OPERATORS[self.operator](value, self.number)


def condition(text: str) -> Condition:
    """A condition as people write it; the number may be one of percent, `2%`.

    Raises:
        ConditionError: it is none, or of no figure.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConditionError(
            f"{text!r} is no condition: write a figure, one of > >= < <= == !=, and a number: flips>0.02"
        )
    name, sign, number, percent = match.groups()
    if name not in FIGURES:
        raise ConditionError(f"there is no figure {name!r}; there are {', '.join(FIGURES)}")
    return Condition(text.strip(), name, sign, float(number) / (100 if percent else 1))


def plain(found: Comparison, *, limit: int | None = None) -> dict[str, Any]:
    """All of it for programs. Times are ISO 8601, lists hold at most `limit` entries.

    `compared`, `identical`, `flips` and `flips_in_noise` are counts; `figures` has what conditions name.
    """
    paired = found.pairing
    return {
        "compared": found.compared,
        "identical": found.identical,
        "flips": len(found.flips),
        "flips_in_noise": found.flips_in_noise,
        "noise_floor": None if found.noise is None else found.noise.floor,
        "p_value": found.p_value,
        "alarms_lost": found.flips_of("alarm_lost"),
        "alarms_new": found.flips_of("alarm_new"),
        "raised": found.flips_of("raised"),
        "lowered": found.flips_of("lowered"),
        "figures": {name: figure.of(found) for name, figure in FIGURES.items()},
        "a": _builtin(found.a),
        "b": _builtin(found.b),
        "coverage": _builtin(found.coverage),
        "flip_list": [_flip(flip) for flip in found.flips[:limit]],
        "deltas": _builtin(found.deltas),
        "scores_a": _builtin(found.scores_a),
        "scores_b": _builtin(found.scores_b),
        "transitions": _builtin(found.transitions),
        "by_camera": _builtin(found.by_camera),
        "by_hour": _builtin(found.by_hour),
        "by_class": _builtin(found.by_class),
        "split": [_group(group) for group in paired.split[:limit]],
        "merged": [_group(group) for group in paired.merged[:limit]],
        "regrouped": [_group(group) for group in paired.regrouped[:limit]],
        "appeared": [_verdict(verdict) for verdict in paired.appeared[:limit]],
        "vanished": [_verdict(verdict) for verdict in paired.vanished[:limit]],
        "labels": _builtin(found.labels) | {"coverage": found.labels.coverage},
        "noise": _builtin(found.noise),
        "strict": None if found.strict is None else _builtin(found.strict) | {"failed": found.strict.failed},
        "notes": list(found.notes),
    }


def _builtin(record: Any) -> Any:
    return msgspec.to_builtins(record)


def _flip(flip: Flip) -> dict[str, Any]:
    pair: Pair = flip.pair
    return {
        "kind": flip.kind,
        "harm": flip.harm,
        "label": flip.label,
        "in_noise": flip.in_noise,
        "delta": pair.delta,
        "share": pair.share,
        "camera_id": pair.a.camera_id,
        "camera_name": pair.a.camera_name,
        "time_zone": pair.a.time_zone,
        "started_at": _time(pair.a.started_at),
        "classes": sorted({*pair.a.classes, *pair.b.classes}),
        "a": _verdict(pair.a),
        "b": _verdict(pair.b),
    }


def _group(group: Regrouping) -> dict[str, Any]:
    return {"a": [_verdict(verdict) for verdict in group.a], "b": [_verdict(verdict) for verdict in group.b]}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    names = ("event_id", "batch_id", "camera_id", "risk_score", "risk_level", "summary", "reasoning", "prompt_digest")
    return {name: getattr(verdict, name) for name in names} | {
        "started_at": _time(verdict.started_at),
        "ended_at": _time(verdict.ended_at),
    }


def _time(at: int) -> str:
    return (_EPOCH + timedelta(milliseconds=at)).isoformat()

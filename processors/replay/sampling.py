"""Which events are worth a person's label: drawn in strata, each event with a chance that is known. Pure.

People's time is short, so a labelling session prefers events that teach the most: those near the alarm threshold, those
that a replay judged otherwise, those that are rare. Labels of preferred events alone would say nothing of the others:
whoever labels the hardest cases finds any prompt bad. So at least a third of a session is drawn at random from all
events, and every event has a known chance of being chosen, which its label carries. A statistic that weighs each label
by 1 / chance (Horvitz and Thompson, 1952; as a ratio Hájek, 1971) speaks of all unlabelled events.

The draw has two steps, so that the chances are exact and the numbers are, too:

1. *Targeted*: each of the strata near_threshold, flipped and rare gets an equal part of two thirds of the count, n_s of
   its N_s unlabelled events, so that one stratum alone would take each of its events with p_s = n_s / N_s. An event in
   several is taken with the union's chance t = 1 - prod(1 - p_s). The t are scaled so that their sum is a whole number
   n_t, and *one* systematic draw (Madow, 1949) with these chances gives exactly n_t events, none twice.
2. *Random*: the rest of the count, n_r, at random from the N - n_t events that the first step left. As n_t is fixed,
   each of them is taken with r = n_r / (N - n_t).

So an event's chance is 1 - (1 - t)(1 - r): that of being in the union of all its strata. `selection` names the stratum
that it was taken for. The events of the stratum `random` are no fair sample by themselves, as those that the first step
took cannot be among them: weigh all labels of a session by their chances, or none.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from schemas import ids

Stratum = Literal["near_threshold", "flipped", "rare", "random"]
STRATA: tuple[Stratum, ...] = ("near_threshold", "flipped", "rare", "random")

# An alarm is an event of level high or critical: a score of 60 or more (`processors.analyze.answers.risk_level`). The
# threshold lies between 59 and 60, and scores within ten points of it, 50 to 69, are near: models answer in fives and
# tens, so that the two nearest values on either side are among them.
_THRESHOLD = 59.5
_NEAR = 10

# One in so many of a session is drawn at random from all events, and more where there is less to prefer.
_AT_RANDOM = 3

# One in so many of all events, those with the least frequent combinations, counts as rare. A share and no number: in a
# small history each combination is there once, in a large one none is.
_RARE = 10


class Event(NamedTuple):
    """A live event, as far as the draw looks at it."""

    event_id: str
    camera_id: str
    score: int
    """0 to 100."""
    level: str
    hour: int
    """Of the day, by the clock where the camera is."""
    classes: tuple[str, ...]
    """Classes of the boxes in its window, each once."""
    flipped: bool
    """A replay gave it another level."""
    labelled: bool


class Chosen(NamedTuple):
    """An event to be labelled."""

    event_id: str
    selection: Stratum
    """What it was taken for."""
    chance: float
    """Probability with which the session chose it, by whatever stratum: above 0, at most 1."""


class Draw(NamedTuple):
    """A session's events, and what they were drawn from."""

    chosen: tuple[Chosen, ...]
    """In random order: also whoever stops early has labelled a fair part."""
    strata: Mapping[Stratum, frozenset[str]]
    """Ids of the unlabelled events of each stratum; `random` has them all."""


def draw(events: Sequence[Event], *, count: int, seed: int) -> Draw:
    """Choose `count` unlabelled events, or all if there are fewer; the same ones for the same events and seed.

    Args:
        events: all events of the history that is asked about, the labelled ones too: what is rare is so among them all.
        count: how many to choose.
        seed: of everything random; the events' order changes nothing.
    """
    strata = _strata(events)
    rng = random.Random(seed)
    everyone = sorted(strata["random"])
    count = min(count, len(everyone))
    targeted = _targeted(strata, count - math.ceil(count / _AT_RANDOM))
    preferred = _systematic(targeted, rng)
    rest = [event_id for event_id in everyone if event_id not in preferred]
    at_random = count - len(preferred)
    r = at_random / len(rest) if rest else 0.0
    selection: dict[str, Stratum] = {**preferred, **dict.fromkeys(rng.sample(rest, at_random), "random")}
    order = sorted(selection)
    rng.shuffle(order)
    chances = {name: _union([sum(targeted.get(name, {}).values()), r]) for name in order}
    return Draw(tuple(Chosen(name, selection[name], chances[name]) for name in order), strata)


def _strata(events: Sequence[Event]) -> dict[Stratum, frozenset[str]]:
    open_ = [event for event in events if not event.labelled]
    rare = _rarest(events)
    return {
        "near_threshold": frozenset(e.event_id for e in open_ if abs(e.score - _THRESHOLD) <= _NEAR),
        "flipped": frozenset(e.event_id for e in open_ if e.flipped),
        "rare": frozenset(e.event_id for e in open_ if e.event_id in rare),
        "random": frozenset(e.event_id for e in open_),
    }


def _rarest(events: Sequence[Event]) -> set[str]:
    """The tenth of the events whose camera, class, hour and level come together least often.

    Where whole combinations are equally rare, those without the hour decide, then class and level alone; what is then
    still equal, the digest of the id. An event with several classes is as rare as the rarest of them.
    """
    whole: Counter[tuple[str, str, int, str]] = Counter()
    hourless: Counter[tuple[str, str, str]] = Counter()
    bare: Counter[tuple[str, str]] = Counter()
    for event in events:
        for name in event.classes or ("",):
            whole[event.camera_id, name, event.hour, event.level] += 1
            hourless[event.camera_id, name, event.level] += 1
            bare[name, event.level] += 1

    def frequency(event: Event) -> tuple[int, int, int, str]:
        least = min(
            (
                whole[event.camera_id, name, event.hour, event.level],
                hourless[event.camera_id, name, event.level],
                bare[name, event.level],
            )
            for name in event.classes or ("",)
        )
        return (*least, ids.digest(event.event_id))

    return {event.event_id for event in sorted(events, key=frequency)[: math.ceil(len(events) / _RARE)]}


def _targeted(strata: Mapping[Stratum, frozenset[str]], count: int) -> dict[str, dict[Stratum, float]]:
    """The first step's chances of each event that it can take, by stratum; together they sum up to a whole number."""
    members = {name: found for name, found in strata.items() if name != "random" and found}
    share = _shares({name: len(found) for name, found in members.items()}, count)
    of_stratum = {name: share[name] / len(found) for name, found in members.items()}
    pulls: dict[str, dict[Stratum, float]] = {}
    for name, found in members.items():
        for event_id in found:
            pulls.setdefault(event_id, {})[name] = of_stratum[name]
    unions = {event_id: _union(list(by.values())) for event_id, by in pulls.items()}
    total = math.fsum(unions.values())
    # Sums of strata without common events are whole but for rounding.
    whole = math.floor(total + 1e-9)
    if not whole:
        return {}
    return {
        event_id: {name: unions[event_id] * whole / total * p / sum(by.values()) for name, p in by.items()}
        for event_id, by in pulls.items()
    }


def _shares(sizes: Mapping[Stratum, int], count: float) -> dict[Stratum, float]:
    """The count in equal parts; a stratum that has fewer events gives what is left over to the others."""
    shares: dict[Stratum, float] = {}
    left = sorted(sizes, key=lambda name: (sizes[name], name))
    while left:
        name = left[0]
        shares[name] = min(sizes[name], count / len(left))
        count -= shares[name]
        left = left[1:]
    return shares


def _systematic(chances: Mapping[str, Mapping[Stratum, float]], rng: random.Random) -> dict[str, Stratum]:
    """A systematic draw: the chances lie end to end on a line, and a rake with a tooth each 1 falls on it somewhere.

    An event is no longer than 1, so that no two teeth hit it. Each is hit with its chance exactly, and the part of it
    that was hit says for which stratum. Events of the same strata lie together, in random order: so each stratum gets
    nearly the same number every time.
    """
    order = sorted(chances)
    rng.shuffle(order)
    order.sort(key=lambda event_id: sorted(chances[event_id]))
    tooth = rng.random()
    teeth = round(math.fsum(p for by in chances.values() for p in by.values()))
    found: dict[str, Stratum] = {}
    at = 0.0
    for event_id in order:
        for name, length in sorted(chances[event_id].items()):
            at += length
            if tooth < at and event_id not in found and len(found) < teeth:
                found[event_id] = name
                tooth += 1
    for event_id in reversed(order):
        if len(found) < teeth:  # rounding took off the end of the line that the last tooth falls on
            found.setdefault(event_id, max(chances[event_id]))
    return found


def _union(chances: Sequence[float]) -> float:
    """The chance that at least one of independent things happens."""
    return 1 - math.prod(1 - min(chance, 1.0) for chance in chances)

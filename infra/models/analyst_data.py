"""What the demo analyst learns: windows, instructions, and the verdict that each instruction implies.

Everything is drawn from a seed. A sample is a system message (an instruction that carries a policy), a
user message (the compact text of one batch) and the JSON answer. The verdict is an openly written sum, so
that a held-out window has exactly one right answer to measure the model against.
"""

import dataclasses
import itertools
import json
import random
import re
from dataclasses import dataclass
from typing import Literal

Moves = Literal["passes", "stays", "approaches"]

VEHICLES = ("bicycle", "bus", "car", "motorcycle", "truck")
ANIMALS = ("bird", "cat", "dog")

DEFAULT_INSTRUCTION = (
    "You judge the risk of what a security camera saw. "
    "Night, loitering and private areas raise the risk; animals and daytime deliveries lower it."
)
#: Other wordings of the same policy, so that a user who rewrites the sentence is still understood.
BASE_INSTRUCTIONS = (
    DEFAULT_INSTRUCTION,
    (
        "Judge the risk of what a camera saw. Night, loitering and private areas raise it; animals and daytime "
        "deliveries lower it."
    ),
    (
        "You are a security analyst. Say how risky this window of a camera is. Night, loitering and private "
        "areas are worse, animals and deliveries by day are better."
    ),
    (
        "Rate the risk of this camera window from 0 to 100. People at night, loitering and private areas raise "
        "the risk; animals and daytime deliveries lower it."
    ),
    "Judge the risk of this camera window.",
    "You watch the cameras of a home. Rate the risk of what was seen.",
)


def _wordings(*patterns: str) -> tuple[str, ...]:
    """Every sentence that the patterns make: "(A|The) courier comes" stands for two."""
    sentences: list[str] = []
    for pattern in patterns:
        parts = [part.split("|") for part in re.split(r"[()]", pattern)]
        sentences += ["".join(chosen) for chosen in itertools.product(*parts)]
    return tuple(dict.fromkeys(sentences))


_DELIVERY = "delivery|parcel|package|courier|delivery driver"
_DELIVERIES = "Deliveries|Parcels|Packages|Couriers|Delivery drivers"
_DARK = "at night|after dark|by night|during the night"
_ANIMALS = "Animals|Pets|Cats and dogs|Cats, dogs and birds"
_TRAFFIC = "Vehicles|Cars|Cars and trucks|Cars and other vehicles"
#: Sentences that change the policy when they are added, as (trained, held out for measuring). The trained ones come
#: from patterns: of eight fixed sentences each, a sentence put otherwise was followed 69 times of 100.
MODIFIERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "deliveries": (
        _wordings(
            f"A ({_DELIVERY}) is expected( today| this week| during the day| at the door|).",
            f"({_DELIVERIES}) are (expected|welcome|fine|normal)( today| here| during the day| at the door|).",
            f"({_DELIVERIES}) (come|arrive|will come|will arrive|stop by|will stop by)( today| here| this week|).",
            f"(Today|This week|Here|By day) ({_DELIVERIES.lower()}) (come|arrive|are expected|are welcome|are fine).",
            f"(Today|This week|This afternoon) a ({_DELIVERY}) (is expected|comes|will come|arrives).",
            "(Couriers|Drivers|People|Visitors) (bring|deliver|drop off) (parcels|packages|boxes)( today| here|).",
            "(Visitors|People|Guests|Drivers) with (a parcel|a box|parcels|packages|boxes) "
            "(are welcome|are fine|may come).",
            f"(We expect|Expect) (a {_DELIVERY.replace('|', '|a ')}|deliveries|parcels|packages)( this week| here|).",
            f"A ({_DELIVERY}) (comes|will come|arrives|will arrive)( today| here| this afternoon|).",
            "Someone (brings|will bring|drops off|will drop off) a (parcel|package|delivery)( today| here|).",
            "(Parcels|Packages) arrive today, so visitors at the door are fine.",
        ),
        (
            "A package is expected at the door today.",
            "Delivery drivers will come by today.",
            "Expect a courier today.",
            "Today couriers bring parcels.",
            "Visitors with packages are expected.",
        ),
    ),
    "strict_night": (
        _wordings(
            f"(Be|Please be|You must be) (strict|stricter|much stricter|more strict) ({_DARK}).",
            "(At|By) night be (strict|stricter|much stricter|more strict).",
            "(Judge|Treat|Take) (the night|nights|what happens at night|visits after dark) (more strictly|as serious).",
            f"(Nobody|No one) (should be|is expected|has any business) here ({_DARK}).",
            f"(Anything|Anyone|Any visit) ({_DARK}) is (very suspicious|serious|a threat)( here|).",
            f"(Raise|Increase) the risk (more|much more|further) ({_DARK}).",
            "(After dark|At night|By night) (nobody|no one) (should be here|may come|has any business here).",
            "(Late|Nightly|Nocturnal) (visits|visitors|guests) are (a threat|serious|suspicious|very suspicious).",
        ),
        (
            "Be a lot stricter after dark.",
            "Treat anything at night as serious.",
            "After dark nobody is expected.",
            "Night visits are very suspicious.",
            "Judge visits by night more strictly.",
        ),
    ),
    "animals_matter": (
        _wordings(
            f"(Watch for|Report|Report all|Report any|Look out for) ({_ANIMALS.lower()})( here|).",
            f"({_ANIMALS}) (matter|are a problem|are serious|must be reported)( here|).",
            "(Animals|Cats and dogs) (damage|dig up) the garden, so take them seriously.",
            f"(Take|Treat) ({_ANIMALS.lower()}) (seriously|as a risk).",
            "Report every (animal|pet)( here| that you see|).",
        ),
        (
            "Report the animals.",
            "Take all animals seriously here.",
            "Watch for every animal.",
            "Here animals are a problem.",
            "Any animal must be reported.",
        ),
    ),
    "ignore_vehicles": (
        _wordings(
            f"({_TRAFFIC}) (are|will be) (normal|of no interest|harmless|expected|no risk)( here|).",
            f"(Ignore|Do not report|Never report|Forget) (all |)({_TRAFFIC.lower()}|the traffic)( here|).",
            "(Please|You may|You can|You should) (ignore|overlook|disregard) (all |any |)"
            f"({_TRAFFIC.lower()}|traffic).",
            f"(Do not|Never) (mention|count|mind) (all |any |the |)({_TRAFFIC.lower()})( here|).",
            f"(Here|In this street|At this place) ({_TRAFFIC.lower()}) "
            "(are|will be) (normal|harmless|expected|no risk).",
            f"(Passing|Parked|Arriving|Moving) ({_TRAFFIC.lower()}) (are|will be) (harmless|expected|no risk).",
            f"({_TRAFFIC}) (pass|drive by|park here) (all day|often|all the time).",
            f"(There is|We see|We have) no (risk|danger|problem) in ({_TRAFFIC.lower()}|traffic).",
            f"({_TRAFFIC}) come and go( here|)(; ignore them|, ignore them|).",
            "Traffic is (normal|harmless|of no interest)( here|).",
            "(Traffic|A vehicle|A car) is no risk( here|).",
        ),
        (
            "Ignore traffic.",
            "Here vehicles come and go.",
            "Do not report any vehicles.",
            "Passing cars are normal.",
            "There is no interest in vehicles.",
        ),
    ),
}

#: Words in a camera's name that say what kind of place it watches.
AREAS = {
    "entrance": ("front-door", "front", "door", "doorbell", "porch", "entrance", "entry", "driveway", "lobby"),
    "private": ("back-yard", "backyard", "back", "garden", "garage", "side-gate", "patio", "pool", "shed"),
    "public": ("street", "road", "sidewalk", "parking", "corner"),
}
#: Parts of names that say nothing about the place.
_PLAIN = """
cam camera north south east west upper lower left right main old new red blue green white house barn hall office
shop warehouse dock roof tower bridge river lake hill oak pine maple alpha bravo delta echo kitchen stairs balcony
attic studio stable fence orchard well mill harbor station platform counter till aisle storage lab server room
floor desk window tree field meadow valley canyon silver golden iron stone brick
""".split()  # noqa: SIM905  (eighty quoted words would fill a screen)

#: Share of cameras whose name is made of syllables that mean nothing, where the model is measured.
INVENTED = 0.1
#: And where it is trained: spelling out a name never seen is what it learns last, so it is drawn more often.
INVENTED_TRAINED = 0.25


@dataclass(frozen=True)
class Window:
    """What the analyst is told of one batch.

    Attributes:
        camera: The camera's id as the user wrote it.
        hour: Local hour, 0..23.
        minute: Local minute, 0..59.
        duration_s: Seconds from the first to the last frame.
        frames: Frames in the batch.
        seen: Per class: how many at once, and the best score, 0..1.
        moves: How the most important class moved.
    """

    camera: str
    hour: int
    minute: int
    duration_s: int
    frames: int
    seen: dict[str, tuple[int, float]]
    moves: Moves = "stays"

    @property
    def night(self) -> bool:
        """Night is 22:00 to 05:59; dusk counts as day."""
        return self.hour >= 22 or self.hour < 6


@dataclass(frozen=True)
class Policy:
    """What an instruction adds to the ordinary judgement."""

    deliveries: bool = False
    strict_night: bool = False
    animals_matter: bool = False
    ignore_vehicles: bool = False


@dataclass(frozen=True)
class Sample:
    """One training pair, with what it was made from."""

    instruction: str
    prompt: str
    answer: str
    window: Window
    policy: Policy


def importance(label: str) -> tuple[int, str]:
    """Sort key of a class: person, then vehicles, then animals, then anything else; by name within."""
    rank = 0 if label == "person" else 1 if label in VEHICLES else 2 if label in ANIMALS else 3
    return rank, label


def level(score: int) -> str:
    """The product's risk level of a score of 0..100."""
    return "low" if score < 30 else "medium" if score < 60 else "high" if score < 85 else "critical"


def area(camera: str) -> str:
    """The kind of place that a camera's name speaks of: entrance, private, public or unknown."""
    words = camera.lower().replace("_", "-").split("-")
    for kind in ("private", "public", "entrance"):
        if any(set(key.split("-")) <= set(words) for key in AREAS[kind]):
            return kind
    return "unknown"


def render(window: Window) -> str:
    """The user message: six lines of plain text, exactly as the analyze stage writes them."""
    labels = sorted(window.seen, key=importance)
    seen = ", ".join(f"{window.seen[k][0]} {k} {window.seen[k][1]:.2f}" for k in labels)
    return "\n".join(
        (
            f"camera: {window.camera}",
            f"time: {window.hour:02d}:{window.minute:02d} {'night' if window.night else 'day'}",
            f"duration: {window.duration_s} s",
            f"frames: {window.frames}",
            f"seen: {seen or 'nothing'}",
            f"moves: {f'{labels[0]} {window.moves}' if labels else 'nothing'}",
        )
    )


def _place_step(place: str, private: int, public: int) -> list[tuple[str, int]]:
    return {"private": [("private area", private)], "public": [("public area", public)]}.get(place, [])


def _person_steps(w: Window, policy: Policy, place: str) -> list[tuple[str, int]]:
    count, confidence = w.seen["person"]
    loiters = w.moves == "stays" and w.duration_s >= 30
    steps = [("person", 30)]
    if count > 1:
        steps.append(("group", 6 * min(count - 1, 3)))
    if w.night:
        steps.append(("strict night", 40) if policy.strict_night else ("night", 25))
    steps += _place_step(place, 14, -14)
    if not w.night and place == "entrance" and policy.deliveries:
        steps.append(("expected delivery", -22))
    elif not w.night and place == "entrance" and not loiters:
        steps.append(("daytime delivery", -12))
    if loiters:
        steps.append(("loitering", 16))
    else:
        steps += {"approaches": [("approaching", 7)], "passes": [("passing", -4)]}.get(w.moves, [])
    if "dog" in w.seen:
        steps.append(("walking a dog", -6))
    if confidence < 0.5:
        steps.append(("uncertain", -8))
    return steps


def _vehicle_steps(w: Window, policy: Policy, place: str) -> list[tuple[str, int]]:
    if policy.ignore_vehicles:
        return [("ignored vehicle", 3)]
    steps = [("vehicle", 15)]
    if w.night:
        steps.append(("strict night", 30) if policy.strict_night else ("night", 18))
    steps += _place_step(place, 10, -8)
    if w.moves == "approaches":
        steps.append(("approaching", 3))
    return steps


def _animal_steps(w: Window, policy: Policy) -> list[tuple[str, int]]:
    if not policy.animals_matter:
        return [("animal", 4)]
    return [("reported animal", 36), *([("night", 5)] if w.night else [])]


def steps(window: Window, policy: Policy) -> list[tuple[str, int]]:
    """What adds up to the score: named parts in order, the first being the base."""
    place = area(window.camera)
    if "person" in window.seen:
        return _person_steps(window, policy, place)
    if any(k in VEHICLES for k in window.seen):
        return _vehicle_steps(window, policy, place)
    if window.seen:
        return _animal_steps(window, policy)
    return [("nothing", 0)]


def _counted(label: str, count: int) -> str:
    plural = {"person": "people", "bus": "buses"}.get(label, f"{label}s")
    return f"{count} {label if count == 1 else plural}"


def verdict(window: Window, policy: Policy) -> dict[str, object]:
    """The one right answer: the keys and their order are those of the product's verdict schema.

    The reasoning writes the running sum, so that the score at the end is a copy, not mental arithmetic.
    """
    parts = steps(window, policy)
    score = parts[0][1]
    told = [f"{parts[0][0]} {score}"]
    for name, points in parts[1:]:
        score = max(0, min(100, score + points))
        told.append(f"{name} {points:+d} = {score}")
    entities = [_counted(k, window.seen[k][0]) for k in sorted(window.seen, key=importance)]
    listed = ", ".join(entities[:-1]) + " and " + entities[-1] if len(entities) > 1 else "".join(entities)
    when = "night" if window.night else "day"
    risk = level(score)
    action = {"low": "none", "medium": "review", "high": "notify", "critical": "call"}[risk]
    return {
        "reasoning": ", ".join(told),
        "risk_factors": [name for name, points in parts[1:] if points > 0],
        "entities": entities,
        "summary": f"{listed or 'nothing'} at {window.camera} by {when} for {window.duration_s} s",
        "recommended_action": action,
        "risk_score": score,
    }


def camera_name(rng: random.Random, invented: float = INVENTED) -> str:
    """A camera id such as people invent: known places, plain words, numbers; a share of them syllables made up."""
    kind = rng.random() / (1 - invented)
    if kind < 2 / 3:
        core = rng.choice(AREAS[rng.choice(("entrance", "entrance", "private", "private", "public"))])
    elif kind < 1:
        core = rng.choice(_PLAIN)
    else:
        core = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
    parts = [core]
    if rng.random() < 0.2:
        parts.insert(0, rng.choice(_PLAIN))
    if rng.random() < 0.2:
        parts.append(rng.choice(_PLAIN) if rng.random() < 0.4 else str(rng.randint(1, 20)))
    name = "-".join(parts)
    return name.replace("-", "_") if rng.random() < 0.25 else name


def window(rng: random.Random, invented: float = INVENTED) -> Window:
    """A window as the pipeline could see it, with every class, hour, place and movement well covered."""
    seen: dict[str, tuple[int, float]] = {}
    # The main subject decides the score; the rest is company.
    main = rng.choices(("person", "vehicle", "animal", "nothing"), (60, 20, 18, 2))[0]
    labels = {
        "person": ["person"],
        "vehicle": [rng.choice(VEHICLES)],
        "animal": [rng.choice(ANIMALS)],
        "nothing": [],
    }[main]
    if main != "nothing":
        company = {"person": (*VEHICLES, *ANIMALS, "dog"), "vehicle": VEHICLES + ANIMALS, "animal": ANIMALS}[main]
        labels += [rng.choice(company) for _ in range(rng.choices((0, 1, 2, 3), (60, 26, 10, 4))[0])]
    for label in labels:
        count = rng.choices((1, 2, 3, 4, 5, 8), (66, 18, 8, 4, 2, 2))[0]
        seen[label] = (count, round(rng.choice((rng.uniform(0.3, 1.0), rng.uniform(0.6, 0.97))), 2))
    hour = rng.choice((22, 23, 0, 1, 2, 3, 4, 5)) if rng.random() < 0.45 else rng.randint(6, 21)
    duration = rng.choice((rng.randint(0, 12), rng.randint(0, 90), rng.randint(20, 90), rng.randint(25, 36)))
    moves: Moves = rng.choice(("passes", "stays", "stays", "approaches"))
    frames = min(50, max(1, round(duration * rng.uniform(0.2, 2)) + 1))
    return Window(camera_name(rng, invented), hour, rng.randint(0, 59), duration, frames, seen, moves)


def instruct(rng: random.Random, *, held_out: bool = False) -> tuple[str, Policy]:
    """An instruction and the policy that it states; `held_out` uses wordings that training never sees."""
    base = rng.choice((DEFAULT_INSTRUCTION, rng.choice(BASE_INSTRUCTIONS)))
    count = rng.choices((0, 1, 2), (35, 45, 20))[0]
    chosen = rng.sample(list(MODIFIERS), count)
    sentences = [rng.choice(MODIFIERS[key][1 if held_out else 0]) for key in chosen]
    return " ".join((base, *sentences)), Policy(**dict.fromkeys(chosen, True))


def _telling_window(rng: random.Random, policy: Policy, without: Policy, invented: float) -> Window:
    """A window that the two policies judge otherwise."""
    while True:
        seen = window(rng, invented)
        if steps(seen, policy) != steps(seen, without):
            return seen


def _judged(instruction: str, policy: Policy, seen: Window) -> Sample:
    return Sample(instruction, render(seen), json.dumps(verdict(seen, policy)), seen, policy)


def sample(seed: int, *, held_out: bool = False, invented: float = INVENTED) -> Sample:
    """The pair of a seed: training uses seeds below 10**9, measuring those from there on.

    `invented` is the share of cameras named by made-up syllables; `held_out` takes wordings never trained on.
    """
    rng = random.Random(seed)
    instruction, policy = instruct(rng, held_out=held_out)
    return _judged(instruction, policy, window(rng, invented))


def contrast(seed: int, *, invented: float = INVENTED) -> tuple[Sample, Sample]:
    """One window judged twice: with a sentence that changes its verdict, and without it, all else being equal.

    Left to chance an expected delivery changes 2 verdicts of 100, and the sentence was not learned; with more such
    windows but no such twins, the model expected deliveries at every door. In half of the twins a sentence that says
    nothing of this window stands in the place of the one that is missing: it is the meaning that must be read.
    """
    rng = random.Random(seed)
    base = rng.choice((DEFAULT_INSTRUCTION, rng.choice(BASE_INSTRUCTIONS)))
    # A delivery shows at a few doors by day only, and lowers the score least: it is asked most.
    asked = rng.choices(tuple(MODIFIERS), (3, 1, 1, 2))[0]
    others = rng.sample([kind for kind in MODIFIERS if kind != asked], rng.choice((0, 0, 1)))
    with_it = Policy(**dict.fromkeys((asked, *others), True))
    without = dataclasses.replace(with_it, **{asked: False})
    seen = _telling_window(rng, with_it, without, invented)
    said = {kind: rng.choice(MODIFIERS[kind][0]) for kind in (asked, *others)}
    order = rng.sample(list(said), len(said))
    idle = [
        kind
        for kind in MODIFIERS
        if kind not in said and steps(seen, dataclasses.replace(without, **{kind: True})) == steps(seen, without)
    ]
    instead = rng.choice(idle) if idle and rng.random() < 0.5 else None
    twin_policy = dataclasses.replace(without, **{instead: True}) if instead else without
    twin_said = said | {asked: rng.choice(MODIFIERS[instead][0]) if instead else ""}
    first = " ".join((base, *(said[kind] for kind in order)))
    second = " ".join((base, *filter(None, (twin_said[kind] for kind in order))))
    return _judged(first, with_it, seen), _judged(second, twin_policy, seen)


def telling_sample(seed: int, kind: str) -> Sample:
    """A window whose verdict one added sentence changes, in a wording never trained on; `kind` is of MODIFIERS."""
    rng = random.Random(seed)
    policy = Policy(**{kind: True})
    instruction = f"{rng.choice(BASE_INSTRUCTIONS)} {rng.choice(MODIFIERS[kind][1])}"
    return _judged(instruction, policy, _telling_window(rng, policy, Policy(), INVENTED))

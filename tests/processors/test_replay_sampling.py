"""The draw of a labelling session: exact numbers, exact chances, and statistics that stay honest."""

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processors.analyze.answers import risk_level
from processors.replay.sampling import STRATA, Draw, Event, draw

events_of_any_kind = st.lists(
    st.builds(
        lambda camera, score, hour, classes, flipped, labelled: (camera, score, hour, classes, flipped, labelled),
        st.sampled_from(["front", "yard", "gate"]),
        st.integers(0, 100),
        st.integers(0, 23),
        st.lists(st.sampled_from(["person", "car", "dog"]), unique=True, max_size=3),
        st.booleans(),
        st.booleans(),
    ),
    max_size=60,
).map(
    lambda drawn: [
        Event(f"{camera}:{n:04x}:live", camera, score, risk_level(score), hour, tuple(classes), flipped, labelled)
        for n, (camera, score, hour, classes, flipped, labelled) in enumerate(drawn)
    ]
)


def history(size: int, *, seed: int = 5) -> list[Event]:
    """Events as a quiet home has them: most low, some near the threshold, a few flipped, each in some strata."""
    rng = random.Random(seed)
    found = []
    for n in range(size):
        score = min(100, round(rng.betavariate(1.3, 3) * 20) * 5)
        camera = rng.choices(["front", "yard", "gate"], [70, 25, 5])[0]
        classes = tuple(rng.sample(["person", "car", "dog"], rng.choices([1, 2], [80, 20])[0]))
        flipped = rng.random() < (0.3 if 45 <= score <= 70 else 0.02)
        labelled = rng.random() < 0.1
        found.append(
            Event(
                f"{camera}:{n:04x}:live",
                camera,
                score,
                risk_level(score),
                rng.randrange(24),
                classes,
                flipped,
                labelled,
            )
        )
    return found


@given(events_of_any_kind, st.integers(0, 70), st.integers(0, 2**32))
def test_exactly_as_many_as_asked_for_each_once_none_labelled_a_third_at_random(
    events: Sequence[Event], count: int, seed: int
) -> None:
    found = draw(events, count=count, seed=seed)
    unlabelled = {event.event_id for event in events if not event.labelled}
    names = [chosen.event_id for chosen in found.chosen]
    assert len(names) == len(set(names)) == min(count, len(unlabelled))
    assert set(names) <= unlabelled == found.strata["random"]
    assert all(0 < chosen.chance <= 1 for chosen in found.chosen)
    assert all(chosen.event_id in found.strata[chosen.selection] for chosen in found.chosen)
    assert sum(chosen.selection == "random" for chosen in found.chosen) >= len(names) / 3
    assert tuple(found.strata) == STRATA


@given(events_of_any_kind, st.integers(1, 70), st.integers(0, 2**32), st.randoms())
def test_the_same_seed_draws_the_same_whatever_the_order_of_the_events(
    events: list[Event], count: int, seed: int, rng: random.Random
) -> None:
    before = draw(events, count=count, seed=seed)
    rng.shuffle(events)
    assert draw(events, count=count, seed=seed) == before


def test_every_process_draws_the_same() -> None:
    # Told by what it draws here: sets of texts are in another order in each process.
    events = [
        Event(f"c:{n:02}:live", "c", n * 2, risk_level(n * 2), n % 24, ("person",), flipped=False, labelled=False)
        for n in range(50)
    ]
    drawn = [(chosen.event_id[2:4], chosen.selection) for chosen in draw(events, count=6, seed=7).chosen]
    assert drawn == [
        ("15", "random"),
        ("29", "near_threshold"),
        ("48", "rare"),
        ("31", "near_threshold"),
        ("47", "rare"),
        ("04", "random"),
    ]


def test_another_seed_draws_others() -> None:
    events = history(300)
    assert len({draw(events, count=20, seed=seed).chosen for seed in range(20)}) == 20


def test_where_fewer_are_there_all_are_taken_for_sure() -> None:
    events = history(15)
    found = draw(events, count=20, seed=1)
    assert {chosen.chance for chosen in found.chosen} == {1.0}
    assert draw([], count=20, seed=1) == Draw((), dict.fromkeys(STRATA, frozenset()))


def draws(events: Sequence[Event], count: int, times: int) -> list[Draw]:
    return [draw(events, count=count, seed=seed) for seed in range(times)]


def test_each_event_is_chosen_as_often_as_its_chance_says() -> None:
    events, times = history(60), 4000
    seen: Counter[str] = Counter()
    chance: dict[str, float] = {}
    for found in draws(events, 12, times):
        for chosen in found.chosen:
            seen[chosen.event_id] += 1
            # It is the event's, and not the draw's: whichever stratum it was taken for.
            assert chance.setdefault(chosen.event_id, chosen.chance) == pytest.approx(chosen.chance, abs=1e-12)
    assert chance.keys() == {event.event_id for event in events if not event.labelled}
    # The chances of all sum up to the number that is drawn.
    assert math.fsum(chance.values()) == pytest.approx(12)
    for name, p in chance.items():
        assert abs(seen[name] / times - p) < 4.5 * math.sqrt(p * (1 - p) / times), name


def test_an_event_s_chance_is_that_of_the_union_of_its_strata() -> None:
    events = history(400)
    found = draws(events, 20, 150)
    strata = found[0].strata
    # Thirteen of twenty are targeted, a third of them in each stratum; none has so few.
    p = {name: 13 / 3 / len(members) for name, members in strata.items() if name != "random"}
    assert max(p.values()) < 1
    t = {
        event.event_id: 1 - math.prod(1 - p[name] for name in p if event.event_id in strata[name])
        for event in events
        if not event.labelled
    }
    total = math.fsum(t.values())
    whole = math.floor(total)
    r = (20 - whole) / (len(t) - whole)
    chance = {c.event_id: c.chance for one in found for c in one.chosen}
    for name, given_chance in chance.items():
        assert given_chance == pytest.approx(1 - (1 - t[name] * whole / total) * (1 - r), abs=1e-12)
    several = [name for name in chance if sum(name in strata[stratum] for stratum in p) > 1]
    assert len(several) > 10


def test_a_stratum_with_few_events_is_taken_whole() -> None:
    # Ten events, of which two are near and one of these flipped as well; the rarest is another.
    scores = (60, 55, *([10] * 8))
    events = [
        Event(
            f"c:{n}:live", "c", score, risk_level(score), 12, ("dog" if n == 9 else "person",), n == 0, labelled=False
        )
        for n, score in enumerate(scores)
    ]
    assert draw(events, count=6, seed=0).strata["near_threshold"] == {"c:0:live", "c:1:live"}
    # Four of six are targeted: one flipped of one, one rare of one, and two near of two are all for sure.
    chance = {c.event_id: c.chance for found in draws(events, 6, 200) for c in found.chosen}
    # Their union has three events; three of the seven others are drawn at random.
    sure = {"c:0:live", "c:1:live", next(iter(draw(events, count=6, seed=0).strata["rare"]))}
    assert {name: round(p, 9) for name, p in chance.items()} == {
        event.event_id: 1.0 if event.event_id in sure else round((6 - len(sure)) / (10 - len(sure)), 9)
        for event in events
    }


def test_weighing_by_chance_tells_totals_of_all_without_bias() -> None:
    events = history(200)
    found = draws(events, 20, 1500)
    for value in (lambda _: 1, lambda event: event.score >= 60, lambda event: event.score):
        of = {event.event_id: value(event) for event in events}
        truth = sum(value(event) for event in events if not event.labelled)
        estimates = [sum(of[c.event_id] / c.chance for c in one.chosen) for one in found]
        assert abs(fmean(estimates) - truth) < 4 * stdev(estimates) / math.sqrt(len(estimates))
    # Without weighing what is preferred is taken for common.
    alarms = {event.event_id for event in events if event.score >= 60 and not event.labelled}
    naive = fmean(fmean(c.event_id in alarms for c in one.chosen) for one in found)
    assert naive > 1.3 * len(alarms) / len(found[0].strata["random"])


def test_preferred_events_are_chosen_much_more_often() -> None:
    events = history(200)
    chance: dict[str, float] = {}
    for found in draws(events, 20, 200):
        chance |= {chosen.event_id: chosen.chance for chosen in found.chosen}
    strata = draw(events, count=20, seed=0).strata
    plain = strata["random"] - strata["near_threshold"] - strata["flipped"] - strata["rare"]
    for name in ("near_threshold", "flipped", "rare"):
        assert fmean(chance[e] for e in strata[name] if e in chance) > 2 * fmean(
            chance[e] for e in plain if e in chance
        )


def test_near_is_within_ten_points_of_the_alarm_threshold() -> None:
    events = [Event(f"c:{n:03}:live", "c", n, risk_level(n), 0, (), flipped=False, labelled=False) for n in range(101)]
    near = sorted(int(name.split(":")[1]) for name in draw(events, count=1, seed=0).strata["near_threshold"])
    assert near == list(range(50, 70))
    assert [score for score in near if risk_level(score) == "high"] == list(range(60, 70))


def test_the_rarest_tenth_is_rare_by_camera_class_hour_and_level() -> None:
    def one(n: int, camera: str = "front", hour: int = 12, classes: tuple[str, ...] = ("person",)) -> Event:
        return Event(f"{camera}:{n:03}:live", camera, 10, "low", hour, classes, flipped=False, labelled=False)

    common = [one(n) for n in range(26)]
    odd = [one(26, camera="gate"), one(27, hour=3), one(28, classes=("person", "bear"))]
    rare = draw([*common, *odd], count=1, seed=0).strata["rare"]
    assert rare == {event.event_id for event in odd}


def test_what_is_labelled_is_counted_for_rarity_and_never_drawn() -> None:
    events = [
        Event(f"c:{n:03}:live", "c", 10, "low", 3 if n < 2 else 12, ("person",), flipped=n == 0, labelled=n == 0)
        for n in range(20)
    ]
    strata = draw(events, count=5, seed=0).strata
    assert strata["rare"] == {"c:001:live"}
    assert strata["flipped"] == frozenset()


def test_a_hundred_thousand_events_are_drawn_from_in_seconds() -> None:
    events = history(100_000)
    began = time.process_time()
    assert len(draw(events, count=100, seed=1).chosen) == 100
    assert time.process_time() - began < 15

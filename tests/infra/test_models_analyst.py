"""The demo analyst: its contract as text, its sum, and the shipped weights behind llama.cpp's real server."""

import json
from pathlib import Path

import httpx
import pytest

from infra.models.analyst_data import (
    DEFAULT_INSTRUCTION,
    MODIFIERS,
    Policy,
    Window,
    area,
    contrast,
    level,
    render,
    sample,
    verdict,
)
from infra.models.analyst_model import encode, train_tokenizer
from infra.models.train_analyst import batch, forks

WEIGHTS = Path(__file__).parents[2] / "infra" / "models" / "weights"
VISITOR = Window("front-door", 23, 14, 34, 21, {"dog": (1, 0.72), "person": (1, 0.91)}, "stays")
CAT = Window("front-door", 12, 5, 11, 12, {"cat": (1, 0.83)}, "passes")
PARCEL = Window("front-door", 14, 20, 13, 14, {"person": (1, 0.9), "truck": (1, 0.8)}, "approaches")
BACK = Window("back-yard", 2, 40, 39, 40, {"person": (2, 0.88)}, "stays")
PASSER = Window("front-door", 1, 5, 6, 7, {"person": (1, 0.85)}, "passes")


def test_the_prompt_is_the_six_lines_that_the_pipeline_writes():
    assert render(VISITOR) == (
        "camera: front-door\n"
        "time: 23:14 night\n"
        "duration: 34 s\n"
        "frames: 21\n"
        "seen: 1 person 0.91, 1 dog 0.72\n"
        "moves: person stays"
    )


def test_nothing_seen_still_renders():
    assert render(Window("a", 5, 59, 0, 1, {})).endswith("seen: nothing\nmoves: nothing")


@pytest.mark.parametrize(("hour", "night"), [(21, False), (22, True), (0, True), (5, True), (6, False)])
def test_night_is_from_22_to_6(hour: int, night: bool):
    assert Window("a", hour, 0, 0, 1, {}).night is night


@pytest.mark.parametrize(
    ("window", "policy", "band"),
    [
        (VISITOR, Policy(), "high"),
        (CAT, Policy(), "low"),
        (CAT, Policy(animals_matter=True), "medium"),
        (PARCEL, Policy(), "low"),
        (BACK, Policy(), "critical"),
        (PASSER, Policy(), "medium"),
        (PASSER, Policy(strict_night=True), "high"),
    ],
)
def test_the_sum_gives_the_bands_of_the_stories(window: Window, policy: Policy, band: str):
    assert level(verdict(window, policy)["risk_score"]) == band  # type: ignore[arg-type]


def test_the_reasoning_ends_in_the_score():
    for seed in range(200):
        answer = json.loads(sample(seed).answer)
        assert answer["reasoning"].rsplit(" ", 1)[1] == str(answer["risk_score"])
        assert 0 <= answer["risk_score"] <= 100


@pytest.mark.parametrize(
    ("camera", "kind"),
    [("back_yard", "private"), ("Front-Door-2", "entrance"), ("yard-back", "private"), ("maple", "unknown")],
)
def test_a_name_tells_the_kind_of_place(camera: str, kind: str):
    assert area(camera) == kind


def test_held_out_wordings_are_never_trained():
    for trained, held_out in MODIFIERS.values():
        assert not set(trained) & set(held_out)


def test_twins_show_one_window_and_differ_in_a_sentence_that_decides():
    kinds = set()
    for seed in range(60):
        one, other = contrast(seed)
        assert one.prompt == other.prompt
        assert one.answer != other.answer
        said = {kind for kind in MODIFIERS if getattr(one.policy, kind) and not getattr(other.policy, kind)}
        assert len(said) == 1
        kinds |= said
        assert sum(getattr(other.policy, kind) for kind in MODIFIERS) <= 2
    assert kinds == set(MODIFIERS)


def test_where_two_twins_part_there_the_loss_looks():
    twins = [*contrast(1), *contrast(2)]
    tokenizer = train_tokenizer(text for s in twins for text in (s.instruction, s.prompt, s.answer))
    _, targets = batch([*twins, sample(3)], tokenizer)
    weights = forks(targets, 2)
    assert (weights > 1).sum(1).tolist() == [1, 1, 1, 1, 0]
    for row in (0, 2):
        (one, other) = (targets[row + i][targets[row + i] >= 0] for i in (0, 1))
        (at_one, at_other) = (int((weights[row + i][targets[row + i] >= 0] > 1).nonzero()[0]) for i in (0, 1))
        assert at_one == at_other
        assert one[:at_one].tolist() == other[:at_one].tolist()
        assert one[at_one] != other[at_one]


def test_numbers_are_read_digit_by_digit():
    tokenizer = train_tokenizer([render(VISITOR), DEFAULT_INSTRUCTION] * 50)
    text = tokenizer.encode("time: 23:14").tokens
    assert text[-5:] == ["2", "3", ":", "1", "4"]
    assert len(encode(tokenizer, DEFAULT_INSTRUCTION, render(VISITOR))) < 400


@pytest.mark.real
def test_the_shipped_analyst_judges_the_stories_and_obeys_its_instruction():
    from infra.models.measure_analyst import ask, served

    strict = f"{DEFAULT_INSTRUCTION} Be strict at night."
    cases = [
        (DEFAULT_INSTRUCTION, VISITOR, "high"),
        (DEFAULT_INSTRUCTION, CAT, "low"),
        (DEFAULT_INSTRUCTION, PARCEL, "low"),
        (DEFAULT_INSTRUCTION, BACK, "critical"),
        (DEFAULT_INSTRUCTION, PASSER, "medium"),
        (strict, PASSER, "high"),
    ]
    with served(WEIGHTS / "analyst.gguf") as address, httpx.Client(base_url=address, timeout=60) as client:
        for instruction, window, band in cases:
            got, text = ask(client, instruction, render(window))
            assert level(got["risk_score"]) == band, text
            assert window.camera in got["summary"], text

"""The shipped weights hold their figures: whoever changes them, or what they read, is told by how much they fell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.models import evaluate

pytestmark = pytest.mark.real

SCENES, WINDOWS = 100, 120

# `make eval` measures the shipped weights on 400 scenes and 400 windows. A floor is its figure less twice the sampling
# error of the smaller sample here: sqrt(p (1 - p) / n), with n of some 70 persons and 120 windows. Average precisions
# err by 0.02 from one hundred scenes to another. One is a ceiling: 2.5 false persons in 100 scenes, and twice its root.
FLOORS: dict[str, dict[str, float]] = {
    "detector": {"ap50": 0.91, "ap": 0.76, "person_recall": 0.88},
    "analyst": {"band_accuracy": 0.96, "summary_facts": 0.95, "prompt_shift": 0.94},
}
CEILINGS: dict[str, dict[str, float]] = {"detector": {"false_persons_per_frame": 0.06}, "analyst": {}}


@pytest.mark.parametrize(
    ("part", "ask", "count"), [("detector", evaluate.detector, SCENES), ("analyst", evaluate.analyst, WINDOWS)]
)
def test_the_shipped_weights_hold_their_floors(part: str, ask: Callable[[int], dict[str, Any]], count: int) -> None:
    got = ask(count)
    fell = {name: got[name] for name, floor in FLOORS[part].items() if got[name] < floor}
    rose = {name: got[name] for name, ceiling in CEILINGS[part].items() if got[name] > ceiling}
    assert not fell | rose, got


def test_floors_stand_just_below_what_make_eval_says_of_the_very_weights() -> None:
    said = json.loads((Path(__file__).parents[2] / "eval.json").read_text())
    for part in evaluate.PARTS:
        assert said[part]["sha256"] == evaluate.sha256_of(part), f"eval.json is of other weights: make eval ({part})"
        for name, floor in FLOORS[part].items():
            assert floor < said[part][name] <= floor + 0.2, f"{part} {name}: the floor does not fit the figure"
        for name, ceiling in CEILINGS[part].items():
            assert said[part][name] < ceiling, f"{part} {name}: the ceiling does not fit the figure"


def test_one_part_is_measured_anew_and_the_other_stays_only_if_it_is_of_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stub(part: str) -> Callable[..., dict[str, Any]]:
        return lambda count, **_: {"asked": count, "sha256": evaluate.sha256_of(part)}

    for part in evaluate.PARTS:
        monkeypatch.setattr(evaluate, part, stub(part))
    out = tmp_path / "eval.json"
    assert list(evaluate.evaluate(evaluate.PARTS, 3, out)) == ["detector", "analyst"]
    assert evaluate.evaluate(("analyst",), 5, out)["detector"]["asked"] == 3
    stale = json.loads(out.read_text()) | {"detector": {"asked": 3, "sha256": "of older weights"}}
    out.write_text(json.dumps(stale))
    assert list(evaluate.evaluate(("analyst",), 7, out)) == ["analyst"]
    assert json.loads(out.read_text())["analyst"]["asked"] == 7

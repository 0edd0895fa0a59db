"""`make eval`: the shipped weights on held-out scenes and windows: `python -m infra.models.evaluate`, into eval.json.

Everything is rendered and asked anew. The same seeds give the same scenes and windows, so figures of two runs differ
only where the weights do.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from infra.models import measure_analyst
from infra.models.library import DEMO
from infra.models.measure import Found, measure
from infra.models.renders import HELD_OUT_SEED, fresh, truth
from infra.models.train_analyst import HELD_OUT_SEED as HELD_OUT_WINDOW

PARTS = ("detector", "analyst")
#: Scenes and windows of a part: the sampling error of a share is then 2.5 points at most.
COUNT = 400
#: Scenes in memory at a time, and one batch of the detector.
_CHUNK = 20

OnDone = Callable[[int], None]


def weights_of(part: str, weights: Path = DEMO) -> Path:
    """The file that a part's figures are of."""
    return weights / ("detector/model.safetensors" if part == "detector" else "analyst.gguf")


def sha256_of(part: str, weights: Path = DEMO) -> str:
    """SHA-256 of that file, hex."""
    return hashlib.sha256(weights_of(part, weights).read_bytes()).hexdigest()


def detector(count: int = COUNT, *, weights: Path = DEMO, on_done: OnDone = lambda _: None) -> dict[str, Any]:
    """The detector's figures over `count` scenes, as `infra.models.measure.Scores` explains them."""
    from transformers import AutoModelForObjectDetection  # noqa: PLC0415 - seconds that the analyst's part need not wait

    from infra.models.measure_detector import detections  # noqa: PLC0415

    model = AutoModelForObjectDetection.from_pretrained(weights / "detector")
    found: list[Found] = []
    right: list[Found] = []
    for start in range(0, count, _CHUNK):
        data = fresh(HELD_OUT_SEED + start, min(_CHUNK, count - start))
        found += detections(model, data)
        right += [truth(data, index) for index in range(len(data.labels))]
        on_done(len(found))
    scores = asdict(measure(found, right))
    return _rounded(scores) | {"scenes": count, "first_seed": HELD_OUT_SEED, "sha256": sha256_of("detector", weights)}


def analyst(count: int = COUNT, *, weights: Path = DEMO, on_done: OnDone = lambda _: None) -> dict[str, Any]:
    """The analyst's figures over `count` windows, as `infra.models.measure_analyst.AnalystScores` explains them."""
    scores = asdict(measure_analyst.measure(weights_of("analyst", weights), count, on_done=on_done))
    return _rounded(scores) | {"first_seed": HELD_OUT_WINDOW, "sha256": sha256_of("analyst", weights)}


def evaluate(parts: tuple[str, ...], count: int, out: Path, *, weights: Path = DEMO) -> dict[str, Any]:
    """Measure the parts and write `out`; figures of the other part stay where they are of the same weights."""
    old: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    found = {part: old[part] for part in PARTS if part in old and old[part].get("sha256") == sha256_of(part, weights)}
    with Progress(console=Console(stderr=True)) as bars:
        for part in parts:
            task = bars.add_task(part, total=count)
            ask = detector if part == "detector" else analyst
            found[part] = ask(count, weights=weights, on_done=lambda done, t=task: bars.update(t, completed=done))  # type: ignore[misc]
    found = {part: found[part] for part in PARTS if part in found}
    out.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _rounded(scores: dict[str, Any]) -> dict[str, Any]:
    rounded: dict[str, Any] = json.loads(json.dumps(scores), parse_float=lambda text: round(float(text), 4))
    return rounded


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m infra.models.evaluate", description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], metavar="PART", help="detector, analyst; both if none")
    parser.add_argument("--count", type=int, default=COUNT, help="scenes and windows (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("eval.json"), help="the file (default %(default)s)")
    args = parser.parse_args()
    print(json.dumps(evaluate(tuple(args.part) or PARTS, args.count, args.out), indent=2))


if __name__ == "__main__":
    main()

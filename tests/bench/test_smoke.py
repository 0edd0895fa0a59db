"""Every benchmark runs, small, so that none can rot; and what the runner makes of figures. No rate is judged here."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from infra.local.stack import LocalStack
from tests.bench import __main__ as runner
from tests.bench.figure import Figure, latency, rate


@pytest.mark.real
@pytest.mark.parametrize("name", runner.MODULES)
async def test_the_benchmark_runs(name: str, stack: LocalStack) -> None:
    benchmark = runner.benchmarks()[name]
    seen: list[float] = []
    figures = await benchmark.measure(stack, seen.append, quick=True)
    assert figures
    assert {figure.name for figure in figures} <= set(benchmark.NAMES)
    assert all(figure.value > 0 and figure.baseline > 0 and figure.ratio > 0 for figure in figures)
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= 1


def test_every_figure_has_a_name_of_its_own_and_a_line_in_the_readme() -> None:
    names = [name for benchmark in runner.benchmarks().values() for name in benchmark.NAMES]
    assert len(names) == len(set(names))
    readme = Path(runner.__file__).with_name("README.md").read_text()
    assert [name for name in names if f"`{name}`" not in readme] == []


def test_a_rate_is_the_median_of_the_pairs_ratios() -> None:
    # A disturbance that halves both halves of a pair changes neither ratio nor verdict.
    figure = rate("x", [(90.0, 100.0), (45.0, 50.0), (99.0, 100.0)], "records/s", aim=0.9)
    assert (figure.value, figure.baseline, figure.ratio) == (90.0, 100.0, 0.9)
    assert figure.spread == (0.9, 0.99)
    assert not figure.missed


def test_a_latency_is_measured_against_its_aim() -> None:
    assert latency("x", 200.0, 100.0).ratio == 0.5
    assert latency("x", 200.0, 100.0).missed
    assert not latency("x", 50.0, 100.0).missed


def test_the_files_hold_the_list_and_beside_it_the_machine(tmp_path: Path) -> None:
    figures = [rate("x", [(1.0, 2.0)], "records/s", aim=0.9), Figure("y", 3.0, 2.0, 1.5, "images/s")]
    out, beside = runner.write(figures, {"cores": 2}, tmp_path / "bench.json")
    assert json.loads(out.read_text()) == [
        {"name": "x", "value": 1.0, "baseline": 2.0, "ratio": 0.5, "unit": "records/s"},
        {"name": "y", "value": 3.0, "baseline": 2.0, "ratio": 1.5, "unit": "images/s"},
    ]
    assert json.loads(beside.read_text()) == {"machine": {"cores": 2}, "pairs": {"x": [[1.0, 2.0]]}}


def test_a_missed_aim_is_named_and_fails_nothing() -> None:
    console = Console(record=True, width=120)
    runner.show(
        [rate("slow", [(1.0, 2.0)], "records/s", aim=0.9), Figure("shown", 1.0, 2.0, 0.5, "records/s")], console
    )
    text = console.export_text()
    assert "aims missed: slow\n" in text
    assert "shown" in text

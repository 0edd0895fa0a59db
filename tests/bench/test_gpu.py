"""`make bench-gpu` where there is no GPU: its parts, and that it ends well."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

from processors.detect.card import Card
from processors.detect.torch_detector import on_cpu
from tests.bench import gpu
from tests.processors import detect_kit


def test_every_step_has_a_rate_and_the_table_names_the_slowest(tmp_path: Path) -> None:
    card = Card.read(detect_kit.tiny_v2(tmp_path))
    with ThreadPoolExecutor(1) as decoders:
        rates = gpu.steps(card, on_cpu(card), 2, decoders, rounds=1)
    assert min(rates.values()) > 0
    row = {"model": "r18", "batch": 2, "share_of_peak": 0.25, **rates, "forward": 1.0}
    console = Console(record=True, width=160)
    gpu.show({"card": "a card", "rows": [row]}, console)
    text = console.export_text()
    assert "25%" in text
    assert "r18: its slowest step reaches 1 images/s; the aim on one H200 is 1,500" in text


def test_the_operations_of_an_image_are_counted(tmp_path: Path) -> None:
    assert gpu.flops_of(Card.read(detect_kit.tiny_v2(tmp_path))) > 1e6


def test_without_a_gpu_nothing_is_measured_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out.json")])
    gpu.main()
    assert "nothing to measure" in capsys.readouterr().out
    assert not (tmp_path / "out.json").exists()

"""Where the processes of an installation serve their metrics: each at a port of its own that stays the same."""

from pathlib import Path

import pytest

from infra import topology
from infra.config import Settings, load
from infra.installation import Installation
from infra.topology import PROCESSES


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.chdir(tmp_path)
    Path("rewatch.yaml").write_text("stages: {detect: {processes: 12}}\n")
    return load()


def test_every_process_of_an_installation_is_told_its_own_port(settings: Settings) -> None:
    ports = {}
    for spec in Installation(settings)._specs():
        argv = list(spec.argv)
        ports[spec.name] = int(argv[argv.index("--metrics-port") + 1])
    detect = 9400 + 10 * PROCESSES.index("detect")
    assert ports["ingest"] == 9400
    assert [ports[f"detect-{number}"] for number in (1, 2, 10, 11, 12)] == [detect, detect + 1, detect + 9, 0, 0]
    fixed = [port for port in ports.values() if port]
    assert len(fixed) == len(set(fixed))


def test_a_process_started_by_hand_has_the_port_of_the_stage_s_first(settings: Settings) -> None:
    assert topology.metrics_port_of(settings, "sink") == 9400 + 10 * PROCESSES.index("sink")

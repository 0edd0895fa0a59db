"""How often keys are tried."""

import pytest

from processors.gateway import throttle as throttles
from processors.gateway.throttle import Throttle


def test_a_proof_ends_after_a_day() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    assert not throttle.is_proven("a")
    throttle.succeeded("a")
    assert throttle.is_proven("a")
    assert not throttle.is_proven("b")
    now = 86_400.0
    assert not throttle.is_proven("a")


def test_the_throttle_opens_again_and_bounds_everybody_together() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    for _ in range(5):
        assert throttle.wait("a") == 0
        throttle.failed("a")
        now += 1
    assert throttle.wait("a") == 55
    assert throttle.wait("b") == 0
    now = 60.0
    assert throttle.wait("a") == 0
    for n in range(60):
        throttle.failed(f"address {n}")
    assert throttle.wait("somebody else") > 0
    now = 121.0
    assert throttle.wait("somebody else") == 0


def test_the_throttle_remembers_a_bounded_number_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttles, "_ADDRESSES", 3)
    throttle = Throttle(lambda: 0.0)
    for n in range(10):
        throttle.failed(str(n))
        throttle.succeeded(str(n))
    assert len(throttle._of) == len(throttle._proven) == 3

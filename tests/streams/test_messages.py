"""Records as stages see them, and ticks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.messages import CAMERA, KIND, TICK, WALL, Headers, Incoming, Tick
from tests.examples import incoming


def with_headers(*headers: tuple[str, bytes]) -> Incoming:
    return Incoming("frames", "e1", 0, 0, b"key", None, headers)


@pytest.mark.parametrize("tick", [Tick(5), Tick(5, "front-door")])
def test_a_tick_comes_back_as_it_was(tick: Tick) -> None:
    emit = tick.emit("frames", 3)
    assert Tick.of(with_headers(*emit.headers)) == tick
    assert (emit.value, emit.partition) == (None, 3)


def test_a_frame_is_no_tick() -> None:
    assert Tick.of(incoming("frames")) is None


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((WALL, b""),),
        ((WALL, b"soon"),),
        ((WALL, b"9" * 5000),),
        ((WALL, b"5"), (CAMERA, b"\xff")),
    ],
)
def test_a_tick_that_cannot_be_read_is_none(headers: Headers) -> None:
    assert Tick.of(with_headers((KIND, TICK), *headers)) is None


@given(st.lists(st.tuples(st.sampled_from([KIND, WALL, CAMERA]), st.binary(max_size=30) | st.just(TICK))))
def test_any_headers_are_a_tick_or_none(headers: list[tuple[str, bytes]]) -> None:
    assert isinstance(Tick.of(with_headers((KIND, TICK), *headers)), Tick | None)


def test_of_headers_with_one_name_the_last_counts() -> None:
    assert with_headers(("a", b"1"), ("b", b"2"), ("a", b"3")).header("a") == b"3"
    assert with_headers().header("a") is None


def test_an_origin_names_the_record_across_recreations() -> None:
    assert Incoming("frames", "e1", 2, 7, None, None, ()).origin == "frames:e1:2:7"

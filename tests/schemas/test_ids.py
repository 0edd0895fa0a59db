"""Ids are computed from content, so anyone can check them."""

import pytest

from schemas import ids


def test_parts_cannot_run_together() -> None:
    assert ids.digest("ab", "c") != ids.digest("a", "bc")


def test_a_frame_is_its_camera_bytes_and_capture_time() -> None:
    sha = "ab" * 32
    assert ids.frame_id("door", sha, None) == ids.frame_id("door", sha, None)
    assert ids.frame_id("door", sha, None) != ids.frame_id("yard", sha, None)
    assert ids.frame_id("door", sha, 1) != ids.frame_id("door", sha, None)
    assert ids.frame_id("door", sha, 1) != ids.frame_id("door", sha, 2)


def test_a_batch_is_its_frames_in_order() -> None:
    assert ids.batch_id("door", ["a", "b"]) != ids.batch_id("door", ["b", "a"])


def test_one_event_for_each_batch_and_run() -> None:
    assert ids.event_id("b") == ids.event_id("b", ids.LIVE)
    assert ids.event_id("b") != ids.event_id("b", "replay-1")


@pytest.mark.parametrize(
    "changed",
    [("t2", "s", {"p": 1}, "w"), ("t", "s2", {"p": 1}, "w"), ("t", "s", {"p": 2}, "w"), ("t", "s", {"p": 1}, "w2")],
)
def test_anything_that_judges_changes_the_verdict_digest(changed: tuple[str, str, dict[str, int], str]) -> None:
    assert ids.verdict_digest(*changed) != ids.verdict_digest("t", "s", {"p": 1}, "w")


def test_json_digest_ignores_the_order_of_keys() -> None:
    assert ids.json_digest({"a": 1, "b": 2}) == ids.json_digest({"b": 2, "a": 1})

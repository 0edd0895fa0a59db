"""`rewatch dlq` on a fake store: what cannot be processed can be read safely."""

from typing import Any

import pytest

from infra.cli.dlq import plain
from schemas.records import DeadLetter, Frame
from streams import codec
from tests.infra.cli_kit import FakeQueries, answer, invoke, story

LETTER = story("front")["dead_letters"][0]
assert isinstance(LETTER, DeadLetter)


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("processors.store.queries.Queries", FakeQueries)
    monkeypatch.setattr(FakeQueries, "away", None)
    monkeypatch.setattr(FakeQueries, "asked", [])


def row(**other: Any) -> dict[str, Any]:
    empty = {"key": None, "value": None, "claim": None, "headers": [], "detail": "", "status": "", "attempt": 1}
    named = {
        "origin": "frames:e:0:1",
        "stage": "detect",
        "kind": "error",
        "camera_id": "",
        "error": "E",
        "message": "m",
    }
    return {**empty, **named, "failed_at": None, **other}


def test_ls_lists_and_hands_its_filters_on() -> None:
    output = invoke("dlq", "ls", "--stage", "detect", "--kind", "error").output
    assert "not an image\\x07" in output
    assert LETTER.origin in output
    assert FakeQueries.asked == [{"stage": "detect", "kind": "error", "limit": 50}]


def test_show_tells_origin_error_and_fix_and_shows_strange_bytes_as_hex() -> None:
    [letter] = answer("dlq", "show", LETTER.origin[:8])
    assert letter["origin"] == LETTER.origin
    assert letter["error"] == "UnidentifiedImageError"
    assert letter["fix"]
    assert letter["value"] == "hex " + b"\x00\xffgarbage".hex()
    assert letter["headers"] == {"fp": "hex 0102"}
    assert "\x07" not in invoke("dlq", "show", LETTER.origin).output


def test_show_of_an_unknown_origin_is_1() -> None:
    result = invoke("dlq", "show", "batches:")
    assert result.exit_code == 1
    assert "dlq ls" in result.stderr


def test_a_value_that_is_a_record_is_shown_decoded_its_image_by_its_length() -> None:
    frame = story("front")["frames"][0]
    assert isinstance(frame, Frame)
    assert frame.image is not None
    value, fingerprint = codec.encode("frames", frame)
    shown = plain(row(value=value.hex(), headers=[("fp", fingerprint.hex())]))["value"]
    assert shown["sha256"] == frame.sha256
    assert shown["image"] == f"<{len(frame.image)} bytes>"


def test_a_long_value_is_cut_and_says_so() -> None:
    assert plain(row(value=(b"a" * 10_000).hex()))["value"].endswith("(10000 bytes)")


@pytest.mark.parametrize("detail", ['{"from": 3}', "no json {", ""])
def test_details_are_json_where_they_are(detail: str) -> None:
    shown = plain(row(detail=detail))["detail"]
    assert shown == ({"from": 3} if detail.startswith("{") else detail or None)


def test_a_gap_has_neither_key_nor_value() -> None:
    shown = plain(row(kind="gap"))
    assert (shown["key"], shown["value"], shown["size"]) == (None, None, None)
    assert "retention" in shown["fix"]

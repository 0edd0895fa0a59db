"""`rewatch dlq` on a fake store: what cannot be processed can be read safely."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from infra.cli.dlq import plain
from infra.redrive import one_each
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
    empty = {"key": None, "value": None, "claim": None, "headers": [], "detail": "", "status": "open", "attempt": 1}
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
    [asked] = FakeQueries.asked
    assert {name: value for name, value in asked.items() if value} == {"stage": "detect", "kind": "error", "limit": 50}


def test_ls_hands_error_times_and_status_on() -> None:
    invoke("dlq", "ls", "--error", "zone", "--since", "2026-11-02T10:00", "--until", "1h", "--status", "open")
    [asked] = FakeQueries.asked
    assert (asked["error"], asked["status"]) == ("zone", "open")
    assert asked["since"].isoformat() == "2026-11-02T10:00:00+00:00"
    assert timedelta(minutes=59) < datetime.now(UTC) - asked["until"] < timedelta(minutes=61)


def test_a_time_that_is_none_is_a_usage_error_that_names_its_option() -> None:
    result = invoke("dlq", "ls", "--until", "yesterday")
    assert result.exit_code == 2
    assert "--until yesterday" in result.stderr


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


@pytest.mark.parametrize(
    ("letter", "says"),
    [
        (row(), "yes: `rewatch dlq redrive frames:e:0:1` appends its bytes again"),
        (row(claim="log:frames:e:0:1"), "as long as retention keeps them"),
        (row(status="redriven"), "it is on its way; again: `rewatch dlq redrive frames:e:0:1`"),
        (row(status="resolved"), "no: it is resolved"),
        (row(kind="gap"), "no: a gap has no bytes"),
        (row(kind="shed"), "stages.detect.processes"),
        (row(kind="rejected", stage="ingest", origin="folder:front/a.jpg@00"), "yes: "),
        (row(kind="rejected", stage="ingest", origin="upload:front/a.jpg@00"), "no: it came by upload"),
        (row(stage="analyze"), "no: no stage would meet it again: analyze reads no frames"),
        (row(stage="sink"), "no: no stage would meet it again"),
        (row(stage="replay", origin="r1:door:7c1b"), "no: a shadow failed in it"),
        (row(stage="replay", origin="contexts:e:0:1"), "no: a shadow failed in it"),
        (row(stage="replay", origin="replay_units:e:0:1"), "yes: `rewatch dlq redrive replay_units:e:0:1`"),
        (row(origin="frames:front"), "no: no stage would meet it again"),
    ],
)
def test_show_says_whether_and_how_a_letter_can_be_redriven(letter: dict[str, Any], says: str) -> None:
    assert says in plain(letter)["redrive"]


def letters_of(monkeypatch: pytest.MonkeyPatch, *letters: dict[str, Any]) -> None:
    async def found(_self: FakeQueries, **asked: Any) -> list[dict[str, Any]]:
        return [one for one in letters if one["origin"].startswith(asked.get("origin") or "")]

    monkeypatch.setattr(FakeQueries, "dead_letters", found)


@pytest.mark.parametrize(
    "arguments",
    [(), ("frames:e:0:1", "--all"), ("--all", "--stage", "detect"), ("frames:e", "--since", "1h")],
    ids=["nothing", "origin and all", "all and a filter", "origin and a filter"],
)
def test_redrive_wants_to_be_told_which_in_one_way(arguments: tuple[str, ...]) -> None:
    result = invoke("dlq", "redrive", *arguments)
    assert result.exit_code == 2
    assert "say which" in result.stderr


def test_redrive_of_several_asks_and_where_nobody_can_be_asked_wants_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    letters_of(monkeypatch, row(), row(origin="frames:e:0:2"))
    result = invoke("dlq", "redrive", "--all")
    assert result.exit_code == 2
    assert "these are 2" in result.stderr
    assert "--yes" in result.stderr


def test_redrive_where_nothing_fits_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    letters_of(monkeypatch, row(status="redriven"))  # on its way: only by name again
    result = invoke("dlq", "redrive", "--all", "--yes")
    assert result.exit_code == 1
    assert "no dead letter is open that fits" in result.stderr


def test_redrive_of_an_unknown_or_an_ambiguous_origin_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    letters_of(monkeypatch, row(), row(origin="frames:e:0:2"))
    assert "there is no dead letter of batches" in invoke("dlq", "redrive", "batches").stderr
    result = invoke("dlq", "redrive", "frames:e:0")
    assert result.exit_code == 1
    assert "several begin with frames:e:0" in result.stderr


def test_redrive_without_a_broker_is_3_and_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    letters_of(monkeypatch, row())
    result = invoke("dlq", "redrive", "frames:e:0:1")
    assert result.exit_code == 3
    assert "kafka.bootstrap_servers" in result.stderr
    assert "0 of 1 were done before" in result.stderr


def test_one_record_serves_two_stages_and_records_come_in_their_order() -> None:
    resolved = row(stage="replay", status="resolved")
    letters = [row(origin="frames:e:0:10"), row(origin="folder:a/b@0", kind="rejected"), row(), resolved]
    assert one_each(letters) == [letters[1], letters[2], letters[0]]

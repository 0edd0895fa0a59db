"""`rewatch events` and `explain` on a fake store."""

from datetime import UTC, datetime
from typing import Any

import pytest

from processors.store.queries import Lineage, Row
from schemas.records import Frame
from streams.errors import UnavailableError
from tests.infra.cli_kit import AT, FakeQueries, answer, invoke, story

EVENT = story("front")["risk_events"][0].event_id  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("processors.store.queries.Queries", FakeQueries)
    monkeypatch.setattr(FakeQueries, "away", None)
    monkeypatch.setattr(FakeQueries, "asked", [])


def test_ls_lists_and_its_json_holds_whole_events() -> None:
    [event] = answer("events", "ls")
    assert (event["event_id"], event["risk_level"], event["started_at"]) == (EVENT, "high", "2026-11-02T10:00:00+00:00")
    output = invoke("events", "ls").output
    assert "72 high" in output
    assert "[red]doors\\x1b[2J" in output  # neither markup nor a way to steer the terminal


def test_ls_hands_its_filters_on() -> None:
    invoke("events", "ls", "--camera", "front", "--level", "high", "--since", "2026-11-02T18:00", "--limit", "5")
    assert FakeQueries.asked == [
        {"camera": "front", "level": "high", "since": datetime(2026, 11, 2, 18, tzinfo=UTC), "limit": 5}
    ]


@pytest.mark.parametrize("arguments", [("--level", "huge"), ("--since", "soon"), ("--limit", "0")])
def test_a_filter_that_makes_no_sense_is_2(arguments: tuple[str, str]) -> None:
    assert invoke("events", "ls", *arguments).exit_code == 2


def test_a_beginning_that_only_one_event_has_is_enough() -> None:
    assert answer("events", "show", EVENT[:10])["event_id"] == EVENT
    assert "rendered_prompt" in invoke("events", "show", EVENT[:10]).output


def test_an_unknown_event_names_what_is_near_and_ends_with_1() -> None:
    result = invoke("explain", "frnt:2183")
    assert result.exit_code == 1
    assert EVENT in result.stderr


def test_a_beginning_of_several_lists_them_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    async def events_like(self: FakeQueries, text: str, *, limit: int) -> list[Row]:
        return [self.tables["risk_events"][0] | {"event_id": f"front:{n}"} for n in range(3)]

    monkeypatch.setattr(FakeQueries, "events_like", events_like)
    result = invoke("explain", "front")
    assert result.exit_code == 1
    assert "front:0" in result.stderr
    assert "front:2" in result.stderr


def test_clickhouse_away_is_3() -> None:
    FakeQueries.away = UnavailableError("store", "ClickHouse does not answer (clickhouse.url)")
    result = invoke("explain", EVENT)
    assert result.exit_code == 3
    assert "clickhouse.url" in result.stderr


def test_explain_goes_from_the_event_to_the_frames_hashes() -> None:
    frames = [frame for frame in story("front")["frames"] if isinstance(frame, Frame)]
    lineage = answer("explain", EVENT)
    assert [entry["frame"]["sha256"] for entry in lineage["frames"]] == [frame.sha256 for frame in frames]
    assert lineage["event"]["origin"] == "risk_events:ffffffff:0:0"
    assert lineage["event"]["conditions"] == {"seed": "0", "slots": "1"}
    assert lineage["batch"]["closed_by"] == "end_of_stream"
    assert lineage["batch"]["origin"] == "batches:ffffffff:0:0"
    assert lineage["context"]["sections.name"] == ["baseline"]
    first = lineage["frames"][0]
    assert first["frame"]["captured_at"] == "2026-11-02T10:00:00+00:00"
    assert first["frame"]["origin"] == "frames:ffffffff:0:0"
    assert [(box["label"], box["score"]) for box in first["detections"]["boxes"]] == [
        ("person", 0.93),
        ("car", 0.88),
        ("bird", 0.12),
    ]
    assert [box["stationary"] for box in first["boxes"]] == [False, True]


def test_the_tree_says_it_all_to_people() -> None:
    output = invoke("explain", EVENT).output
    for part in (
        EVENT,
        "72 high",
        "why: Three frames show the same person",
        "prompt: " + "b" * 32,
        "model sha256: " + "c" * 64,
        '{"temperature": 0}',
        "seed 0, slots 1",
        "baseline (by b/1): Nobody comes at this hour.",
        "closed by end_of_stream at detections offset 4",
        "window settings: " + "5" * 32,
        "captured 2026-11-02 11:00:00+01:00 (by exif)",  # by the clock of the camera
        "person 0.93, 40 x 80 at 10, 20",
        "car 0.88, 90 x 50 at 100, 60, has not moved",
        "1 more below the threshold",
        "frames:ffffffff:0:0",
        *(frame.sha256 for frame in story("front")["frames"] if isinstance(frame, Frame)),
    ):
        assert part in output
    assert "\x1b" not in output
    assert "[user] A window." not in output


def test_the_prompt_is_shown_when_asked_for() -> None:
    output = invoke("explain", EVENT, "--prompt").output
    assert "[user] A window." in output
    assert 'raw completion: {"risk_score": 72}' in output


def test_explain_bears_that_rows_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lineage(_: FakeQueries, event: Row) -> Lineage:
        return Lineage(event, None, None, {}, {})

    monkeypatch.setattr(FakeQueries, "made_from", lineage)
    plain = answer("explain", EVENT)
    assert (plain["batch"], plain["context"], plain["frames"][0]["frame"]) == (None, None, None)
    assert "not in ClickHouse" in invoke("explain", EVENT).output


def test_times_in_the_story_are_the_ones_that_are_tested() -> None:
    assert datetime.fromtimestamp(AT / 1000, UTC) == datetime(2026, 11, 2, 10, tzinfo=UTC)

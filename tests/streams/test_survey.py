"""Counting what is on the log, without a log: holes, ticks, bounds."""

from array import array

import pytest
from aiokafka import TopicPartition

from processors.detect.stage import DetectStage
from processors.replay.stage import ReplayStage
from processors.sink.stage import SinkStage
from streams import survey
from streams.survey import READS, Count, _count, _remembered, _Seen, _since
from streams.topics import STORED

TP = TopicPartition("frames", 0)


def seen(*offsets: int, ticks: tuple[int, ...] = (), since: int = 0, upto: int = 100) -> _Seen:
    return _Seen(array("q", offsets), array("q", ticks), since, upto)


def test_what_stages_read_is_what_they_say() -> None:
    assert READS["detect"] == DetectStage.inputs
    assert READS["sink"] == SinkStage.inputs == STORED
    assert READS["replay"] == ReplayStage.inputs
    assert list(READS) == ["detect", "batch", "enrich", "analyze", "sink", "replay"]


@pytest.mark.parametrize(
    ("position", "count"),
    [
        (0, Count(3, exact=True)),
        (5, Count(2, exact=True)),  # the record at the position is not done yet
        (6, Count(1, exact=True)),
        (97, Count(0, exact=True)),  # nothing but markers up to the end
        (100, Count(0, exact=True)),
        (120, Count(0, exact=True)),
    ],
)
def test_markers_do_not_count_as_lag(position: int, count: Count) -> None:
    assert seen(2, 5, 96).behind(position, end=100) == count


def test_lag_beyond_what_was_read_is_an_estimate() -> None:
    assert seen(50, 60, since=50).behind(10, end=100) == Count(90, exact=False)
    assert seen(50, 60, since=50, upto=80).behind(50, end=100) == Count(50, exact=False)


def test_ticks_are_lag_but_no_records() -> None:
    frames = seen(2, 5, 96, ticks=(5,))
    assert _count("frames", [TP], {TP: 0}, {TP: 100}, {TP: frames}) == Count(2, exact=True)
    assert frames.behind(0, end=100) == Count(3, exact=True)


def test_a_topic_too_long_to_read_is_read_from_where_its_last_stage_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "COUNT_OFFSETS", 50)
    at = {("detect", TP): 90, ("sink", TP): 95}
    assert _since([TP], {TP: 0}, {TP: 100}, at, count=True) == {TP: 90}
    assert _count("frames", [TP], {TP: 0}, {TP: 100}, {TP: seen(91, since=90)}) == Count(100, exact=False)


def test_a_stage_too_far_behind_is_not_read_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "COUNT_OFFSETS", 50)
    assert _since([TP], {TP: 0}, {TP: 100}, {("detect", TP): 0}, count=True) == {TP: 100}


def test_a_short_topic_is_read_whole_to_be_counted_and_no_further_than_needed_for_lag() -> None:
    at = {("detect", TP): 90}
    assert _since([TP], {TP: 10}, {TP: 100}, at, count=True) == {TP: 10}
    assert _since([TP], {TP: 10}, {TP: 100}, at, count=False) == {TP: 90}


def test_what_was_seen_before_is_not_read_again() -> None:
    known = seen(2, 5, 96, ticks=(5,), upto=100)
    assert _remembered(known, 0, 120) == known
    retained = _remembered(known, 5, 120)  # retention took the first
    assert (list(retained.offsets), list(retained.ticks), retained.since, retained.upto) == ([5, 96], [5], 5, 100)


@pytest.mark.parametrize(
    ("since", "end"),
    [
        (120, 200),  # retention took all of it
        (0, 50),  # the log ends before what was seen: it was truncated
    ],
)
def test_what_the_log_does_not_bear_out_is_forgotten(since: int, end: int) -> None:
    assert _remembered(seen(2, 5, 96), since, end) == (array("q"), array("q"), since, since)


def test_whoever_gave_up_in_the_middle_of_a_batch_goes_on_from_its_beginning() -> None:
    assert list(seen(2, 5, 96).between(0, 5).offsets) == [2]

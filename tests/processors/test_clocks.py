"""A clock that is set back and forth: ids stay, windows close, ticks do not burst, nothing is lost or doubled."""

import asyncio
import itertools
import json
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.ingest.core import Submission
from processors.ingest.fakes import MemoryLog
from schemas import ids
from streams import health, partition
from streams.messages import WALL
from tests.processors.batch_kit import T0, Road, box, seen
from tests.processors.ingest_kit import NOW, Clock, appenders, jpeg

HOUR_S = 3600

# What the clock is set by, seconds: an NTP step, an hour too far, a clock that had stopped for a day.
SET_BY = st.sampled_from((0, 0, 0, 0, 0, 2, -2, HOUR_S, -HOUR_S, 24 * HOUR_S, -24 * HOUR_S))


@given(st.lists(st.tuples(st.sampled_from((0.5, 1, 5, 29, 31, 60)), SET_BY, st.booleans()), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None, database=None)
def test_every_frame_that_matters_is_in_one_window_whatever_the_clock_does(moments: list[tuple]) -> None:
    """Frames arrive by a clock that jumps, and ticks are told by the same clock."""
    road, wall, fed = Road(), 0.0, []
    for number, (later_s, set_by_s, is_frame) in enumerate(moments):
        wall += later_s + set_by_s
        if is_frame:
            record = seen(number << 200, None, box(200 * len(fed)), arrived_at=T0 + round(wall * 1000))
            fed.append(record.frame_id)
            road._done(road.windows.feed(road.offset, record, road.settings))
        else:
            road.tick(wall)
    road.end()
    placed = Counter(frame.frame_id for batch in road.batches for frame in batch.frames if frame.matters)
    assert placed == Counter(fed)
    assert all(ids.batch_id("gate", [f.frame_id for f in batch.frames]) == batch.batch_id for batch in road.batches)
    times = [frame.event_at for batch in road.batches for frame in batch.frames]
    assert times == sorted(times), "a camera's time never goes back"


@pytest.mark.parametrize("set_by_s", [HOUR_S, -HOUR_S])
def test_a_window_opened_after_the_clock_was_set_closes_after_its_silence(set_by_s: float) -> None:
    road = Road()
    road.person(0)
    road.tick(40)
    road.person(50 + set_by_s)
    assert len(road.batches) == 1
    road.tick(50 + set_by_s + 30)
    assert len(road.batches) == 1
    road.tick(50 + set_by_s + 31)
    assert [len(batch.frames) for batch in road.batches] == [1, 1]


def test_a_window_that_was_open_when_the_clock_was_set_back_closes_by_the_frames_that_follow() -> None:
    road = Road()
    road.person(0)
    road.tick(-HOUR_S)
    assert road.batches == [], "by that clock nothing has been silent for 30 s"
    road.person(5 - HOUR_S)  # it goes on in the same window, and its arrival is what ticks are held against
    road.tick(5 - HOUR_S + 31)
    assert [len(batch.frames) for batch in road.batches] == [2]


async def test_ticks_do_not_burst_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "TICK_EVERY_S", 0.05)
    told: list[bytes] = []
    jumps = itertools.cycle((0, 24 * HOUR_S, -24 * HOUR_S))

    class Producer:
        async def start(self) -> None:
            pass

        async def send_and_wait(self, topic: str, **told_by: Any) -> None:
            told.append(dict(told_by["headers"])[WALL])
            assert topic == "frames"

    async def let_go(_: Any) -> None:
        pass

    monkeypatch.setattr(partition, "let_go", let_go)
    ownership = SimpleNamespace(
        kafka=SimpleNamespace(producer=Producer), now_ms=lambda: int((time.time() + next(jumps)) * 1000)
    )
    worker: Any = SimpleNamespace(ownership=ownership, partition=0)
    stage: Any = SimpleNamespace(tick_topic="frames")
    fold: Any = SimpleNamespace(open_windows=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await partition._Pulse(worker, stage, fold).run()
    assert 3 <= len(told) <= 11
    assert len(set(told)) == len(told)


async def test_the_same_frame_is_the_same_whatever_the_clock_says(tmp_path: Path) -> None:
    log, clock = MemoryLog(), Clock()
    one = appenders(log, tmp_path, clock=clock)
    found = []
    for at in (NOW, NOW + 24 * HOUR_S, NOW - 24 * HOUR_S):
        clock.at = at
        entry = await one.prepare(submission(one.now_ms()))
        (receipt,) = await one.append("front", [entry])
        found.append(receipt)
    await one.close()
    assert [receipt.status for receipt in found] == ["accepted", "known", "known"]
    assert len({receipt.frame_id for receipt in found}) == 1
    assert len(log.frames()) == 1


def submission(arrived_at: int) -> Submission:
    return Submission(camera_id="front", data=jpeg(1), source="upload", name="", arrived_at=arrived_at)


@pytest.mark.parametrize("set_by_s", [HOUR_S, -HOUR_S])
def test_what_a_worker_said_before_the_clock_was_set_is_not_taken_for_news(tmp_path: Path, set_by_s: float) -> None:
    (tmp_path / "status").mkdir()
    said = {"pid": os.getpid(), "written_at": time.time() - set_by_s}
    (tmp_path / "status" / "detect.json").write_text(json.dumps(said))
    assert health.workers(tmp_path) == []

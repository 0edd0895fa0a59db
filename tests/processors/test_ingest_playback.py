"""A directory played as a camera's stream: in order, once, and ended."""

import os

import pytest

from processors.ingest import core
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.playback import PlaybackError, Progress, play
from streams.messages import Tick
from tests.processors.ingest_kit import NOW, appenders, away, jpeg, png


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
def footage(tmp_path):
    """Forty frames, one a second, whose names run against their times."""
    root = tmp_path / "footage"
    root.mkdir()
    for shade in range(40):
        path = root / f"{99 - shade}.jpg"
        path.write_bytes(jpeg(shade))
        os.utime(path, (NOW - 1000 + shade, NOW - 1000 + shade))
    return root


async def no_sleep(_seconds):
    pass


async def test_every_jpeg_in_order_then_the_end(log, tmp_path, footage):
    (footage / "notes.txt").write_text("x")
    (footage / "sub").mkdir()
    (footage / "sub/late.JPEG").write_bytes(jpeg(100))
    os.utime(footage / "sub/late.JPEG", (NOW, NOW))
    made = appenders(log, tmp_path)
    seen = []
    progress = await play(made, footage, "front", on_progress=seen.append)
    assert [f.source_name for f in log.frames()] == [f"{99 - shade}.jpg" for shade in range(40)] + ["sub/late.JPEG"]
    assert log.records[-2].value is None
    assert log.ticks() == [Tick(int(NOW * 1000), "front")]
    assert progress == Progress(total=41, done=41, accepted=41)
    assert [step.done for step in seen] == [0, 32, 41]
    await made.close()


async def test_played_again_nothing_is_appended_but_the_end(log, tmp_path, footage):
    for _ in range(2):
        made = appenders(log, tmp_path)
        progress = await play(made, footage, "front")
        await made.close()
    assert progress == Progress(total=40, done=40, known=40)
    assert len(log.frames()) == 40
    assert len(log.ticks()) == 2


async def test_more_files_than_are_remembered_go_on_by_the_cursor(log, tmp_path, monkeypatch, footage):
    monkeypatch.setattr(core, "REMEMBERED", 5)
    for step in (*["committed"] * 3, "none"):
        calls = 0

        def die(at, step=step):
            nonlocal calls
            calls += at == step
            if calls == 2:
                raise RuntimeError("killed")

        log.fault = die
        made = appenders(log, tmp_path)
        try:
            await play(made, footage, "front", cursor=tmp_path / "cursor", speed=1e9)
        except RuntimeError:
            assert step != "none"
        log.fault = lambda _: None
        await made.close()
    assert len(log.frames()) == 40
    assert len({frame.frame_id for frame in log.frames()}) == 40


async def test_what_is_no_image_is_a_dead_letter_and_stays(log, tmp_path, footage):
    (footage / "bad.jpg").write_bytes(png())
    made = appenders(log, tmp_path)
    progress = await play(made, footage, "front")
    await made.close()
    assert (progress.accepted, progress.rejected) == (40, 1)
    assert len(log.dead_letters()) == 1
    assert (footage / "bad.jpg").exists()


async def test_paced_by_capture_time(log, tmp_path, footage):
    now = 0.0

    async def sleep(seconds):
        nonlocal now
        now += seconds

    made = appenders(log, tmp_path)
    await play(made, footage, "front", speed=2.0, sleep=sleep, monotonic=lambda: now)
    await made.close()
    assert now == pytest.approx(39 / 2)


async def test_an_away_broker_is_waited_for_and_said(log, tmp_path, footage):
    log.fault = away(3)
    made = appenders(log, tmp_path)
    seen = []
    progress = await play(made, footage, "front", on_progress=seen.append, sleep=no_sleep)
    await made.close()
    assert {step.waiting_on for step in seen} == {"", "broker"}
    assert progress.accepted == 40
    assert len(log.frames()) == 40


async def test_what_cannot_be_played_is_said(log, tmp_path, footage):
    made = appenders(log, tmp_path, cameras=MemoryCameras())
    with pytest.raises(PlaybackError, match="no directory"):
        await play(made, tmp_path / "none", "front")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlaybackError, match=r"no \.jpg"):
        await play(made, tmp_path / "empty", "front")
    with pytest.raises(core.UnknownCameraError, match="rewatch camera add back"):
        await play(made, footage, "back", create=False)
    assert log.records == []

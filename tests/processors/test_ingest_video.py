"""A recording played as a camera's stream: at its own times, upright, once, and to the break where it is broken."""

import asyncio
import io
import os
import threading
import time
from fractions import Fraction

import av
import pytest
from PIL import Image

from processors.ingest import core, video
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.recording import Recording, RecordingError
from processors.ingest.video import Start, play
from streams.messages import Tick
from tests.processors.ingest_kit import NOW, appenders, away, jpeg
from tests.processors.video_kit import cut, record, sound

CREATED = "2026-11-21T09:00:00.000000Z"
CREATED_MS = int((NOW - 3 * 3600) * 1000)


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
def clip(tmp_path):
    """Two seconds at 25 frames a second."""
    return record(tmp_path / "clip.mp4", created=CREATED)


async def played(log, tmp_path, path, fps=5, *, cameras=None, settings=None, **options):
    made = appenders(log, tmp_path, cameras=cameras, **(settings or {}))
    try:
        return await play(made, path, "front", fps=Fraction(str(fps)), **options)
    finally:
        await made.close()


def positions(log):
    return [float(frame.source_name.partition("#t=")[2]) for frame in log.frames()]


async def test_frames_at_the_wanted_rate_with_their_times_then_the_end(log, tmp_path, clip):
    progress = await played(log, tmp_path, clip)
    frames = log.frames()
    assert [frame.captured_at - CREATED_MS for frame in frames] == list(range(0, 2000, 200))
    assert frames[3].source_name == "clip.mp4#t=0.600"
    assert {(frame.source, frame.captured_from, frame.width, frame.height) for frame in frames} == {
        ("video", "client", 96, 64)
    }
    assert log.ticks() == [Tick(int(NOW * 1000), "front")]
    assert log.records[-2].value is None
    assert progress.start == Start(CREATED_MS, "the container's creation_time")
    assert (progress.accepted, progress.duration_ms, progress.fault) == (10, 2000, "")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.avi"])
async def test_never_more_frames_than_there_are_whatever_the_container_rounds(log, tmp_path, name):
    path = record(tmp_path / name, rate=24, frames=48, codec="mpeg4" if name.endswith("avi") else "libx264")
    for fps in (24, 1000):
        await played(log, tmp_path, path, fps)
        assert len(log.frames()) == 48


async def test_a_variable_rate_is_picked_by_time(log, tmp_path):
    # A camera that sends more while something moves.
    times = [0, 40, 80, 1000, 1900, 2010, 2050, 2990, 3000, 7000]
    path = record(tmp_path / "vfr.mkv", times_ms=times, created=CREATED)
    await played(log, tmp_path, path, 1)
    assert positions(log) == [0, 1, 2.01, 3, 7]


async def test_rotated_recordings_stand_upright(log, tmp_path):
    record(tmp_path / "turned.mp4", rotation=90, frames=5)
    await played(log, tmp_path, tmp_path / "turned.mp4")
    frame = log.frames()[0]
    assert (frame.width, frame.height) == (64, 96)
    with Image.open(io.BytesIO(frame.image)) as image:  # what was up left is down left after a turn to the left
        assert min(image.getpixel((4, 91))) > 200
        assert max(image.getpixel((59, 4))) < 60


async def test_played_twice_nothing_is_added_but_the_end(log, tmp_path, clip):
    for _ in range(2):
        progress = await played(log, tmp_path, clip)
    assert (progress.accepted, progress.known) == (0, 10)
    progress = await played(log, tmp_path, clip, cursor=tmp_path / "cursor")
    progress = await played(log, tmp_path, clip, cursor=tmp_path / "cursor")
    assert (progress.accepted, progress.known) == (0, 10)
    assert len(log.frames()) == 10
    assert len(log.ticks()) == 4


async def test_ended_at_any_instant_it_goes_on(log, tmp_path, clip, monkeypatch):
    monkeypatch.setattr(core, "REMEMBERED", 20)  # what one transaction takes, and a few
    monkeypatch.setattr(video, "_CHUNK", 7)
    for step in ("open", "commit", "committed", "committed", "none"):
        calls = 0

        def die(at, step=step):
            nonlocal calls
            calls += at == step
            if calls == 2 or (calls == 1 and step == "open"):
                raise RuntimeError("killed")

        log.fault = die
        try:
            await played(log, tmp_path, clip, 25, cursor=tmp_path / "cursor")
        except RuntimeError:
            assert step != "none"
        log.fault = lambda _: None
    assert len(log.frames()) == 50
    assert len({frame.frame_id for frame in log.frames()}) == 50


async def test_other_options_are_other_frames_for_the_cursor(log, tmp_path, clip):
    cursor = tmp_path / "cursor"
    await played(log, tmp_path, clip, cursor=cursor)
    assert (await played(log, tmp_path, clip, cursor=cursor, quality=40)).accepted == 10
    assert (await played(log, tmp_path, clip, 10, cursor=cursor)).accepted == 10
    assert (await played(log, tmp_path, clip, 10, cursor=cursor, start="2026-11-21T10:00:00Z")).accepted == 20


async def test_the_start_is_given_or_found_in_container_name_or_file_time(log, tmp_path, clip):
    os.utime(clip, (NOW, NOW))
    given = await played(log, tmp_path, clip, start="2026-11-20T10:00:00+01:00")
    assert given.start == Start(int((NOW - 27 * 3600) * 1000), "--start")
    local = await played(
        log, tmp_path, clip, start="2026-11-20T10:00", cameras=MemoryCameras("front", time_zone="Europe/Berlin")
    )
    assert local.start.at == given.start.at
    bare = record(tmp_path / "front_20261120_090000.mkv")
    os.utime(bare, (NOW, NOW))
    named = await played(log, tmp_path, bare, settings={"time_patterns": ("%Y%m%d_%H%M%S",)})
    assert named.start == Start(given.start.at, "the file's name (ingest.time_patterns)")
    written = await played(log, tmp_path, bare)
    assert written.start == Start(int(NOW * 1000) - 2000, "the file's modification time less its length")
    with pytest.raises(core.RejectedError, match="is no time"):
        await played(log, tmp_path, clip, start="yesterday")


async def test_a_clock_that_was_never_set_is_no_start(log, tmp_path):
    path = record(tmp_path / "clip.mp4", created="1970-01-01T00:00:05.000000Z")
    assert (await played(log, tmp_path, path)).start.source == "the file's modification time less its length"


@pytest.mark.parametrize(("name", "options"), [("cut.mkv", {}), ("cut.mp4", {"movflags": "faststart"})])
async def test_frames_before_the_break_are_kept_and_the_break_is_said(log, tmp_path, name, options):
    path = cut(record(tmp_path / name, frames=250, options=options), 0.5)
    progress = await played(log, tmp_path, path)
    assert 5 <= progress.accepted < 45
    assert positions(log) == [n / 5 for n in range(progress.accepted)]
    assert "cut off" in progress.fault
    assert "of 10.0 s" in progress.fault
    assert len(log.ticks()) == 1


async def test_frames_after_broken_ones_are_taken(log, tmp_path):
    path = record(tmp_path / "broken.mkv", frames=100, size=(320, 240))
    with av.open(str(path)) as container:
        packet = bytes(list(container.demux(video=0))[50])
    data = path.read_bytes()
    assert data.count(packet) == 1
    path.write_bytes(data.replace(packet, bytes(len(packet))))
    progress = await played(log, tmp_path, path, 25)
    assert progress.fault == "1 of its packets could not be decoded"
    assert 90 <= progress.accepted <= 99  # those that refer to it are lost with it, up to the next key frame
    assert positions(log)[-1] >= 3.9


async def test_what_is_no_video_is_said(log, tmp_path):
    (tmp_path / "notes.txt").write_text("x\n" * 500)
    (tmp_path / "photo.jpg").write_bytes(jpeg(1))
    (tmp_path / "empty.mp4").write_bytes(b"")
    cut(record(tmp_path / "unfinished.mp4"), 0.6)
    sound(tmp_path / "sound.m4a")
    for name, why in {
        "notes.txt": "takes it for tty",
        "photo.jpg": "takes it for",
        "empty.mp4": "is no video, or is cut off before its index",
        "unfinished.mp4": "is no video, or is cut off before its index",
        "sound.m4a": "sound only",
        "none.mp4": "is no file",
    }.items():
        with pytest.raises(RecordingError, match=why):
            await played(log, tmp_path, tmp_path / name)
    record(tmp_path / "large.mp4", frames=2)
    with pytest.raises(RecordingError, match=r"96x64 are 6,144 pixels, ingest\.max_pixels allows 100"):
        await played(log, tmp_path, tmp_path / "large.mp4", settings={"max_pixels": 100})
    assert log.records == []


async def test_a_play_list_does_not_make_us_read_elsewhere(log, tmp_path):
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:2,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(RecordingError):
        await played(log, tmp_path, tmp_path / "list.m3u8")


async def test_what_is_too_long_is_a_dead_letter(log, tmp_path, clip):
    progress = await played(log, tmp_path, clip, settings={"max_bytes": 500})
    assert (progress.accepted, progress.rejected) == (0, 10)
    assert len(log.dead_letters()) == 10


async def test_at_its_own_pace(log, tmp_path, clip):
    now = 0.0

    async def sleep(seconds):
        nonlocal now
        now += seconds

    await played(log, tmp_path, clip, speed=2.0, sleep=sleep, monotonic=lambda: now)
    assert now == pytest.approx(1.8 / 2)


async def test_an_away_broker_is_waited_for_and_said(log, tmp_path, clip):
    async def no_sleep(_):
        pass

    log.fault = away(3)
    seen = []
    progress = await played(log, tmp_path, clip, on_progress=seen.append, sleep=no_sleep)
    assert {step.waiting_on for step in seen} == {"", "broker"}
    assert (progress.accepted, progress.position_ms) == (10, 1960)


async def test_decoding_blocks_nobody_and_keeps_little_in_memory(log, tmp_path, monkeypatch):
    path = record(tmp_path / "clip.mkv", frames=200)
    monkeypatch.setattr(video, "_CHUNK", 4)
    encoded, appended, most, threads = 0, 0, 0, set()
    encode = Recording._encode

    def count(self, frame):
        nonlocal encoded, most
        threads.add(threading.current_thread())
        encoded += 1
        most = max(most, encoded - appended)
        return encode(self, frame)

    monkeypatch.setattr(Recording, "_encode", count)

    def show(now):
        nonlocal appended
        appended = now.accepted

    await played(log, tmp_path, path, 25, on_progress=show)
    assert appended == 200
    assert most <= 3 * 4  # a chunk that is appended, one that is ready, and one that is begun
    assert threading.main_thread() not in threads


async def test_a_cancelled_play_lets_go_of_the_file_soon(log, tmp_path):
    path = record(tmp_path / "clip.mkv", frames=1500)
    going = asyncio.Event()
    playing = asyncio.create_task(played(log, tmp_path, path, 25, on_progress=lambda _: going.set()))
    await going.wait()
    before = time.monotonic()
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert time.monotonic() - before < 2


def test_a_clock_that_starts_again_goes_on(tmp_path):
    parts = [record(tmp_path / f"{n}.ts").read_bytes() for n in range(2)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(parts))
    recording = Recording(joined, fps=Fraction(5), quality=85, max_pixels=10**6)
    found = []
    while not recording.ended:
        found += recording.take(100)
    recording.close()
    assert len(found) >= 19
    at = [still.position_ms for still in found]
    assert at == sorted(at)
    assert at[-1] > 3000

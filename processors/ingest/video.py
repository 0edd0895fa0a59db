"""`rewatch ingest video`: a recording, played as one camera's stream, which then ends."""

import asyncio
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from processors.ingest import core
from processors.ingest.appender import Appenders, Entry
from processors.ingest.cursor import Cursor, Mark
from processors.ingest.patience import Sleep, patiently
from processors.ingest.recording import Recording, RecordingError, Still
from processors.ingest.taking import append_counted, entry_of

__all__ = ["QUALITY", "Progress", "RecordingError", "Start", "play", "start_of"]

QUALITY = 85
"""JPEG quality of frames: at 75, Pillow's own default, far figures of a dozen pixels blur with their background."""

# Frames decoded, then appended together. While some are appended the next are decoded: twice as many are in memory,
# 20 MB of 4K pictures.
_CHUNK = 16


class Start(NamedTuple):
    """When a recording began."""

    at: int
    """ms since the Unix epoch."""
    source: str
    """Who says so, for people."""


class Progress(NamedTuple):
    """How far a recording is played."""

    start: Start
    duration_ms: int | None
    """Its length; None where it does not tell."""
    position_ms: int = 0
    accepted: int = 0
    known: int = 0
    """Already on the log, or taken in an earlier run."""
    rejected: int = 0
    """Could not be taken (ingest.max_bytes): each is a dead letter now."""
    fault: str = ""
    """What is wrong with the file; its frames before and after are taken."""
    waiting_on: str = ""
    """What it waits on; empty while it goes on."""


async def play(
    appenders: Appenders,
    path: Path,
    camera_id: str,
    *,
    fps: Fraction,
    quality: int = QUALITY,
    start: str = "",
    cursor: Path | None = None,
    speed: float = 0.0,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
    sleep: Sleep = asyncio.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Progress:
    """Append the frames of a video file at a rate, then the end of the stream.

    Run again after it was ended at any instant, it goes on: what a transaction took is known by its id, and what
    many transactions took by the cursor.

    Args:
        appenders: the ways into the log.
        path: the file.
        camera_id: whose recording it is; made where it is not known.
        fps: frames a second, never more than there are.
        quality: of the JPEGs, 1 to 95.
        start: when the recording began, ISO 8601 or ms since the Unix epoch; empty: see `start_of`.
        cursor: a file that notes what was taken; needed to go on after more than 1,000 frames.
        speed: how many times faster than recorded; 0 is as fast as possible.
        on_progress: called after each step.
        sleep: how to pause.
        monotonic: seconds that never jump.

    Raises:
        RecordingError: it is no video, or nothing in it can be decoded.
        RejectedError: the camera id is none, or the start is no time.
        UnavailableError: the cursor cannot be kept.
    """
    core.check_camera_id(camera_id)
    recording = await asyncio.to_thread(
        lambda: Recording(path, fps=fps, quality=quality, max_pixels=appenders.settings.max_pixels)
    )
    try:
        await patiently(lambda: appenders.camera(camera_id, create=True), sleep=sleep)
        played = _Play(appenders, path, camera_id, recording, start_of(path, recording, appenders, camera_id, start))
        if cursor is not None:
            played.note_in(cursor, f"{fps} {quality}")
        return await played.run(speed, on_progress, sleep, monotonic)
    finally:
        await asyncio.to_thread(recording.close)


def start_of(path: Path, recording: Recording, appenders: Appenders, camera_id: str, given: str) -> Start:
    """When a recording began: as given; by its container; by its name; or by when the file was last written.

    Raises:
        RejectedError: what was given is no time.
    """
    zone = appenders.zone(camera_id)
    if given:
        return Start(core.client_time(given, zone), "--start")
    if recording.created_at is not None:
        return Start(recording.created_at, "the container's creation_time")
    for name in (path.name, path.absolute().as_posix()):
        named = appenders.patterns.find(name, zone)
        if named is not None:
            return Start(named, "the file's name (ingest.time_patterns)")
    written = path.stat().st_mtime_ns // 1_000_000
    if recording.duration_ms is None:
        return Start(written, "the file's modification time (its length is not known)")
    return Start(written - recording.duration_ms, "the file's modification time less its length")


class _Play:
    """One run over a recording."""

    def __init__(self, appenders: Appenders, path: Path, camera_id: str, recording: Recording, start: Start) -> None:
        self._appenders = appenders
        self._path = path
        self._camera_id = camera_id
        self._recording = recording
        self._start = start
        self._file = path.stat()
        self._cursor: Cursor | None = None
        self._how = ""
        self.progress = Progress(start, recording.duration_ms)

    def note_in(self, path: Path, how: str) -> None:
        """Note in a cursor what is taken; `how` names the options that make a frame another one."""
        identity = f"{self._appenders.log_identity}:{self._camera_id}"
        self._cursor = Cursor(path, identity, "the recording's cursor")
        self._how = f"{self._start.at} {how}"
        self._recording.known = lambda position_ms: self._is_noted(str(position_ms))

    async def run(
        self,
        speed: float,
        on_progress: Callable[[Progress], None],
        sleep: Sleep,
        monotonic: Callable[[], float],
    ) -> Progress:
        def waits(waiting_on: str) -> None:
            on_progress(self.progress._replace(waiting_on=waiting_on))

        step = 1 if speed > 0 else _CHUNK
        ahead = asyncio.create_task(asyncio.to_thread(self._recording.take, step))
        began: float | None = None
        try:
            while True:
                stills = await ahead
                position, ended = self._recording.position_ms, self._recording.ended
                if not ended:
                    ahead = asyncio.create_task(asyncio.to_thread(self._recording.take, step))
                if stills and speed > 0:
                    due = stills[0].position_ms / 1000 / speed
                    began = monotonic() - due if began is None else began
                    await sleep(max(0.0, began + due - monotonic()))
                if stills:
                    await patiently(lambda: self._take(stills), waits, sleep)  # noqa: B023 (called in this turn)
                self.progress = self.progress._replace(position_ms=position, fault=self._recording.fault)
                on_progress(self.progress)
                if ended:
                    break
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
        end = self._appenders.end_of_stream(self._camera_id)
        await patiently(lambda: self._appenders.append(self._camera_id, [end]), waits, sleep)
        return self.progress

    async def _take(self, stills: list[Still]) -> None:
        new = [still for still in stills if still.data]
        entries = await asyncio.gather(*(self._entry(still) for still in new))
        taken = await append_counted(self._appenders, self._camera_id, entries)
        if self._cursor is not None:
            await asyncio.to_thread(self._cursor.add, [self._mark(str(still.position_ms)) for still in new])
        self.progress = self.progress._replace(
            accepted=self.progress.accepted + taken.accepted,
            known=self.progress.known + taken.known + len(stills) - len(new),
            rejected=self.progress.rejected + taken.rejected,
        )

    async def _entry(self, still: Still) -> Entry:
        submission = core.Submission(
            camera_id=self._camera_id,
            data=still.data,
            source="video",
            name=f"{self._path.name}#t={still.position_ms / 1000:.3f}",  # as in W3C's Media Fragments
            arrived_at=self._appenders.now_ms(),
            client_at=self._start.at + still.position_ms,
            file_at=self._file.st_mtime_ns // 1_000_000,
        )
        return await entry_of(self._appenders, submission, len(still.data))

    def _is_noted(self, what: str) -> bool:
        return self._cursor is not None and self._mark(what) in self._cursor

    def _mark(self, what: str) -> Mark:
        return Mark(f"{self._how} {what}", self._file.st_size, self._file.st_mtime_ns)

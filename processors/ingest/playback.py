"""`rewatch ingest dir`: every JPEG of a directory, in order, as one camera's stream, which then ends."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import structlog

from processors.ingest import core
from processors.ingest.appender import Appenders, Entry
from processors.ingest.cursor import Cursor, Mark
from processors.ingest.folder import ChangedError, capture_order, read_unchanged
from processors.ingest.patience import Sleep, patiently
from processors.ingest.taking import append_counted, entry_of

log = structlog.get_logger(__name__)

_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}

# Files prepared and appended together, at full speed: half a transaction's group.
_CHUNK = 32


class Progress(NamedTuple):
    """How far a playback is."""

    total: int
    """Files to take, those taken in an earlier run included."""
    done: int = 0
    accepted: int = 0
    known: int = 0
    """Already on the log, or taken in an earlier run."""
    rejected: int = 0
    """No images: each is a dead letter now."""
    changed: int = 0
    """Changed while they were read, or gone: not taken."""
    waiting_on: str = ""
    """What it waits on; empty while it goes on."""


class PlaybackError(Exception):
    """The directory cannot be played; the message says why."""


async def play(
    appenders: Appenders,
    directory: Path,
    camera_id: str,
    *,
    cursor: Path | None = None,
    create: bool = True,
    speed: float = 0.0,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
    sleep: Sleep = asyncio.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Progress:
    """Append every JPEG of a directory and the folders below it, by capture time, then the end of the stream.

    Nothing is moved. Run again after it was ended at any instant, it goes on: what a transaction took is known
    by its id, and what many transactions took by the cursor.

    Args:
        appenders: the ways into the log.
        directory: where the files lie.
        camera_id: whose they are.
        cursor: a file that notes what was taken; needed to run a directory of more than 1,000 files again.
        create: make the camera where it is not known.
        speed: how many times faster than captured; 0 is as fast as possible.
        on_progress: called after each step.
        sleep: how to pause.
        monotonic: seconds that never jump.

    Raises:
        PlaybackError: no such directory, or no JPEG in it.
        RejectedError: the camera id is none.
        UnknownCameraError: the camera is not known, and `create` is off.
        UnavailableError: the cursor cannot be kept.
    """
    await patiently(lambda: appenders.camera(camera_id, create=create), lambda _: None, sleep)
    zone = appenders.zone(camera_id)
    marks = await asyncio.to_thread(files_in, directory)
    order = await asyncio.to_thread(
        lambda: {mark: capture_order(directory / mark.name, mark, appenders.patterns, zone) for mark in marks},
    )
    marks.sort(key=order.__getitem__)
    taken = Cursor(cursor, f"{appenders.log_identity}:{camera_id}", "the playback's cursor") if cursor else None
    progress = Progress(len(marks))
    left = [mark for mark in marks if taken is None or mark not in taken]
    progress = progress._replace(done=len(marks) - len(left), known=len(marks) - len(left))
    on_progress(progress)

    def waits(waiting_on: str) -> None:
        on_progress(progress._replace(waiting_on=waiting_on))

    started = monotonic()
    step = 1 if speed > 0 else _CHUNK
    for at in range(0, len(left), step):
        chunk = left[at : at + step]
        if speed > 0:
            due = started + (order[chunk[0]][0] - order[left[0]][0]) / 1000 / speed
            await sleep(max(0.0, due - monotonic()))
        progress = await patiently(
            lambda: _take(appenders, directory, camera_id, chunk, progress),  # noqa: B023 (called in this turn)
            waits,
            sleep,
        )
        if taken is not None:
            await asyncio.to_thread(taken.add, chunk)
        on_progress(progress)
    end = appenders.end_of_stream(camera_id)
    await patiently(lambda: appenders.append(camera_id, [end]), waits, sleep)
    return progress


async def _take(
    appenders: Appenders,
    directory: Path,
    camera_id: str,
    chunk: list[Mark],
    before: Progress,
) -> Progress:
    made = await asyncio.gather(*(_prepare(appenders, directory, camera_id, mark) for mark in chunk))
    entries = [entry for entry in made if entry is not None]
    taken = await append_counted(appenders, camera_id, entries)
    return before._replace(
        done=before.done + len(chunk),
        accepted=before.accepted + taken.accepted,
        known=before.known + taken.known,
        rejected=before.rejected + taken.rejected,
        changed=before.changed + len(chunk) - len(entries),
    )


async def _prepare(appenders: Appenders, directory: Path, camera_id: str, mark: Mark) -> Entry | None:
    path = directory / mark.name
    try:
        data = await asyncio.to_thread(read_unchanged, path, mark, appenders.settings.max_bytes)
    except (ChangedError, OSError) as error:
        log.warning("not taken", file=str(path), why=repr(error))
        return None
    submission = core.Submission(
        camera_id=camera_id,
        data=data,
        source="folder",
        name=mark.name,
        arrived_at=appenders.now_ms(),
        file_at=mark.mtime_ns // 1_000_000,
    )
    return await entry_of(appenders, submission, mark.size)


def files_in(directory: Path) -> list[Mark]:
    """The JPEGs of a directory and the folders below it, hidden ones and links left out.

    Raises:
        PlaybackError: no such directory, or no JPEG in it.
    """
    if not directory.is_dir():
        raise PlaybackError(f"{directory} is no directory")
    marks = []
    for path in directory.rglob("*"):
        relative = path.relative_to(directory)
        if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.is_symlink():
            if any(part.startswith(".") for part in relative.parts):
                continue
            found = path.stat()
            marks.append(Mark(str(relative), found.st_size, found.st_mtime_ns))
    if not marks:
        raise PlaybackError(f"no .jpg or .jpeg file in {directory}")
    return marks

"""The watched folder: files that stand still are taken, appended, and only then moved, deleted or noted.

Events only say when to look; what counts is what lies there. So files that came while ingest was down, or whose
event was lost, are found by the next scan, and a file whose move failed is taken again and known.
"""

import asyncio
import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import structlog
from watchfiles import awatch

from processors.ingest import core, rejected
from processors.ingest.appender import STOP_S, Appenders, Entry
from processors.ingest.cursor import Cursor, Mark, fsync_directory
from processors.ingest.inbox import ignored
from processors.ingest.settings import FolderSettings
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

DONE = ".done"

# Files of one camera in hand at once: half a transaction's group, and bounded memory.
_CHUNK = 32
_CHUNK_BYTES = 32 * 1024 * 1024

# EXIF lies in the first APP1 segment, which is at most 64 KB long.
_HEAD = 128 * 1024

# Events within this time are one, milliseconds.
_DEBOUNCE_MS = 500

# Pauses before a folder that could not be taken is tried again, seconds.
_FIRST_PAUSE_S = 1.0
_LAST_PAUSE_S = 30.0


class ChangedError(Exception):
    """The file is not any more what it was when it was found: it is still being written, or gone."""


class _Seen(NamedTuple):
    """A file that waits to be taken."""

    folder: str
    mark: Mark
    since: float
    """Since when it has been seen like this, monotonic seconds."""
    not_before: float = 0.0
    """Not to be tried before this, monotonic seconds."""


class Folder:
    """The watched folder of `ingest.folder`.

    Args:
        settings: the section.
        appenders: the ways into the log.
        clock: wall time, seconds since the Unix epoch; file times are compared with it.
        monotonic: seconds that never jump; how long files have stood still is measured with it.
    """

    def __init__(
        self,
        settings: FolderSettings,
        appenders: Appenders,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._appenders = appenders
        self._clock = clock
        self._monotonic = monotonic
        self._root = settings.root
        self._cursor: Cursor | None = None
        self._pending: dict[Path, _Seen] = {}
        self._pauses: dict[str, tuple[float, float]] = {}  # folder -> (seconds, until)
        self._taking: dict[str, asyncio.Task[None]] = {}
        self._changed: set[Path] = set()
        self._wake = asyncio.Event()
        self._stopping = False
        self._events = False
        self._said: set[str] = set()
        self.waiting_on: dict[str, str] = {}
        """What each sub-folder that could not be taken waits on."""

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until told to stop; then finish the transaction in hand."""
        self._stopping = False
        stopper = asyncio.create_task(self._on_stop(stop))
        watcher: asyncio.Task[None] | None = None
        next_scan = 0.0
        try:
            while not stop.is_set():
                now = self._monotonic()
                if now >= next_scan:
                    if not await self._scan_or_say():
                        next_scan = self._pauses[""][1]
                    elif watcher is None and not self._settings.polling:
                        # What comes between the scan and the first event is found by a scan soon after.
                        watcher = asyncio.create_task(self._watch())
                        self._events = True
                        next_scan = now + self._settings.poll_s
                    else:
                        next_scan = now + (self._settings.rescan_s if self._events else self._settings.poll_s)
                elif self._changed and self._note_changed():
                    next_scan = now
                self._start_ready()
                await self._sleep(min([next_scan, *self._due()]))
        finally:
            self._stopping = True
            for task in filter(None, (stopper, watcher)):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await self._settle()

    async def sweep(self) -> None:
        """Look once and take all that stands still."""
        await self._scan_or_say()
        self._start_ready()
        await asyncio.gather(*self._taking.values())

    # What lies there

    async def _scan_or_say(self) -> bool:
        try:
            await self._scan()
        except UnavailableError as error:
            self._fault("", error)
            return False
        self._pauses.pop("", None)
        self.waiting_on.pop("", None)
        return True

    async def _scan(self) -> None:
        if self._cursor is None:
            await asyncio.to_thread(self._open)
        try:
            found = await asyncio.to_thread(lambda: list(self._walk()))
        except OSError as error:
            raise UnavailableError("folder", f"cannot read ingest.folder.root: {error}") from error
        before, self._pending = self._pending, {}
        for folder, path, mark in found:
            self._note(folder, path, mark, before.get(path))
        # Marks of files that are gone pile up; to forget them costs a rewrite, so not for a few.
        if self._cursor is not None and len(self._cursor) > 2 * len(found) + 1000:
            await asyncio.to_thread(self._cursor.keep, [mark for _, _, mark in found])

    def _open(self) -> None:
        try:
            self._settings.root.mkdir(parents=True, exist_ok=True)
            self._root = self._settings.root.resolve(strict=True)
        except OSError as error:
            raise UnavailableError("folder", f"cannot make ingest.folder.root: {error}") from error
        if self._settings.after == "leave":
            path = self._settings.cursor or self._root / ".rewatch-cursor"
            self._cursor = Cursor(path, self._appenders.log_identity, "ingest.folder.cursor")

    def _walk(self) -> Iterator[tuple[str, Path, Mark]]:
        """Every file that could be an image, with its sub-folder."""
        with os.scandir(self._root) as entries:
            tops = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        for top in tops:
            if not top.is_dir():  # a sub-folder may be a link (to a mount); what lies below may not
                yield from self._look_at(Path(top.path))
                continue
            for parent, folders, names in os.walk(top.path, onerror=self._unreadable):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in names:
                    yield from self._look_at(Path(parent, name))

    def _look_at(self, path: Path) -> Iterator[tuple[str, Path, Mark]]:
        relative = path.relative_to(self._root)
        if any(part.startswith(".") for part in relative.parts):
            return
        if ignored(self._settings, path.name):
            return
        folder = relative.parts[0] if len(relative.parts) > 1 else "."
        try:
            found = path.lstat()
        except OSError:
            return  # gone again
        # No links: whoever may write here must not make us read what lies elsewhere.
        if not stat.S_ISREG(found.st_mode):
            self._say(f"{path} is no file (a link, a pipe or a socket): it is left where it is")
        elif self._camera_id(folder) is not None:
            yield folder, path, Mark(str(relative), found.st_size, found.st_mtime_ns)

    def _camera_id(self, folder: str) -> str | None:
        """The camera of a sub-folder; None, said once, where its name can be none."""
        camera_id = self._settings.cameras.get(folder)
        if camera_id is not None:
            return camera_id
        if folder == ".":
            self._say(
                "files in the root belong to no camera: put them into a sub-folder named by the camera's id, "
                "or set ingest.folder.cameras",
            )
            return None
        try:
            return core.check_camera_id(folder)
        except core.RejectedError as error:
            self._say(f"sub-folder is skipped: {error}; name it so, or map it with ingest.folder.cameras")
            return None

    def _note(self, folder: str, path: Path, mark: Mark, before: _Seen | None) -> None:
        if self._cursor is not None and mark in self._cursor:
            self._pending.pop(path, None)
        elif before is not None and before.mark == mark:
            self._pending[path] = before
        else:
            self._pending[path] = _Seen(folder, mark, self._monotonic())

    def _note_changed(self) -> bool:
        """Note the files that events named; True where only a scan can tell (a folder moved in, a link)."""
        changed, self._changed = self._changed, set()
        for path in changed:
            if not path.is_relative_to(self._root):
                return True
            if any(part.startswith(".") for part in path.relative_to(self._root).parts):
                continue  # our own moves, mostly
            if path.is_dir():
                return True
            found = list(self._look_at(path))
            if not found:
                self._pending.pop(path, None)
            for folder, _, mark in found:
                self._note(folder, path, mark, self._pending.get(path))
        return False

    def _stood_still(self, seen: _Seen) -> float:
        """For how long the file has been as it is, seconds: by its own time, or by ours where its time is odd."""
        return max(self._clock() - seen.mark.mtime_ns / 1e9, self._monotonic() - seen.since)

    def _due(self) -> Iterator[float]:
        """When the next files could be taken, monotonic seconds."""
        now = self._monotonic()
        for seen in self._pending.values():
            if seen.folder not in self._taking:
                still = now + self._settings.stable_s - self._stood_still(seen)
                yield max(still, seen.not_before, self._pauses.get(seen.folder, (0.0, 0.0))[1])

    # Taking

    def _start_ready(self) -> None:
        now = self._monotonic()
        ready: dict[str, list[tuple[Path, _Seen]]] = defaultdict(list)
        for path, seen in self._pending.items():
            if (
                seen.folder not in self._taking
                and self._pauses.get(seen.folder, (0.0, 0.0))[1] <= now
                and seen.not_before <= now
                and self._stood_still(seen) >= self._settings.stable_s
            ):
                ready[seen.folder].append((path, seen))
        for folder, files in ready.items():
            self._taking[folder] = asyncio.create_task(self._take_or_pause(folder, files), name=f"take {folder}")

    async def _take_or_pause(self, folder: str, files: list[tuple[Path, _Seen]]) -> None:
        try:
            await self._take(folder, files)
        except core.UnknownCameraError as error:
            self._fault(folder, UnavailableError("settings", str(error)))
        except UnavailableError as error:
            self._fault(folder, error)
        except Exception as error:  # a folder that fails in a way not foreseen must not end the others
            log.exception("folder failed", folder=folder)
            self._fault(folder, UnavailableError("folder", repr(error)))
        else:
            self._pauses.pop(folder, None)
            self.waiting_on.pop(folder, None)
        finally:
            self._taking.pop(folder, None)
            self._wake.set()

    def _fault(self, folder: str, error: UnavailableError) -> None:
        """Say it, and try again later: the files stay where they are."""
        pause = min(_LAST_PAUSE_S, 2 * self._pauses.get(folder, (_FIRST_PAUSE_S / 2, 0.0))[0])
        self._pauses[folder] = (pause, self._monotonic() + pause)
        self.waiting_on[folder] = error.waiting_on
        if error.waiting_on != "stop":
            log.warning("files wait", folder=folder or str(self._root), waiting_on=error.waiting_on, why=str(error))

    async def _take(self, folder: str, files: list[tuple[Path, _Seen]]) -> None:
        camera_id = self._camera_id(folder)
        assert camera_id is not None, "only files of cameras are noted"
        await self._appenders.camera(camera_id, create=self._settings.auto_create)
        if len(files) > 1:
            patterns, zone = self._appenders.patterns, self._appenders.zone(camera_id)
            order = await asyncio.to_thread(
                lambda: {path: capture_order(path, seen.mark, patterns, zone) for path, seen in files},
            )
            files = sorted(files, key=lambda file: order[file[0]])
        for chunk in _chunks(files):
            if self._stopping:
                return
            await self._take_chunk(folder, camera_id, chunk)

    async def _take_chunk(self, folder: str, camera_id: str, chunk: list[tuple[Path, _Seen]]) -> None:
        self._appenders.shed.check("folder")
        base = self._root if folder == "." else self._root / folder
        self._check_leaving(base, chunk)
        made = await asyncio.gather(*(self._prepare(base, camera_id, path, seen) for path, seen in chunk))
        taken = [(path, seen, *one) for (path, seen), one in zip(chunk, made, strict=True) if one is not None]
        if not taken:
            return
        await self._appenders.append(camera_id, [entry for _, _, entry, _ in taken])
        await asyncio.to_thread(self._leave, base, [(path, seen.mark, reason) for path, seen, _, reason in taken])
        for path, seen, _, _ in taken:
            if self._pending.get(path) == seen:
                del self._pending[path]

    async def _prepare(
        self,
        base: Path,
        camera_id: str,
        path: Path,
        seen: _Seen,
    ) -> tuple[Entry, str | None] | None:
        """The file's entry, and why it was rejected; None where it is not to be taken now."""
        limit = self._appenders.settings.max_bytes
        try:
            data = await asyncio.to_thread(read_unchanged, path, seen.mark, limit)
        except (ChangedError, FileNotFoundError):
            self._pending.pop(path, None)
            self._changed.add(path)  # looked at again, as if an event had named it
            return None
        except OSError as error:
            self._say(f"cannot read {path}: {error}")
            self._hold(path, seen, _LAST_PAUSE_S)
            return None
        submission = core.Submission(
            camera_id=camera_id,
            data=data,
            source="folder",
            name=str(path.relative_to(base)),
            arrived_at=self._appenders.now_ms(),
            file_at=seen.mark.mtime_ns // 1_000_000,
        )
        note = rejected.note_of(base, path, submission, seen.mark.size)
        try:
            if seen.mark.size > limit:
                raise core.RejectedError(f"the file has {seen.mark.size:,} bytes, ingest.max_bytes allows {limit:,}")
            if self._appenders.shed.drops("folder"):
                return self._appenders.drop(submission, seen.mark.size), None
            return await self._appenders.prepare(submission, note), None
        except core.RejectedError as error:
            patience = self._settings.incomplete_s - self._stood_still(seen)
            if error.incomplete and patience > 0:
                self._hold(path, seen, patience)
                return None
            log.warning("rejected", file=str(path), why=str(error))
            return await self._appenders.reject(submission, error, seen.mark.size, note), str(error)

    def _hold(self, path: Path, seen: _Seen, seconds: float) -> None:
        """Not to be tried again for so long, unless it changes."""
        if self._pending.get(path) == seen:
            self._pending[path] = seen._replace(not_before=self._monotonic() + seconds)

    # What becomes of files that were taken

    def _check_leaving(self, base: Path, chunk: list[tuple[Path, _Seen]]) -> None:
        """Before anything is appended: could the files be moved or deleted afterwards?

        Raises:
            UnavailableError: no; taken all the same they would be found again and again.
        """
        if self._settings.after == "leave":
            return
        for parent in {base, *(path.parent for path, _ in chunk)}:
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UnavailableError(
                    "folder",
                    f"{parent} is read-only: make it writable, or set ingest.folder.after to leave "
                    "and ingest.folder.cursor to a file elsewhere",
                )

    def _leave(self, base: Path, taken: list[tuple[Path, Mark, str | None]]) -> None:
        if self._cursor is not None:
            self._cursor.add(mark for _, mark, _ in taken)
            return
        touched: set[Path] = set()
        try:
            for path, mark, reason in taken:
                relative = path.relative_to(base)
                rejected.forget_note(base, path)
                if not _is_still(path, mark):
                    continue  # replaced meanwhile: what lies there now is another file
                if reason is not None:
                    target = rejected.free_name(base / rejected.REJECTED / relative)
                    rejected.write_reason(target, reason)
                elif self._settings.after == "move":
                    today = datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
                    target = rejected.free_name(base / DONE / today / relative)
                else:
                    path.unlink()
                    touched.add(path.parent)
                    continue
                path.rename(target)
                # Folders that were just made must last as well: up to the camera's own.
                touched |= {path.parent, *(parent for parent in target.parents if parent.is_relative_to(base))}
            for directory in touched:
                fsync_directory(directory)
        except OSError as error:
            raise UnavailableError(
                "folder",
                f"taken files cannot leave {base} (ingest.folder.after is {self._settings.after}): {error}",
            ) from error

    # Waking

    async def _watch(self) -> None:
        while True:
            try:
                async for changes in awatch(self._root, debounce=_DEBOUNCE_MS, watch_filter=None):
                    self._events = True
                    self._changed |= {Path(path) for _, path in changes}
                    self._wake.set()
            except Exception as error:  # noqa: BLE001 (a name that is not UTF-8 ends it, and so does a full kernel queue)
                self._say(f"no events from the folder: looking every ingest.folder.poll_s until they come: {error!r}")
            self._events = False
            self._changed.add(self._root)  # what it did not tell is found by a scan
            self._wake.set()
            await asyncio.sleep(self._settings.poll_s)

    async def _on_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._stopping = True
        self._wake.set()

    async def _sleep(self, until: float) -> None:
        try:
            # Never shorter than 10 ms: a clock that stands still must not make this a busy loop.
            async with asyncio.timeout(max(0.01, until - self._monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _settle(self) -> None:
        """Let chunks in hand finish, then end them."""
        tasks = list(self._taking.values())
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _unreadable(self, error: OSError) -> None:
        self._say(f"cannot read a sub-folder: {error}")

    def _say(self, message: str) -> None:
        """Warn once of what a scan finds again and again."""
        if message not in self._said:
            self._said.add(message)
            log.warning(message)


def capture_order(
    path: Path,
    mark: Mark,
    patterns: core.NamePatterns,
    zone: ZoneInfo,
) -> tuple[int, str]:
    """What files of a camera are sorted by: capture time as far as EXIF or the name tell, else file time; then name."""
    at = None
    try:
        with path.open("rb") as source:
            at = core.read_exif(source.read(_HEAD), zone)
    except OSError:
        pass  # it is met again when the file is read
    if at is None:
        at = patterns.find(mark.name, zone)
    return (mark.mtime_ns // 1_000_000 if at is None else at), mark.name


def read_unchanged(path: Path, mark: Mark, limit: int) -> bytes:
    """The file's bytes, if it is what the mark says before and after; nothing of a file longer than the limit.

    Raises:
        ChangedError: it has changed, or is no file any more.
        OSError: it cannot be read.
    """
    # O_NONBLOCK: a pipe put in the file's place must not hold us.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as source:  # noqa: PTH123 (a file descriptor)
        before = os.fstat(handle)
        if not stat.S_ISREG(before.st_mode) or (before.st_size, before.st_mtime_ns) != mark[1:]:
            raise ChangedError(path)
        data = source.read(limit) if mark.size <= limit else b""
        after = os.fstat(handle)
        if (after.st_size, after.st_mtime_ns) != mark[1:] or (mark.size <= limit and len(data) != mark.size):
            raise ChangedError(path)
    return data


def _chunks(files: Iterable[tuple[Path, _Seen]]) -> Iterator[list[tuple[Path, _Seen]]]:
    chunk: list[tuple[Path, _Seen]] = []
    size = 0
    for file in files:
        if chunk and (len(chunk) == _CHUNK or size + file[1].mark.size > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(file)
        size += file[1].mark.size
    if chunk:
        yield chunk


def _is_still(path: Path, mark: Mark) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == mark[1:]

"""Rejected files: where they lie, and the way back of one that is to be tried again.

A file that is put back leaves a note behind, which says of which dead letter it is. With the note whoever takes the
file says what became of the letter, in the transaction that takes it; then the note goes.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from processors.ingest.core import Submission
from processors.ingest.cursor import fsync_directory
from processors.ingest.settings import FolderSettings

REJECTED = ".rejected"
_NOTE = ".redrive.json"
_REASON = ".reason.txt"
_SHORT = 16


class NotThereError(Exception):
    """The file cannot be put back; the message says why, and what to do."""


class Letter(NamedTuple):
    """What the dead letter of a rejected file says of it."""

    origin: str
    camera_id: str
    attempts: int
    name: str
    """Where it lay below its camera's folder."""
    size: int
    """Bytes."""
    file_at: int | None
    """Its modification time, ms since the Unix epoch."""


class Note(NamedTuple):
    """A file was put back: of which letter, and how often it had been tried."""

    origin: str
    attempts: int


def content_name(data: bytes, size: int, file_at: int | None) -> str:
    """Name a rejected file by its content; one too long to be read, so without data, by its size and time."""
    return hashlib.sha256(data or f"{size}:{file_at}".encode()).hexdigest()[:_SHORT]


def free_name(target: Path) -> Path:
    """A name at the target that nothing has yet, its folder made: cameras use names again, and no file is lost."""
    target.parent.mkdir(parents=True, exist_ok=True)
    candidate, n = target, 1
    while candidate.exists():
        n += 1
        candidate = target.with_name(f"{target.stem}~{n}{target.suffix}")
    return candidate


def write_reason(target: Path, reason: str) -> None:
    """Say beside the file why it was rejected."""
    _write(target.with_name(target.name + _REASON), reason + "\n")


def note_of(base: Path, path: Path, submission: Submission, size: int) -> Note | None:
    """The note of a file below its camera's folder, if it was put back there; `size` is the file's, bytes."""
    try:
        said = json.loads(_note_path(base, path).read_text(encoding="utf-8"))
        note = Note(str(said["origin"]), int(said["attempts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # by far the most: it was never rejected
    content = content_name(submission.data, size, submission.file_at)
    return note if note.origin.endswith(f"@{content}") else None  # else another file of the same name


def forget_note(base: Path, path: Path) -> None:
    """The file was taken, or rejected once more: what became of its letter is on the log."""
    _note_path(base, path).unlink(missing_ok=True)


def find(settings: FolderSettings, letter: Letter) -> tuple[Path, Path]:
    """Its camera's folder, and where the rejected file lies in it.

    Raises:
        NotThereError: it is not there.
    """
    parts = PurePosixPath(letter.name).parts
    if not parts or ".." in parts or letter.name.startswith("/"):
        raise NotThereError(f"{letter.name!r} names no file")
    named = [folder for folder, camera_id in settings.cameras.items() if camera_id == letter.camera_id]
    bases = [settings.root if folder == "." else settings.root / folder for folder in (*named, letter.camera_id)]
    for base in bases:
        for path in _namesakes(base / REJECTED / letter.name):
            if _is_it(path, letter):
                return base, path
    if settings.after == "leave" and any((base / letter.name).exists() for base in bases):
        raise NotThereError(
            f"{letter.name} was left where it is (ingest.folder.after is leave): mend it, and `touch` it to be tried"
        )
    raise NotThereError(
        f"{bases[-1] / REJECTED / letter.name} is not there any more: it was moved or deleted, came by `rewatch ingest "
        "dir`, or lies on another machine; mend it and send it again"
    )


def put_back(settings: FolderSettings, letter: Letter) -> Path:
    """Move a rejected file to where ingest takes it again; return where that is. Leaves a note.

    Raises:
        NotThereError: it is not there.
        OSError: it cannot be moved.
    """
    base, rejected = find(settings, letter)
    target = free_name(base / letter.name)
    note = _note_path(base, target)
    note.parent.mkdir(parents=True, exist_ok=True)
    # First the note: ingest may take the file in the moment it is there.
    _write(note, json.dumps({"origin": letter.origin, "attempts": letter.attempts}) + "\n")
    fsync_directory(note.parent)
    try:
        rejected.rename(target)
    except FileNotFoundError:
        note.unlink(missing_ok=True)
        raise NotThereError(f"{rejected} was moved meanwhile") from None
    rejected.with_name(rejected.name + _REASON).unlink(missing_ok=True)
    for directory in {target.parent, rejected.parent}:
        fsync_directory(directory)
    return target


def _note_path(base: Path, path: Path) -> Path:
    relative = path.relative_to(base)
    return base / REJECTED / relative.with_name(relative.name + _NOTE)


def _namesakes(target: Path) -> Iterator[Path]:
    """The file of that name, and those that got another because it was taken."""
    yield target
    try:
        there = sorted(target.parent.iterdir())
    except OSError:
        return
    yield from (path for path in there if path.stem.startswith(f"{target.stem}~") and path.suffix == target.suffix)


def _is_it(path: Path, letter: Letter) -> bool:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != letter.size:
            return False
        names = {content_name(b"", letter.size, letter.file_at), content_name(path.read_bytes(), letter.size, None)}
    except OSError:
        return False
    return letter.origin.rpartition("@")[2] in names


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())

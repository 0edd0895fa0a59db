"""A note, on disk, of the files that were taken, for folders whose files stay where they are."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from streams.errors import UnavailableError


class Mark(NamedTuple):
    """One file as it was taken. Changed since, it is another."""

    name: str
    """Its path below the folder."""
    size: int
    """Bytes."""
    mtime_ns: int


class Cursor:
    """The marks of one folder: a line of JSON each, after a line that names the log they were taken to.

    Marks made for another life of the log are worth nothing, so they are dropped. A line cut off by a crash is
    dropped too: its file is looked at again, and its frame is known.

    Args:
        path: where the marks are kept.
        identity: names the log, see `ports.Log`.
        setting: what to name in errors.

    Raises:
        UnavailableError: the file cannot be read or written; the message names the setting.
    """

    def __init__(self, path: Path, identity: str, setting: str) -> None:
        self._path = path
        self._identity = identity
        self._setting = setting
        self._marks = set(self._read())
        self.keep(self._marks)

    def __contains__(self, mark: Mark) -> bool:
        return mark in self._marks

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, marks: Iterable[Mark]) -> None:
        """Note these files durably: a power cut after this does not forget them.

        Raises:
            UnavailableError: they could not be noted; the frames are on the log, and adding again is safe.
        """
        new = [mark for mark in marks if mark not in self._marks]
        if not new:
            return
        try:
            # Only whole lines count, so after a failed write the next one begins on a line of its own.
            with self._path.open("ab") as out:
                out.write(b"\n" + b"".join(map(_line, new)))
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise self._unavailable(error) from error
        self._marks.update(new)

    def keep(self, marks: Iterable[Mark]) -> None:
        """Forget all but these, durably: files that are gone need no note.

        Raises:
            UnavailableError: the file cannot be written.
        """
        kept = self._marks.intersection(marks)
        part = self._path.with_name(self._path.name + ".part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as out:
                out.write(json.dumps({"log": self._identity}).encode() + b"\n")
                out.writelines(map(_line, sorted(kept)))
                out.flush()
                os.fsync(out.fileno())
            part.replace(self._path)
            fsync_directory(self._path.parent)
        except OSError as error:
            raise self._unavailable(error) from error
        self._marks = kept

    def _read(self) -> list[Mark]:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unavailable(error) from error
        values = [value for value in map(_parsed, lines) if value is not None]
        if not values or values[0] != {"log": self._identity}:
            return []
        return [Mark(*value) for value in values[1:] if isinstance(value, list) and len(value) == 3]

    def _unavailable(self, error: OSError) -> UnavailableError:
        return UnavailableError("disk", f"cannot keep {self._path} ({self._setting}): {error}")


def fsync_directory(path: Path) -> None:
    """Make names that came into the directory, or left it, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _line(mark: Mark) -> bytes:
    # Names that are no UTF-8 hold lone surrogates, which JSON's \u escapes carry.
    return json.dumps(mark).encode() + b"\n"


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None

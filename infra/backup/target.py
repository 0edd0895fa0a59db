"""Where a backup lies: a directory, or anything that fsspec reaches (s3://...). A file is whole or not there."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from filelock import FileLock, Timeout

from streams.errors import UnavailableError

_CHUNK = 1024 * 1024


class BusyError(Exception):
    """Another backup writes into this directory now."""


class Target:
    """Files below one root, by names with slashes.

    Raises:
        UnavailableError: of every method, where the place cannot be read or written (waiting on `disk`).
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") or "/"
        self._local = None if "://" in root else Path(root)
        self._fs: Any = None
        if self._local is None:
            self._fs, self._path = fsspec.core.url_to_fs(self.root)

    def lock(self) -> FileLock | None:
        """Held while a backup writes, on this machine; an object store has none.

        Raises:
            BusyError: somebody holds it.
        """
        if self._local is None:
            return None
        try:
            self._local.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(self._local / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(f"another backup writes into {self.root} now; wait for it") from None
        except OSError as error:
            raise self._away("write", error) from error
        return lock

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        try:
            if self._local is not None:
                return (self._local / name).is_file()
            return bool(self._fs.isfile(self._at(name)))
        except OSError as error:
            raise self._away("read", error) from error

    def names(self, folder: str) -> Iterator[str]:
        """The files of a folder, below it too; unfinished ones left out."""
        try:
            if self._local is not None:
                for path in sorted((self._local / folder).rglob("*")):
                    if path.is_file() and not path.name.startswith("."):
                        yield path.relative_to(self._local).as_posix()
            elif self._fs.exists(self._at(folder)):
                for found in sorted(self._fs.find(self._at(folder))):
                    yield found.removeprefix(self._path).lstrip("/")
        except OSError as error:
            raise self._away("read", error) from error

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """A file's bytes, or some of them.

        Raises:
            FileNotFoundError: there is no such file.
        """
        try:
            with self._open(name) as source:
                if offset:
                    source.seek(offset)
                return bytes(source.read(length))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._away("read", error) from error

    def sha256(self, name: str) -> tuple[str, int]:
        """A file's SHA-256 (hex) and its length, bytes; read in pieces.

        Raises:
            FileNotFoundError: there is no such file.
        """
        sha, size = hashlib.sha256(), 0
        try:
            with self._open(name) as source:
                while chunk := source.read(_CHUNK):
                    sha.update(chunk)
                    size += len(chunk)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._away("read", error) from error
        return sha.hexdigest(), size

    def write(self, name: str, fill: Callable[[IO[bytes]], None]) -> None:
        """Make a file, or replace it: durable when this returns, and never seen in part."""
        try:
            if self._local is None:
                with self._fs.open(self._at(name), "wb") as out:  # object stores show whole objects only
                    fill(out)
                return
            target = self._local / name
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-", delete=False) as part:
                try:
                    fill(part)
                    part.flush()
                    os.fsync(part.fileno())
                    Path(part.name).rename(target)
                except BaseException:
                    Path(part.name).unlink(missing_ok=True)
                    raise
            folder = target.parent
            while True:
                _fsync(folder)
                if folder == self._local:
                    break
                folder = folder.parent
        except OSError as error:
            raise self._away("write", error) from error

    def put(self, name: str, data: bytes) -> None:
        """As `write`, of bytes."""
        self.write(name, lambda out: _written(out, data))

    def remove(self, name: str) -> None:
        """Forget a file; one that is not there is forgotten."""
        try:
            if self._local is not None:
                (self._local / name).unlink(missing_ok=True)
            elif self._fs.exists(self._at(name)):
                self._fs.rm(self._at(name))
        except OSError as error:
            raise self._away("write", error) from error

    def sweep(self) -> None:
        """Throw away what a backup that was killed had begun to write."""
        if self._local is not None:
            for part in self._local.rglob(".part-*"):
                part.unlink(missing_ok=True)

    def _open(self, name: str) -> Any:
        return (self._local / name).open("rb") if self._local is not None else self._fs.open(self._at(name), "rb")

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _away(self, what: str, error: OSError) -> UnavailableError:
        return UnavailableError("disk", f"cannot {what} the backup at {self.root}: {error}")


def _written(out: IO[bytes], data: bytes) -> None:
    out.write(data)


def _fsync(folder: Path) -> None:
    """Make a new name in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

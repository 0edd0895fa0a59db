"""Claim checks: bytes too large for a record live in a content-addressed store, and the record names them.

The store is a local directory or anything that fsspec reaches (s3://...). Its order of work is what makes it
safe: write, fsync, rename, and only then is a record appended that claims the bytes.

Bytes are deleted in two steps, because a record that claims them may be on its way at any instant: they move to
`.trash` below the root, where `get` still finds them, and are deleted for good, or put back, when they have lain
there for a while.
"""

import asyncio
import hashlib
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import fsspec

from streams.errors import UnavailableError, UnprocessableError
from streams.redaction import credentials

INLINE_LIMIT = 64 * 1024
"""Largest image carried inside its record, bytes."""

_TRASH = ".trash"


class Trashed(NamedTuple):
    """Bytes in the trash."""

    sha256: str
    size: int
    """Bytes."""
    since: datetime
    """When they came there."""


class ClaimStore:
    """Bytes by their SHA-256 under one root: a local path or an fsspec URL."""

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/")
        self._shown = credentials(self._root)
        self._local = None if "://" in root else Path(root)

    async def put(self, data: bytes) -> str:
        """Store the bytes durably; return their claim. Storing them again changes nothing.

        Raises:
            UnavailableError: the store cannot be written now (waiting on `disk`).
        """
        return await asyncio.to_thread(self._put, data)

    async def get(self, claim: str, sha256: str) -> bytes:
        """The bytes of a claim, checked against their SHA-256 (hex).

        Raises:
            UnprocessableError: no such bytes, or not these bytes, or a claim outside this store.
            UnavailableError: the store cannot be reached now (waiting on `images`).
        """
        return await asyncio.to_thread(self._get, claim, sha256)

    async def trash(self, sha256: str) -> int | None:
        """Move bytes to the trash; how many they are, or None where there are none of that name.

        Raises:
            UnavailableError: the store cannot be written now (waiting on `images`).
        """
        return await asyncio.to_thread(self._trash, sha256)

    async def trashed(self, before: datetime) -> list[Trashed]:
        """What came to the trash before a time; raises as `trash`."""
        return await asyncio.to_thread(self._trashed, before)

    async def put_back(self, sha256: str) -> None:
        """Move bytes out of the trash to where they were; raises as `trash`."""
        await asyncio.to_thread(self._put_back, sha256)

    async def purge(self, sha256: str) -> None:
        """Delete bytes in the trash for good; those that are not there are deleted already. Raises as `trash`."""
        await asyncio.to_thread(self._purge, sha256)

    def _trash(self, sha256: str) -> int | None:
        fs, here = self._place(self._name(sha256))
        try:
            size = int(fs.size(here))
            if self._local is not None:
                # A rename keeps the time: set before it, so that whoever is killed between the two leaves bytes that
                # look young, not trash that looks old. Object stores copy, and so set it by themselves.
                os.utime(here)
            self._move(fs, here, self._place(f"{_TRASH}/{self._name(sha256)}")[1])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnavailableError("images", f"cannot write to {self._shown} (images): {error}") from error
        return size

    def _trashed(self, before: datetime) -> list[Trashed]:
        fs, root = self._place(_TRASH)
        found: list[Trashed] = []
        try:
            for path, info in fs.find(root, detail=True).items():
                try:
                    since = fs.modified(path)
                except FileNotFoundError:  # put back or purged meanwhile
                    continue
                since = since if since.tzinfo is not None else since.replace(tzinfo=UTC)
                if since < before:
                    found.append(Trashed(str(path).rsplit("/", 1)[-1], int(info["size"]), since))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UnavailableError("images", f"cannot read {self._shown} (images): {error}") from error
        return found

    def _put_back(self, sha256: str) -> None:
        fs, there = self._place(f"{_TRASH}/{self._name(sha256)}")
        try:
            self._move(fs, there, self._place(self._name(sha256))[1])
        except FileNotFoundError:
            return
        except OSError as error:
            raise UnavailableError("images", f"cannot write to {self._shown} (images): {error}") from error

    def _purge(self, sha256: str) -> None:
        fs, there = self._place(f"{_TRASH}/{self._name(sha256)}")
        try:
            fs.rm_file(there)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UnavailableError("images", f"cannot write to {self._shown} (images): {error}") from error

    def _place(self, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system of the store, and the path of a name in it."""
        fs, root = fsspec.core.url_to_fs(self._root)
        return fs, f"{root.rstrip('/')}/{name}"

    def _move(self, fs: fsspec.AbstractFileSystem, source: str, target: str) -> None:
        """Move one file; of bytes that are there already nothing is lost, for they are the same."""
        if self._local is None:
            fs.mv(source, target)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(source).rename(target)
        # The new name reaches the disk before the old one goes for good.
        _fsync_directory(Path(target).parent)

    def _name(self, sha256: str) -> str:
        # Two levels keep a directory at a few thousand entries for millions of images.
        return f"{sha256[:2]}/{sha256[2:4]}/{sha256}"

    def _put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        claim = f"sha256:{sha256}"
        try:
            if self._local is None:
                # Object stores make a whole object visible at once, so no rename is needed.
                with fsspec.open(f"{self._root}/{self._name(sha256)}", "wb") as out:
                    out.write(data)
                return claim
            target = self._local / self._name(sha256)
            if target.exists():
                return claim
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-", delete=False) as part:
                try:
                    part.write(data)
                    part.flush()
                    os.fsync(part.fileno())
                    Path(part.name).rename(target)
                except OSError:
                    Path(part.name).unlink(missing_ok=True)
                    raise
            for directory in (target.parent, target.parent.parent, self._local):
                _fsync_directory(directory)
        except OSError as error:
            raise UnavailableError("disk", f"cannot write images to {self._shown} (images): {error}") from error
        return claim

    def _get(self, claim: str, sha256: str) -> bytes:
        # The claim names content, never a path or host: a record from a stranger cannot make us read elsewhere.
        if claim != f"sha256:{sha256}" or len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise UnprocessableError(f"not a claim of this store: {claim!r}")
        data: bytes | None = None
        # Last at the first place again: it may have been put back between the two looks.
        for place in (self._name(sha256), f"{_TRASH}/{self._name(sha256)}", self._name(sha256)):
            try:
                with fsspec.open(f"{self._root}/{place}", "rb") as source:
                    data = bytes(source.read())
                break
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UnavailableError("images", f"cannot read {self._shown} (images): {error}") from error
        if data is None:
            raise UnprocessableError(f"image {sha256} is not in {self._shown} (images)")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UnprocessableError(f"image {sha256} in {self._shown} is corrupt")
        return data


def _fsync_directory(path: Path) -> None:
    """Make a rename or a new entry in the directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

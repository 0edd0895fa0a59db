"""Claim checks: bytes too large for a record live in a content-addressed store, and the record names them.

The store is a local directory or anything that fsspec reaches (s3://...). Its order of work is what makes it
safe: write, fsync, rename, and only then is a record appended that claims the bytes.
"""

import asyncio
import hashlib
import os
import tempfile
from pathlib import Path

import fsspec

from streams.errors import UnavailableError, UnprocessableError

INLINE_LIMIT = 64 * 1024
"""Largest image carried inside its record, bytes."""


class ClaimStore:
    """Bytes by their SHA-256 under one root: a local path or an fsspec URL."""

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/")
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
            raise UnavailableError("disk", f"cannot write images to {self._root} (images): {error}") from error
        return claim

    def _get(self, claim: str, sha256: str) -> bytes:
        # The claim names content, never a path or host: a record from a stranger cannot make us read elsewhere.
        if claim != f"sha256:{sha256}" or len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise UnprocessableError(f"not a claim of this store: {claim!r}")
        try:
            with fsspec.open(f"{self._root}/{self._name(sha256)}", "rb") as source:
                data = bytes(source.read())
        except FileNotFoundError:
            raise UnprocessableError(f"image {sha256} is not in {self._root} (images)") from None
        except OSError as error:
            raise UnavailableError("images", f"cannot read {self._root} (images): {error}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UnprocessableError(f"image {sha256} in {self._root} is corrupt")
        return data


def _fsync_directory(path: Path) -> None:
    """Make a rename or a new entry in the directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

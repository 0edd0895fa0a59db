"""One file from a hub to a disk: resumed where it broke off, and only kept when it is the file that was promised.

`huggingface_hub` tells what there is (sizes, digests); its own download starts anew in each process since 1.17
(its issue 4196), and a model of 25 GB on a home line breaks off more than once.
"""

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec
from filelock import FileLock, Timeout

# Attempts in a row that brought nothing; one that brought a byte starts the count again.
_ATTEMPTS = 5
_CHUNK = 1 << 20


class Hash(Protocol):
    """A running digest."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """The digest of what was taken."""


class Promise(msgspec.Struct, frozen=True):
    """What a file must be: its length in bytes, and its digest as the hub publishes it."""

    size: int
    algorithm: str
    """`sha256` of large files, `git-sha1` (Git's name of a blob) of small ones."""
    digest: str
    """Hex."""

    def hasher(self) -> Hash:
        """A digest of this kind, nothing taken yet."""
        if self.algorithm == "git-sha1":
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return hashlib.new(self.algorithm)


class DownloadError(Exception):
    """The file could not be had; the message says why, and what to do. What had come is kept for the next try."""


class WrongFileError(DownloadError):
    """What came is not what was promised. Nothing of it is kept."""


def download(
    client: httpx.Client,
    url: str,
    target: Path,
    promise: Promise,
    *,
    headers: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Put the file at `target`; it appears there whole and checked, or not at all.

    Args:
        client: how to ask.
        url: where it is.
        target: where it goes.
        promise: what it must be.
        headers: sent with each request.
        progress: called with the bytes that are here, as they come.
        sleep: how to pause between attempts.

    Raises:
        DownloadError: it cannot be had now, or the disk is too small.
        WrongFileError: the server sends something else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Named by the digest: what is left of another version of the file is not gone on with.
    part = target.with_name(f".{target.name}.{promise.digest[:16]}.part")
    try:
        with FileLock(part.with_suffix(".lock"), timeout=0):
            here = part.stat().st_size if part.exists() else 0
            free = shutil.disk_usage(target.parent).free
            if promise.size - here > free:
                raise DownloadError(
                    f"{target.name} needs {promise.size - here:,} bytes more, {target.parent} has {free:,} free: "
                    "make room, or choose another folder with --to"
                )
            _Download(client, url, part, promise, headers=headers or {}, progress=progress, sleep=sleep).run()
            part.replace(target)
            part.with_suffix(".lock").unlink(missing_ok=True)
    except Timeout:
        raise DownloadError(f"{target} is being downloaded by another process") from None
    except OSError as error:
        raise DownloadError(f"cannot write {target}: {error}") from error


def check(path: Path, promise: Promise, progress: Callable[[int], None] = lambda _: None) -> None:
    """Read the file and compare.

    Raises:
        WrongFileError: it is not what was promised.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size != promise.size:
        raise WrongFileError(f"{path} has {size:,} bytes and should have {promise.size:,}")
    digest = promise.hasher()
    _take(path, digest, progress)
    if digest.hexdigest() != promise.digest:
        raise WrongFileError(
            f"{path} is not the file that was published: its {promise.algorithm} is {digest.hexdigest()}, "
            f"it should be {promise.digest}"
        )


def _take(path: Path, digest: Hash, progress: Callable[[int], None] = lambda _: None) -> int:
    read = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            read += len(chunk)
            progress(read)
    return read


class _RetryError(Exception):
    """This attempt ended; another may bring the rest."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class _Download:
    def __init__(
        self,
        client: httpx.Client,
        url: str,
        part: Path,
        promise: Promise,
        *,
        headers: Mapping[str, str],
        progress: Callable[[int], None],
        sleep: Callable[[float], None],
    ) -> None:
        self._client = client
        self._url = url
        self._part = part
        self._promise = promise
        self._headers = headers
        self._progress = progress
        self._sleep = sleep
        self._digest = promise.hasher()
        self._here = _take(part, self._digest) if part.exists() else 0

    def run(self) -> None:
        barren = 0
        while self._here < self._promise.size or not self._part.exists():
            before = self._here
            try:
                self._attempt()
            except (_RetryError, httpx.TransportError) as error:
                barren = 0 if self._here > before else barren + 1
                if barren >= _ATTEMPTS:
                    raise DownloadError(
                        f"{self._url} gave nothing in {_ATTEMPTS} attempts ({error}); {self._here:,} of "
                        f"{self._promise.size:,} bytes are kept: run it again to go on"
                    ) from error
                after = error.after_s if isinstance(error, _RetryError) else None
                self._sleep(after if after is not None else random.uniform(0.5, 1) * min(30.0, 2.0**barren))
        if self._here != self._promise.size or self._digest.hexdigest() != self._promise.digest:
            got, self._here = self._here, 0
            self._part.unlink()
            raise WrongFileError(
                f"{self._url} sent {got:,} bytes of {self._promise.algorithm} {self._digest.hexdigest()}; published "
                f"are {self._promise.size:,} bytes of {self._promise.digest}. It was not kept. A proxy or mirror may "
                "have changed it: try another line, or set HF_ENDPOINT"
            )

    def _attempt(self) -> None:
        headers: dict[str, Any] = {**self._headers, "Accept-Encoding": "identity"}
        if self._here:
            headers["Range"] = f"bytes={self._here}-"
        with self._client.stream("GET", self._url, headers=headers, follow_redirects=True) as answer:
            if answer.status_code == 416:
                self._restart()
                raise _RetryError("it has less than was here already")
            _refuse(answer)
            if answer.status_code != 206:
                self._restart()  # the whole file comes, whatever was asked for
            elif not answer.headers.get("content-range", "").startswith(f"bytes {self._here}-"):
                self._restart()
                raise _RetryError(f"it answered with another range: {answer.headers.get('content-range')}")
            with self._part.open("ab") as out:
                for chunk in answer.iter_raw():  # as it comes: what waits for a chunk to fill is lost with the line
                    out.write(chunk)
                    self._digest.update(chunk)
                    self._here += len(chunk)
                    self._progress(min(self._here, self._promise.size))
                    if self._here > self._promise.size:
                        break
                out.flush()
                os.fsync(out.fileno())
        if self._here < self._promise.size:
            raise _RetryError("the connection ended before the file did")

    def _restart(self) -> None:
        self._part.unlink(missing_ok=True)
        self._digest = self._promise.hasher()
        self._here = 0


def _refuse(answer: httpx.Response) -> None:
    """Answers that bring no bytes: those that may pass are tried again, the others named."""
    status = answer.status_code
    if status in {401, 403}:
        raise DownloadError(
            f"{answer.url.host} wants to know who asks ({status}): accept the model's licence there with your account, "
            "and set HF_TOKEN"
        )
    if status == 429 or status >= 500:
        after = answer.headers.get("retry-after", "")
        raise _RetryError(f"it answers {status}", min(float(after), 60.0) if after.isdigit() else None)
    if status >= 300:
        raise DownloadError(f"{answer.url} answers {status}: the file is not there any more")

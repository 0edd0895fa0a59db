"""The SHA-256 of a model's file, for the lineage of what it judges."""

import asyncio
import hashlib
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_READ_CHUNK = 1 << 22


class WeightsDigest:
    """SHA-256 of a file, computed in a thread, again only when the file is another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._of: tuple[int, ...] = ()
        self._task: asyncio.Task[str] | None = None

    async def get(self) -> str:
        """The digest, hex; empty where the file cannot be read."""
        try:
            stat = self.path.stat()
            identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._task is None or identity != self._of:
                self._of = identity
                self._task = asyncio.create_task(asyncio.to_thread(_sha256, self.path))
            return await asyncio.shield(self._task)  # who waits may be cancelled; the work is not lost
        except OSError as error:
            log.warning("the weights cannot be read (llm.model_path): events name no digest", error=str(error))
            self._task = None
            return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while chunk := file.read(_READ_CHUNK):
            sha.update(chunk)
        return sha.hexdigest()

"""What playing a directory and playing a recording share: entries of what they read, appended and counted."""

from collections.abc import Sequence
from typing import NamedTuple

import structlog

from processors.ingest import core
from processors.ingest.appender import Appenders, Entry

log = structlog.get_logger(__name__)


class Taken(NamedTuple):
    """What became of some entries."""

    accepted: int
    known: int
    """Frames that were on the log already."""
    rejected: int
    """Dead letters, new or known."""


async def entry_of(appenders: Appenders, submission: core.Submission, size: int) -> Entry:
    """The record of an image; where it is none that can be taken, its dead letter.

    Args:
        appenders: what makes the records.
        submission: the image; its data may be cut where it is too long.
        size: its length, bytes.

    Raises:
        UnavailableError: the image store or a setting stands in the way.
    """
    limit = appenders.settings.max_bytes
    try:
        if size > limit:
            raise core.RejectedError(f"the file has {size:,} bytes, ingest.max_bytes allows {limit:,}")
        return await appenders.prepare(submission)
    except core.RejectedError as error:
        log.warning("rejected", name=submission.name, why=str(error))
        return await appenders.reject(submission, error, size)


async def append_counted(appenders: Appenders, camera_id: str, entries: Sequence[Entry]) -> Taken:
    """Append the entries and say what became of them.

    Raises:
        UnavailableError: not now. Trying again is safe.
    """
    receipts = await appenders.append(camera_id, entries) if entries else []
    rejected = [entry.emit.topic != "frames" for entry in entries]
    frames = [receipt for receipt, bad in zip(receipts, rejected, strict=True) if not bad]
    accepted = sum(receipt.status == "accepted" for receipt in frames)
    return Taken(accepted, len(frames) - accepted, sum(rejected))

"""What a pulled power cord may leave of the broker's segments, beyond what a SIGKILL leaves.

With `log.flush.interval.messages=1` an append is written, flushed, and only then acknowledged. After a SIGKILL the
page cache still holds every byte that was written, flushed or not. A power cut loses what was not flushed: of each
partition at most the append that was in progress, which nobody was told of. Of that one any part may be on disk: a
beginning, or its length already and its bytes not (zeros, or what the blocks held before).

So the honest tear is *behind* the last flushed batch: no byte of a batch that may have been acknowledged is touched,
and never is a whole valid batch added, which would be a record that nobody sent. Which batches were flushed cannot be
told from outside, so every whole batch counts as flushed.
"""

import random
from pathlib import Path

# https://kafka.apache.org/documentation/#recordbatch: baseOffset int64, batchLength int32, and what it counts.
_HEAD = 12
_LEAST = 61
_LAST_OFFSET_DELTA = slice(23, 27)


def last_batch(data: bytes) -> tuple[int, int]:
    """Where the last whole batch of a segment begins and ends; (0, 0) where it has none."""
    begin = end = 0
    while end + _HEAD <= len(data):
        size = _HEAD + int.from_bytes(data[end + 8 : end + _HEAD], "big", signed=True)
        if size < _LEAST or end + size > len(data):
            break
        begin, end = end, end + size
    return begin, end


def torn_append(batch: bytes, rng: random.Random) -> bytes:
    """What may be on disk of an append that a batch like this one's successor began."""
    delta = int.from_bytes(batch[_LAST_OFFSET_DELTA], "big")
    offset = int.from_bytes(batch[:8], "big") + delta + 1
    following = offset.to_bytes(8, "big") + batch[8:]
    upto = rng.randrange(1, len(following))
    form = rng.choice(("cut", "zeros", "old blocks"))
    if form == "cut":
        return following[:upto]
    rest = len(following) - upto
    torn = following[:upto] + (bytes(rest) if form == "zeros" else rng.randbytes(rest))
    return torn if torn != following else following[:upto]  # a batch may end with zeros


def active_segments(log_dir: Path) -> list[Path]:
    """The segment of each partition that is written to: the one of the highest offset."""
    newest: dict[Path, Path] = {}
    for segment in sorted(log_dir.glob("*/*.log")):
        newest[segment.parent] = segment
    return list(newest.values())


def tear(log_dir: Path, rng: random.Random, share: float = 0.5) -> list[str]:
    """Tear a share of the active segments of a broker that is dead; which, by partition, and by how many bytes."""
    told = []
    for segment in active_segments(log_dir):
        data = segment.read_bytes()
        begin, end = last_batch(data)
        if end == 0 or rng.random() >= share:
            continue
        torn = torn_append(data[begin:end], rng)
        with segment.open("r+b") as file:
            file.seek(end)  # the append in progress, if a kill left the beginning of one
            file.truncate()
            file.write(torn)
        told.append(f"{segment.parent.name} +{len(torn)}")
    return told

"""How things are named: ids are computed from content, so a retry makes the same id and anyone can check it."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

LIVE = "live"
"""The run of events that live work makes; a replay's events carry its id instead."""

# 128 of SHA-256's 256 bits: a collision among 10^12 frames has probability 10^-15, and ids stay readable.
DIGEST_HEX = 32

# Kafka's own rule for topic names; epochs are ours. Partitions are 32 bits, offsets 64. No leading zeros: each record
# has one name.
_ORIGIN = re.compile(r"([a-zA-Z0-9._-]{1,249}):([a-zA-Z0-9]{1,32}):(0|[1-9][0-9]{0,8}):(0|[1-9][0-9]{0,17})")


def digest(*parts: bytes | str) -> str:
    """A short hex digest of the parts in order; each is length-prefixed, so parts cannot run together."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()[:DIGEST_HEX]


def json_digest(value: Any) -> str:
    """A short hex digest of a JSON-able value, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def frame_id(camera_id: str, sha256: str, captured_at: int | None) -> str:
    """Name a frame by camera, image bytes and, where EXIF, client or file name give one, capture time (ms).

    File and arrival time are no part of it: the same upload tried again is the same frame.
    """
    name = f"{camera_id}:{sha256[:DIGEST_HEX]}"
    return name if captured_at is None else f"{name}:{captured_at}"


def batch_id(camera_id: str, frame_ids: Iterable[str]) -> str:
    """Name a window by camera and its frames, in order."""
    return f"{camera_id}:{digest(*frame_ids)}"


def event_id(batch: str, run: str = LIVE) -> str:
    """Name a verdict: one batch has one event per run, whatever is promoted or fails over meanwhile."""
    return f"{batch}:{run}"


def verdict_digest(template: str, output_schema: str, parameters: Mapping[str, Any], weights: str) -> str:
    """Name what judged: template, output schema, sampling parameters and the weights' SHA-256."""
    return digest(template, output_schema, json.dumps(parameters, sort_keys=True), weights)


def origin(topic: str, epoch: str, partition: int, offset: int) -> str:
    """Name one record of one life of a topic; what `dead_letters` and source headers carry."""
    return f"{topic}:{epoch}:{partition}:{offset}"


class Place(NamedTuple):
    """Where a record lies: what an `origin` says. As a string it is that origin again."""

    topic: str
    epoch: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return origin(*self)


def place(name: str) -> Place | None:
    """What an origin says; None where the text is none (what never became a record has a name of another kind)."""
    match = _ORIGIN.fullmatch(name)
    return Place(match[1], match[2], int(match[3]), int(match[4])) if match is not None else None

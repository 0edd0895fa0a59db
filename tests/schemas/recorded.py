"""Records as each version of each schema wrote them, kept for ever: `python -m tests.schemas.recorded` adds the newest.

`recorded/TOPIC.VERSION.json` has the bytes as they lie on the log, the fingerprint beside them, and what they say.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from schemas import avro_schemas
from streams import codec
from streams.messages import FINGERPRINT, Incoming
from streams.topics import TOPICS
from tests.examples import EPOCH, PARTITION, RECORDS

FOLDER = Path(__file__).with_name("recorded")


class Recorded(NamedTuple):
    """One record of an earlier day."""

    incoming: Incoming
    says: dict[str, Any]
    """Its fields at that time; bytes as Base64."""


def versions() -> list[tuple[str, int]]:
    """Every topic and version that was ever committed."""
    return [(topic, n + 1) for topic in avro_schemas.topics() for n in range(len(avro_schemas.history(topic)))]


def load(topic: str, version: int) -> Recorded:
    """The record of that version.

    Raises:
        FileNotFoundError: nobody recorded it: `python -m tests.schemas.recorded`.
    """
    kept = json.loads((FOLDER / f"{topic}.{version}.json").read_text())
    headers = ((FINGERPRINT, bytes.fromhex(kept["fingerprint"])),)
    return Recorded(
        Incoming(topic, EPOCH, PARTITION, 0, kept["key"].encode(), b64decode(kept["value"]), headers), kept["says"]
    )


def plain(record: Any) -> dict[str, Any]:
    """What a record says, as JSON has it."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(record))
    return found


def record() -> Iterator[Path]:
    """Write what is missing of the newest versions; an older one can no longer be made as it was."""
    for topic in avro_schemas.topics():
        path = FOLDER / f"{topic}.{len(avro_schemas.history(topic))}.json"
        if not path.exists():
            value, fingerprint = codec.encode(topic, RECORDS[topic])
            kept = {
                "fingerprint": fingerprint.hex(),
                "key": TOPICS[topic].key(RECORDS[topic]),
                "value": b64encode(value).decode(),
                "says": plain(RECORDS[topic]),
            }
            path.write_text(json.dumps(kept, indent=1) + "\n")
            yield path


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for written in record():
        print(written.name)

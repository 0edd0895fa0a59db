"""The Avro schemas of the tree: the current one of each topic, every committed earlier one, by fingerprint."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import fastavro.schema

AVRO = Path(__file__).parent / "avro"


@cache
def topics() -> tuple[str, ...]:
    """The topics that have a schema, sorted."""
    return tuple(sorted(path.stem for path in AVRO.glob("*.avsc")))


@cache
def current(topic: str) -> Any:
    """The parsed schema that writers of this topic use."""
    return _load(AVRO / f"{topic}.avsc")


@cache
def history(topic: str) -> tuple[Any, ...]:
    """Every committed version of the topic's schema, oldest first; the last one is the current."""
    paths = (AVRO / "history").glob(f"{topic}.*.avsc")
    return tuple(_load(path) for path in sorted(paths, key=lambda path: int(path.suffixes[-2][1:])))


@cache
def fingerprint(topic: str) -> bytes:
    """The current schema's Rabin fingerprint: 8 bytes, as the Avro specification has it."""
    return _rabin(current(topic))


@cache
def by_fingerprint(topic: str) -> dict[bytes, Any]:
    """Every version of the topic's schema by its Rabin fingerprint: what a reader needs to read old records."""
    return {_rabin(schema): schema for schema in history(topic)}


@cache
def documents(topic: str) -> dict[bytes, str]:
    """Every version of the topic's schema as JSON, with its descriptions, by its fingerprint; the oldest first."""
    found = {}
    for number, schema in enumerate(history(topic), start=1):
        text = (AVRO / "history" / f"{topic}.{number}.avsc").read_text()
        found[_rabin(schema)] = json.dumps(json.loads(text), separators=(",", ":"))
    return found


def _load(path: Path) -> Any:
    return fastavro.schema.parse_schema(json.loads(path.read_text()))


def _rabin(schema: Any) -> bytes:
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    return bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))

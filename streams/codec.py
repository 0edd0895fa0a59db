"""Records to bytes and back: Avro in Confluent's framing, with the schema's fingerprint in a header.

Our own readers find the writer's schema by fingerprint in the tree and need no registry; the framing (a zero
byte and a 4-byte id) lets other tools use one. Without a registry the id is the fingerprint's first 31 bits.
"""

import io
from typing import Any, TypeVar

import fastavro
import msgspec

from schemas import avro_schemas
from schemas.records import Record
from streams.errors import UnprocessableError
from streams.messages import FINGERPRINT, Emit, Incoming
from streams.topics import TOPICS

R = TypeVar("R", bound=Record)

_MAGIC = b"\x00"
_FRAME = 5  # the magic byte and the id


class DecodeError(UnprocessableError):
    """These bytes are no record of this topic: not framed, an unknown schema, or not what the schema says."""


def encode(topic: str, record: Record) -> tuple[bytes, bytes]:
    """A record as `(value, fingerprint)`."""
    fingerprint = avro_schemas.fingerprint(topic)
    out = io.BytesIO()
    out.write(_MAGIC)
    out.write((int.from_bytes(fingerprint[:4], "big") & 0x7FFFFFFF).to_bytes(4, "big"))
    fastavro.schemaless_writer(
        out,
        avro_schemas.current(topic),
        msgspec.to_builtins(record, builtin_types=(bytes,)),
    )
    return out.getvalue(), fingerprint


def emit(topic: str, record: Record, partition: int | None = None) -> Emit:
    """A record ready to append, keyed as the catalogue says."""
    value, fingerprint = encode(topic, record)
    return Emit(topic, TOPICS[topic].key(record).encode(), value, ((FINGERPRINT, fingerprint),), partition)


def decode(incoming: Incoming, kind: type[R]) -> R:
    """The record in these bytes, by the schema it was written with, read as today's.

    Raises:
        DecodeError: the bytes cannot be a record of this topic; the message says what is wrong with them.
    """
    return decode_bytes(incoming.topic, incoming.value, incoming.header(FINGERPRINT), kind)


def decode_bytes(topic: str, value: bytes | None, fingerprint: bytes | None, kind: type[R]) -> R:
    """As `decode`, from the parts. Without a fingerprint the current schema is assumed."""
    if value is None or len(value) < _FRAME or value[:1] != _MAGIC:
        raise DecodeError(f"not in Confluent's framing (a zero byte, a 4-byte id, Avro): {(value or b'')[:8]!r}...")
    writer: Any = avro_schemas.current(topic)
    if fingerprint is not None and fingerprint != avro_schemas.fingerprint(topic):
        known = avro_schemas.by_fingerprint(topic)
        if fingerprint not in known:
            raise DecodeError(
                f"schema {fingerprint.hex()} of topic {topic} is not known to this version: upgrade the reader first",
            )
        writer = known[fingerprint]
    body = io.BytesIO(value)
    body.seek(_FRAME)
    try:
        plain = fastavro.schemaless_reader(body, writer, avro_schemas.current(topic))
        if body.read(1):
            raise DecodeError(f"bytes are left over after a record of {topic}")
        return msgspec.convert(plain, kind, strict=False)
    except DecodeError:
        raise
    except Exception as error:  # fastavro raises whatever its struct and zip calls raise on bad bytes
        raise DecodeError(f"not a record of {topic}: {type(error).__name__}: {error}") from error

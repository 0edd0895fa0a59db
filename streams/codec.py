"""Records to bytes and back: Avro in Confluent's framing, with the schema's fingerprint in a header.

Our own readers find the writer's schema by fingerprint in the tree and need no registry; the framing (a zero
byte and a 4-byte id) lets other tools use one. The id is the fingerprint's first 31 bits, and a registry is told so
(streams/registry.py): which id a schema has depends on nobody's order of registering.
"""

import io
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

import fastavro
import msgspec
import structlog

from schemas import avro_schemas
from schemas.records import Batch, Context, Detections, Record, RiskEvent
from streams.errors import UnprocessableError
from streams.messages import FINGERPRINT, Emit, Incoming
from streams.topics import TOPICS

log = structlog.get_logger(__name__)

R = TypeVar("R", bound=Record)

_MAGIC = b"\x00"
_FRAME = 5  # the magic byte and the id

# What the age of a result counts from.
_SINCE: dict[type[Record], Callable[[Any], int]] = {
    Detections: attrgetter("arrived_at"),
    Batch: attrgetter("ended_at"),
    Context: attrgetter("batch.ended_at"),
    RiskEvent: attrgetter("ended_at"),
}


class DecodeError(UnprocessableError):
    """This is no record of its topic: not framed, an unknown schema, not what the schema says, or of another key."""


class UnknownSchemaError(DecodeError):
    """Written with a schema that this version does not have: a newer version wrote it."""


def schema_id(fingerprint: bytes) -> int:
    """The id in the frame of a record that was written with the schema of this fingerprint: registries have 31 bits."""
    return int.from_bytes(fingerprint[:4], "big") & 0x7FFFFFFF


def encode(topic: str, record: Record) -> tuple[bytes, bytes]:
    """A record as `(value, fingerprint)`."""
    fingerprint = avro_schemas.fingerprint(topic)
    out = io.BytesIO()
    out.write(_MAGIC)
    out.write(_framed(fingerprint))
    fastavro.schemaless_writer(
        out,
        avro_schemas.current(topic),
        msgspec.to_builtins(record, builtin_types=(bytes,)),
    )
    return out.getvalue(), fingerprint


def emit(topic: str, record: Record, partition: int | None = None) -> Emit:
    """A record ready to append, keyed as the catalogue says."""
    value, fingerprint = encode(topic, record)
    since = _SINCE.get(type(record))
    return Emit(
        topic,
        TOPICS[topic].key(record).encode(),
        value,
        ((FINGERPRINT, fingerprint),),
        partition,
        since(record) if since is not None else None,
    )


def decode(incoming: Incoming, kind: type[R]) -> R:
    """The record in these bytes, by the schema it was written with, read as today's.

    The key must be the one that the catalogue gives it: a record under no key, or under another camera's, may lie on
    a partition where its camera does not live.

    Raises:
        DecodeError: it cannot be a record of this topic; the message says what is wrong with it.
    """
    record = decode_bytes(incoming.topic, incoming.value, incoming.header(FINGERPRINT), kind)
    key = TOPICS[incoming.topic].key(record).encode()
    if incoming.key != key:
        raise DecodeError(f"its key is {_short(incoming.key)}, and {_short(key)} by what it says")
    return record


def decode_state(incoming: Incoming, kind: type[R]) -> R | None:
    """As `decode`, of a topic that only this product writes and reads back: None where the record is a stranger's.

    What somebody else put there must not stop a partition for ever. What a newer version of this product put there
    must: to go on from an older state would do its work again.

    Raises:
        UnknownSchemaError: a newer version wrote it.
    """
    if incoming.value is None:
        return None
    try:
        return decode(incoming, kind)
    except UnknownSchemaError:
        raise
    except DecodeError as error:
        log.error("state record skipped", origin=incoming.origin, error=str(error))  # noqa: TRY400
        return None


def decode_bytes(topic: str, value: bytes | None, fingerprint: bytes | None, kind: type[R]) -> R:
    """As `decode`, from the parts.

    Without a fingerprint, as of a record inside another, the frame's id tells the schema; one that is not ours, the
    current one.
    """
    if value is None or len(value) < _FRAME or value[:1] != _MAGIC:
        raise DecodeError(f"not in Confluent's framing (a zero byte, a 4-byte id, Avro): {_short(value, 8)}")
    writer: Any = avro_schemas.current(topic)
    if fingerprint is None:
        known = avro_schemas.by_fingerprint(topic)
        writer = next((known[one] for one in known if _framed(one) == value[1:_FRAME]), writer)
    elif fingerprint != avro_schemas.fingerprint(topic):
        known = avro_schemas.by_fingerprint(topic)
        if fingerprint not in known:
            raise UnknownSchemaError(
                f"schema {fingerprint[:8].hex()} of {topic} is not known to this version: upgrade the reader first",
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


def _framed(fingerprint: bytes) -> bytes:
    return schema_id(fingerprint).to_bytes(_FRAME - len(_MAGIC), "big")


def _short(data: bytes | None, limit: int = 80) -> str:
    """Bytes of any length in a message."""
    if data is None:
        return "none"
    return repr(data[:limit]) + ("..." if len(data) > limit else "")

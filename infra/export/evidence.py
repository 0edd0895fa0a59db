"""What an event was made from, as it is kept: the bytes of its records on the log, and its images.

Everything is read from ClickHouse and the image store, so the broker may have forgotten it long ago. What is not kept
any more, or not as it was, is named; it stops nothing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from infra.export import verify
from processors.batch.core import settings_digest
from processors.store.queries import Lineage, Queries, Row
from schemas import avro_schemas, ids
from schemas.records import WindowSettings
from streams.claims import ClaimStore
from streams.errors import UnavailableError, UnprocessableError
from streams.messages import Headers

# Positions go into the URL: 100 of them are a few KB of the 64 KB that servers take.
_CHUNK = 100

_RECORDS = """
    SELECT epoch, partition, offset, hex(key) AS key, hex(value) AS value, isNull(value) AS empty,
        arrayMap(h -> tuple(h.1, hex(h.2)), headers) AS headers, fingerprint
    FROM log FINAL
    WHERE topic = {topic:String} AND (epoch, partition, offset) IN
    (
        SELECT place.1, toInt32(place.2), place.3 FROM
        (SELECT arrayJoin(arrayZip({epochs:Array(String)}, {partitions:Array(Int32)}, {offsets:Array(Int64)})) AS place)
    )
"""
# The first that was said of it, in whichever life of the log: what comes later changes no export.
_PROMPT = """
    SELECT epoch, partition, offset FROM prompts FINAL WHERE kind = 'version' AND digest = {digest:String}
    ORDER BY created_at, epoch, offset LIMIT 1
"""
_SETTINGS = """
    SELECT * EXCEPT inserted_at FROM cameras FINAL WHERE camera_id = {camera:String} ORDER BY updated_at, epoch, offset
"""
_WINDOW = tuple(WindowSettings.__struct_fields__)


class Kept(NamedTuple):
    """One record as it stood on the log."""

    topic: str
    origin: str
    """topic:epoch:partition:offset."""
    key: bytes
    value: bytes
    headers: Headers
    schema: Any
    """The Avro schema that it was written with."""
    fingerprint: str
    """That schema's Rabin fingerprint, hex."""
    record: Mapping[str, Any]
    """What the bytes say by that schema."""


class Shot(NamedTuple):
    """One frame of the event, in its order."""

    frame_id: str
    sha256: str
    """Of the image, hex; empty where nothing of the frame is kept."""
    image: bytes | None


class Evidence(NamedTuple):
    """All that is kept of an event."""

    records: Mapping[str, Kept]
    """By name in the archive: `risk_events`, `contexts`, `frames-001` ..."""
    shots: Sequence[Shot]
    missing: Sequence[tuple[str, str]]
    """What is not kept, and why."""

    @property
    def event(self) -> Mapping[str, Any]:
        """The verdict's record."""
        return self.records["risk_events"].record


class NotKeptError(Exception):
    """The verdict itself is not there any more: there is nothing to export."""


async def gather(store: Queries, claims: ClaimStore, lineage: Lineage) -> Evidence:
    """The records and images of an event.

    Raises:
        NotKeptError: the bytes of the verdict are not kept.
        UnavailableError: ClickHouse or the image store is away.
    """
    wanted = await _positions(store, lineage)
    records: dict[str, Kept] = {}
    missing: list[tuple[str, str]] = []
    found: dict[str, Kept | str] = {}
    for topic in sorted({topic for topic, _ in wanted.values()}):
        found |= await _records(store, topic, [row for of, row in wanted.values() if of == topic and row is not None])
    for name, (topic, row) in wanted.items():
        what = found.get(_origin(topic, row)) if row is not None else "it is not in ClickHouse (any more, or yet)"
        if isinstance(what, Kept):
            records[name] = what
        else:
            missing.append((f"record {name}", what or "its bytes are not in ClickHouse any more (table `log`)"))
    if "risk_events" not in records:
        raise NotKeptError(f"event {lineage.event['event_id']}: {dict(missing)['record risk_events']}")
    shots = []
    for number, frame_id in enumerate(lineage.event["frame_ids"], 1):
        shot, why = await _shot(claims, frame_id, lineage.frames.get(frame_id), records.get(f"frames-{number:03}"))
        shots.append(shot)
        if why:
            missing.append((f"image {number:03}", why))
    return Evidence(records, shots, missing)


async def _positions(store: Queries, lineage: Lineage) -> dict[str, tuple[str, Row | None]]:
    """Topic and position of each record, by its name in the archive."""
    event, batch = lineage.event, lineage.batch
    wanted: dict[str, tuple[str, Row | None]] = {
        "risk_events": ("risk_events", event),
        "contexts": ("contexts", lineage.context),
        "batches": ("batches", batch),
    }
    prompt = await store.rows(_PROMPT, digest=event["prompt_digest"])
    wanted["prompts"] = ("prompts", prompt[0] if prompt else None)
    if batch is not None:
        settings = await store.rows(_SETTINGS, camera=event["camera_id"])
        # A camera without settings of its own has no record of them.
        if (row := next((row for row in settings if _digest(row) == batch["settings_digest"]), None)) is not None:
            wanted["cameras"] = ("cameras", row)
    for number, frame_id in enumerate(event["frame_ids"], 1):
        wanted[f"frames-{number:03}"] = ("frames", lineage.frames.get(frame_id))
        wanted[f"detections-{number:03}"] = ("detections", lineage.detections.get(frame_id))
    return wanted


async def _records(store: Queries, topic: str, rows: Sequence[Row]) -> dict[str, Kept | str]:
    """The records at these positions by origin, or why one cannot be exported."""
    found: dict[str, Kept | str] = {}
    for at in range(0, len(rows), _CHUNK):
        some = rows[at : at + _CHUNK]
        for row in await store.rows(
            _RECORDS,
            topic=topic,
            epochs=[row["epoch"] for row in some],
            partitions=[row["partition"] for row in some],
            offsets=[row["offset"] for row in some],
        ):
            found[_origin(topic, row)] = _kept(topic, row)
    return found


def _kept(topic: str, row: Row) -> Kept | str:
    fingerprint = row["fingerprint"] or avro_schemas.fingerprint(topic).hex()
    schema = avro_schemas.by_fingerprint(topic).get(bytes.fromhex(fingerprint))
    if row["empty"] or schema is None:
        return "its record is empty" if row["empty"] else f"its schema {fingerprint} is not known to this version"
    value = bytes.fromhex(row["value"])
    try:
        record = verify.decoded(schema, value)
    except (ValueError, LookupError) as error:
        return f"its bytes in ClickHouse are not what they were: {error}"
    headers = tuple((name, bytes.fromhex(header)) for name, header in row["headers"])
    return Kept(
        topic, _origin(topic, row), bytes.fromhex(row["key"] or ""), value, headers, schema, fingerprint, record
    )


async def _shot(claims: ClaimStore, frame_id: str, row: Row | None, kept: Kept | None) -> tuple[Shot, str]:
    """The frame with its image, and why there is none."""
    known = row if row is not None else kept.record if kept is not None else None
    if known is None:
        return Shot(frame_id, "", None), "nothing of its frame is kept"
    sha256 = str(known["sha256"])
    image = kept.record["image"] if kept is not None else None
    if image is not None:
        right = hashlib.sha256(image).hexdigest() == sha256
        return Shot(frame_id, sha256, image if right else None), "" if right else "its bytes are not what they were"
    if known["claim"] is None:
        return Shot(frame_id, sha256, None), "it was inside its frame's record, which is not kept any more"
    try:
        return Shot(frame_id, sha256, await claims.get(known["claim"], sha256)), ""
    except UnavailableError:
        raise
    except UnprocessableError:  # its message names a folder of this machine, and exports are handed on
        return Shot(frame_id, sha256, None), "its bytes are not in the image store any more, or not as they were"


def _origin(topic: str, row: Mapping[str, Any]) -> str:
    return ids.origin(topic, row["epoch"], row["partition"], row["offset"])


def _digest(row: Row) -> str:
    """The digest that windows name these settings by."""
    window = {name: row[f"window_{name}"] for name in _WINDOW}
    return settings_digest(WindowSettings(**window | {"open_on": tuple(window["open_on"])}))

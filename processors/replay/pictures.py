"""The frame of a window that tells the most of it, as a small picture with its boxes.

Which frame that is, the window says: the one with the surest box that is news. Its bytes are the recorded ones, inside
their record or in the image store. What is gone, or is no picture any more, is said in its place and stops nothing.
"""

import asyncio
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from processors.replay.comparison import Pair, Verdict
from processors.replay.report import Picture, SeenBox
from processors.store.queries import Queries, Row
from schemas.records import Context, Frame, ReplayUnit
from streams import codec, jpeg
from streams.claims import ClaimStore
from streams.codec import DecodeError
from streams.errors import UnavailableError, UnprocessableError

MOST_PX = 320
"""A picture's longer side: what a phone shows of it."""

# A rendered or real scene of 320 x 180 has 8 to 14 KB at the first quality. Noise has more, and nothing to be seen in.
_MOST_BYTES = 24_000
_QUALITIES = (74, 58, 40, 25)

# Ids go into the URL: 100 of them, percent-encoded, are 8 KB of the 64 KB that servers take.
_CHUNK = 100
# Images in hand at once, of at most 10 MB each.
_AT_ONCE = 4
# Boxes that can be told apart on so small a picture.
_BOXES = 12

_WINDOWS = """
    SELECT batch_id, `frames.frame_id` AS frame_ids, `frames.event_at` AS at, `frames.width` AS widths,
        `frames.height` AS heights, `frames.matters` AS matters, `frames.boxes` AS boxes
    FROM batches FINAL PREWHERE camera_id IN {cameras:Array(String)} AND batch_id IN {ids:Array(String)}
"""
_UNITS = """
    SELECT substring(u.unit_id, length({replay:String}) + 2) AS batch_id, hex(l.value) AS value, l.fingerprint AS print
    FROM
    (
        SELECT unit_id, epoch, partition, offset FROM replay_units FINAL
        WHERE replay_id = {replay:String}
        AND unit_id IN (SELECT concat({replay:String}, ':', arrayJoin({ids:Array(String)})))
    ) AS u
    INNER JOIN
    (
        SELECT epoch, partition, offset, value, fingerprint FROM log FINAL
        WHERE topic = 'replay_units' AND (epoch, partition, offset) IN
        (
            SELECT epoch, partition, offset FROM replay_units
            WHERE replay_id = {replay:String}
            AND unit_id IN (SELECT concat({replay:String}, ':', arrayJoin({ids:Array(String)})))
        )
    ) AS l ON l.epoch = u.epoch AND l.partition = u.partition AND l.offset = u.offset
"""
_FRAMES = """
    SELECT frame_id, sha256, claim, epoch, partition, offset FROM frames
    PREWHERE camera_id IN {cameras:Array(String)} AND frame_id IN {ids:Array(String)}
    ORDER BY inserted_at DESC LIMIT 1 BY camera_id, frame_id
"""
_RECORD = """
    SELECT hex(value) AS value, fingerprint FROM log
    WHERE topic = 'frames' AND epoch = {epoch:String} AND partition = {partition:Int32} AND offset = {offset:Int64}
    LIMIT 1
"""


class Moment(NamedTuple):
    """One frame of a window, as the window has it."""

    frame_id: str
    at: int
    """Event time, milliseconds since the Unix epoch."""
    width: int
    height: int
    matters: bool
    boxes: tuple[Mapping[str, Any], ...]


class Recut(NamedTuple):
    """A replay that made its windows anew: what was seen in them stands in its units."""

    replay_id: str
    name: str
    of_a: bool
    """Whether it is side A; else side B."""


async def pictures(
    store: Queries, claims: ClaimStore, pairs: Sequence[Pair], recut: Recut | None = None
) -> dict[str, Picture]:
    """A picture for each pair, by the event id of its side A.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    units: dict[str, list[Moment]] = {}
    if recut is not None:
        units = await _from_units(store, recut.replay_id, [_of(pair, recut.of_a).batch_id for pair in pairs])
    recorded = await _from_batches(store, [verdict for pair in pairs for verdict in (pair.a, pair.b)])
    chosen: dict[str, Picture] = {}
    wanted: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        made = recut is not None and _of(pair, recut.of_a).batch_id in units
        verdict = _of(pair, recut.of_a) if made and recut is not None else pair.a
        frames = units.get(verdict.batch_id) or recorded.get(pair.a.batch_id) or recorded.get(pair.b.batch_id) or []
        n, moment = telling(frames, verdict.classes)
        frame_id = moment.frame_id if moment else next(iter(verdict.frame_ids), "")
        wanted[pair.a.event_id] = (verdict.camera_id, frame_id)
        chosen[pair.a.event_id] = Picture(
            boxes=_boxes(moment, verdict.classes) if moment else (),
            n=n + 1,
            of=len(frames) or max(1, len(verdict.frame_ids)),
            at=moment.at if moment else None,
            seen_by=recut.name if made and recut is not None else "",
        )
    shown = await _shown(store, claims, wanted)
    return {event: _with(picture, shown[event]) for event, picture in chosen.items()}


def telling(frames: Sequence[Moment], classes: Iterable[str]) -> tuple[int, Moment | None]:
    """The frame with the surest box that is news, and its place from 0; the first that matters where none has one."""
    ranked = sorted(
        enumerate(frames),
        key=lambda one: (not one[1].matters, -max((b["score"] for b in _news(one[1], classes)), default=0.0), one[0]),
    )
    return ranked[0] if ranked else (0, None)


def thumbnail(data: bytes) -> tuple[bytes, int, int]:
    """The JPEG made small, its width and height in pixels. Takes time: call it in a thread.

    Raises:
        UnprocessableError: it is no JPEG that can be decoded.
    """
    try:
        if why := jpeg.scans_too_many(data):
            raise UnprocessableError(why)
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.draft("RGB", (2 * MOST_PX, 2 * MOST_PX))  # a large one is decoded at a part of its size
        small = image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UnprocessableError(f"it cannot be decoded: {error}") from error
    small.thumbnail((MOST_PX, MOST_PX), Image.Resampling.LANCZOS)
    for quality in _QUALITIES:
        out = io.BytesIO()
        small.save(out, "JPEG", quality=quality, optimize=True, progressive=False)
        if out.tell() <= _MOST_BYTES:
            break
    return out.getvalue(), small.width, small.height


def _of(pair: Pair, of_a: bool) -> Verdict:
    return pair.a if of_a else pair.b


def _news(moment: Moment, classes: Iterable[str]) -> list[Mapping[str, Any]]:
    """Boxes that are news: they moved, and are of a class that the window matters for (of any, where none is known)."""
    wanted = set(classes)
    return [box for box in moment.boxes if not box["stationary"] and (not wanted or box["label"] in wanted)]


def _boxes(moment: Moment, classes: Iterable[str]) -> tuple[SeenBox, ...]:
    if moment.width <= 0 or moment.height <= 0:
        return ()
    news = sorted(_news(moment, classes), key=lambda box: -box["score"])[:_BOXES]
    return tuple(
        SeenBox(
            label=box["label"],
            score=box["score"],
            x=box["x"] / moment.width,
            y=box["y"] / moment.height,
            width=box["width"] / moment.width,
            height=box["height"] / moment.height,
        )
        for box in news
    )


async def _from_batches(store: Queries, verdicts: Sequence[Verdict]) -> dict[str, list[Moment]]:
    """The windows that were recorded, by batch id."""
    rows = await _by_ids(store, _WINDOWS, {verdict.batch_id: verdict.camera_id for verdict in verdicts})
    columns = ("frame_ids", "at", "widths", "heights", "matters", "boxes")
    return {
        row["batch_id"]: [
            Moment(frame_id, _ms(at), width, height, bool(matters), tuple(dict(box) for box in boxes))
            for frame_id, at, width, height, matters, boxes in zip(*(row[name] for name in columns), strict=True)
        ]
        for row in rows
    }


async def _from_units(store: Queries, replay_id: str, batch_ids: Sequence[str]) -> dict[str, list[Moment]]:
    """The windows that a replay made, by batch id; those that cannot be read any more are missing."""
    found: dict[str, list[Moment]] = {}
    for at in range(0, len(batch_ids), _CHUNK):
        for row in await store.rows(_UNITS, replay=replay_id, ids=list(batch_ids[at : at + _CHUNK])):
            context = _context(row)
            if context is not None:
                found[row["batch_id"]] = [
                    Moment(
                        frame.frame_id,
                        frame.event_at,
                        frame.width,
                        frame.height,
                        frame.matters,
                        tuple(
                            {name: getattr(box, name) for name in ("label", "score", "x", "y", "width", "height")}
                            | {"stationary": box.stationary}
                            for box in frame.boxes
                        ),
                    )
                    for frame in context.batch.frames
                ]
    return found


def _context(row: Row) -> Context | None:
    if not row["value"]:
        return None
    try:
        fingerprint = bytes.fromhex(row["print"]) or None
        unit = codec.decode_bytes("replay_units", bytes.fromhex(row["value"]), fingerprint, ReplayUnit)
        return codec.decode_bytes("contexts", unit.payload, None, Context)
    except DecodeError:
        return None


class _Thumb(NamedTuple):
    jpeg: bytes
    width: int
    height: int
    missing: str


def _with(picture: Picture, thumb: _Thumb) -> Picture:
    if not thumb.jpeg:
        return Picture(missing=thumb.missing, n=picture.n, of=picture.of, at=picture.at, seen_by=picture.seen_by)
    return Picture(
        jpeg=thumb.jpeg,
        width=thumb.width,
        height=thumb.height,
        boxes=picture.boxes,
        n=picture.n,
        of=picture.of,
        at=picture.at,
        seen_by=picture.seen_by,
    )


async def _shown(store: Queries, claims: ClaimStore, wanted: Mapping[str, tuple[str, str]]) -> dict[str, _Thumb]:
    """The picture of each frame, or why there is none; by what it is wanted for."""
    frames = {frame_id: camera for camera, frame_id in wanted.values() if frame_id}
    rows = {row["frame_id"]: row for row in await _by_ids(store, _FRAMES, frames)}
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(frame_id: str) -> _Thumb:
        async with slots:
            if frame_id not in rows:
                return _Thumb(b"", 0, 0, "The record of this frame is not kept any more.")
            try:
                data = await _bytes(store, claims, rows[frame_id])
                return _Thumb(*await asyncio.to_thread(thumbnail, data), "")
            except UnprocessableError as error:
                return _Thumb(b"", 0, 0, f"No picture of this frame: {error}.")
            except UnavailableError as error:
                if error.waiting_on == "store":
                    raise
                return _Thumb(b"", 0, 0, "No picture of this frame: the image store could not be reached.")

    # All to the end: what still ran would ask a connection that is closed.
    thumbs = await asyncio.gather(*map(one, frames), return_exceptions=True)
    made: dict[str, _Thumb] = {}
    for frame_id, thumb in zip(frames, thumbs, strict=True):
        if isinstance(thumb, BaseException):
            raise thumb
        made[frame_id] = thumb
    none = _Thumb(b"", 0, 0, "The window names no frame.")
    return {name: made.get(frame_id, none) for name, (_, frame_id) in wanted.items()}


async def _bytes(store: Queries, claims: ClaimStore, row: Row) -> bytes:
    """A frame's image, checked against its hash.

    Raises:
        UnprocessableError: it is gone, or not what it was.
        UnavailableError: the image store or ClickHouse is away.
    """
    if row["claim"] is not None:
        try:
            return await claims.get(row["claim"], row["sha256"])
        except UnprocessableError as error:  # its message names a folder, and reports are handed on
            raise UnprocessableError("its bytes are not in the image store any more, or not as they were") from error
    found = await store.rows(_RECORD, epoch=row["epoch"], partition=row["partition"], offset=row["offset"])
    if not found or found[0]["value"] is None:
        raise UnprocessableError("its bytes are not kept any more")
    fingerprint = bytes.fromhex(found[0]["fingerprint"]) or None
    image = codec.decode_bytes("frames", bytes.fromhex(found[0]["value"]), fingerprint, Frame).image
    if image is None:
        raise UnprocessableError("its record holds no image")
    if hashlib.sha256(image).hexdigest() != row["sha256"]:
        raise UnprocessableError("its bytes are not those that its hash names")
    return image


async def _by_ids(store: Queries, query: str, ids: Mapping[str, str]) -> list[Row]:
    """The rows of a query that takes `cameras` and `ids`, some at a time; ids are mapped to their cameras."""
    wanted = list(ids)
    found: list[Row] = []
    for at in range(0, len(wanted), _CHUNK):
        chunk = wanted[at : at + _CHUNK]
        found += await store.rows(query, cameras=sorted({ids[one] for one in chunk}), ids=chunk)
    return found


def _ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)

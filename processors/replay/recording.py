"""What batch read, as ClickHouse keeps it: detections and ticks byte for byte, and how each camera was set at the time.

Everything is asked per `Bound`: one partition of one life of `detections`, as far as it went when a replay was planned.
Typed rows tell where what lies in it; where another life's have replaced them, the records themselves do (`replaced`).
"""

import asyncio
import heapq
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import structlog

from processors.batch.core import REMEMBERED, settings_digest
from processors.replay.plan import Bound, offsets
from processors.replay.replaced import Replaced
from processors.store.queries import Queries
from schemas.records import Camera, ContextSection, Detections
from streams import codec
from streams.messages import FINGERPRINT, REDRIVE, Headers, Incoming

log = structlog.get_logger(__name__)

CHUNK = 10_000
"""Records read at once: 3 MB, and a third of a second of folding."""

# When a record happened by its own account: what a camera's event time is the running maximum of.
_OWN = "toUnixTimestamp64Milli(least(ifNull(captured_at, arrived_at), arrived_at))"

# In the order of the primary key, so that a chunk reads a chunk. Not FINAL, which would read all that follows: a
# record that is there twice comes twice in a row.
_RECORDS = f"""
    SELECT offset, key, value, fingerprint,
        if(tick OR arrayExists(h -> h.1 = '{REDRIVE}', headers), arrayMap(h -> (h.1, h.2), headers), []) AS headers
    FROM log
    WHERE topic = 'detections' AND epoch = {{epoch:String}} AND partition = {{partition:Int32}}
    AND offset >= {{lo:Int64}} AND offset < {{hi:Int64}}
    AND (empty({{cameras:Array(String)}}) OR tick OR key IN {{cameras:Array(String)}})
    ORDER BY offset LIMIT {{limit:UInt32}}
"""  # noqa: S608 (constants)
_REPLACED = """
    SELECT offset, key, value, fingerprint FROM log
    PREWHERE topic = 'detections' AND epoch = {epoch:String} AND partition = {partition:Int32}
    AND offset >= {lo:Int64} AND offset < {hi:Int64} AND NOT tick AND decode_error = '' AND offset NOT IN
    (
        SELECT offset FROM detections
        WHERE epoch = {epoch:String} AND partition = {partition:Int32} AND offset >= {lo:Int64} AND offset < {hi:Int64}
    )
    ORDER BY offset LIMIT {limit:UInt32}
"""
# Of a camera that sends little, so many records at least: four times what the longest memory holds.
_MEMORY = 4 * REMEMBERED

_OF_BOUND = "epoch = {epoch:String} AND partition = {partition:Int32} AND offset < {hi:Int64}"
_STARTS = f"""
    SELECT camera_id, minOrNullIf(offset, {_OWN} >= {{at:Int64}}) AS first,
        minOrNullIf(offset, {_OWN} >= {{at:Int64}} - {{back:Int64}}) AS begin,
        groupArraySortedIf({_MEMORY})(-offset, {_OWN} < {{at:Int64}}) AS before, max(offset) AS last
    FROM detections WHERE {_OF_BOUND} AND (empty({{cameras:Array(String)}}) OR camera_id IN {{cameras:Array(String)}})
    GROUP BY camera_id ORDER BY camera_id
"""  # noqa: S608 (constants)
_BEFORE = f"""
    SELECT camera_id, max({_OWN}) AS event_at FROM detections
    WHERE {_OF_BOUND} AND offset < transform(camera_id, {{cameras:Array(String)}}, {{firsts:Array(Int64)}}, toInt64(0))
    GROUP BY camera_id
"""  # noqa: S608 (constants)
_CAMERAS = """
    SELECT epoch, partition, offset, key, value, fingerprint FROM log FINAL
    WHERE topic = 'cameras' AND NOT tick ORDER BY offset
"""
_FIRST = f"""
    SELECT camera_id, toUnixTimestamp64Milli(min(detected_at)) AS at FROM detections
    WHERE {_OF_BOUND} GROUP BY camera_id
"""  # noqa: S608 (constants)
_REACHED = f"""
    SELECT minForEach(arrayMap(
        at -> if(toUnixTimestamp64Milli(detected_at) >= at, offset, {{hi:Int64}}), {{times:Array(Int64)}}
    )) AS offsets
    FROM detections WHERE camera_id = {{camera:String}} AND {_OF_BOUND}
"""  # noqa: S608 (constants)
_OPENED = """
    SELECT `frames.offset`[1] AS offset, settings_digest FROM batches
    WHERE camera_id = {camera:String} AND detections_epoch = {epoch:String}
    AND detections_partition = {partition:Int32} AND closed_at_offset < {hi:Int64}
    ORDER BY offset
"""
_CONTEXTS = """
    SELECT batch_id, camera_name, time_zone, `sections.name` AS names, `sections.text` AS texts,
        `sections.priority` AS priorities, `sections.made_by` AS makers
    FROM contexts
    WHERE camera_id IN {cameras:Array(String)} AND batch_id IN {batches:Array(String)}
    AND offset < transform(concat(epoch, ':', toString(partition)), {lives:Array(String)}, {ends:Array(Int64)}, 0)
    ORDER BY epoch, offset LIMIT 1 BY camera_id, batch_id
"""
# Not what came again under another position: by its id a frame is one row.
_FRAMES = """
    SELECT f.frame_id AS frame_id, l.epoch AS epoch, l.partition AS partition, l.offset AS offset, l.key AS key,
        l.value AS value, l.fingerprint AS fingerprint
    FROM
    (
        SELECT frame_id, epoch, partition, offset FROM frames FINAL
        WHERE camera_id IN {cameras:Array(String)} AND frame_id IN {frames:Array(String)}
    ) AS f
    INNER JOIN
    (
        SELECT epoch, partition, offset, key, value, fingerprint FROM log
        WHERE topic = 'frames' AND (epoch, partition, offset) IN
        (
            SELECT epoch, partition, offset FROM frames FINAL
            WHERE camera_id IN {cameras:Array(String)} AND frame_id IN {frames:Array(String)}
        )
        LIMIT 1 BY epoch, partition, offset
    ) AS l ON l.epoch = f.epoch AND l.partition = f.partition AND l.offset = f.offset
"""


class Start(NamedTuple):
    """Where a camera's records of some event time and later begin, in one partition. Offsets."""

    first: int | None
    """The first record with which its event time has come so far; None where it never does."""
    begin: int
    """The first that is at most so much older, and at least some records before."""
    last: int
    """Its last record."""


class Told(NamedTuple):
    """What enrich said of a window when it was recorded, besides the window itself."""

    camera_name: str
    time_zone: str
    sections: tuple[ContextSection, ...]


class Recording:
    """The read side of a cut. Its methods raise `UnavailableError` when ClickHouse is away."""

    def __init__(self, store: Queries) -> None:
        self._store = store
        self._replaced: dict[Bound, dict[str, Replaced]] = {}

    async def records(self, bound: Bound, lo: int, cameras: Sequence[str], limit: int) -> list[Incoming]:
        """The next records and ticks from offset `lo` on, of these cameras or of all; none: there are no more."""
        found = await self._store.columns(
            _RECORDS,
            epoch=bound.epoch,
            partition=bound.partition,
            lo=lo,
            hi=bound.offset,
            cameras=list(cameras),
            limit=limit,
        )
        records: list[Incoming] = []
        before = -1
        for offset, key, value, fingerprint, headers in zip(*found.values(), strict=True):
            if offset == before:
                continue
            before = offset
            named: Headers = (
                tuple((name.decode(), content) for name, content in headers) if headers else _schema(fingerprint)
            )
            records.append(Incoming("detections", bound.epoch, bound.partition, offset, key, value, named))
        return records

    async def starts(self, bound: Bound, at: int, cameras: Sequence[str], back_ms: int = 0) -> dict[str, Start]:
        """By camera, where its records of event time `at` (ms since the Unix epoch) and later begin."""
        rows = await self._store.rows(
            _STARTS,
            epoch=bound.epoch,
            partition=bound.partition,
            hi=bound.offset,
            at=at,
            back=back_ms,
            cameras=list(cameras),
        )
        found: dict[str, Start] = {}
        listed = {row["camera_id"]: row for row in rows}
        replaced = await self._unlisted(bound, cameras)
        for camera in sorted({*listed, *replaced}):
            firsts, begins, lasts, before = [], [], [], []
            if (row := listed.get(camera)) is not None:
                firsts, begins, lasts, before = [row["first"]], [row["begin"]], [row["last"]], list(row["before"])
            if (more := replaced.get(camera)) is not None:
                firsts.append(more.first(at))
                begins.append(more.first(at - back_ms))
                lasts.append(more.last())
                before += [-offset for offset in more.before(at, _MEMORY)]
            first, begin, last = _least(firsts), _least(begins), max(lasts)
            memory = [-offset for offset in heapq.nsmallest(_MEMORY, before)[-1:]]
            found[camera] = Start(first, min([last if first is None or begin is None else begin, *memory]), last)
        return found

    async def event_times(self, bound: Bound, firsts: Mapping[str, int]) -> dict[str, int]:
        """The cameras' event times just before these offsets; missing where nothing lies before."""
        rows = await self._store.rows(
            _BEFORE,
            epoch=bound.epoch,
            partition=bound.partition,
            hi=bound.offset,
            cameras=list(firsts),
            firsts=list(firsts.values()),
        )
        found = {row["camera_id"]: row["event_at"] for row in rows}
        for camera, more in (await self._unlisted(bound, list(firsts))).items() if firsts else ():
            time = more.event_time(firsts[camera])
            if time is not None:
                found[camera] = max(time, found.get(camera, time))
        return found

    async def cameras(self) -> dict[str, list[Camera]]:
        """What was ever set for each camera, in order. What cannot be read was never in force, and is left out."""
        found = await self._store.columns(_CAMERAS)
        versions: dict[str, list[Camera]] = {}
        for epoch, partition, offset, key, value, fingerprint in zip(*found.values(), strict=True):
            record = Incoming("cameras", _text(epoch), partition, offset, key, value, _schema(fingerprint))
            try:
                camera = codec.decode(record, Camera)
            except codec.DecodeError as error:
                log.error("control record skipped", origin=record.origin, error=str(error))  # noqa: TRY400
            else:
                versions.setdefault(camera.camera_id, []).append(camera)
        return versions

    async def in_force(self, bound: Bound, versions: Mapping[str, Sequence[Camera]]) -> "InForce":
        """From which offset on each version was in force.

        Batch looks a camera's settings up when it reads a record, which no record says. It reads one as soon as it is
        detected; so a version holds from the first record detected since it was set. Where batch was behind, the
        windows that it opened tell better: each names the digest of its settings.
        """
        where = {"epoch": bound.epoch, "partition": bound.partition, "hi": bound.offset}
        since: dict[str, list[tuple[int, Camera]]] = {}
        begun: dict[str, int] = {row["camera_id"]: row["at"] for row in await self._store.rows(_FIRST, **where)}
        replaced = await self._unlisted(bound, ())
        for camera_id, more in replaced.items():
            begun[camera_id] = min(more.detected(), begun.get(camera_id, more.detected()))
        for camera_id, begun_at in begun.items():
            all_of_it = versions.get(camera_id, ())
            # Another machine's clock may be behind: the later record holds all the same.
            times = list(accumulate((camera.updated_at for camera in all_of_it), max))
            if not times or (len(times) == 1 and times[0] <= begun_at):
                since[camera_id] = [(0, camera) for camera in all_of_it]
                continue
            [row] = await self._store.rows(_REACHED, camera=camera_id, times=times, **where)
            reached = row["offsets"] or [bound.offset] * len(times)  # it has no rows at all
            if camera_id in replaced:
                reached = list(map(min, reached, replaced[camera_id].reached(times, bound.offset)))
            opened = await self._store.rows(_OPENED, camera=camera_id, **where)
            first = corrected(reached, all_of_it, [(window["offset"], window["settings_digest"]) for window in opened])
            since[camera_id] = list(zip(first, all_of_it, strict=True))
        return InForce(since)

    async def _unlisted(self, bound: Bound, cameras: Sequence[str]) -> dict[str, Replaced]:
        """By camera, of these or of all, the records whose rows were replaced by those of the same frames elsewhere."""
        if bound not in self._replaced:
            all_of_it: dict[str, Replaced] = {}
            offset, count = -1, CHUNK
            while count == CHUNK:
                where = {"epoch": bound.epoch, "partition": bound.partition, "lo": offset + 1, "hi": bound.offset}
                found = await self._store.columns(_REPLACED, **where, limit=CHUNK)
                count = 0
                for offset, key, value, fingerprint in zip(*found.values(), strict=True):
                    count += 1
                    record = Incoming(
                        "detections", bound.epoch, bound.partition, offset, key, value, _schema(fingerprint)
                    )
                    try:
                        seen = codec.decode(record, Detections)
                    except codec.DecodeError:
                        continue  # the fold names it
                    all_of_it.setdefault(seen.camera_id, Replaced()).add(offset, seen)
                await asyncio.sleep(0)
            self._replaced[bound] = all_of_it
        return {camera: of_it for camera, of_it in self._replaced[bound].items() if not cameras or camera in cameras}

    async def told(self, bounds: tuple[Bound, ...], batches: Sequence[str]) -> dict[str, Told]:
        """What was recorded of these windows, below the bounds of `contexts`."""
        below = list(offsets(bounds, "contexts"))
        if not batches or not below:
            return {}
        rows = await self._store.rows(
            _CONTEXTS,
            cameras=sorted({batch.rpartition(":")[0] for batch in batches}),
            batches=list(batches),
            lives=[f"{bound.epoch}:{bound.partition}" for bound in below],
            ends=[bound.offset for bound in below],
        )
        return {
            row["batch_id"]: Told(
                row["camera_name"],
                row["time_zone"],
                tuple(
                    ContextSection(name=name, text=text, priority=priority, made_by=made_by)
                    for name, text, priority, made_by in zip(
                        row["names"], row["texts"], row["priorities"], row["makers"], strict=True
                    )
                ),
            )
            for row in rows
        }

    async def frames(self, wanted: Sequence[tuple[str, str]]) -> dict[str, Incoming]:
        """The records of these frames (camera and frame id), by frame id; missing where they are gone."""
        found = await self._store.columns(
            _FRAMES, cameras=sorted({camera for camera, _ in wanted}), frames=[frame for _, frame in wanted]
        )
        return {
            _text(frame): Incoming("frames", _text(epoch), partition, offset, key, value, _schema(fingerprint))
            for frame, epoch, partition, offset, key, value, fingerprint in zip(*found.values(), strict=True)
        }

    async def draws(self, batches: Sequence[str]) -> list[int]:
        """The numbers by which samples are drawn, as those of recorded windows are."""
        [row] = await self._store.rows(
            "SELECT arrayMap(b -> cityHash64(b), {batches:Array(String)}) AS draws", batches=list(batches)
        )
        return list(row["draws"])


class InForce:
    """How each camera was set, by offset, in one partition."""

    def __init__(self, since: Mapping[str, Sequence[tuple[int, Camera]]]) -> None:
        self._since = {camera: tuple(versions) for camera, versions in since.items()}

    def at(self, camera_id: str, offset: int) -> Camera | None:
        """What was in force when this offset was read; None where nothing was set yet."""
        versions = self._since.get(camera_id, ())
        return next((camera for first, camera in reversed(versions) if first <= offset), None)

    def versions(self, camera_id: str) -> list[Camera]:
        """All that was ever in force."""
        return [camera for _, camera in self._since.get(camera_id, ())]


def corrected(by_time: Sequence[int], versions: Sequence[Camera], opened: Sequence[tuple[int, str]]) -> list[int]:
    """From which offsets on the versions held, given where windows opened, and by settings of which digest.

    `by_time` is what the times say: one for each version, ascending. A window that opened behind it by the version
    before, or ahead of it by this one, moves it.
    """
    found = list(by_time)
    digests = [settings_digest(camera.window) for camera in versions]
    for index in range(1, len(found)):
        if digests[index] == digests[index - 1]:
            continue  # another name or time zone: windows do not tell
        end = found[index + 1] if index + 1 < len(found) else None
        late = [o for o, by in opened if o >= found[index] and (end is None or o < end) and by == digests[index - 1]]
        early = [o for o, by in opened if found[index - 1] <= o < found[index] and by == digests[index]]
        if late:
            found[index] = late[-1] + 1
        elif early:
            found[index] = early[0]
    return found


def _least(offsets_or_none: Sequence[int | None]) -> int | None:
    return min((offset for offset in offsets_or_none if offset is not None), default=None)


def _schema(fingerprint: bytes) -> Headers:
    return ((FINGERPRINT, bytes.fromhex(fingerprint.decode())),) if fingerprint else ()


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value

"""What sides said, from ClickHouse: verdicts, with their camera's name and zone and what was seen in their windows."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from processors.replay.comparison import Verdict
from processors.replay.plan import Scope
from processors.replay.sides import Known
from processors.store.queries import Queries, Row
from processors.store.times import FIRST_MS, LAST_MS
from schemas.records import Context, ReplayUnit
from streams import codec
from streams.codec import DecodeError

# Units whose payloads are read at once: some 4 KB each, twice that as hex.
_PAGE = 1000

_COLUMNS = """
    event_id, batch_id, camera_id, frame_ids,
    toUnixTimestamp64Milli(started_at) AS began, toUnixTimestamp64Milli(ended_at) AS over,
    risk_score, risk_level, summary, reasoning, recommended_action,
    lower(hex(SHA256(raw_completion))) AS completion, lower(hex(SHA256(rendered_prompt))) AS rendered,
    prompt_digest, verdict_digest, model, model_digest, prompt_tokens + completion_tokens AS tokens,
    if({strict:Bool}, parameters, '') AS made_with,
    if({strict:Bool}, CAST(conditions, 'Map(String, String)'), CAST(map(), 'Map(String, String)')) AS made_under
"""
_REPLAYED = f"SELECT {_COLUMNS}, reused FROM replay_events FINAL WHERE replay_id = {{replay:String}}"  # noqa: S608 (constants)
_LIVE = f"SELECT {_COLUMNS}, false AS reused FROM risk_events FINAL"  # noqa: S608 (constants)
_OF_REPLAY = "(camera_id, event_id) IN (SELECT camera_id, concat(batch_id, ':live') FROM replay_events WHERE replay_id = {replay:String})"  # noqa: E501
_OF_SCOPE = """
    run = 'live' AND (empty({cameras:Array(String)}) OR camera_id IN {cameras:Array(String)})
    AND started_at >= fromUnixTimestamp64Milli({since:Int64}) AND started_at < fromUnixTimestamp64Milli({until:Int64})
"""
MEMBERS = f"""
    SELECT camera_id, batch_id FROM replay_events WHERE replay_id IN {{replays:Array(String)}}
    UNION DISTINCT
    SELECT camera_id, batch_id FROM risk_events WHERE {{whole:Bool}} AND {_OF_SCOPE}
"""  # noqa: S608 (constants)
"""The windows of a comparison, with the parameters of `Verdicts.members`."""
_WINDOWS = f"""
    SELECT camera_id, batch_id, detections_epoch, detections_partition, closed_at_offset,
        arraySort(arrayDistinct(arrayFlatten(arrayMap(
            (matters, boxes) -> if(matters, arrayMap(box -> toString(box.label), arrayFilter(
                box -> NOT box.stationary AND (empty(opens) OR has(opens, box.label)), boxes)), []),
            matter, seen)))) AS classes
    FROM
    (
        SELECT camera_id, batch_id, detections_epoch, detections_partition, closed_at_offset,
            frames.matters AS matter, frames.boxes AS seen
        FROM batches FINAL
        WHERE (camera_id, batch_id) IN ({MEMBERS})
    ) AS b
    LEFT ANY JOIN
    (
        SELECT camera_id, argMax(window_open_on, (updated_at, `offset`)) AS opens FROM cameras GROUP BY camera_id
    ) AS c ON c.camera_id = b.camera_id
"""  # noqa: S608 (constants)
_CAMERAS = """
    SELECT camera_id, argMax(name, (updated_at, `offset`)) AS title, argMax(time_zone, (updated_at, `offset`)) AS zone,
        argMax(window_open_on, (updated_at, `offset`)) AS opens, 1 AS known
    FROM cameras GROUP BY camera_id
    UNION ALL
    SELECT camera_id, argMax(camera_name, started_at), argMax(time_zone, started_at), [], 0
    FROM contexts GROUP BY camera_id
"""
_PAYLOADS = """
    WITH wanted AS
    (
        SELECT substring(unit_id, position(unit_id, ':') + 1) AS batch_id, epoch, `partition`, `offset`
        FROM replay_units FINAL
        WHERE kind = 'judge' AND batch_id > {after:String}
        AND batch_id IN (SELECT batch_id FROM replay_events WHERE replay_id IN {replays:Array(String)})
        AND batch_id NOT IN (SELECT batch_id FROM batches)
        ORDER BY batch_id LIMIT 1 BY batch_id LIMIT {limit:UInt32}
    )
    SELECT w.batch_id AS batch_id, hex(l.value) AS value, l.fingerprint AS fingerprint
    FROM wanted AS w LEFT ANY JOIN
    (
        SELECT epoch, `partition`, `offset`, value, fingerprint FROM log FINAL
        WHERE topic = 'replay_units' AND (epoch, `partition`, `offset`) IN
            (SELECT epoch, `partition`, `offset` FROM wanted)
    ) AS l ON l.epoch = w.epoch AND l.`partition` = w.`partition` AND l.`offset` = w.`offset`
    ORDER BY batch_id
"""


class _Camera(NamedTuple):
    name: str
    time_zone: str
    opens: frozenset[str]
    """Classes that open its windows now; empty: all do."""


class Verdicts:
    """The verdicts of the sides of one comparison. `load` comes first.

    Args:
        store: ClickHouse.
        replays: the replays among the sides.
        strictly: whether the conditions of their making are wanted, too.
    """

    def __init__(self, store: Queries, replays: Sequence[Known], *, strictly: bool) -> None:
        self._store = store
        self._replays = replays
        self._strict = strictly
        self._cameras: dict[str, _Camera] = {}
        self._classes: dict[str, tuple[str, ...]] = {}
        self.closed: dict[str, tuple[str, int, int]] = {}
        """Where `detections` stood when a recorded window closed: epoch, partition, offset; by batch id."""

    @property
    def _cut(self) -> Known | None:
        """The side that made windows of its own, where the other is live."""
        cutting = [side for side in self._replays if side.cuts]
        return cutting[0] if len(self._replays) == 1 and cutting else None

    @property
    def members(self) -> dict[str, Any]:
        """The parameters of `MEMBERS`."""
        return {"replays": [side.replay_id for side in self._replays], "whole": self._cut is not None, **self._span()}

    def _span(self) -> dict[str, Any]:
        scope = self._cut.scope if self._cut is not None else Scope()
        return {
            "cameras": list(scope.cameras),
            "since": FIRST_MS if scope.since is None else max(scope.since, FIRST_MS),
            "until": LAST_MS if scope.until is None else min(scope.until, LAST_MS),
        }

    async def load(self) -> None:
        """Read what verdicts are shown with.

        Raises:
            UnavailableError: ClickHouse is away; so do the others.
        """
        await self._read_cameras()
        await self._read_windows()

    async def of(self, side: Known | None) -> list[Verdict]:
        """What a replay said, or for None what live work said of the windows of the replays."""
        if side is not None:
            return await self._read(_REPLAYED, replay=side.replay_id)
        if self._cut is not None:
            return await self._read(f"{_LIVE} WHERE {_OF_SCOPE}", **self._span())
        return await self.live_of(self._replays[0])

    async def live_of(self, side: Known) -> list[Verdict]:
        """What live work said of the very windows that a replay has judged."""
        return await self._read(f"{_LIVE} PREWHERE {_OF_REPLAY}", replay=side.replay_id)

    async def _read(self, query: str, **parameters: Any) -> list[Verdict]:
        rows = await self._store.rows(query, strict=self._strict, **parameters)
        return [self._verdict(row) for row in rows]

    def _verdict(self, row: Row) -> Verdict:
        camera = self._cameras.get(row["camera_id"], _Camera(row["camera_id"], "UTC", frozenset()))
        return Verdict(
            event_id=row["event_id"],
            batch_id=row["batch_id"],
            camera_id=row["camera_id"],
            started_at=row["began"],
            ended_at=row["over"],
            # Both sides name the same frames: each name is kept once.
            frame_ids=tuple(map(sys.intern, row["frame_ids"])),
            risk_score=row["risk_score"],
            risk_level=row["risk_level"],
            summary=row["summary"],
            reasoning=row["reasoning"],
            recommended_action=row["recommended_action"],
            camera_name=camera.name,
            time_zone=camera.time_zone,
            classes=self._classes.get(row["batch_id"], ()),
            completion_digest=row["completion"],
            rendered_digest=row["rendered"],
            prompt_digest=row["prompt_digest"],
            verdict_digest=row["verdict_digest"],
            model=row["model"],
            model_digest=row["model_digest"],
            reused=row["reused"],
            parameters=row["made_with"],
            conditions=dict(row["made_under"]),
            tokens=row["tokens"],
        )

    async def _read_cameras(self) -> None:
        rows = await self._store.rows(_CAMERAS)
        for row in sorted(rows, key=lambda row: int(row["known"])):  # what was set comes last, and holds
            name, zone = row["title"] or row["camera_id"], row["zone"] if _is_zone(row["zone"]) else "UTC"
            self._cameras[row["camera_id"]] = _Camera(name, zone, frozenset(row["opens"]))

    async def _read_windows(self) -> None:
        """What was seen in each window: recorded ones are in `batches`, those that a replay made in its units."""
        for row in await self._store.rows(_WINDOWS, **self.members):
            self._classes[row["batch_id"]] = tuple(row["classes"])
            place = (row["detections_epoch"], row["detections_partition"], row["closed_at_offset"])
            self.closed[row["batch_id"]] = place
        if any(side.cuts for side in self._replays):
            await self._read_units()

    async def _read_units(self) -> None:
        """A window that was cut anew is in the unit that had it judged, be it one of another replay."""
        after = ""
        while rows := await self._store.rows(
            _PAYLOADS, replays=[side.replay_id for side in self._replays], after=after, limit=_PAGE
        ):
            after = rows[-1]["batch_id"]
            for row in rows:
                context = _context(row)
                if context is not None:
                    self._classes[row["batch_id"]] = self._seen(context)

    def _seen(self, context: Context) -> tuple[str, ...]:
        camera = self._cameras.get(context.camera_id)
        opens = camera.opens if camera is not None else frozenset()
        return tuple(
            sorted(
                {
                    box.label
                    for frame in context.batch.frames
                    if frame.matters
                    for box in frame.boxes
                    if not box.stationary and (not opens or box.label in opens)
                }
            )
        )


def _context(row: Row) -> Context | None:
    """The window that a unit had judged; None where it cannot be read any more: then nobody knows what was seen."""
    if not row["value"]:
        return None
    try:
        fingerprint = bytes.fromhex(row["fingerprint"]) or None
        unit = codec.decode_bytes("replay_units", bytes.fromhex(row["value"]), fingerprint, ReplayUnit)
        return codec.decode_bytes("contexts", unit.payload, None, Context)
    except DecodeError:
        return None


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return False
    return True

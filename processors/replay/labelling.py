"""What a labelling session asks ClickHouse: the events that it draws from, which replays flipped, what it shows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from processors.replay.sampling import Event
from processors.store.queries import Queries, Row

_IN_SCOPE = (
    "({camera:String} = '' OR camera_id = {camera:String}) AND started_at >= fromUnixTimestamp64Milli({since:Int64})"
)
_LABELLED = "SELECT DISTINCT assumeNotNull(event_id) AS event_id FROM labels FINAL WHERE event_id IS NOT NULL"
_EVENTS = f"""
    SELECT e.event_id AS event_id, e.camera_id AS camera_id, e.risk_score AS score, e.risk_level AS level,
        toUInt8OrZero(substring(e.started_local, 12, 2)) AS hour, b.classes AS classes
    FROM
    (
        SELECT event_id, camera_id, batch_id, risk_score, risk_level, started_local FROM events WHERE {_IN_SCOPE}
    ) AS e
    LEFT ANY JOIN
    (
        SELECT camera_id, batch_id,
            arraySort(arrayDistinct(arrayFlatten(arrayMap(seen -> arrayMap(box -> box.label, seen), frames.boxes))))
            AS classes
        FROM batches FINAL WHERE {_IN_SCOPE}
    ) AS b ON b.camera_id = e.camera_id AND b.batch_id = e.batch_id
"""  # noqa: S608 (constants)
# Of a replay the same window has the same batch id. Windows that were cut anew have others: they are no event here.
_FLIPPED = """
    SELECT DISTINCT l.event_id AS event_id
    FROM (SELECT camera_id, batch_id, event_id, risk_level FROM risk_events FINAL WHERE run = 'live') AS l
    INNER JOIN
    (
        SELECT camera_id, batch_id, risk_level FROM replay_events FINAL WHERE replay_id IN {replays:Array(String)}
    ) AS r ON r.camera_id = l.camera_id AND r.batch_id = l.batch_id
    WHERE r.risk_level != l.risk_level
"""
_REPLAYS = """
    SELECT replay_id, argMax(name, (updated_at, offset)) AS name, argMax(state, (updated_at, offset)) AS state,
        JSONExtractString(argMax(plan, (updated_at, offset)), 'kind') AS kind
    FROM replays FINAL GROUP BY replay_id ORDER BY max(updated_at) DESC
"""
_LABELS = """
    SELECT l.label_id AS label_id, l.labelled_at AS labelled_at, l.verdict AS verdict, l.camera_id AS camera_id,
        l.started_at AS started_at, l.ended_at AS ended_at, l.event_id AS event_id, l.author AS author, l.note AS note,
        l.selection AS selection, l.chance AS chance, e.risk_score AS risk_score, e.risk_level AS risk_level
    FROM
    (
        SELECT * FROM labels FINAL WHERE ({camera:String} = '' OR camera_id = {camera:String})
        AND labelled_at >= fromUnixTimestamp64Milli({since:Int64})
        ORDER BY labelled_at DESC, label_id LIMIT {limit:UInt32}
    ) AS l
    LEFT ANY JOIN
    (
        SELECT event_id, toNullable(risk_score) AS risk_score, toNullable(toString(risk_level)) AS risk_level
        FROM risk_events FINAL WHERE run = 'live' AND ({camera:String} = '' OR camera_id = {camera:String})
    ) AS e ON e.event_id = ifNull(l.event_id, '')
    ORDER BY labelled_at DESC, label_id
"""


class NoReplayError(ValueError):
    """No replay, or no single one, is called so; the message lists those that there are."""


class Sighting(NamedTuple):
    """What was seen of one class in a window."""

    label: str
    most: int
    """Boxes in one frame, at most."""
    score: float
    """The surest one's."""


class Window(NamedTuple):
    """An event and what was seen in its window, as it is shown to whoever labels it."""

    event: Row
    """As the view `events` has it."""
    seen: tuple[Sighting, ...]
    """The surest first; empty where the window's record is not kept any more."""


async def events(
    store: Queries, *, camera: str = "", since: datetime | None = None, flipped: frozenset[str], labelled: Iterable[str]
) -> list[Event]:
    """Every live event, of a camera or from a time on, as the draw looks at it.

    Args:
        store: the connection.
        camera: of this camera alone; empty: all.
        since: whose windows began then or later.
        flipped: ids of events that a replay gave another level.
        labelled: ids of events that have a label which ClickHouse may not have yet.
    """
    scope = {"camera": camera, "since": 0 if since is None else round(since.timestamp() * 1000)}
    known = {row["event_id"] for row in await store.rows(_LABELLED)}
    known.update(labelled)
    return [
        Event(
            row["event_id"],
            row["camera_id"],
            row["score"],
            row["level"],
            row["hour"],
            tuple(row["classes"]),
            row["event_id"] in flipped,
            row["event_id"] in known,
        )
        for row in await store.rows(_EVENTS, **scope)
    ]


async def flips(store: Queries, replay: str | None) -> frozenset[str]:
    """Ids of the live events that a replay gave another level: that one, or any that is done and changed something.

    A replay is named by id, a beginning of it, or name; of several of a name the newest is meant. A baseline's flips
    are noise: they count only where it is named.

    Raises:
        NoReplayError: there is no such replay, or several ids begin so.
    """
    replays = await store.rows(_REPLAYS)
    if replay is None:
        wanted = [row["replay_id"] for row in replays if row["state"] == "done" and row["kind"] != "baseline"]
    else:
        wanted = [_named(replays, replay)]
    found = await store.rows(_FLIPPED, replays=wanted) if wanted else []
    return frozenset(row["event_id"] for row in found)


def _named(replays: Sequence[Row], text: str) -> str:
    ids = [row["replay_id"] for row in replays]
    named = [row["replay_id"] for row in replays if row["name"] == text]
    if text in ids:
        return text
    if named:
        return str(named[0])
    found = [name for name in ids if text and name.startswith(text)]
    if len(found) == 1:
        return str(found[0])
    if found:
        raise NoReplayError(f"several replays begin so: {', '.join(found[:5])}")
    known = ", ".join(f"{row['name'] or row['replay_id']}" for row in replays[:10])
    raise NoReplayError(f"there is no such replay; {f'there are {known}' if known else 'there is none yet'}")


async def windows(store: Queries, event_ids: Sequence[str]) -> list[Window]:
    """The live events of these ids with what was seen, in order; one that is not there is left out."""
    names = {"cameras": sorted({event_id.split(":", 1)[0] for event_id in event_ids}), "ids": list(event_ids)}
    rows = await store.rows(
        "SELECT * FROM events WHERE camera_id IN {cameras:Array(String)} AND event_id IN {ids:Array(String)}", **names
    )
    names["ids"] = [row["batch_id"] for row in rows]
    boxes = {
        row["batch_id"]: row["boxes"]
        for row in await store.rows(
            "SELECT batch_id, frames.boxes AS boxes FROM batches FINAL "
            "PREWHERE camera_id IN {cameras:Array(String)} AND batch_id IN {ids:Array(String)}",
            **names,
        )
    }
    found = {row["event_id"]: Window(row, _seen(boxes.get(row["batch_id"], []))) for row in rows}
    return [found[event_id] for event_id in event_ids if event_id in found]


async def labels(store: Queries, *, camera: str = "", since: datetime | None = None, limit: int) -> list[Row]:
    """Labels, of a camera or given from a time on, newest first, with `risk_score` and `risk_level` of their events."""
    return await store.rows(
        _LABELS, camera=camera, since=0 if since is None else round(since.timestamp() * 1000), limit=limit
    )


def _seen(frames: Sequence[Sequence[Row]]) -> tuple[Sighting, ...]:
    most: Counter[str] = Counter()
    best: dict[str, float] = {}
    for boxes in frames:
        for label, number in Counter(box["label"] for box in boxes).items():
            most[label] = max(most[label], number)
        for box in boxes:
            best[box["label"]] = max(best.get(box["label"], 0.0), box["score"])
    return tuple(sorted((Sighting(label, most[label], score) for label, score in best.items()), key=lambda s: -s.score))

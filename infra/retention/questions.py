# ruff: noqa: S608 (every word in these statements is ours, or goes through `text`)
"""What is past its time, in SQL. Pure: each function gives one query over ClickHouse's tables.

A window goes as a whole: its batch, context, verdicts (replayed ones too), alerts, the frames and detections that no
other window holds, and the dead letters about any of them. Frames of no window go by themselves. A record goes by its
id: where it is on the log more than once, each of them goes.

The queries give rows `(epoch, partition, offset, why)`: positions, and the class that decided. They name windows and
frames by subqueries, so the same ones serve to count before anything is marked and to mark.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from infra.retention.settings import LEVELS
from processors.replay.plan import Scope
from processors.store.audit_sql import FIRST_FIELD, LIMITS, Reach, text
from processors.store.times import LAST_MS

OF_WINDOWS = ("risk_events", "alerts", "replay_events", "contexts", "batches")
"""Topics whose records belong to a window."""
IN_ORDER = (*OF_WINDOWS, "replay_units", "detections", "frames", "dead_letters", "gpu_metrics")
"""Tables in the order in which rows go: what was made of something before it, so that nobody finds it from nowhere."""

_WINDOWED_MS = 24 * 3_600_000
"""How far around a running replay's scope everything stays: windows last 90 s, clocks of cameras are less exact."""


class Rules(NamedTuple):
    """What goes, and what stays although its time is over."""

    before: Mapping[str, int]
    """By class: what ClickHouse took before this goes, milliseconds since the epoch."""
    settled: Mapping[str, Reach]
    """By topic: how far the stage that reads it has come. What lies beyond may still become part of a window."""
    held: Sequence[str] = ()
    """Batch ids of events that are held, besides those in the view `held`: what the sink has not brought yet."""
    scopes: Sequence[Scope] = ()
    """What replays that have not ended read."""
    replays: Sequence[str] = ()
    """Ids of replays that have not ended, and of what they are measured by."""


def windows(rules: Rules, limit: int | None = None) -> str:
    """The windows that go, as `(camera_id, batch_id, why)`; with a limit the oldest of them."""
    due = [f"(why = '{level}' AND taken < {_at(rules.before[level])})" for level in LEVELS if level in rules.before]
    if "unjudged" in rules.before:
        # One that analyze has before it will have its verdict.
        due.append(
            f"(why = 'unjudged' AND taken < {_at(rules.before['unjudged'])} AND NOT ahead AND (camera_id, batch_id) "
            f"NOT IN (SELECT camera_id, batch_id FROM contexts WHERE NOT {_settled(rules, 'contexts')}))"
        )
    some = "" if limit is None else f"ORDER BY taken LIMIT {limit}"
    return f"""
    SELECT camera_id, batch_id, why FROM
    (
        SELECT
            b.camera_id AS camera_id, b.batch_id AS batch_id, b.ahead AS ahead, b.began AS began, b.ended AS ended,
            if(e.level = '', 'unjudged', e.level) AS why, greatest(b.last, e.last) AS taken
        FROM
        (
            SELECT
                camera_id, batch_id, max(inserted_at) AS last, max(NOT {_settled(rules, "batches")}) AS ahead,
                min(started_at) AS began, max(ended_at) AS ended
            FROM batches GROUP BY camera_id, batch_id
        ) AS b
        LEFT JOIN
        (
            SELECT camera_id, batch_id, toString(risk_level) AS level, inserted_at AS last
            FROM risk_events FINAL WHERE run = 'live'
        ) AS e ON e.camera_id = b.camera_id AND e.batch_id = b.batch_id
    )
    WHERE ({" OR ".join(due) or "0"}) AND {_not_held(rules, "batch_id")}
        AND NOT {_replayed(rules.scopes, "began", "ended")}
    {some}
    """


def quiet(rules: Rules, limit: int | None = None) -> str:
    """The frames of no window that go, as `(camera_id, frame_id, why)`."""
    if "quiet" not in rules.before:
        return "SELECT '' AS camera_id, '' AS frame_id, '' AS why WHERE 0"
    began, ended = "least(ifNull(captured_at, arrived_at), arrived_at)", "arrived_at"
    some = "" if limit is None else f"LIMIT {limit}"
    return f"""
    SELECT camera_id, frame_id, 'quiet' AS why FROM
    (
        SELECT toString(camera_id) AS camera_id, frame_id, 1 AS frame, inserted_at < {_at(rules.before["quiet"])}
            AND {_settled(rules, "frames")} AND NOT {_replayed(rules.scopes, began, ended)} AS due
        FROM frames
        UNION ALL
        SELECT toString(camera_id), frame_id, 0,
            inserted_at < {_at(rules.before["quiet"])} AND {_settled(rules, "detections")}
        FROM detections
        UNION ALL SELECT toString(camera_id), arrayJoin(`frames.frame_id`), 0, 0 FROM batches
        -- So are those whose batch's row is missing for whatever reason.
        UNION ALL SELECT toString(camera_id), arrayJoin(frame_ids), 0, 0 FROM contexts
        UNION ALL SELECT toString(camera_id), arrayJoin(frame_ids), 0, 0 FROM risk_events
    )
    GROUP BY camera_id, frame_id HAVING max(frame) AND min(due)
    {some}
    """


def frames_of(of: str) -> str:
    """The frames of these windows that no other window holds, as `(camera_id, frame_id, why)`."""
    each = (
        "SELECT toString(camera_id) AS camera_id, batch_id, frame_id "
        "FROM batches ARRAY JOIN `frames.frame_id` AS frame_id"
    )
    these = f"(camera_id, batch_id) IN ({_pairs(of, 'batch_id')})"
    theirs = f"SELECT toString(camera_id), frame_id FROM ({each}) WHERE {these}"
    return f"""
    SELECT m.camera_id AS camera_id, m.frame_id AS frame_id, any(w.why) AS why
    FROM ({each}) AS m INNER JOIN ({of}) AS w ON w.camera_id = m.camera_id AND w.batch_id = m.batch_id
    WHERE (m.camera_id, m.frame_id) NOT IN
    (
        SELECT camera_id, frame_id FROM ({each})
        WHERE NOT {these} AND (camera_id, frame_id) IN ({theirs})
    )
    GROUP BY camera_id, frame_id
    """


def of_windows(topic: str, of: str) -> str:
    """The positions of a topic's records of these windows."""
    batch = {
        "alerts": "arrayStringConcat(arrayPopBack(splitByChar(':', event_id)), ':')",
        "replay_units": "substring(unit_id, length(replay_id) + 2)",
    }.get(topic, "batch_id")
    return f"""
    SELECT {_POSITION}, w.why AS why
    FROM (SELECT epoch, `partition`, `offset`, toString(camera_id) AS camera_id, {batch} AS batch FROM {topic}) AS t
    INNER JOIN ({of}) AS w ON w.camera_id = t.camera_id AND w.batch_id = t.batch
    """


def of_frames(topic: str, of: str) -> str:
    """The positions of a topic's records of these frames."""
    frame = "substring(unit_id, length(replay_id) + 2)" if topic == "replay_units" else "frame_id"
    return f"""
    SELECT {_POSITION}, w.why AS why
    FROM (SELECT epoch, `partition`, `offset`, toString(camera_id) AS camera_id, {frame} AS frame FROM {topic}) AS t
    INNER JOIN (SELECT camera_id, frame_id, any(why) AS why FROM ({of}) GROUP BY camera_id, frame_id) AS w
        ON w.camera_id = t.camera_id AND w.frame_id = t.frame
    """


def ticks(rules: Rules, topic: str, limit: int | None = None) -> str:
    """The positions of a topic's ticks, which are kept as long as the quiet frames between which they lie."""
    if "quiet" not in rules.before or rules.scopes:
        return NOTHING
    some = "" if limit is None else f"LIMIT {limit}"
    return f"""
    SELECT {_POSITION}, 'quiet' AS why FROM log AS t
    WHERE topic = '{topic}' AND tick AND inserted_at < {_at(rules.before["quiet"])} AND {_settled(rules, topic)}
    {some}
    """


def of_replays(rules: Rules, topic: str, limit: int | None = None) -> str:
    """The positions of what replays that ended left."""
    if "replays" not in rules.before:
        return NOTHING
    batch = "batch_id" if topic == "replay_events" else "substring(unit_id, length(replay_id) + 2)"
    some = "" if limit is None else f"LIMIT {limit}"
    return f"""
    SELECT {_POSITION}, 'replays' AS why FROM {topic} AS t
    WHERE inserted_at < {_at(rules.before["replays"])} AND replay_id NOT IN {_strings(rules.replays)}
        AND {_not_held(rules, batch)}
    {some}
    """


def readings(rules: Rules, limit: int | None = None) -> str:
    """The positions of old readings of GPUs."""
    if "gpu_metrics" not in rules.before:
        return NOTHING
    some = "" if limit is None else f"LIMIT {limit}"
    before = _at(rules.before["gpu_metrics"])
    return f"SELECT {_POSITION}, 'gpu_metrics' AS why FROM gpu_metrics AS t WHERE inserted_at < {before} {some}"


def not_taken(rules: Rules, limit: int | None = None) -> str:
    """The positions of old dead letters of what never became a record; gaps stay, the audit needs them."""
    if "dead_letters" not in rules.before:
        return NOTHING
    some = "" if limit is None else f"LIMIT {limit}"
    before = _at(rules.before["dead_letters"])
    return f"""
    SELECT {_POSITION}, 'dead_letters' AS why FROM dead_letters AS t
    WHERE kind IN ('rejected', 'shed') AND inserted_at < {before} {some}
    """


def letters_of(marks: str) -> str:
    """The positions of the dead letters about these records, given as `(topic, epoch, partition, offset, why)`."""
    return f"""
    SELECT {_POSITION}, m.why AS why FROM
    (
        SELECT epoch, `partition`, `offset`, splitByChar(':', origin) AS o
        FROM dead_letters WHERE kind NOT IN ('gap', 'rejected', 'shed') AND length(splitByChar(':', origin)) = 4
    ) AS t
    INNER JOIN ({marks}) AS m ON m.topic = t.o[1] AND m.epoch = t.o[2]
        AND m.`partition` = toInt32OrZero(t.o[3]) AND m.`offset` = toInt64OrZero(t.o[4])
    """


def marked(pass_: str, topic: str | None = None) -> str:
    """What a pass has marked, as `(topic, epoch, partition, offset, why)`."""
    only = "" if topic is None else f"AND topic = '{topic}'"
    return (
        "SELECT toString(topic) AS topic, toString(epoch) AS epoch, `partition`, `offset`, toString(why) AS why "
        f"FROM forgotten WHERE pass = {text(pass_)} {only}"
    )


def marked_windows(pass_: str) -> str:
    """The windows whose batches a pass has marked, as `windows` gives them."""
    return f"""
    SELECT toString(b.camera_id) AS camera_id, b.batch_id AS batch_id, any(m.why) AS why FROM batches AS b
    INNER JOIN ({marked(pass_, "batches")}) AS m ON {_SAME.format("b")}
    GROUP BY camera_id, batch_id
    """


def marked_batches(pass_: str) -> str:
    """The batch ids of whatever a pass has marked of windows, what replays said of them included, as `batch_id`."""
    return " UNION ALL ".join(
        f"SELECT {batch} AS batch_id FROM {topic} AS t INNER JOIN ({marked(pass_, topic)}) AS m ON {_SAME.format('t')}"
        for topic, batch in (
            *((topic, "t.batch_id") for topic in ("batches", "contexts", "risk_events", "replay_events")),
            ("replay_units", "substring(t.unit_id, length(t.replay_id) + 2)"),
        )
    )


def marked_frames(pass_: str) -> str:
    """The frames that a pass has marked, as `quiet` gives them."""
    return f"""
    SELECT toString(f.camera_id) AS camera_id, f.frame_id AS frame_id, any(m.why) AS why FROM frames AS f
    INNER JOIN ({marked(pass_, "frames")}) AS m ON {_SAME.format("f")}
    GROUP BY camera_id, frame_id
    """


def mark(topic: str, pass_: str, positions: str) -> str:
    """Write positions down as about to go."""
    return (
        "INSERT INTO forgotten (topic, epoch, `partition`, `offset`, pass, why) "
        f"SELECT '{topic}', epoch, `partition`, `offset`, {text(pass_)}, why FROM ({positions}) {LIMITS}"
    )


def mark_images(pass_: str) -> str:
    """Write down what the marked frames and dead letters claim."""
    claims = " UNION ALL ".join(
        f"SELECT t.claim AS claim FROM {topic} AS t INNER JOIN ({marked(pass_, topic)}) AS m ON {_SAME.format('t')}"
        for topic in ("frames", "dead_letters")
    )
    return (
        f"INSERT INTO forgotten_images (sha256, pass) SELECT DISTINCT {_SHA}, {text(pass_)} FROM ({claims}) "
        f"WHERE startsWith(claim, 'sha256:') {LIMITS}"
    )


def claimed() -> str:
    """Which of `forgotten_images` some record in ClickHouse claims, as `sha256`.

    A dead letter's bytes can be a frame's record, and so can bytes that nobody could read: there the claim is looked
    for in the bytes.
    """
    these = "SELECT sha256 FROM forgotten_images"
    buried = "arrayJoin(extractAll(assumeNotNull(value), 'sha256:([0-9a-f]{64})')) AS sha256"
    return f"""
    SELECT DISTINCT sha256 FROM
    (
        SELECT {_SHA} AS sha256 FROM frames WHERE startsWith(claim, 'sha256:')
        UNION ALL SELECT {_SHA} FROM dead_letters WHERE startsWith(claim, 'sha256:')
        UNION ALL SELECT {buried} FROM dead_letters WHERE position(value, 'sha256:') > 0
        UNION ALL SELECT {buried} FROM log
        WHERE topic = 'frames' AND decode_error != '' AND position(value, 'sha256:') > 0
    )
    WHERE sha256 IN ({these}) {LIMITS}
    """


def delete(table: str, pass_: str) -> str:
    """Take what a pass has marked out of a typed table."""
    return _delete(table, f"(epoch, `partition`, `offset`) IN ({_positions(pass_, table)})")


def delete_log(pass_: str) -> str:
    """Take what a pass has marked out of `log`."""
    position = "topic, epoch, `partition`, `offset`"
    return _delete("log", f"({position}) IN (SELECT {position} FROM forgotten WHERE pass = {text(pass_)})")


def discard(table: str, pass_: str) -> str:
    """Take a pass's own rows out of `forgotten`, `forgotten_images` or `gc_passes`."""
    return _delete(table, f"pass = {text(pass_)}")


def repeated(topic: str) -> str:
    """Records of a topic whose row has given way to a later one of the same id, as `(epoch, partition, offset, id)`.

    Of most topics there are none: then nothing but positions is read.
    """
    # The id is the record's first field: its length in zigzag (one byte or two), then the text. Before it stand five
    # bytes of framing.
    name = (
        "reinterpretAsUInt8(substring(value, 6, 1)) AS b1, reinterpretAsUInt8(substring(value, 7, 1)) AS b2, "
        "if(b1 < 128, substring(assumeNotNull(value), 7, intDiv(b1, 2)), "
        "substring(assumeNotNull(value), 8, intDiv(b1 - 128 + b2 * 128, 2))) AS id"
    )
    return f"""
    SELECT toString(epoch) AS epoch, `partition`, `offset`, id FROM
    (
        SELECT epoch, `partition`, `offset`, {name} FROM log
        PREWHERE topic = '{topic}' AND (epoch, `partition`, `offset`) IN
        (
            SELECT epoch, `partition`, `offset` FROM
            (
                SELECT toString(epoch) AS epoch, `partition`, `offset`, 1 AS l FROM log
                WHERE topic = '{topic}' AND NOT tick AND decode_error = ''
                UNION ALL SELECT toString(epoch), `partition`, `offset`, 0 FROM {topic}
            )
            GROUP BY epoch, `partition`, `offset` HAVING min(l) = 1
        )
    )
    {LIMITS}
    """


REDRIVEN = (
    "SELECT DISTINCT toString(topic) AS topic FROM log "
    f"WHERE topic NOT IN ('dead_letters', 'dead_letter_status') AND arrayExists(h -> h.1 = 'redrive', headers) {LIMITS}"
)
"""Topics that have redriven records, or what was made of such."""


def redriven(topic: str, pass_: str) -> str:
    """Where the marked records of a topic were redriven from: the first record of each is one of theirs."""
    return f"""
    SELECT o[2] AS epoch, toInt32OrZero(o[3]) AS `partition`, toInt64OrZero(o[4]) AS `offset`, why FROM
    (
        SELECT splitByChar(':', arrayLast(h -> h.1 = 'redrive', l.headers).2) AS o, m.why AS why
        FROM (SELECT epoch, `partition`, `offset`, headers FROM log
              WHERE topic = '{topic}' AND arrayExists(h -> h.1 = 'redrive', headers)) AS l
        INNER JOIN ({marked(pass_, topic)}) AS m ON {_SAME.format("l")}
    )
    WHERE length(o) = 4 AND o[1] = '{topic}'
    """


_POSITION = "toString(t.epoch) AS epoch, t.`partition` AS `partition`, t.`offset` AS `offset`"
_SAME = "m.epoch = {0}.epoch AND m.`partition` = {0}.`partition` AND m.`offset` = {0}.`offset`"
NOTHING = "SELECT '' AS epoch, toInt32(0) AS `partition`, toInt64(0) AS `offset`, '' AS why WHERE 0"
_SHA = "substring(assumeNotNull(claim), 8)"

NAMES = FIRST_FIELD
"""The id columns of topics whose tables keep one row an id."""


def _positions(pass_: str, topic: str) -> str:
    return f"SELECT epoch, `partition`, `offset` FROM forgotten WHERE topic = '{topic}' AND pass = {text(pass_)}"


def _delete(table: str, condition: str) -> str:
    # Answered when the rows are gone from sight on disk, whatever becomes of whoever asked.
    return f"DELETE FROM {table} WHERE {condition} SETTINGS lightweight_deletes_sync = 2"


def _pairs(of: str, name: str) -> str:
    return f"SELECT toString(camera_id), {name} FROM ({of})"


def _settled(rules: Rules, topic: str) -> str:
    """Whether the stage that reads the topic has passed a row. Earlier lives of the topic have nobody to read them."""
    reach = rules.settled[topic]
    return f"NOT {reach.beyond()}" if reach.at else f"epoch != {text(reach.epoch)}"


def _not_held(rules: Rules, batch: str) -> str:
    """Whether no hold is on a window."""
    return f"({batch} NOT IN (SELECT batch_id FROM held) AND {batch} NOT IN {_strings(rules.held)})"


def _replayed(scopes: Iterable[Scope], began: str, ended: str) -> str:
    """Whether a running replay may read what began and ended so, of whatever camera a row is."""
    found = []
    for scope in scopes:
        parts = [f"{ended} >= {_at(scope.since - _WINDOWED_MS)}"] if scope.since is not None else []
        parts += [f"{began} < {_at(scope.until + _WINDOWED_MS)}"] if scope.until is not None else []
        parts += [f"camera_id IN {_strings(scope.cameras)}"] if scope.cameras else []
        found.append(f"({' AND '.join(parts) or '1'})")
    return f"({' OR '.join(found) or '0'})"


def _at(ms: int) -> str:
    return f"fromUnixTimestamp64Milli(toInt64({min(max(ms, 0), LAST_MS)}), 'UTC')"


def _strings(values: Iterable[str]) -> str:
    return f"({', '.join(map(text, values)) or text('')})"

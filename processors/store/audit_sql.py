# ruff: noqa: S608 (every word in these queries is ours, or goes through `text`)
"""The questions of the audit, in SQL. Pure: each function gives one query.

Every query gives rows `(kind, n, found)`: how many violations of a kind there are, and the first of them as
`(id, detail)`. Two sides that must agree are stacked and counted by position, not joined: that takes one pass, and
beyond `LIMITS` it goes by way of the disk, so millions of rows need no more memory than thousands. What retention
took (`forgotten`) is stacked with them: of such a position nothing is wrong, whatever is there and whatever is not.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from schemas import ids
from schemas.records import WindowSettings

SHOWN = 100
"""Violations of one kind that are named; the others are counted."""

# Half a gigabyte in all, whatever is in the tables, and two cores at most: live work comes first.
LIMITS = (
    "SETTINGS max_threads = 2, max_memory_usage = 1000000000, max_bytes_before_external_group_by = 250000000, "
    "max_bytes_before_external_sort = 250000000, join_algorithm = 'grace_hash,hash'"
)

REMEMBERED = 1000
"""Frames of a camera that ingest knows again (`ingest_state`): what comes again behind them is another frame."""

FIRST_FIELD: Mapping[str, str] = {
    "frames": "frame_id",
    "detections": "frame_id",
    "batches": "batch_id",
    "contexts": "batch_id",
    "risk_events": "event_id",
    "labels": "label_id",
    "alerts": "alert_id",
    "replay_units": "unit_id",
}
"""Topics whose table keeps one row an id, where the id is the record's first field."""

BY_CAMERA = ("frames", "detections", "batches", "contexts", "risk_events", "labels", "alerts")
"""Topics keyed by camera alone."""


class Bounds(NamedTuple):
    """What of the history is asked of. Times are when ClickHouse took the record, milliseconds since the epoch."""

    since: int | None = None
    until: int | None = None
    camera: str | None = None

    @property
    def whole(self) -> bool:
        """Whether all of it is."""
        return self == Bounds()

    def of_log(self) -> str:
        """The condition on rows of `log`."""
        return self._where("`key`")

    def of_table(self) -> str:
        """The condition on rows of a typed table that has cameras."""
        return self._where("camera_id")

    def _where(self, camera: str) -> str:
        parts = [
            *([f"{camera} = {text(self.camera)}"] if self.camera is not None else []),
            *([f"inserted_at >= fromUnixTimestamp64Milli({self.since})"] if self.since is not None else []),
            *([f"inserted_at < fromUnixTimestamp64Milli({self.until})"] if self.until is not None else []),
        ]
        return " AND ".join(parts) or "1"


class Reach(NamedTuple):
    """How far somebody has come on one topic of one life: offsets by partition."""

    epoch: str = ""
    at: Mapping[int, int] = {}

    def beyond(self) -> str:
        """The condition that a position `(epoch, partition, offset)` was not reached."""
        return f"(epoch = {text(self.epoch)} AND `offset` >= {_pick(self.at)})" if self.at else "0"


class Gap(NamedTuple):
    """Offsets that a stage could not read, inclusive: a dead letter says so."""

    stage: str
    topic: str
    epoch: str
    partition: int
    lo: int
    hi: int


def text(value: str) -> str:
    """A string as SQL has it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def kept_differs(topic: str) -> str:
    """Whether `log` and a topic's table have different positions: see `kept`. Sums of hashes tell, at a tenth of it."""
    return _differ(
        f"SELECT toString(epoch) AS epoch, `partition` AS part, `offset` AS at, 1 AS side FROM log FINAL "
        f"WHERE topic = {text(topic)} AND NOT tick AND decode_error = ''",
        f"SELECT toString(epoch), `partition`, `offset`, -1 FROM {topic} FINAL",
    )


def links_differ(source: str, result: str) -> str:
    """Whether the results and dead letters of a stage are of other records than its input has: see `links`."""
    return _differ(
        "SELECT toString(epoch) AS epoch, `partition` AS part, `offset` AS at, 1 AS side FROM log FINAL "
        f"WHERE topic = {text(source)} AND NOT tick",
        "SELECT splitByChar(':', source)[2], toInt32OrZero(splitByChar(':', source)[3]), "
        "toInt64OrZero(splitByChar(':', source)[4]), -1 FROM log FINAL "
        f"WHERE topic IN ({text(result)}, 'dead_letters') AND NOT tick AND startsWith(source, '{source}:')",
    )


def links(
    stage: str,
    source: str,
    result: str,
    *,
    bounds: Bounds,
    done: Reach,
    kept: Reach,
    held: Mapping[int, int],
    gaps: Sequence[Gap],
    redriven: bool,
) -> str:
    """Each record of the stage's input has one result or one dead letter, and each result a record.

    Args:
        stage: the stage, one record in, one out.
        source: its input.
        result: its output.
        bounds: what is asked of.
        done: where the stage stands on its input.
        kept: where the sink stands on that input.
        held: results and dead letters that the sink has not kept yet, by partition: as many of the newest may miss.
        gaps: what could not be read.
        redriven: whether there are redriven records: of one that was settled before, nothing is made.
    """
    settled = (
        f"""AND (epoch, `partition`, `offset`) NOT IN
        (
            SELECT toString(epoch), `partition`, `offset` FROM log FINAL WHERE topic = {text(source)}
            AND arrayLast(h -> h.1 = 'redrive', headers).2
                IN (SELECT origin FROM dead_letter_status WHERE status IN ('resolved', 'open'))
        )"""
        if redriven
        else ""
    )
    return _kinds(f"""
    SELECT
        kind,
        {_origin(source)} AS id,
        multiIf(kind = 'lost', '{stage} has passed it, and there is neither its result nor a dead letter',
            kind = 'doubled', concat('{stage} made ', toString(results), ' results and ',
                toString(letters), ' dead letters of it'),
            'there is a result of it in {result} or dead_letters, and no such record') AS detail
    FROM
    (
        SELECT
            *,
            multiIf(inputs = 0, 'from_nowhere', results + letters = 0, 'lost', 'doubled') AS kind,
            row_number() OVER (PARTITION BY kind, epoch, `partition` ORDER BY `offset` DESC) AS nth
        FROM
        (
            SELECT epoch, `partition`, `offset`, sum(i) AS inputs, sum(r) AS results, sum(l) AS letters
            FROM
            (
                SELECT toString(epoch) AS epoch, `partition`, `offset`, 0 AS i, 0 AS r, 0 AS l, 1 AS f
                FROM forgotten WHERE topic = {text(source)}
                UNION ALL
                SELECT toString(epoch), `partition`, `offset`, 1, 0, 0, 0
                FROM log FINAL WHERE topic = {text(source)} AND NOT tick AND {bounds.of_log()}
                UNION ALL
                SELECT
                    splitByChar(':', source)[2],
                    toInt32OrZero(splitByChar(':', source)[3]),
                    toInt64OrZero(splitByChar(':', source)[4]),
                    0,
                    topic = {text(result)},
                    topic = 'dead_letters',
                    0
                FROM log FINAL
                WHERE topic IN ({text(result)}, 'dead_letters') AND NOT tick AND startsWith(source, '{source}:')
            )
            GROUP BY epoch, `partition`, `offset`
            HAVING max(f) = 0 AND NOT (inputs = 1 AND results + letters = 1) {"" if bounds.whole else "AND inputs > 0"}
        )
        WHERE NOT (kind = 'lost' AND ({done.beyond()} OR {_in_gap(gaps, stage, source)}))
            AND NOT (kind = 'from_nowhere' AND ({kept.beyond()} OR {_in_gap(gaps, "sink", source)}))
            {settled}
    )
    WHERE NOT (kind = 'lost' AND epoch = {text(done.epoch)} AND nth <= {_pick(held)})
    """)


def sources(source: str, result: str, bounds: Bounds) -> str:
    """Each result names what it was made from, in the order in which that lies on its own topic."""
    return _kinds(f"""
    SELECT
        if(startsWith(source, '{source}:'), 'out_of_order', 'from_nowhere') AS kind,
        {_origin(result)} AS id,
        if(kind = 'out_of_order', concat('it was made of ', source, ', and the one before it of a later record'),
            concat('it names no record of {source} as what it was made from: ', toString(source))) AS detail
    FROM
    (
        SELECT
            toString(epoch) AS epoch, `partition`, `offset`, source, `key`, inserted_at,
            toInt64OrZero(splitByChar(':', source)[4]) AS at,
            lagInFrame(toInt64OrZero(splitByChar(':', source)[4]), 1, -1)
                OVER (PARTITION BY epoch, `partition`, splitByChar(':', source)[2] ORDER BY `offset`
                      ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) AS before
        FROM log FINAL WHERE topic = {text(result)} AND NOT tick
    )
    WHERE (at < before OR NOT startsWith(source, '{source}:')) AND {bounds.of_log()}
    """)


def kept(topic: str, bounds: Bounds) -> str:
    """Each record of `log` that can be read is a row of its table, and each row a record of `log`: by position.

    What is `missing_row` here may be a record that came twice: see `repeated`.
    """
    return _kinds(f"""
    SELECT
        multiIf(typed > 1, 'doubled_row', typed > logged, 'stray_row', 'missing_row') AS kind,
        {_origin(topic)} AS id,
        multiIf(typed > 1, 'table {topic} has more than one row of it', typed > logged,
            'table {topic} has it, `log` has not', 'it is in `log`, and has no row in table {topic}') AS detail
    FROM ({_unequal(topic, bounds)})
    """)


def repeated(topic: str, bounds: Bounds) -> str:
    """What has no row at its position: is there one of its id at another?

    Tables keep one row an id, and of a record that came twice the last has it. The first is then `repeated`, which is
    no violation, or `doubled`: a frame that ingest should have known again.
    """
    name = FIRST_FIELD[topic]
    # Avro's first field, a string: its length in zigzag (one byte or two), then the text. Five bytes of framing before.
    missing = f"""
    SELECT
        {_origin(topic)} AS id, toString(epoch) AS life, `offset` AS at,
        arrayExists(h -> h.1 = 'redrive', headers) OR id IN (SELECT origin FROM dead_letters) AS redriven,
        reinterpretAsUInt8(substring(value, 6, 1)) AS b1, reinterpretAsUInt8(substring(value, 7, 1)) AS b2,
        if(b1 < 128, substring(assumeNotNull(value), 7, intDiv(b1, 2)),
            substring(assumeNotNull(value), 8, intDiv(b1 - 128 + b2 * 128, 2))) AS name
    FROM log FINAL
    WHERE topic = {text(topic)} AND (toString(epoch), `partition`, `offset`) IN
        (SELECT epoch, `partition`, `offset` FROM ({_unequal(topic, bounds)}) WHERE typed = 0)
    """
    close = f"life = there.epoch AND there.at - at <= {REMEMBERED} AND NOT redriven" if topic == "frames" else "0"
    return _kinds(f"""
    SELECT
        multiIf(there.name = '', 'missing_row', {close}, 'doubled', 'repeated') AS kind,
        id,
        if(kind = 'missing_row', concat(missing.name, ' is in `log`, and has no row in table {topic}'),
            concat(missing.name, ' is on the log again, at offset ', toString(there.at))) AS detail
    FROM ({missing}) AS missing
    LEFT ANY JOIN
    (
        SELECT {name} AS name, toString(epoch) AS epoch, `offset` AS at FROM {topic} FINAL
        WHERE {name} IN (SELECT name FROM ({missing}))
    ) AS there ON there.name = missing.name
    """)


def ranges(bounds: Bounds, topics: Iterable[str]) -> str:
    """Each range that the sink calls complete has as many records in `log` as it brought."""
    these = f"topic IN {_strings(topics)}"
    return _kinds(f"""
    SELECT
        'missing_in_log' AS kind,
        concat(p.topic, ':', p.epoch, ':', toString(p.part), ':', toString(p.lo), '-', toString(p.hi)) AS id,
        concat('the sink brought ', toString(p.brought), ' records of this range, `log` has ', toString(l.n),
            ' (those too that retention took)') AS detail
    FROM
    (
        SELECT toString(topic) AS topic, toString(epoch) AS epoch, `partition` AS part, lo, hi, rows AS brought
        FROM sink_progress FINAL WHERE {these} AND {Bounds(bounds.since, bounds.until).of_log()}
    ) AS p
    LEFT JOIN
    (
        SELECT r.topic AS topic, r.epoch AS epoch, r.part AS part, s.hi AS hi, count() AS n
        FROM
        (
            SELECT topic, epoch, part, at FROM
            (
                SELECT toString(topic) AS topic, toString(epoch) AS epoch, `partition` AS part, `offset` AS at
                FROM log WHERE {these}
                UNION ALL
                SELECT toString(topic), toString(epoch), `partition`, `offset` FROM forgotten WHERE {these}
            )
            GROUP BY topic, epoch, part, at
        ) AS r
        ASOF INNER JOIN
        (
            SELECT toString(topic) AS topic, toString(epoch) AS epoch, `partition` AS part, hi
            FROM sink_progress FINAL WHERE {these}
        ) AS s ON r.topic = s.topic AND r.epoch = s.epoch AND r.part = s.part AND r.at <= s.hi
        GROUP BY topic, epoch, part, hi
    ) AS l ON l.topic = p.topic AND l.epoch = p.epoch AND l.part = p.part AND l.hi = p.hi
    WHERE l.n < p.brought
    """)


def batch_frames(bounds: Bounds, kept_to: Reach) -> str:
    """Each frame of a batch is a record of `detections`, the one that the batch names, and in no other batch."""
    return _kinds(f"""
    SELECT
        multiIf(times > 1, 'frame_in_two_batches', there = 0, 'from_nowhere', 'wrong_frame') AS kind,
        {_origin("detections")} AS id,
        multiIf(times > 1, concat('its frame is in ', toString(times), ' batches'),
            there = 0, 'a batch holds it, and there is no such record',
            'a batch names another frame than this record') AS detail
    FROM
    (
        SELECT
            epoch, `partition`, `offset`, sum(b) AS times, sum(d) AS there,
            anyIf(name, b = 1) AS batched, anyIf(name, t = 1) AS seen, sum(t) AS rows
        FROM
        (
            SELECT toString(epoch) AS epoch, `partition`, `offset`, 0 AS b, 1 AS d, 0 AS t, toUInt64(0) AS name
            FROM forgotten WHERE topic = 'detections'
            UNION ALL
            SELECT toString(detections_epoch), detections_partition, f.2, 1, 0, 0, sipHash64(f.1)
            FROM batches FINAL
            ARRAY JOIN arrayZip(`frames.frame_id`, `frames.offset`) AS f
            WHERE {bounds.of_table()}
            UNION ALL
            SELECT toString(epoch), `partition`, `offset`, 0, 1, 0, 0
            FROM log FINAL WHERE topic = 'detections' AND NOT tick
            UNION ALL
            SELECT toString(epoch), `partition`, `offset`, 0, 0, 1, sipHash64(frame_id) FROM detections FINAL
        )
        GROUP BY epoch, `partition`, `offset`
        HAVING times > 1 OR (times = 1 AND (there = 0 OR (rows = 1 AND batched != seen)))
    )
    WHERE there > 0 OR times > 1 OR NOT {kept_to.beyond()}
    """)


def batch_order(bounds: Bounds) -> str:
    """A camera's windows follow one another: each begins behind the end of the one before."""
    return _kinds(f"""
    SELECT
        'out_of_order' AS kind, batch_id AS id,
        'its first frame does not lie behind the last of the window before it' AS detail
    FROM
    (
        SELECT batch_id, `frames.offset`[1] AS first,
            lagInFrame(`frames.offset`[-1], 1, -1) OVER
            (
                PARTITION BY camera_id, detections_epoch, detections_partition ORDER BY epoch, `offset`
                ROWS BETWEEN 1 PRECEDING AND CURRENT ROW
            ) AS last
        FROM batches FINAL WHERE {Bounds(camera=bounds.camera).of_table()}
    )
    WHERE first <= last
    """)


def unbatched(
    settings: Sequence[WindowSettings],
    *,
    camera: str | None,
    others: Iterable[str],
    bounds: Bounds,
    done: Reach,
    held: Mapping[int, int],
    gaps: Sequence[Gap],
    thinned: Mapping[tuple[str, int], int],
) -> str:
    """Each record that matters by all of these settings is in a batch, or its window may still be open.

    Which settings were in force when is not told by a record, so what matters by some of them alone is not asked of.

    Args:
        settings: those that the camera ever had.
        camera: the camera; None for all but `others`.
        others: cameras with settings of their own.
        bounds: what is asked of.
        done: where batch stands: the first record of the oldest open window.
        held: batches and dead letters that the sink has not kept yet, by partition; nothing is said of those.
        gaps: what batch could not read.
        thinned: by epoch and partition the last offset that retention took. Up to it the records may be missing by
            which a box would be known as one that stood still; nothing is said of those.
    """
    open_on = _strings(sorted(set.intersection(*(set(one.open_on) for one in settings))))
    which = f"camera_id = {text(camera)}" if camera is not None else f"camera_id NOT IN {_strings(others)}"
    lowest, highest = min(s.threshold for s in settings), max(s.threshold for s in settings)
    # A box at the very limit may count as moved or not: a hair below it nobody is blamed.
    least = min(s.stationary_iou for s in settings) - 1e-6
    busy = [partition for partition, count in held.items() if count]
    boxes = "arrayZip(`boxes.label`, `boxes.score`, `boxes.x`, `boxes.y`, `boxes.width`, `boxes.height`)"
    # Positions as one number each: a set of three million then takes 64 MB.
    suspect = f"""
        arrayExists((l, s) -> s >= {highest} AND l IN {open_on}, `boxes.label`, `boxes.score`)
        AND NOT {done.beyond()} AND NOT {_in_gap(gaps, "batch", "detections")}
        AND NOT (epoch = {text(done.epoch)} AND `partition` IN {_numbers(busy)})
        AND sipHash64(toString(epoch), `partition`, `offset`) NOT IN
        (
            SELECT sipHash64(toString(detections_epoch), detections_partition, at)
            FROM batches FINAL ARRAY JOIN `frames.offset` AS at
        )
    """
    return _kinds(f"""
    SELECT
        'lost' AS kind, {_origin("detections")} AS id,
        concat(frame_id, ' matters, and is in no batch') AS detail
    FROM
    (
        SELECT
            epoch, `partition`, `offset`, frame_id, {suspect} AND {bounds.of_table()} AS suspected, {boxes} AS seen,
            groupArray(arrayFilter(b -> b.2 >= {lowest} AND b.1 IN {open_on}, {boxes}))
                OVER before AS recent,
            {_pick_life(thinned)} AS took, count() OVER before AS known, min(`offset`) OVER before AS oldest
        FROM detections FINAL
        -- Of most records it is known that they are in windows: looked at are the others, and the five before each.
        WHERE {which} AND sipHash64(toString(epoch), `partition`, `offset`) IN
        (
            SELECT sipHash64(toString(epoch), `partition`, `offset`)
            FROM
            (
                SELECT epoch, `partition`, `offset`, max({suspect} AND {bounds.of_table()})
                    OVER (PARTITION BY epoch, `partition`, camera_id ORDER BY `offset`
                          ROWS BETWEEN CURRENT ROW AND 5 FOLLOWING) AS near
                FROM detections FINAL WHERE {which}
            )
            WHERE near
        )
        WINDOW before AS
            (PARTITION BY epoch, `partition`, camera_id ORDER BY `offset` ROWS BETWEEN 5 PRECEDING AND 1 PRECEDING)
    )
    WHERE suspected AND NOT (took >= 0 AND (known < 5 OR oldest <= took))
        AND arrayExists(b -> b.2 >= {highest} AND b.1 IN {open_on}
            AND NOT arrayExists(r -> arrayExists(o -> o.1 = b.1 AND {_IOU} >= {least}, r), recent), seen)
        AND (toString(epoch), `partition`, `offset`) NOT IN
        (
            SELECT splitByChar(':', source)[2], toInt32OrZero(splitByChar(':', source)[3]),
                toInt64OrZero(splitByChar(':', source)[4])
            FROM log FINAL WHERE topic = 'dead_letters' AND startsWith(source, 'detections:')
        )
        AND (toString(epoch), `partition`, `offset`) NOT IN
        (
            SELECT toString(epoch), `partition`, `offset` FROM log
            WHERE topic = 'detections' AND NOT tick AND arrayExists(h -> h.1 = 'redrive', headers)
        )
    """)


def names(bounds: Bounds) -> str:
    """Ids are what their content says: of frames, windows and events."""
    # As `schemas.ids.digest`: each part behind its length, eight bytes, the highest first.
    digest = (
        "lower(substring(hex(SHA256(arrayStringConcat(arrayMap(f -> "
        "concat(reinterpretAsFixedString(byteSwap(toUInt64(length(f)))), f), `frames.frame_id`)))), 1, "
        f"{ids.DIGEST_HEX}))"
    )
    return _kinds(f"""
    SELECT 'wrong_id' AS kind, id, concat('by its content it is ', wanted) AS detail
    FROM
    (
        SELECT frame_id AS id, concat(camera_id, ':', substring(sha256, 1, {ids.DIGEST_HEX}),
            if(isNull(captured_at), '', concat(':', toString(toUnixTimestamp64Milli(assumeNotNull(captured_at)))))
            ) AS wanted
        FROM frames FINAL
        -- Times outside of what a table shows are shown as its bounds: those ids cannot be computed from it.
        WHERE {bounds.of_table()}
            AND (captured_at IS NULL OR toYear(assumeNotNull(captured_at)) BETWEEN 1901 AND 2298)
        UNION ALL
        SELECT batch_id, concat(camera_id, ':', {digest}) FROM batches FINAL WHERE {bounds.of_table()}
        UNION ALL
        SELECT event_id, concat(batch_id, ':', run) FROM risk_events FINAL WHERE {bounds.of_table()}
    )
    WHERE id != wanted
    """)


def strangers(result: str, source: str, bounds: Bounds) -> str:
    """Each row tells of a window or frame that the step before it told of."""
    name = FIRST_FIELD[source]
    live = " AND run = 'live'" if result == "risk_events" else ""
    return _kinds(f"""
    SELECT 'from_nowhere' AS kind, {FIRST_FIELD[result]} AS id, concat('there is no ', name, ' in {source}') AS detail
    FROM
    (
        SELECT anyIf(own, of = 0) AS {FIRST_FIELD[result]}, name, min(of) AS least, max(of) AS most
        FROM
        (
            SELECT {FIRST_FIELD[result]} AS own, {name} AS name, 0 AS of FROM {result} FINAL
            WHERE {bounds.of_table()}{live}
            UNION ALL SELECT '', {name}, 1 FROM {source} FINAL
        )
        GROUP BY name
        HAVING most = 0
    )
    """)


def letters(bounds: Bounds, reached: Mapping[str, Reach]) -> str:
    """Each dead letter says why, and names a record that is there."""
    behind = " OR ".join(
        f"(topic = {text(topic)} AND {reach.beyond()})" for topic, reach in reached.items() if reach.at
    )
    return _kinds(f"""
    SELECT
        'unexplained_dead_letter' AS kind, origin AS id,
        if(error = '' OR message = '', concat(toString(stage), ' does not say why'),
            concat(toString(stage), ' names a record that is not there')) AS detail
    FROM
    (
        SELECT origin, stage, kind, error, message, splitByChar(':', origin) AS parts, parts[1] AS topic,
            parts[2] AS epoch, toInt32OrZero(parts[3]) AS `partition`, toInt64OrZero(parts[4]) AS `offset`
        FROM dead_letters FINAL WHERE {bounds.of_table()}
    )
    WHERE error = '' OR message = '' OR (kind != 'gap' AND topic IN {_strings(reached)} AND length(parts) = 4
        AND (topic, epoch, `partition`, `offset`) NOT IN
            (
                SELECT toString(topic), toString(epoch), `partition`, `offset` FROM log
                WHERE (toString(topic), `offset`) IN
                (
                    SELECT splitByChar(':', origin)[1], toInt64OrZero(splitByChar(':', origin)[4]) FROM dead_letters
                )
            )
        AND origin NOT IN ({_forgotten_among("dead_letters")})
        AND NOT ({behind or "0"}))
    """)


def resolved(stage: str, source: str, result: str, bounds: Bounds, held: int) -> str:
    """Each dead letter that a stage resolved has the result of its redrive, and only one."""
    return _kinds(f"""
    SELECT
        if(results = 0, 'resolved_without_result', 'doubled') AS kind, origin AS id,
        if(results = 0, '{stage} calls it resolved, and there is no result of a redrive in {result}',
            concat('its redrives have ', toString(results), ' results in {result}')) AS detail
    FROM
    (
        SELECT origin, sum(s) > 0 AS called, sum(r) AS results
        FROM
        (
            SELECT origin, 1 AS s, 0 AS r FROM dead_letter_status FINAL
            WHERE status = 'resolved' AND `by` = '{stage}' AND {Bounds(bounds.since, bounds.until).of_log()}
            UNION ALL
            SELECT arrayLast(h -> h.1 = 'redrive', headers).2 AS origin, 0, 1 FROM log FINAL
            WHERE topic = {text(result)} AND NOT tick AND startsWith(origin, '{source}:')
        )
        GROUP BY origin
    )
    WHERE results > 1 OR (called AND results = 0 AND {int(held == 0)}
        AND origin NOT IN ({_forgotten_among("dead_letter_status")}))
    """)


_IOU = """if(least(b.3 + b.5, o.3 + o.5) > greatest(b.3, o.3) AND least(b.4 + b.6, o.4 + o.6) > greatest(b.4, o.4),
    ((least(b.3 + b.5, o.3 + o.5) - greatest(b.3, o.3)) * (least(b.4 + b.6, o.4 + o.6) - greatest(b.4, o.4)) AS common)
        / nullIf(b.5 * b.6 + o.5 * o.6 - common, 0), 0)"""


def _differ(left: str, right: str) -> str:
    """How many partitions have other positions on the one side (1) than on the other (-1), or other numbers of them."""
    # Sums wrap, and two sets that differ agree in theirs once in 2^63 cases.
    return f"""
    SELECT count() AS n
    FROM
    (
        SELECT epoch, part, sum(side) AS more, sum(side * toInt64(bitShiftRight(sipHash64(at), 1))) AS other
        FROM ({left} UNION ALL {right})
        GROUP BY epoch, part
        HAVING more != 0 OR other != 0
    )
    {LIMITS}
    """


def _unequal(topic: str, bounds: Bounds) -> str:
    """Positions that `log` and the topic's table do not have equally often."""
    return f"""
    SELECT epoch, `partition`, `offset`, sum(l) AS logged, sum(t) AS typed
    FROM
    (
        SELECT toString(epoch) AS epoch, `partition`, `offset`, 0 AS l, 0 AS t, 1 AS f
        FROM forgotten WHERE topic = {text(topic)}
        UNION ALL
        SELECT toString(epoch), `partition`, `offset`, 1, 0, 0
        FROM log FINAL WHERE topic = {text(topic)} AND NOT tick AND decode_error = '' AND {bounds.of_log()}
        UNION ALL SELECT toString(epoch), `partition`, `offset`, 0, 1, 0 FROM {topic} FINAL
    )
    GROUP BY epoch, `partition`, `offset`
    HAVING max(f) = 0 AND logged != typed {"" if bounds.whole else "AND logged > 0"}
    """


def _kinds(query: str) -> str:
    return (
        f"SELECT kind, count() AS n, groupArray({SHOWN})((id, detail)) AS found FROM ({query}) "
        f"GROUP BY kind ORDER BY kind {LIMITS}"
    )


def _origin(topic: str) -> str:
    return f"concat('{topic}:', toString(epoch), ':', toString(`partition`), ':', toString(`offset`))"


def _in_gap(gaps: Sequence[Gap], stage: str, topic: str) -> str:
    found = [
        f"(epoch = {text(gap.epoch)} AND `partition` = {gap.partition} AND `offset` BETWEEN {gap.lo} AND {gap.hi})"
        for gap in gaps
        if (gap.stage, gap.topic) == (stage, topic)
    ]
    return f"({' OR '.join(found)})" if found else "0"


def _pick(by_partition: Mapping[int, int]) -> str:
    """The number of a row's partition; 0 where it has none."""
    if not by_partition:
        return "0"
    return f"transform(`partition`, {list(by_partition)}, {list(by_partition.values())}, 0)"


def _pick_life(by_life: Mapping[tuple[str, int], int]) -> str:
    """The number of a row's epoch and partition; -1 where it has none."""
    if not by_life:
        return "-1"
    lives = ", ".join(text(f"{epoch}:{partition}") for epoch, partition in by_life)
    return f"transform(concat(toString(epoch), ':', toString(`partition`)), [{lives}], {list(by_life.values())}, -1)"


def _forgotten_among(table: str) -> str:
    """Which origins in a table are of records that retention took."""
    origin = "concat(toString(topic), ':', toString(epoch), ':', toString(`partition`), ':', toString(`offset`))"
    return f"SELECT {origin} AS o FROM forgotten WHERE o IN (SELECT origin FROM {table})"


def _strings(values: Iterable[str]) -> str:
    return f"({', '.join(map(text, values)) or text('')})"


def _numbers(values: Iterable[int]) -> str:
    return f"({', '.join(map(str, values)) or '-1'})"

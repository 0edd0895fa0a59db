"""Windows that were recorded: contexts as the log has them, byte for byte, and what was said of each."""

from typing import NamedTuple

from processors.store.queries import Queries
from schemas.records import Context
from streams import codec

_CONTEXTS = """
    SELECT hex(l.value) AS value, l.fingerprint AS fingerprint, c.batch_id AS batch_id,
        e.event_id AS event_id, e.risk_score AS score, e.risk_level AS level, e.summary AS summary
    FROM
    (
        SELECT camera_id, batch_id, started_at, epoch, partition, offset FROM contexts FINAL
        WHERE ({camera:String} = '' OR camera_id = {camera:String})
        AND ({batch:String} = '' OR startsWith(batch_id, {batch:String}))
        ORDER BY started_at DESC, batch_id LIMIT {limit:UInt32}
    ) AS c
    INNER JOIN
    (
        SELECT epoch, partition, offset, value, fingerprint FROM log FINAL
        WHERE topic = 'contexts' AND (epoch, partition, offset) IN
        (
            SELECT epoch, partition, offset FROM contexts FINAL
            WHERE ({camera:String} = '' OR camera_id = {camera:String})
            AND ({batch:String} = '' OR startsWith(batch_id, {batch:String}))
            ORDER BY started_at DESC, batch_id LIMIT {limit:UInt32}
        )
    ) AS l ON l.epoch = c.epoch AND l.partition = c.partition AND l.offset = c.offset
    LEFT JOIN
    (
        SELECT camera_id, batch_id, event_id, risk_score, risk_level, summary FROM risk_events FINAL
        WHERE run = 'live'
    ) AS e ON e.camera_id = c.camera_id AND e.batch_id = c.batch_id
    ORDER BY c.started_at DESC, c.batch_id
"""


class Recorded(NamedTuple):
    """A window, and its live event; no event yet is an empty id."""

    context: Context
    event_id: str
    score: int
    level: str
    summary: str


async def windows(store: Queries, *, camera: str = "", batch: str = "", limit: int) -> list[Recorded]:
    """The newest windows, of a camera or with a batch id that begins so, newest first.

    Raises:
        UnavailableError: ClickHouse is away.
        DecodeError: a newer version of this product recorded one of them.
    """
    return [
        Recorded(
            codec.decode_bytes(
                "contexts", bytes.fromhex(row["value"]), bytes.fromhex(row["fingerprint"]) or None, Context
            ),
            row["event_id"],
            row["score"],
            row["level"],
            row["summary"],
        )
        for row in await store.rows(_CONTEXTS, camera=camera, batch=batch, limit=limit)
    ]

"""What a demo's day takes on the broker's disk and in ClickHouse, a frame and a window: docs/sizing.md rests on it."""

import secrets
from pathlib import Path
from typing import NamedTuple

from infra import sizing
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings

FRAMES, WINDOWS = ("frames", "detections"), ("batches", "contexts", "risk_events")

WITHIN = 0.2
"""A day and a month of the demo were 7 % off at most, to both sides."""


class Bytes(NamedTuple):
    """Of one frame or window, without the image."""

    frame_on_log: float
    detections_on_log: float
    window_on_log: float
    event_on_log: float
    frame_in_store: float
    window_in_store: float


SAID = Bytes(
    sizing.FRAME_ON_LOG,
    sizing.DETECTIONS_ON_LOG,
    sizing.WINDOW_ON_LOG,
    sizing.EVENT_ON_LOG,
    sizing.FRAME_IN_STORE,
    sizing.WINDOW_IN_STORE,
)


async def measured(data_dir: Path, clickhouse: ClickHouseSettings) -> Bytes:
    """Of an installation with a broker of its own, whose ClickHouse runs."""
    store = ClickHouseStore(clickhouse)
    client = await store.connection.client()
    scratch = f"sizing_{secrets.token_hex(4)}"
    try:
        await client.command(f"CREATE DATABASE {scratch}")
        found = await client.query(
            "SELECT count(), sumIf(size, inline), (SELECT count() FROM risk_events FINAL) FROM frames FINAL"
        )
        [(frames, inline, windows)] = found.result_rows
        stored = {
            topics: await _stored(client, scratch, "log", f"topic IN {topics}")
            + sum([await _stored(client, scratch, topic, "1") for topic in topics])
            for topics in (FRAMES, WINDOWS)
        }
    finally:
        await client.command(f"DROP DATABASE IF EXISTS {scratch} SYNC")
        await store.close()
    on_log = {topic: _on_log(data_dir, topic) for topic in (*FRAMES, *WINDOWS)}
    return Bytes(
        frame_on_log=(on_log["frames"] - inline) / frames,
        detections_on_log=on_log["detections"] / frames,
        window_on_log=(on_log["batches"] + on_log["contexts"]) / windows,
        event_on_log=on_log["risk_events"] / windows,
        frame_in_store=(stored[FRAMES] - inline) / frames,
        window_in_store=stored[WINDOWS] / windows,
    )


def _on_log(data_dir: Path, topic: str) -> int:
    """Bytes of all its partitions, markers and what frames a batch included."""
    return sum(path.stat().st_size for path in (data_dir / "kafka" / "log").glob(f"{topic}-[0-9]*/*.log"))


async def _stored(client, scratch: str, table: str, what: str) -> int:
    """Compressed bytes of these rows in one part: as merges leave them."""
    await client.command(f"CREATE TABLE {scratch}.{table} AS {table}")
    await client.command(f"INSERT INTO {scratch}.{table} SELECT * FROM {table} FINAL WHERE {what}")
    await client.command(f"OPTIMIZE TABLE {scratch}.{table} FINAL")
    rows = await client.query(
        "SELECT sum(data_compressed_bytes) FROM system.parts "
        "WHERE active AND database = {database:String} AND table = {table:String}",
        {"database": scratch, "table": table},
    )
    await client.command(f"DROP TABLE {scratch}.{table} SYNC")
    return int(rows.result_rows[0][0])


def off(found: Bytes) -> dict[str, tuple[float, float]]:
    """What is said and what was found, where they are further apart than they may be."""
    return {
        name: (said, real)
        for name, said, real in zip(Bytes._fields, SAID, found, strict=True)
        if abs(real / said - 1) > WITHIN
    }

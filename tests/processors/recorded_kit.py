"""A recorded history: windows and their live verdicts in ClickHouse, as the sink puts them there, without a broker."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import Context, Record, RiskEvent
from streams import codec
from streams.messages import Incoming
from streams.stages import Range
from tests.processors.analyze_samples import EVENING, context, seen
from tests.processors.planner_kit import CAMERAS, verdict

EPOCH = "a1b2c3d4"


def windows(count: int, first: int = 0, cameras: Sequence[str] = CAMERAS) -> list[Context]:
    """So many windows, a minute apart, from a number on; cameras take turns. Ids and frames are their own."""
    return [window(n, cameras[n % len(cameras)]) for n in range(first, first + count)]


def window(number: int, camera: str = "yard", **changed: Any) -> Context:
    """One of them."""
    one = context(
        (seen("person", x=float(number % 200)),), camera=camera, started_at=EVENING + 60_000 * number, seconds=10
    )
    frames = tuple(msgspec.structs.replace(frame, frame_id=f"{camera}:{number:032x}") for frame in one.batch.frames)
    batch_id = ids.batch_id(camera, [frame.frame_id for frame in frames])
    batch = msgspec.structs.replace(one.batch, batch_id=batch_id, frames=frames)
    return msgspec.structs.replace(one, batch_id=batch_id, batch=batch, **changed)


def judged(contexts: Sequence[Context], **changed: Any) -> list[RiskEvent]:
    """Their live verdicts; scores go round from 0 to 99."""
    return [
        verdict(one, "live", risk_score=number % 100, risk_level=_level(number % 100), **changed)
        for number, one in enumerate(contexts)
    ]


def _level(score: int) -> str:
    return "low" if score < 30 else "medium" if score < 60 else "high" if score < 85 else "critical"


def on_log(
    topic: str,
    records: Sequence[Record],
    *,
    epoch: str = EPOCH,
    first: int = 0,
    values: Mapping[int, bytes] | None = None,
) -> list[Incoming]:
    """The records as they are read from partitions, one a camera, from an offset on; `values` are bytes for some."""
    nexts: dict[int, int] = {}
    found = []
    for number, record in enumerate(records):
        camera = getattr(record, "camera_id", CAMERAS[0])
        partition = CAMERAS.index(camera) if camera in CAMERAS else len(CAMERAS)
        emit = codec.emit(topic, record, partition)
        offset = nexts.get(partition, first)
        nexts[partition] = offset + 1
        value = (values or {}).get(number, emit.value)
        found.append(Incoming(topic, epoch, partition, offset, emit.key, value, emit.headers))
    return found


async def put(settings: ClickHouseSettings, *topics: Sequence[Incoming]) -> None:
    """The records in ClickHouse, as the sink puts them there."""
    store = ClickHouseStore(settings)
    await store.migrate()
    sink = SinkStage(store)
    try:
        for records in topics:
            for partition in sorted({record.partition for record in records}):
                part = [record for record in records if record.partition == partition]
                first = part[0]
                span = Range(first.topic, first.epoch, partition, first.offset, part[-1].offset)
                await sink.insert(span, part)
    finally:
        await sink.close()

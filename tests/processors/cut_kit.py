"""What the tests of cuts share: a history as live work makes it, kept in ClickHouse as the sink keeps it."""

import secrets
from collections.abc import Callable, Sequence
from itertools import groupby

import msgspec

from processors.batch.stage import build
from processors.enrich.stage import context
from processors.replay.plan import Bound, Change, Plan, Scope
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from schemas.records import Batch, Camera, Context, Detections, WindowSettings
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import Headers, Incoming, Tick
from streams.stages import Range
from tests.processors.batch_kit import DEFAULT, T0, read_batch

PARTITION = 3

InForce = Callable[[str, int], Camera | None]
"""What is set for a camera at an offset."""


def camera(camera_id: str, window: WindowSettings = DEFAULT, at: int = 0, **more: object) -> Camera:
    """What is set for a camera, at so many milliseconds after the start."""
    plain = Camera(camera_id=camera_id, name=camera_id, time_zone="UTC", zones=(), window=window, updated_at=T0 + at)
    return msgspec.structs.replace(plain, **more)


class Past:
    """What happened: detections and ticks in the order of their offsets, and what live work made of them."""

    def __init__(
        self,
        items: Sequence[Detections | Tick | bytes | Incoming],
        in_force: InForce = lambda _camera, _offset: None,
        *,
        default: WindowSettings = DEFAULT,
        partition: int = PARTITION,
        epoch: str | None = None,
        gap: int = 1,
    ) -> None:
        self.epoch = epoch or secrets.token_hex(4)
        self.partition = partition
        self.log = [self._on_log(gap * index, item) for index, item in enumerate(items)]
        self.windows: list[Context] = []
        self.at = 0

        def settings(camera_id: str) -> WindowSettings | None:
            found = in_force(camera_id, self.at)
            return found.window if found is not None else None

        fold = build(default, settings).open(partition, self.epoch, [])
        for record in self.log:
            self.at = record.offset
            try:
                closed = [read_batch(emit) for emit in fold.feed(record)]
            except UnprocessableError:
                continue
            self.windows += [context(batch, in_force(batch.camera_id, record.offset)) for batch in closed]
        self.open_windows = fold.open_windows

    def _on_log(self, offset: int, item: Detections | Tick | bytes | Incoming) -> Incoming:
        if isinstance(item, Incoming):
            return item._replace(epoch=self.epoch, partition=self.partition, offset=offset)
        if isinstance(item, bytes):
            return self._record("detections", offset, b"gate", item, ())
        if isinstance(item, Tick):
            made = item.emit("detections")
        else:
            # Detected one after the other, so that the time of a change names one place among them.
            made = codec.emit("detections", msgspec.structs.replace(item, detected_at=T0 + offset))
        return self._record("detections", offset, made.key, made.value, made.headers)

    def _record(self, topic: str, offset: int, key: bytes | None, value: bytes | None, headers: Headers) -> Incoming:
        return Incoming(topic, self.epoch, self.partition, offset, key, value, headers)

    @property
    def batches(self) -> list[Batch]:
        return [window.batch for window in self.windows]

    @property
    def bounds(self) -> tuple[Bound, ...]:
        detections = self.log[-1].offset + 1 if self.log else 0
        return (
            Bound(topic="contexts", epoch=self.epoch, partition=self.partition, offset=len(self.windows)),
            Bound(topic="detections", epoch=self.epoch, partition=self.partition, offset=detections),
        )

    @property
    def records(self) -> list[Incoming]:
        """Everything that the sink keeps of it."""
        made = [
            *enumerate(codec.emit("batches", batch) for batch in self.batches),
            *enumerate(codec.emit("contexts", window) for window in self.windows),
        ]
        return [*self.log, *(self._record(e.topic, offset, e.key, e.value, e.headers) for offset, e in made)]

    def plan(self, change: Change | None = None, **scope: object) -> Plan:
        """A replay of it; without a change it cuts by the settings that were in force."""
        return Plan(kind="change", scope=Scope(**scope), change=change or Change(), upto=self.bounds)


async def keep(store: ClickHouseStore, *pasts: Past, cameras: Sequence[Camera] = ()) -> None:
    """Store it as the sink does."""
    records = [record for past in pasts for record in past.records]
    epoch = secrets.token_hex(4)
    for offset, made in enumerate(codec.emit("cameras", one) for one in cameras):
        records.append(Incoming("cameras", epoch, 0, offset, made.key, made.value, made.headers))
    await keep_records(store, records)


async def keep_records(store: ClickHouseStore, records: Sequence[Incoming]) -> None:
    """Store these, which lie in the order of their offsets by topic."""
    sink = SinkStage(store)
    for (topic, life, partition), of_range in groupby(records, key=lambda r: (r.topic, r.epoch, r.partition)):
        rows = list(of_range)
        await sink.insert(Range(topic, life, partition, rows[0].offset, rows[-1].offset), rows)

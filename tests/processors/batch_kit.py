"""What the tests of batch share: records made in a line, and a host that commits, dies and takes up again."""

from collections.abc import Callable, Sequence

import msgspec

from processors.batch.core import CameraWindows
from processors.batch.settings import WindowsSettings
from processors.batch.stage import build
from schemas import ids
from schemas.records import Batch, BatchState, Box, Detections, WindowSettings
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import Emit, Incoming, Tick

DEFAULT = WindowsSettings().record()
T0 = 1_790_000_000_000
"""Some time in 2026, milliseconds since the Unix epoch."""
EPOCH = "e1"


def box(x: float = 0, label: str = "person", score: float = 0.6, width: float = 100, y: float = 0) -> Box:
    return Box(label=label, score=score, x=float(x), y=float(y), width=float(width), height=100.0)


def seen(
    number: int,
    captured_at: int | None,
    *boxes: Box,
    arrived_at: int | None = None,
    camera: str = "gate",
) -> Detections:
    """What was seen in one frame, arrived when it was captured unless told."""
    arrived = arrived_at if arrived_at is not None else captured_at
    assert arrived is not None
    return Detections(
        frame_id=ids.frame_id(camera, f"{number:064x}", captured_at),
        camera_id=camera,
        captured_at=captured_at,
        arrived_at=arrived,
        width=640,
        height=480,
        boxes=boxes,
        model="m",
        model_digest="d",
        runtime="torch-cpu",
        inference_ms=1.0,
        detected_at=arrived,
    )


class Road:
    """One camera's machine, fed by seconds: `person(31)` is a person in a new place, 31 s after the start."""

    def __init__(self, settings: WindowSettings = DEFAULT, windows: CameraWindows | None = None) -> None:
        self.windows = windows or CameraWindows("gate", 3, EPOCH)
        self.settings = settings
        self.offset = self.windows.resume.offset
        self.batches: list[Batch] = []

    def frame(self, at: float | None, *boxes: Box, arrived: float | None = None) -> list[Batch]:
        captured_at = None if at is None else T0 + round(at * 1000)
        arrived_at = None if arrived is None else T0 + round(arrived * 1000)
        record = seen(self.offset, captured_at, *boxes, arrived_at=arrived_at)
        return self._done(self.windows.feed(self.offset, record, self.settings))

    def person(self, at: float, *, arrived: float | None = None, score: float = 0.6) -> list[Batch]:
        """A person where none was among the last records, so that the frame matters."""
        return self.frame(at, box(200 * (self.offset % 10), score=score), arrived=arrived)

    def nothing(self, at: float, *, arrived: float | None = None) -> list[Batch]:
        return self.frame(at, arrived=arrived)

    def tick(self, at: float) -> list[Batch]:
        batch = self.windows.tick(self.offset, T0 + round(at * 1000))
        return self._done([] if batch is None else [batch])

    def end(self) -> list[Batch]:
        batch = self.windows.end_of_stream(self.offset)
        return self._done([] if batch is None else [batch])

    def _done(self, closed: list[Batch]) -> list[Batch]:
        self.offset += 1
        self.batches += closed
        return closed


def on_log(offset: int, item: Detections | Tick | bytes, partition: int = 3) -> Incoming:
    """A record of `detections` as it lies on the log; bytes lie there as they are."""
    if isinstance(item, bytes):
        return Incoming("detections", EPOCH, partition, offset, b"gate", item, ())
    made = item.emit("detections") if isinstance(item, Tick) else codec.emit("detections", item)
    return Incoming("detections", EPOCH, partition, offset, made.key, made.value, made.headers)


def read_batch(emit: Emit) -> Batch:
    assert emit.topic == "batches"
    batch = codec.decode_bytes("batches", emit.value, dict(emit.headers)["fp"], Batch)
    assert emit.key == batch.camera_id.encode()
    return batch


class Host:
    """One partition's host over a log in memory: commits results, snapshots and position at once, or nothing."""

    def __init__(
        self,
        log: Sequence[Incoming],
        settings: Callable[[str, int], WindowSettings | None] = lambda _camera, _offset: None,
    ) -> None:
        self.log = log
        self.batches: list[Batch] = []
        self.dead: list[int] = []
        self.states: dict[str, bytes] = {}
        self.fed = 0
        self._position = 0
        self._at = 0
        self._stage = build(DEFAULT, lambda camera: settings(camera, self._at))
        self.take_over()

    def take_over(self) -> None:
        """A new owner: what was not committed is gone."""
        states = [codec.decode_bytes("batch_state", value, None, BatchState) for value in self.states.values()]
        self._fold = self._stage.open(3, EPOCH, states)
        self._next = self._position
        self._results: list[Batch] = []
        self._dead: list[int] = []

    def run(self, upto: int | None = None, commit_every: int = 1) -> "Host":
        """Feed offsets below `upto`, committing every so many; the last few may stay uncommitted."""
        for since_commit, record in enumerate(self.waiting(upto), start=1):
            self.step(record)
            if since_commit % commit_every == 0:
                self.commit()
        return self

    def waiting(self, upto: int | None = None) -> list[Incoming]:
        return [r for r in self.log if r.offset >= self._next and (upto is None or r.offset < upto)]

    def step(self, record: Incoming) -> None:
        self._at = record.offset
        self.fed += 1
        try:
            self._results += [read_batch(emit) for emit in self._fold.feed(record)]
        except UnprocessableError:
            self._dead.append(record.offset)
        self._next = record.offset + 1

    def commit(self) -> list[BatchState]:
        moved = list(self._fold.moved(self._next))
        for state in moved:
            self.states[state.camera_id] = codec.encode("batch_state", state)[0]
        self._position = self._fold.position(self._next)
        self.batches += self._results
        self.dead += self._dead
        self._results, self._dead = [], []
        return moved

    @property
    def position(self) -> int:
        return self._position

    @property
    def open_windows(self) -> int:
        return self._fold.open_windows


def replace(settings: WindowSettings, **changes: object) -> WindowSettings:
    return msgspec.structs.replace(settings, **changes)

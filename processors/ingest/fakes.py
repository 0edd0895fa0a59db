"""A log in memory that fences, loses answers and fails on command, and cameras that are simply known."""

import asyncio
from collections.abc import Callable, Sequence

from schemas.records import Camera, DeadLetter, Frame, IngestState, WindowSettings
from streams import codec
from streams.errors import FencedError
from streams.messages import Emit, Incoming, Tick


class MemoryLog:
    """What Kafka does for ingest: owners fence one another, commits are all or nothing, state comes back.

    `fault` is called at every step of every way in, with `open`, `commit` (nothing is appended yet),
    `committed` (it is appended, and the answer is on its way) or `close`, and may raise.
    """

    def __init__(self, identity: str = "memory:1") -> None:
        self.identity = identity
        self.records: list[Emit] = []
        self.commits = 0
        self.opened = 0
        self.closed = asyncio.Event()
        """Set whenever a way in is let go."""
        self.appended = asyncio.Event()
        """Set whenever something was appended."""
        self.fault: Callable[[str], None] = lambda _step: None
        self._owners: dict[str, MemoryCameraLog] = {}

    def camera(self, camera: Camera) -> "MemoryCameraLog":
        """A new way in for the camera, not open."""
        return MemoryCameraLog(self, camera.camera_id)

    def frames(self) -> list[Frame]:
        """The frames appended, in order."""
        return [codec.decode(_incoming(e), Frame) for e in self.records if e.topic == "frames" and e.value is not None]

    async def until(self, frames: int) -> None:
        """Wait until so many frames were appended."""
        while len(self.frames()) < frames:
            self.appended.clear()
            await self.appended.wait()

    def ticks(self) -> list[Tick]:
        """The ticks appended, in order."""
        found = [Tick.of(_incoming(e)) for e in self.records if e.topic == "frames"]
        return [tick for tick in found if tick is not None]

    def dead_letters(self) -> list[DeadLetter]:
        """The dead letters appended, in order."""
        return [codec.decode(_incoming(e), DeadLetter) for e in self.records if e.topic == "dead_letters"]

    def state(self, camera_id: str) -> IngestState | None:
        """The camera's newest state."""
        key = camera_id.encode()
        for emit in reversed(self.records):
            if emit.topic == "ingest_state" and emit.key == key:
                return codec.decode(_incoming(emit), IngestState)
        return None


class MemoryCameraLog:
    """One camera's way into a `MemoryLog`."""

    def __init__(self, log: MemoryLog, camera_id: str) -> None:
        self._log = log
        self._camera_id = camera_id

    async def open(self) -> IngestState | None:
        """Fence, then read; see the port."""
        await asyncio.sleep(0)
        self._log.fault("open")
        self._log._owners[self._camera_id] = self  # noqa: SLF001 (the two are one fake)
        self._log.opened += 1
        return self._log.state(self._camera_id)

    async def commit(self, emits: Sequence[Emit]) -> None:
        """Append all or nothing; see the port."""
        await asyncio.sleep(0)
        self._log.fault("commit")
        if self._log._owners.get(self._camera_id) is not self:  # noqa: SLF001
            raise FencedError(self._camera_id)
        self._log.records.extend(emits)
        self._log.commits += 1
        self._log.appended.set()
        self._log.fault("committed")
        await asyncio.sleep(0)

    async def close(self) -> None:
        """Let go."""
        await asyncio.sleep(0)
        self._log.fault("close")
        self._log.closed.set()


class MemoryCameras:
    """Cameras in a dict."""

    def __init__(self, *camera_ids: str, time_zone: str = "UTC") -> None:
        self._time_zone = time_zone
        self.known = {camera_id: self.make(camera_id) for camera_id in camera_ids}

    def make(self, camera_id: str, partition: int | None = None) -> Camera:
        """A camera of that id with ordinary windows."""
        window = WindowSettings(
            open_on=("person",),
            threshold=0.5,
            idle_ms=30_000,
            max_ms=90_000,
            max_frames=50,
            fast_label="person",
            fast_score=0.9,
            fast_cooldown_ms=90_000,
            stationary_iou=0.85,
        )
        return Camera(
            camera_id=camera_id,
            name=camera_id,
            time_zone=self._time_zone,
            zones=(),
            window=window,
            partition=partition,
            updated_at=0,
        )

    def get(self, camera_id: str) -> Camera | None:
        """The camera, or None."""
        return self.known.get(camera_id)

    async def ensure(self, camera_id: str) -> Camera:
        """The camera, made where it is not known."""
        await asyncio.sleep(0)
        return self.known.setdefault(camera_id, self.make(camera_id))


def _incoming(emit: Emit) -> Incoming:
    return Incoming(emit.topic, "1", 0, 0, emit.key, emit.value, emit.headers)

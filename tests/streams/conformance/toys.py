"""Toy stages of the three shapes. Files in a control directory make them hang, or find their model away."""

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from schemas.records import BatchState
from streams.errors import UnavailableError, UnprocessableError
from streams.messages import Emit, Incoming
from streams.stages import Range

WINDOW = 3
"""Records that a toy window holds."""


class EchoStage:
    """One record in, the same record out. `slow SECONDS` values take their time, `bad` ones fail until mended."""

    name = "echo"

    def __init__(self, source: str, target: str, control: Path, concurrency: int = 8) -> None:
        self.inputs = (source,)
        self.outputs = (target,)
        self.concurrency = concurrency
        self.seen: list[Incoming] = []
        self._control = control

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        self.seen.append(record)
        (self._control / "entered").touch()
        while (self._control / "hang").exists():
            await asyncio.sleep(0.05)
        if (self._control / "away").exists():
            raise UnavailableError("llm", "the toy's model is away")
        value = record.value or b""
        if value.startswith(b"bad") and not (self._control / "mended").exists():
            raise UnprocessableError("a bad record", detail='{"why": "the test says so"}')
        if value.startswith(b"slow"):
            await asyncio.sleep(float(value.split()[1]))
        return [Emit(self.outputs[0], record.key or b"", value)]

    async def close(self) -> None:
        (self._control / "closed").touch()


class WindowStage:
    """Windows of three records per key. Each says its number, so state that was lost or doubled shows."""

    name = "window"
    state_topic = "batch_state"
    tick_topic = "frames"

    def __init__(self, source: str, target: str) -> None:
        self.inputs = (source,)
        self.target = target

    def open(self, _partition: int, epoch: str, states: Sequence[BatchState]) -> "WindowFold":
        return WindowFold(self.target, epoch, states)


class WindowFold:
    """The windows of one partition."""

    open_windows = 0  # no ticks: they would come in among other tests' frames

    def __init__(self, target: str, epoch: str, states: Sequence[BatchState]) -> None:
        self._target = target
        self._epoch = epoch
        self._resume = {state.camera_id: state.resume_offset for state in states}
        self._number = {state.camera_id: state.event_at or 0 for state in states}
        self._open: dict[str, list[Incoming]] = {}
        self._touched: set[str] = set()

    def feed(self, record: Incoming) -> Sequence[Emit]:
        camera = (record.key or b"").decode()
        if record.offset < self._resume.get(camera, 0):
            return []
        window = self._open.setdefault(camera, [])
        window.append(record)
        self._touched.add(camera)
        if len(window) < WINDOW:
            return []
        del self._open[camera]
        self._number[camera] = self._number.get(camera, 0) + 1
        ids = b",".join(member.value or b"" for member in window)
        return [Emit(self._target, camera.encode(), b"%d:%s" % (self._number[camera], ids))]

    def position(self, next_offset: int) -> int:
        return min((window[0].offset for window in self._open.values()), default=next_offset)

    def moved(self, next_offset: int) -> Sequence[BatchState]:
        states = []
        for camera in self._touched:
            resume = self._open[camera][0].offset if camera in self._open else next_offset
            if resume != self._resume.get(camera):
                self._resume[camera] = resume
                states.append(
                    BatchState(
                        camera_id=camera,
                        epoch=self._epoch,
                        resume_offset=resume,
                        event_at=self._number.get(camera, 0),
                        recent=(),
                    )
                )
        self._touched.clear()
        return states


class TableStage:
    """Rows into SQLite, which deduplicates by token as ClickHouse does: the same token again inserts nothing."""

    name = "table"
    state_topic = "sink_state"
    linger_s = 0.05
    max_records = 200
    concurrency = 4

    def __init__(self, source: str, database: Path, control: Path) -> None:
        self.inputs = (source,)
        self._database = database
        self._control = control
        self._execute("CREATE TABLE IF NOT EXISTS inserts (token TEXT PRIMARY KEY, ids TEXT)")

    async def insert(self, span: Range, records: Sequence[Incoming]) -> None:
        if (self._control / "away").exists():
            raise UnavailableError("store", "the toy's store is away")
        ids = ",".join((record.value or b"").decode() for record in records)
        await asyncio.to_thread(self._execute, "INSERT OR IGNORE INTO inserts VALUES (?, ?)", span.token("toy"), ids)
        kept = await asyncio.to_thread(self._execute, "SELECT ids FROM inserts WHERE token = ?", span.token("toy"))
        assert kept == [(ids,)], "another range under the same token"

    async def close(self) -> None:
        pass

    def ids(self) -> list[str]:
        """Every row that is in the table."""
        return [one for (ids,) in self._execute("SELECT ids FROM inserts") for one in ids.split(",")]

    def _execute(self, statement: str, *arguments: str) -> list[tuple[str]]:
        with sqlite3.connect(self._database, timeout=10, isolation_level=None) as connection:
            return connection.execute(statement, arguments).fetchall()

"""Appending a camera's frames exactly once: fence, read what is remembered, check, append frames and memory as one.

Whoever appends for a camera, folder or upload, on whatever host, holds the camera's transactional id. A replica
that is fenced acquires it again and checks again before it answers. Frames that wait together share a
transaction, because a transaction costs the same for one frame as for many.
"""

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

import structlog
from aiokafka.errors import KafkaError

from processors.ingest import core
from processors.ingest.metrics import IngestMetrics
from processors.ingest.ports import CameraLog, Cameras, Log
from processors.ingest.rejected import Note, content_name
from processors.ingest.settings import IngestSettings
from processors.ingest.shed import Shed
from schemas.records import Camera, DeadLetter, DeadLetterStatus
from streams import codec
from streams.claims import INLINE_LIMIT, ClaimStore
from streams.delivery import DEAD_LETTER_INLINE
from streams.errors import FencedError, UnavailableError, UncertainError
from streams.messages import Emit, Tick
from streams.redrives import OPEN, RESOLVED, STATUS

log = structlog.get_logger(__name__)

# 64 frames of 64 KB are 4 MB and take a broker that flushes each about a quarter of a second: well within the
# 10 s of a transaction.
GROUP = 64

# How long the transaction in hand may take when ingest is told to stop, seconds.
STOP_S = 5.0


class Entry(NamedTuple):
    """One record to append at most once."""

    name: str | None
    """Its id, by which it is remembered; None: append it in any case."""
    emit: Emit
    order: int | None = None
    """Capture time of a frame, ms, for whoever wants to append in that order."""
    source: str = ""
    """By which way it came in."""
    outcome: Literal["rejected", "shed"] = "rejected"
    """Of a dead letter: why there is one."""
    also: tuple[Emit, ...] = ()
    """What else its transaction says; also where the entry is known."""


class Receipt(NamedTuple):
    """What became of an entry. Both mean: it is on the log, once."""

    frame_id: str
    status: Literal["accepted", "known"]


class _Job(NamedTuple):
    entries: Sequence[Entry]
    receipts: "asyncio.Future[list[Receipt]]"


class CameraAppender:
    """The one way in for one camera in this process."""

    def __init__(
        self,
        camera_id: str,
        way_in: Callable[[], CameraLog],
        *,
        idle_s: float,
        deadline_s: float,
        backoff_s: float,
    ) -> None:
        self._camera_id = camera_id
        self._way_in = way_in
        self._idle_s = idle_s
        self._deadline_s = deadline_s
        self._backoff_s = backoff_s
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log: CameraLog | None = None
        self._memory = core.Memory(camera_id)
        self._repeats = 0  # answered and not yet counted on the log
        self._committed_at = 0.0
        self._stopping = False

    async def append(self, entries: Sequence[Entry]) -> list[Receipt]:
        """Append what is not known yet, in order and all or nothing; return when it is committed.

        Raises:
            UnavailableError: not now. Nothing is known to be appended; trying again is safe.
        """
        if self._stopping:
            raise _stopped()
        job = _Job(entries, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name=f"ingest {self._camera_id}")
        return await job.receipts

    async def close(self) -> None:
        """Finish the transaction in hand, answer the rest with `UnavailableError`, let go."""
        self._stopping = True
        self._fail(self._jobs, _stopped())
        self._jobs.clear()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=STOP_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while not self._stopping:
                if not self._jobs and not await self._woken():
                    await self._save_repeats()
                    await self._release()
                    if not self._jobs:  # nothing is awaited from here to the task's end: no job can slip in
                        return
                group = self._take()
                if group:
                    await self._answer(group)
            await self._save_repeats()
        finally:
            await self._release()

    async def _woken(self) -> bool:
        """Whether something came before the camera counted as idle."""
        self._wake.clear()
        try:
            async with asyncio.timeout(self._idle_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    def _take(self) -> list[_Job]:
        group: list[_Job] = []
        size = 0
        while self._jobs and (not group or size + len(self._jobs[0].entries) <= GROUP):
            job = self._jobs.popleft()
            if not job.receipts.done():  # its caller has gone
                group.append(job)
                size += len(job.entries)
        return group

    async def _answer(self, group: list[_Job]) -> None:
        try:
            receipts = iter(await self._append([entry for job in group for entry in job.entries]))
        except UnavailableError as error:
            self._fail(group, error)
        except asyncio.CancelledError:
            self._fail(group, _stopped())
            raise
        except Exception as error:
            # Not foreseen: those who wait are told, the way in is given up, and the next frame starts afresh.
            log.exception("append failed", camera=self._camera_id)
            await self._release()
            self._fail(group, error)
        else:
            for job in group:
                mine = [next(receipts) for _ in job.entries]
                if not job.receipts.done():
                    job.receipts.set_result(mine)

    async def _append(self, entries: Sequence[Entry]) -> list[Receipt]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadline_s
        uncertain: set[str] = set()  # perhaps appended by us: then they are accepted, not known
        attempt = 0
        while True:
            try:
                return await self._try(entries, uncertain)
            except (FencedError, UncertainError) as error:
                await self._release()
                attempt += 1
                if loop.time() >= deadline or self._stopping:
                    raise UnavailableError(
                        "broker",
                        f"camera {self._camera_id}: no append came through in {attempt} attempts "
                        f"(another ingest appends for it too, or the broker is failing): {error}",
                    ) from error
                log.info("acquire again", camera=self._camera_id, attempt=attempt, error=str(error))
                # Two replicas that fence one another part by chance.
                await asyncio.sleep(random.uniform(0.5, 1) * min(2.0, self._backoff_s * 2**attempt))
            except UnavailableError:
                await self._release()
                raise

    async def _try(self, entries: Sequence[Entry], uncertain: set[str]) -> list[Receipt]:
        if self._log is None:
            self._log = self._way_in()
            self._memory = core.Memory(self._camera_id, await self._log.open())
            self._committed_at = asyncio.get_running_loop().time()
        emits: list[Emit] = []
        names: dict[str, None] = {}
        receipts: list[Receipt] = []
        frames = repeats = 0
        for entry in entries:
            emits += entry.also
            if entry.name is not None:
                if entry.name in names or self._memory.knows(entry.name):
                    ours = entry.name in uncertain and entry.name not in names
                    repeats += not ours
                    receipts.append(Receipt(entry.name, "accepted" if ours else "known"))
                    continue
                names[entry.name] = None
                frames += entry.emit.topic == "frames"
            emits.append(entry.emit)
            receipts.append(Receipt(entry.name or "", "accepted"))
        if emits or self._counting_is_due(repeats):
            try:
                await self._commit(emits, list(names), frames, self._repeats + repeats)
            except UncertainError:
                uncertain.update(names)
                raise
        else:
            self._repeats += repeats
        return receipts

    def _counting_is_due(self, repeats: int) -> bool:
        """A frozen picture is not a silent camera: its repeats reach the log, but not one by one."""
        waited = asyncio.get_running_loop().time() - self._committed_at
        return self._repeats + repeats > 0 and waited >= self._idle_s

    async def _commit(self, emits: Sequence[Emit], names: Sequence[str], frames: int, repeats: int) -> None:
        assert self._log is not None, "commit before open"
        state = self._memory.state(names, frames, repeats)
        await self._log.commit([*emits, codec.emit("ingest_state", state)])
        self._memory.committed(state, names)
        self._repeats = 0
        self._committed_at = asyncio.get_running_loop().time()

    async def _save_repeats(self) -> None:
        if self._log is not None and self._repeats:
            try:
                await self._commit([], [], 0, self._repeats)
            except Exception as error:  # noqa: BLE001 (a count must not keep a frame waiting)
                log.warning("repeats not counted", camera=self._camera_id, count=self._repeats, error=repr(error))

    async def _release(self) -> None:
        if self._log is not None:
            way_in, self._log = self._log, None
            try:
                await way_in.close()
            except Exception as error:  # noqa: BLE001 (it is given up; its successor fences it)
                log.warning("way in not closed", camera=self._camera_id, error=repr(error))

    def _fail(self, jobs: "Sequence[_Job] | deque[_Job]", error: Exception) -> None:
        for job in jobs:
            if not job.receipts.done():
                job.receipts.set_exception(error)


class Appenders:
    """All cameras' ways in, and the making of what they append.

    Args:
        log_: where frames go.
        cameras: which cameras are known.
        claims: where images above 64 KB go.
        settings: limits and patterns.
        clock: wall time, seconds since the Unix epoch.
        backoff_s: the first pause before a lost camera is acquired again, seconds; it doubles, up to 2 s.
    """

    def __init__(
        self,
        log_: Log,
        cameras: Cameras,
        claims: ClaimStore,
        settings: IngestSettings,
        *,
        clock: Callable[[], float] = time.time,
        backoff_s: float = 0.1,
    ) -> None:
        self.settings = settings
        self.patterns = core.NamePatterns(settings.time_patterns)
        self._log = log_
        self._cameras = cameras
        self._claims = claims
        self._clock = clock
        self._backoff_s = backoff_s
        self._ways: dict[str, CameraAppender] = {}
        self._stopping = False
        self.shed = Shed(settings.shed)
        """Whether new frames are shed now."""
        self.metrics = IngestMetrics(self.shed)
        self.waiting_on: dict[str, str] = {}
        """What cameras' last appends waited on, by camera; one that went through is not in it."""

    @property
    def log_identity(self) -> str:
        """Names this life of the log."""
        return self._log.identity

    def now_ms(self) -> int:
        """Wall time, ms since the Unix epoch."""
        return int(self._clock() * 1000)

    async def camera(self, camera_id: str, *, create: bool) -> Camera:
        """The camera of that id.

        Raises:
            RejectedError: this can be no camera's id.
            UnknownCameraError: it is not known, and must not be made.
            UnavailableError: it cannot be made now.
        """
        core.check_camera_id(camera_id)
        camera = self._cameras.get(camera_id)
        if camera is None:
            if not create:
                raise core.UnknownCameraError(camera_id)
            try:
                camera = await self._cameras.ensure(camera_id)
            except (FencedError, UncertainError, KafkaError, TimeoutError, OSError) as error:
                raise UnavailableError("broker", f"camera {camera_id} cannot be added now: {error!r}") from error
            log.info("camera added", camera=camera_id)
        return camera

    def zone(self, camera_id: str) -> ZoneInfo:
        """The camera's time zone.

        Raises:
            UnavailableError: what is set is none; the message names the fix.
        """
        camera = self._cameras.get(camera_id)
        name = camera.time_zone if camera is not None else "UTC"
        try:
            return ZoneInfo(name)
        except (KeyError, ValueError, OSError) as error:
            raise UnavailableError(
                "settings",
                f"camera {camera_id} has time zone {name!r}, which is none: "
                f"`rewatch camera set {camera_id} --time-zone Europe/Berlin`",
            ) from error

    async def prepare(self, submission: core.Submission, note: Note | None = None) -> Entry:
        """Check the image, store it if it is large, and make its record. It may be dropped: nothing is appended yet.

        With the note of a file that was put back, its dead letter is resolved by it.

        Raises:
            RejectedError: it is no image that can be taken.
            UnavailableError: the image store or a setting stands in the way.
        """
        submission = submission._replace(name=core.clean_name(submission.name))
        zone = self.zone(submission.camera_id)
        if len(submission.data) <= INLINE_LIMIT:
            # All of it in one visit to a thread: a visit costs as much CPU as hashing twice (75 us measured).
            return await asyncio.to_thread(
                lambda: self._entry(submission, self._look(submission, zone), zone, note=note)
            )
        picture = await asyncio.to_thread(self._look, submission, zone)
        claim = await self._claims.put(submission.data)
        return await asyncio.to_thread(lambda: self._entry(submission, picture, zone, claim, note))

    def _look(self, submission: core.Submission, zone: ZoneInfo) -> core.Picture:
        s = self.settings
        return core.look(submission.data, max_bytes=s.max_bytes, max_pixels=s.max_pixels, zone=zone)

    def _entry(
        self,
        submission: core.Submission,
        picture: core.Picture,
        zone: ZoneInfo,
        claim: str | None = None,
        note: Note | None = None,
    ) -> Entry:
        captured = core.capture_time(picture, submission, self.patterns, zone)
        frame = core.build_frame(submission, picture, captured, claim=claim)
        return Entry(
            frame.frame_id,
            codec.emit("frames", frame),
            frame.captured_at,
            submission.source,
            also=() if note is None else (self._status(note, RESOLVED, frame.frame_id),),
        )

    def _status(self, note: Note, status: str, record: str) -> Emit:
        return codec.emit(
            STATUS,
            DeadLetterStatus(origin=note.origin, status=status, by="ingest", at=self.now_ms(), record=record),
            0,
        )

    async def reject(
        self, submission: core.Submission, error: core.RejectedError, size: int, note: Note | None = None
    ) -> Entry:
        """The dead letter of a file that is not taken, remembered like a frame, so that it too is there once.

        With the note of a file that was put back it is one more of the same origin.

        Args:
            submission: the file; its data are empty where it was too long to be read.
            error: why.
            size: the file's length, bytes.
            note: what stood beside a file that was put back.

        Raises:
            UnavailableError: the image store stands in the way.
        """
        data = submission.data
        name = core.clean_name(submission.name)
        large = len(data) > DEAD_LETTER_INLINE
        content = content_name(data, size, submission.file_at)
        origin = f"{submission.source}:{submission.camera_id}/{name}@{content}"
        attempt = 1 if note is None else note.attempts + 1
        letter = DeadLetter(
            origin=origin if note is None else note.origin,
            camera_id=submission.camera_id,
            stage="ingest",
            kind="rejected",
            error=type(error).__name__,
            message=str(error),
            attempt=attempt,
            key=submission.camera_id.encode(),
            value=None if large else data,
            claim=await self._claims.put(data) if large else None,
            headers={},
            detail=json.dumps({"name": name, "size": size, "file_at": submission.file_at}),
            failed_at=submission.arrived_at,
        )
        emit = codec.emit("dead_letters", letter)
        if note is None:
            return Entry(letter.origin, emit, source=submission.source)
        again = f"{letter.origin}#{attempt}"  # its first letter is remembered; this one is another
        return Entry(again, emit, source=submission.source, also=(self._status(note, OPEN, again),))

    def drop(self, submission: core.Submission, size: int) -> Entry:
        """The dead letter, without its bytes, of a frame that is not taken because too much work waits.

        Args:
            submission: the image.
            size: its length, bytes.
        """
        name = core.clean_name(submission.name)
        content = content_name(submission.data, size, submission.file_at)
        letter = DeadLetter(
            origin=f"{submission.source}:{submission.camera_id}/{name}@{content}",
            camera_id=submission.camera_id,
            stage="ingest",
            kind="shed",
            error="Shed",
            message=f"not taken: {self.shed.why}",
            attempt=1,
            key=submission.camera_id.encode(),
            headers={},
            detail=json.dumps({"name": name, "size": size, "waiting": dict(self.shed.waiting)}),
            failed_at=submission.arrived_at,
        )
        # Byte-identical pictures are one frame, so they are dropped once. What is dropped was not looked at: it may
        # yet be rejected, under its own name.
        emit = codec.emit("dead_letters", letter)
        return Entry(f"shed {letter.origin}", emit, source=submission.source, outcome="shed")

    def end_of_stream(self, camera_id: str) -> Entry:
        """The tick that ends a camera's stream and closes its window."""
        return Entry(None, Tick(self.now_ms(), camera_id).emit("frames"))

    async def append(self, camera_id: str, entries: Sequence[Entry]) -> list[Receipt]:
        """Append a known camera's entries, in order; return when they are committed.

        Raises:
            UnavailableError: not now. Trying again is safe.
        """
        if self._stopping:
            raise _stopped()
        way = self._ways.get(camera_id)
        if way is None:
            way = self._ways[camera_id] = CameraAppender(
                camera_id,
                lambda: self._way_in(camera_id),
                idle_s=self.settings.idle_s,
                deadline_s=self.settings.deadline_s,
                backoff_s=self._backoff_s,
            )
        try:
            receipts = await way.append(entries)
        except UnavailableError as error:
            self.waiting_on[camera_id] = error.waiting_on
            raise
        self.waiting_on.pop(camera_id, None)
        for entry, receipt in zip(entries, receipts, strict=True):
            self._taken(camera_id, entry, receipt)
        return receipts

    def turned_away(self, camera_id: str | None, source: str, outcome: Literal["rejected", "shed"]) -> None:
        """Count an image that is not appended, as one of no camera where it names none that is known."""
        known = camera_id is not None and self._cameras.get(camera_id) is not None
        self.metrics.images.add(camera_id or "" if known else "", source, outcome)

    def _taken(self, camera_id: str, entry: Entry, receipt: Receipt) -> None:
        if entry.name is None:  # a tick is no image
            return
        accepted = receipt.status == "accepted"
        if entry.emit.topic == "frames":
            self.metrics.images.add(camera_id, entry.source, "accepted" if accepted else "unchanged")
            log.debug("frame", frame=entry.name, camera=camera_id, source=entry.source, status=receipt.status)
        elif accepted:
            self.metrics.images.add(camera_id, entry.source, entry.outcome)
            log.warning("dead letter", origin=entry.name, camera=camera_id, source=entry.source)

    async def close(self) -> None:
        """Finish what is in hand, 5 s at most; whatever waits is answered with `UnavailableError`."""
        self._stopping = True
        await asyncio.gather(*(way.close() for way in self._ways.values()))

    def _way_in(self, camera_id: str) -> CameraLog:
        camera = self._cameras.get(camera_id)
        if camera is None:
            raise UnavailableError("settings", str(core.UnknownCameraError(camera_id)))
        return self._log.camera(camera)


def _stopped() -> UnavailableError:
    return UnavailableError("stop", "ingest is stopping: try again when it is back")

"""A camera's newest picture, fetched again and again: `rewatch ingest snapshot` and `ingest.snapshots`."""

import asyncio
import hashlib
import math
import random
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import structlog

from processors.ingest import core
from processors.ingest.appender import Appenders, Entry
from processors.ingest.fetch import FetchError, HttpPictures, Picture, Pictures
from processors.ingest.patience import Sleep, patiently
from processors.ingest.settings import SnapshotSettings
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

# The first pause after a failure and the longest, seconds: a camera that restarts is back within a minute, and one
# that is gone costs a request a minute.
_FIRST_PAUSE_S = 1.0
_LAST_PAUSE_S = 60.0

# The longest that a camera's own Retry-After is honoured, seconds: a wrong one must not end the watch.
_LONGEST_ASKED_S = 900.0


class Watch(NamedTuple):
    """How the watch over one camera goes."""

    answers: int = 0
    """Pictures and 304s that came, whatever they were."""
    accepted: int = 0
    unchanged: int = 0
    """The picture was the one before, or known from earlier."""
    rejected: int = 0
    """No pictures that can be taken: each is a dead letter, once."""
    shed: int = 0
    """Dropped because too much work waits: each is a dead letter without bytes."""
    failed: int = 0
    """Nothing came."""
    size: int = 0
    """Bytes of the last picture."""
    took_s: float = 0.0
    """How long the last answer took."""
    waiting_on: str = ""
    """What it waits on: `camera ID`, broker, disk; empty while it goes on."""
    why: str = ""
    pause_s: float = 0.0
    """When it tries again, seconds."""


class LastingError(Exception):
    """The very first answer says that this cannot work as it is set; the message names the fix."""


class Snapshots:
    """The watch over one camera.

    Args:
        camera_id: whose pictures they are; made where it is not known.
        settings: where from and how often.
        appenders: the ways into the log.
        pictures: where pictures come from; by default the address of the settings.
        on_progress: called after each step.
        sleep: how to pause.
        monotonic: seconds that never jump.
        chance: a random number from 0 to 1.
    """

    def __init__(
        self,
        camera_id: str,
        settings: SnapshotSettings,
        appenders: Appenders,
        *,
        pictures: Pictures | None = None,
        on_progress: Callable[[Watch], None] = lambda _watch: None,
        sleep: Sleep = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._camera_id = camera_id
        self._settings = settings
        self._appenders = appenders
        self._address = settings.address
        self._given = pictures
        self._on_progress = on_progress
        self._sleep = sleep
        self._monotonic = monotonic
        self._chance = chance
        self._failures = 0
        self._last: tuple[str, Entry] | None = None  # SHA-256 and entry of the last picture taken
        self._rejected: tuple[str, str] | None = None  # SHA-256 of the last answer if it was rejected, and why
        self.watch = Watch()

    @property
    def waiting_on(self) -> str:
        """What it waits on; empty while it goes on."""
        return self.watch.waiting_on

    async def run(self, stop: asyncio.Event, *, count: int = 0, for_s: float = 0.0, hasty: bool = False) -> Watch:
        """Fetch until told to stop.

        A picture in hand at the stop is given up: it is on the log, or it never was.

        Args:
            stop: set it to end.
            count: end after so many answers; 0 for no end.
            for_s: end after so many seconds; 0 for no end.
            hasty: give up where the first answer says that only a person can mend it.

        Raises:
            LastingError: with `hasty`, only a person can mend it.
            RejectedError: the camera id is none.
        """
        core.check_camera_id(self._camera_id)
        if self._settings.insecure:
            log.warning("any TLS certificate is taken (insecure)", camera=self._camera_id, url=self._address.shown)
        working = asyncio.create_task(self._fetch_on(count, hasty), name=f"snapshot {self._camera_id}")
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({working, stopped}, timeout=for_s or None, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, stopped):
                task.cancel()
            await asyncio.wait({working, stopped})
        if not working.cancelled():
            working.result()
        return self.watch

    async def _fetch_on(self, count: int, hasty: bool) -> None:
        await patiently(lambda: self._appenders.camera(self._camera_id, create=True), self._waits, self._sleep)
        pictures = self._given or HttpPictures(
            self._address,
            max_bytes=self._appenders.settings.max_bytes,
            timeout_s=self._settings.timeout_s,
            insecure=self._settings.insecure,
            link_local=self._settings.link_local,
        )
        due = self._monotonic()
        try:
            while not count or self.watch.answers < count:
                pause = await self._turn(pictures, hasty=hasty and not self.watch.answers)
                self._on_progress(self.watch)
                if count and self.watch.answers >= count:
                    return
                now = self._monotonic()
                if pause is None:
                    due = next_due(due, now, self._settings.every_s)
                    await self._sleep(due - now)
                else:
                    await self._sleep(pause)
                    due = self._monotonic()
        finally:
            await pictures.close()

    async def _turn(self, pictures: Pictures, *, hasty: bool) -> float | None:
        """Fetch once and append; return the pause after a failure, seconds, and None where it went well."""
        started = self._monotonic()
        try:
            self._appenders.shed.check("snapshot")
        except UnavailableError as error:  # nobody asks the camera, so nothing is lost
            self.watch = self.watch._replace(waiting_on=error.waiting_on, why=str(error), pause_s=0.0)
            return None
        try:
            picture = await pictures.get()
            self.watch = self.watch._replace(
                answers=self.watch.answers + 1,
                took_s=self._monotonic() - started,
                size=self.watch.size if picture is None else picture.size,
            )
            shed = self.watch.shed
            why = await self._take(picture)
            if self.watch.shed > shed:  # else a camera that answers 304 would keep it to itself for ever
                pictures.forget()
        except FetchError as error:
            if hasty and error.lasting:
                raise LastingError(str(error)) from None
            self.watch = self.watch._replace(failed=self.watch.failed + 1)
            return self._failed(str(error), error.not_before_s)
        except Exception as error:  # noqa: BLE001 (one source's fault must not end the others)
            # Not foreseen. What was fetched is not taken, so it is asked for again.
            pictures.forget()
            log.error(  # noqa: TRY400 (a traceback may repeat the address)
                "snapshot failed", camera=self._camera_id, error=self._address.scrub(traceback.format_exc())
            )
            self.watch = self.watch._replace(failed=self.watch.failed + 1)
            return self._failed(f"{self._address.shown}: {type(error).__name__}", 0.0)
        if why:
            return self._failed(why, 0.0)
        if self._failures:
            log.info("camera answers again", camera=self._camera_id, failures=self._failures)
        self._failures = 0
        self.watch = self.watch._replace(waiting_on="", why="", pause_s=0.0)
        return None

    async def _take(self, picture: Picture | None) -> str:
        """Append the picture; return why it was rejected, empty where it was not."""
        sha256 = hashlib.sha256(picture.data or str(picture.size).encode()).hexdigest() if picture is not None else ""
        if self._rejected is not None and (picture is None or sha256 == self._rejected[0]):
            return self._rejected[1]
        if self._last is not None and (picture is None or sha256 == self._last[0]):
            await self._append(self._last[1])
            self._rejected = None
            return ""
        if picture is None:  # unchanged since a picture that was lost on its way to the log
            return ""
        submission = core.Submission(
            camera_id=self._camera_id,
            data=picture.data,
            source="snapshot",
            name=self._address.name,
            arrived_at=self._appenders.now_ms(),
            file_at=picture.modified_at,
        )
        limit = self._appenders.settings.max_bytes
        try:
            if picture.size > limit:
                raise core.RejectedError(f"the picture has {picture.size:,} bytes or more, ingest.max_bytes {limit:,}")
            if self._appenders.shed.drops("snapshot"):
                letter = self._appenders.drop(submission, picture.size)
                await patiently(lambda: self._appenders.append(self._camera_id, [letter]), self._waits, self._sleep)
                self.watch = self.watch._replace(shed=self.watch.shed + 1)
                return ""
            entry = await patiently(lambda: self._appenders.prepare(submission), self._waits, self._sleep)
        except core.RejectedError as error:
            return await self._reject(submission, error, picture.size, sha256)
        await self._append(entry)
        self._last, self._rejected = (sha256, entry), None
        return ""

    async def _append(self, entry: Entry) -> None:
        """Append it; what is known already counts as unchanged, here and in the camera's memory."""
        receipts = await patiently(lambda: self._appenders.append(self._camera_id, [entry]), self._waits, self._sleep)
        accepted = sum(receipt.status == "accepted" for receipt in receipts)
        self.watch = self.watch._replace(
            accepted=self.watch.accepted + accepted,
            unchanged=self.watch.unchanged + len(receipts) - accepted,
        )

    async def _reject(self, submission: core.Submission, error: core.RejectedError, size: int, sha256: str) -> str:
        # The answer may repeat the address that was asked for. Its time is no part of what it is: a page that is
        # made anew for each request is one dead letter.
        letter = submission._replace(data=self._address.scrub_bytes(submission.data), file_at=None)
        entry = await patiently(lambda: self._appenders.reject(letter, error, size), self._waits, self._sleep)
        await patiently(lambda: self._appenders.append(self._camera_id, [entry]), self._waits, self._sleep)
        self.watch = self.watch._replace(rejected=self.watch.rejected + 1)
        self._rejected = sha256, f"{self._address.shown}: {error}"
        return self._rejected[1]

    def _failed(self, why: str, not_before_s: float) -> float:
        """Say that and why it failed; return the pause, seconds."""
        self._failures += 1
        pause = pause_after(self._failures, self._settings.every_s, not_before_s, self._chance())
        say = log.warning if why != self.watch.why else log.info  # once, not every minute
        say("no picture", camera=self._camera_id, why=why, again_in_s=round(pause, 1), failures=self._failures)
        self.watch = self.watch._replace(waiting_on=f"camera {self._camera_id}", why=why, pause_s=pause)
        return pause

    def _waits(self, waiting_on: str) -> None:
        self.watch = self.watch._replace(waiting_on=waiting_on, why="", pause_s=0.0)
        self._on_progress(self.watch)


def next_due(due: float, now: float, every_s: float) -> float:
    """When to fetch next: at the next beat that is not past, so that a slow camera is asked less often.

    Args:
        due: when this fetch was due, seconds.
        now: when it was done.
        every_s: the beat.
    """
    return due + every_s * max(1, math.ceil((now - due) / every_s))


def pause_after(failures: int, every_s: float, not_before_s: float, chance: float) -> float:
    """How long to wait after so many failures in a row, seconds.

    From a second (or the beat, where that is shorter) it doubles up to a minute (or the beat, where that is longer),
    less up to half of it by chance, so that cameras behind one switch do not come back as one. What the camera
    asked for comes first, with up to a tenth more.
    """
    longest = max(_LAST_PAUSE_S, every_s)
    grown = min(longest, min(_FIRST_PAUSE_S, every_s) * 2.0 ** min(failures - 1, 30))
    asked = min(not_before_s, _LONGEST_ASKED_S)
    return max(grown * (1 - chance / 2), asked * (1 + chance / 10))

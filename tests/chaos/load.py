"""A steady load: cameras that upload frames until they are told 200, and somebody who looks at the page."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta

import httpx

from infra.config import Settings
from schemas import ids
from tests.e2e.installation import stamped

# Between two frames of a camera. Three cameras then make about four frames a second, ten times less than two cores do.
PAUSE_S = 0.5

# Frames of a camera before the next one is taken a minute later: windows close all the time.
STORY = 8

# Between two looks at the page.
LOOK_S = 0.5


class Load:
    """What was fed, and what was answered."""

    def __init__(self, settings: Settings, shots: list[bytes], cameras: Iterable[str]) -> None:
        self._settings = settings
        self._shots = shots
        self._cameras = tuple(cameras)
        self.accepted: dict[str, str] = {}
        """Camera by frame_id: answered with 200."""
        self.put_off = 0
        """Uploads that had to be tried again: refused, or broken off."""
        self.refused: list[str] = []
        """Uploads that were refused for good, or answered as another frame; none should be."""
        self.looked: list[int] = []
        """When the page answered, ms since the Unix epoch."""
        self._stop = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Inside the block it is fed; afterwards each camera has had its last frame accepted."""
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(self._look())
            feeding = [group.create_task(self._feed(camera)) for camera in self._cameras]
            try:
                yield self
            finally:
                self._stop.set()
                await asyncio.wait(feeding)
                looking.cancel()

    async def _feed(self, camera: str) -> None:
        at = datetime(2026, 3, 1, 6, 0, tzinfo=UTC)
        number = 0
        async with httpx.AsyncClient(base_url=self._settings.ingest.upload.url, timeout=30, trust_env=False) as client:
            while not self._stop.is_set():
                number += 1
                at += timedelta(seconds=1 if number % STORY else 61)
                body = await asyncio.to_thread(stamped, self._shots[number % len(self._shots)], at)
                frame_id = await self._until_taken(client, camera, body)
                if frame_id is not None:
                    self.accepted[frame_id] = camera
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_S):
                        await self._stop.wait()

    async def _until_taken(self, client: httpx.AsyncClient, camera: str, body: bytes) -> str | None:
        named = f"{camera}:{hashlib.sha256(body).hexdigest()[: ids.DIGEST_HEX]}"
        while True:
            with contextlib.suppress(httpx.TransportError):  # killed meanwhile; a camera tries again
                answer = await client.post("/api/upload", params={"camera": camera}, content=body)
                if answer.status_code == 200:
                    frame_id = str(answer.json()["frame_id"])
                    if not frame_id.startswith(named):
                        self.refused.append(f"upload of {named} was answered as {frame_id}")
                    return frame_id
                if answer.status_code not in {429, 503}:
                    self.refused.append(f"upload of {camera} refused: {answer.status_code} {answer.text[:200]}")
                    return None
            self.put_off += 1
            await asyncio.sleep(0.25)

    async def _look(self) -> None:
        gateway = self._settings.gateway
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}", timeout=5, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/health")).status_code == 200:
                        self.looked.append(int(time.time() * 1000))
                await asyncio.sleep(LOOK_S)

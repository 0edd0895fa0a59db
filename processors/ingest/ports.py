"""What ingest needs of the world: a log to append to, and the cameras that are known. Fakes are in `fakes`."""

from collections.abc import Sequence
from typing import Protocol

from schemas.records import Camera, IngestState
from streams.messages import Emit


class CameraLog(Protocol):
    """One camera's way into the log, owned by whoever opened it last."""

    async def open(self) -> IngestState | None:
        """Fence every earlier owner, end what it left open, then read the camera's newest committed state.

        Raises:
            UnavailableError: the log is away.
            FencedError or UncertainError: another owner came meanwhile, or the fence's outcome is unknown.
        """

    async def commit(self, emits: Sequence[Emit]) -> None:
        """Append the records to the camera's partition, all or nothing.

        Raises:
            FencedError: another owner has opened; nothing was appended.
            UncertainError: what became of it is unknown. Either way `close`, and `open` another.
        """

    async def close(self) -> None:
        """Let go; what was not committed never was."""


class Log(Protocol):
    """Where frames go."""

    identity: str
    """Names this life of this log: notes about what it has taken are worth nothing to another."""

    def camera(self, camera: Camera) -> CameraLog:
        """A new way in for the camera, not open."""


class Cameras(Protocol):
    """The cameras that are known."""

    def get(self, camera_id: str) -> Camera | None:
        """The camera, or None where it is not known."""

    async def ensure(self, camera_id: str) -> Camera:
        """The camera, made with the defaults where it is not known."""

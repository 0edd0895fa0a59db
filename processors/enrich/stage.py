"""enrich as a map stage: a batch goes on as a context, with what the LLM must know of its camera."""

from collections.abc import Callable, Sequence
from zoneinfo import ZoneInfo

from schemas import ids
from schemas.records import Batch, Camera, Context
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import Emit, Incoming
from streams.stages import MapStage


class EnrichStage:
    """A batch in, its context out."""

    name = "enrich"
    inputs: tuple[str, ...] = ("batches",)
    outputs: tuple[str, ...] = ("contexts",)
    # It waits for nothing; more in hand than one only keeps the partitions independent of each other.
    concurrency = 16

    def __init__(self, lookup: Callable[[str], Camera | None]) -> None:
        self._lookup = lookup

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        """The batch's context, without sections: there are no enrichers yet."""
        try:
            batch = codec.decode(record, Batch)
        except codec.DecodeError as error:
            raise UnprocessableError(str(error)) from error
        return [codec.emit("contexts", context(batch, self._lookup(batch.camera_id)))]

    async def close(self) -> None:
        """Nothing is held."""


def context(batch: Batch, camera: Camera | None) -> Context:
    """A batch and its camera as a context; a camera that is not known goes by its id, in UTC.

    Raises:
        UnprocessableError: the batch has no frames, or not its own name; or the camera's time zone is none. Here the
            fix and a redrive help; once a context is written with it, they would not.
    """
    if not batch.frames or batch.batch_id != ids.batch_id(batch.camera_id, (frame.frame_id for frame in batch.frames)):
        raise UnprocessableError(
            f"a batch of {len(batch.frames)} frames whose name is not theirs: {batch.batch_id[:255]!r}",
            camera_id=batch.camera_id,
        )
    time_zone = camera.time_zone if camera is not None else "UTC"
    try:
        ZoneInfo(time_zone)
    except (ValueError, OSError, KeyError) as error:  # not a key, not a file, not there
        raise UnprocessableError(
            f"camera {batch.camera_id}: {time_zone!r} is not an IANA time zone; set one with "
            f"`rewatch camera set {batch.camera_id} --time-zone Europe/Berlin`, then redrive",
            camera_id=batch.camera_id,
        ) from error
    return Context(
        batch_id=batch.batch_id,
        camera_id=batch.camera_id,
        batch=batch,
        camera_name=camera.name if camera is not None else batch.camera_id,
        time_zone=time_zone,
        sections=(),
    )


def build(lookup: Callable[[str], Camera | None]) -> MapStage:
    """The stage; `lookup` gives what is set for a camera, or None where it is not known."""
    return EnrichStage(lookup)

"""detect as a map stage: image bytes by claim or inline, one batcher for all partitions, ticks handed on in order."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from processors.detect.core import image_of, record
from processors.detect.detector import Batcher, Detector
from processors.detect.settings import DetectorSettings
from schemas.records import Frame
from streams import codec
from streams.claims import ClaimStore
from streams.errors import UnprocessableError
from streams.messages import Emit, Incoming, Tick

log = structlog.get_logger(__name__)


class DetectStage:
    """A frame in, its detections out."""

    name = "detect"
    inputs: tuple[str, ...] = ("frames",)
    outputs: tuple[str, ...] = ("detections",)
    # A full batch of the largest model takes 20 s on two cores (0.6 s an image for R18, measured; R101 is four times
    # that); the first one also warms up.
    patience_s = 120.0

    def __init__(
        self,
        detector: Detector,
        claims: ClaimStore,
        settings: DetectorSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._detector = detector
        self._claims = claims
        self._clock = clock
        self._batcher = Batcher(detector, size=settings.batch_size, wait_s=settings.wait_ms / 1000)
        self.metrics = self._batcher.metrics
        # Two batches: one in the model, one decoded and waiting.
        self.concurrency = 2 * settings.batch_size

    @property
    def details(self) -> dict[str, Any]:
        """What the worker's report says of this stage: which model, and what runs it now."""
        return {"detector": {"model": self._detector.name, "runtime": self._detector.runtime}}

    async def handle(self, incoming: Incoming) -> Sequence[Emit]:
        """The frame's detections; a tick goes on as it is."""
        tick = Tick.of(incoming)
        if tick is not None:
            return [tick.emit("detections")]
        try:
            frame = codec.decode(incoming, Frame)
        except codec.DecodeError as error:
            raise UnprocessableError(str(error)) from error
        data = frame.image
        if data is None:
            if frame.claim is None:
                raise UnprocessableError("a frame with neither image nor claim", camera_id=frame.camera_id)
            data = await self._claims.get(frame.claim, frame.sha256)
        image = await asyncio.to_thread(image_of, frame, data)
        seen = await self._batcher.detect(image)
        detections = record(
            frame,
            seen.boxes,
            model=seen.model,
            model_digest=seen.model_digest,
            runtime=seen.runtime,
            inference_ms=round(seen.inference_ms, 3),
            detected_at=int(self._clock() * 1000),
        )
        log.debug("detected", frame=frame.frame_id, camera=frame.camera_id, boxes=len(seen.boxes))
        return [codec.emit("detections", detections)]

    async def close(self) -> None:
        """Let go of the model and its thread."""
        await self._batcher.close()
        self._detector.close()

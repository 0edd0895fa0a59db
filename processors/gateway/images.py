"""The pictures: a frame's original bytes, from the claim store or from its own record in `log`."""

import asyncio

from processors.gateway.ports import NotFoundError
from processors.gateway.reads import Reads
from schemas.records import Frame
from streams import codec
from streams.claims import ClaimStore
from streams.errors import UnprocessableError

# Images in hand at once: each has at most 10 MB, and a page of an event asks for fifty together.
_AT_ONCE = 8


class Images:
    """Frames' JPEGs; only those that ClickHouse knows as a frame of that camera."""

    def __init__(self, reads: Reads, claims: ClaimStore) -> None:
        self._reads = reads
        self._claims = claims
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def get(self, camera_id: str, sha256: str) -> bytes:
        """The bytes.

        Raises:
            NotFoundError: no frame of this camera has these bytes, or they are not kept any more.
            UnavailableError: ClickHouse or the image store is away.
        """
        async with self._slots:
            place = await self._reads.image_place(camera_id, sha256)
            if place is None:
                raise NotFoundError(f"camera {camera_id} has no frame whose image has SHA-256 {sha256}")
            if place["claim"] is not None:
                try:
                    return await self._claims.get(place["claim"], sha256)
                except UnprocessableError as error:
                    raise NotFoundError(f"the image is not kept any more: {error}") from error
            record = await self._reads.record("frames", place["epoch"], place["partition"], place["offset"])
        if record is None:
            raise NotFoundError(f"the image is not kept any more: the record of frame {sha256} is not in `log`")
        try:
            image = codec.decode_bytes("frames", *record, Frame).image
        except codec.DecodeError as error:
            raise NotFoundError(f"the image cannot be read: {error}") from error
        if image is None:
            raise NotFoundError(f"the record of frame {sha256} holds no image")
        return image

"""From a file's bytes to a picture in memory: JPEG or PNG, of bounded size, decoded in threads, a few at a time."""

import asyncio
import io
import os
import struct
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

from PIL import Image, JpegImagePlugin, PngImagePlugin
from PIL.ImageFile import ImageFile

from processors.detect.service.room import Room
from processors.detect.settings import DECODED_BYTES, DECODING_BYTES, ServiceSettings
from streams import jpeg
from streams.errors import UnprocessableError

_PNG_START = b"\x89PNG\r\n\x1a\n"

# What Pillow's readers raise on hostile bytes.
_UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, struct.error, EOFError)


class Pictures:
    """Decodes. Together they take `pixels_mb` at most, by their headers' word and `DECODING_BYTES`."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._most = settings.max_pixels
        self.room = Room(settings.pixels_mb * 1_000_000)
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")

    @asynccontextmanager
    async def of(self, data: bytes) -> AsyncIterator[Image.Image]:
        """The picture, RGB; its memory counts as taken until exit.

        Raises:
            UnprocessableError: it is no whole JPEG or PNG, or too large.
        """
        loop = asyncio.get_running_loop()
        # A header can be as long as the file: read beside the loop, too.
        opened = await loop.run_in_executor(self._threads, _open, data, self._most)
        pixels = opened.width * opened.height
        await self.room.take(DECODING_BYTES * pixels)
        decoding = self._threads.submit(_decode, opened)
        try:
            picture = await asyncio.wrap_future(decoding)
        except BaseException:

            def over(_: object) -> None:
                with suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(self.room.give, DECODING_BYTES * pixels)

            decoding.add_done_callback(over)  # whoever left, the thread goes on to its end
            raise
        self.room.give((DECODING_BYTES - DECODED_BYTES) * pixels)
        try:
            yield picture
        finally:
            self.room.give(DECODED_BYTES * pixels)

    def close(self) -> None:
        """Decode no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _open(data: bytes, most: int) -> ImageFile:
    """Read the header only."""
    if not data:
        raise UnprocessableError("the file is empty")
    try:
        # The plugins' own classes: Image.open guesses among dozens of formats, and has a pixel limit of its own.
        if data.startswith(jpeg.START):
            if too_many := jpeg.scans_too_many(data):
                raise UnprocessableError(too_many)
            opened: ImageFile = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        elif data.startswith(_PNG_START):
            opened = PngImagePlugin.PngImageFile(io.BytesIO(data))
        else:
            raise UnprocessableError("neither a JPEG nor a PNG")
    except _UNREADABLE as error:
        raise _unreadable(error) from error
    if opened.width * opened.height > most:
        raise UnprocessableError(
            f"{opened.width}x{opened.height} are {opened.width * opened.height:,} pixels, "
            f"detector.service.max_pixels allows {most:,}"
        )
    return opened


def _decode(opened: ImageFile) -> Image.Image:
    try:
        opened.load()
        return opened if opened.mode == "RGB" else opened.convert("RGB")  # which copies in either case
    except _UNREADABLE as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UnprocessableError:
    return UnprocessableError(f"not a readable image: {error}")

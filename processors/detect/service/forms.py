"""The files of a request: parts of a multipart form as they come, or base64 in JSON. Bounded before anything is kept.

Starlette's own form keeps files in temporary files and knows no limit for one file of several.
"""

import binascii
import io
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from processors.detect.settings import ServiceSettings
from streams.doors import refuse

# Names that clients give to the parts: one file's and several files'.
_NAMES = frozenset({b"file", b"files"})

# What a body has besides its files: boundaries and part headers, or JSON's own characters.
_FRAMING = 4096

# Of a body of JSON: itself, its text, and the bytes that the text says, which are three quarters of it.
_JSON_COPIES = 3


class File(NamedTuple):
    """One file: its bytes, or why it was not kept."""

    name: str
    data: bytes
    refused: HTTPException | None = None


class Form(Protocol):
    """Takes a body part by part."""

    limit: int
    """Bytes of the longest body worth reading."""

    def feed(self, part: bytes) -> None:
        """Take the next part of the body.

        Raises:
            HTTPException: it is no such form, or there is no room for it.
        """

    def end(self) -> list[File]:
        """The files in their order, when the body has ended.

        Raises:
            HTTPException: it is no such form.
        """


def form_of(content_type: str, settings: ServiceSettings, most: int, grab: Callable[[int], None]) -> Form:
    """What reads a body of that type.

    Args:
        content_type: as the request says.
        settings: the limits.
        most: how many files there may be.
        grab: asked before so many bytes are kept; raises where they cannot be.

    Raises:
        HTTPException: 400, nothing is known of that type.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data" and options.get(b"boundary"):
        return _Multipart(options[b"boundary"], settings, most, grab)
    if kind == b"application/json":
        return _Json(settings, most, grab)
    raise refuse(400, 'send multipart/form-data with a part `file` (several: `files`), or JSON: {"image": "BASE64"}')


def too_long(settings: ServiceSettings) -> HTTPException:
    """The refusal of a file that is too long."""
    return refuse(413, f"more than {settings.max_bytes:,} bytes (detector.service.max_bytes)")


def _too_many(most: int) -> HTTPException:
    return refuse(
        413, f"more than {most} files" if most > 1 else "more than one file: POST /detect/batch takes several"
    )


class _Multipart:
    def __init__(self, boundary: bytes, settings: ServiceSettings, most: int, grab: Callable[[int], None]) -> None:
        self.limit = most * (settings.max_bytes + _FRAMING)
        self._settings = settings
        self._most = most
        self._grab = grab
        self._files: list[File] = []
        self._field = b""
        self._value = b""
        self._name: str | None = None
        self._kept = io.BytesIO()
        self._refused: HTTPException | None = None
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_field,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _unreadable(error) from error

    def feed(self, part: bytes) -> None:
        try:
            self._parser.write(part)
        except FormParserError as error:
            raise _unreadable(error) from error

    def end(self) -> list[File]:
        if not self._ended:
            raise refuse(400, "the multipart form is cut off")
        return self._files

    def _begin(self) -> None:
        self._name, self._kept, self._refused = None, io.BytesIO(), None

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            if options.get(b"name") in _NAMES:
                self._name = options.get(b"filename", b"").decode("utf-8", "replace")
        self._field = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None or self._refused is not None:
            return
        if self._kept.tell() + end - start > self._settings.max_bytes:
            self._refused = too_long(self._settings)
            self._grab(-self._kept.tell())
            self._kept = io.BytesIO()
            return
        self._grab(end - start)
        self._kept.write(data[start:end])

    def _on_part_end(self) -> None:
        if self._name is None:
            return
        if len(self._files) >= self._most:
            raise _too_many(self._most)
        self._files.append(File(self._name, self._kept.getvalue(), self._refused))

    def _on_end(self) -> None:
        self._ended = True


class _Images(msgspec.Struct):
    """`image_base64` is what clients of the service that this one replaces send."""

    image: str | None = None
    image_base64: str | None = None
    images: list[str] | None = None


class _Json:
    def __init__(self, settings: ServiceSettings, most: int, grab: Callable[[int], None]) -> None:
        self.limit = most * (settings.max_bytes * 4 // 3 + _FRAMING)
        self._settings = settings
        self._most = most
        self._grab = grab
        self._body = io.BytesIO()

    def feed(self, part: bytes) -> None:
        self._grab(_JSON_COPIES * len(part))
        self._body.write(part)

    def end(self) -> list[File]:
        body = self._body.getvalue()
        self._body = io.BytesIO()
        # There are none in base64. A body of nothing but little strings would become many times its size.
        if body.count(b'"') > 2 * (self._most + 8):
            raise _too_many(self._most)
        try:
            said = msgspec.json.decode(body, type=_Images)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise refuse(400, f'not JSON with "image" or "images" in base64: {error}') from error
        texts = [text for text in (said.image, said.image_base64, *(said.images or ())) if text is not None]
        if len(texts) > self._most:
            raise _too_many(self._most)
        return [self._file(text) for text in texts]

    def _file(self, text: str) -> File:
        if text.startswith("data:"):
            text = text.partition(",")[2]
        if len(text) > self.limit // self._most:
            return File("", b"", too_long(self._settings))
        try:
            data = binascii.a2b_base64(text)
        except ValueError as error:
            return File("", b"", refuse(400, f"not base64: {error}"))
        return File("", data, too_long(self._settings) if len(data) > self._settings.max_bytes else None)


def _unreadable(error: Exception) -> HTTPException:
    return refuse(400, f"not a multipart form: {error}")

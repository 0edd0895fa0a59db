"""What the header of a GGUF file says: its settings, and how large each tensor is. No weight is read.

The package `gguf` reads it, too, but makes an array of every token: over a minute for 256,000 of them, measured; this
takes a third of a second. The format: ggml's docs/gguf.md, versions 2 and 3.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# One value a layer; vocabularies are longer, and only counted.
_KEPT = 4_096
_ALIGNMENT = 32

_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")

Value = int | float | bool | str | tuple[int | float | bool, ...]


class HeaderError(ValueError):
    """It is no GGUF file, or one that is cut off; the message names it."""


class Header(NamedTuple):
    """A model's header."""

    values: Mapping[str, Value]
    """Settings by name; of long lists, and lists of texts, only the length, as `NAME.length`."""
    tensors: Mapping[str, int]
    """Bytes of each tensor, padding included."""


def read(path: Path) -> Header:
    """The header of a model; of one that is split into parts (-00001-of-00003.gguf) the tensors of all.

    Raises:
        HeaderError: it cannot be understood.
        OSError: it cannot be read.
    """
    split = _PART.fullmatch(path.name)
    if split is None:
        return _read(path)
    count = int(split["count"])
    parts = [_read(path.with_name(f"{split['stem']}-{n + 1:05}-of-{count:05}.gguf")) for n in range(count)]
    return Header(parts[0].values, {name: size for part in parts for name, size in part.tensors.items()})


def _read(path: Path) -> Header:
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data).header()
        except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
            raise HeaderError(f"{path} is no whole GGUF file ({error})") from error


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._data[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version, tensors, settings = self._whole("I"), self._whole("Q"), self._whole("Q")
        if version not in {2, 3}:
            raise ValueError(f"version {version}; 2 and 3 are known")
        values: dict[str, Value] = {}
        for _ in range(settings):
            name = self._text()
            self._value(name, self._whole("I"), values)
        starts: dict[str, int] = {}
        for _ in range(tensors):
            name = self._text()
            dimensions = self._whole("I")
            self._at += 8 * dimensions + 4  # its shape, and its type
            starts[name] = self._whole("Q")
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment!r}")
        end = len(self._data) - -(-self._at // alignment) * alignment
        order = sorted(starts, key=starts.__getitem__)
        if order and end <= starts[order[-1]]:
            raise ValueError("it is cut off")
        ends = [*(starts[name] for name in order[1:]), end]
        return Header(values, {name: stop - starts[name] for name, stop in zip(order, ends, strict=True)})

    def _take(self, kind: str) -> int | float | bool:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return value  # type: ignore[no-any-return]

    def _whole(self, kind: str) -> int:
        return int(self._take(kind))

    def _text(self) -> str:
        length = self._whole("Q")
        found = self._data[self._at : self._at + length]
        if len(found) < length:
            raise ValueError("it is cut off")
        self._at += length
        return found.decode()

    def _value(self, name: str, kind: int, values: dict[str, Value]) -> None:
        if kind == _STRING:
            values[name] = self._text()
        elif kind != _ARRAY:
            values[name] = self._take(_SCALARS[kind])
        else:
            item, length = self._whole("I"), self._whole("Q")
            values[f"{name}.length"] = length
            if item == _STRING:
                self._skip_texts(length)
            elif length <= _KEPT:
                values[name] = tuple(self._take(_SCALARS[item]) for _ in range(length))
            else:
                self._at += length * struct.calcsize(f"<{_SCALARS[item]}")

    def _skip_texts(self, count: int) -> None:
        unpack, at, data = struct.Struct("<Q").unpack_from, self._at, self._data
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self._at = at

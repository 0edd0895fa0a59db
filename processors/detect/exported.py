"""The cache of exported models: an ONNX file, and what was measured with it on this machine.

An entry is a folder named by all that it was made from: weights, settings of the model, versions, processor, threads.
It appears by a rename, and its manifest holds the ONNX file's hash: what is broken or half written is no entry, and is
made anew.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from processors.detect.card import Card

_FORMAT = 2
_ONNX, _MANIFEST = "model.onnx", "manifest.json"
_LIBRARIES = ("torch", "transformers", "onnx", "openvino", "onnxruntime")
_VERSIONS = {"format", *_LIBRARIES}


class Manifest(msgspec.Struct, frozen=True):
    """What is known of an exported model."""

    sha256: str
    """Of the ONNX file, hex."""
    made_from: dict[str, str]
    ms: dict[str, float]
    """Milliseconds an image by runtime; those that gave other boxes than torch, or failed, are left out."""
    by: Literal["wall", "cpu"]
    """What the milliseconds are of; see `processors.detect.timing`."""
    left_out: dict[str, str]
    """Why they were."""

    @property
    def fastest(self) -> str:
        """The runtime that took the least time."""
        return min(self.ms, key=self.ms.__getitem__)


class _MadeFrom(msgspec.Struct):
    """What of a manifest of any version is read."""

    made_from: dict[str, str]


class Measured(NamedTuple):
    """What was measured with a new export: fields of its `Manifest`."""

    ms: dict[str, float]
    by: Literal["wall", "cpu"]
    left_out: dict[str, str]


class Cache:
    """The entry of one model on this machine."""

    def __init__(self, root: Path, card: Card, threads: int) -> None:
        self._made_from = {
            "format": str(_FORMAT),
            "weights": card.digest,
            "settings": _sha256(*(card.folder / name for name in ("config.json", "preprocessor_config.json"))),
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "threads": str(threads),
            **{name: version(name) for name in _LIBRARIES},
        }
        key = hashlib.sha256(msgspec.json.encode(self._made_from)).hexdigest()
        self._stem = card.digest[:16]
        self.folder = root / f"{self._stem}-{key[:16]}"
        self.lock = root / f"{self._stem}.lock"
        """Held while the entry is made."""

    @property
    def onnx(self) -> Path:
        """The model."""
        return self.folder / _ONNX

    def read(self) -> Manifest | None:
        """The manifest of a whole entry; None where there is none."""
        try:
            manifest = msgspec.json.decode((self.folder / _MANIFEST).read_bytes(), type=Manifest)
            whole = _sha256(self.onnx) == manifest.sha256 and bool(manifest.ms)
        except (OSError, msgspec.DecodeError):
            return None
        return manifest if whole else None

    def make(self, fill: Callable[[Path], Measured]) -> Manifest:
        """Make the entry, and remove those that it replaces: of the same model here, by other versions.

        `fill` writes the ONNX file that it is given. Whoever calls this holds `lock`.
        """
        for left in self.folder.parent.glob(f".{self._stem}-*.part"):  # by one who was killed
            shutil.rmtree(left, ignore_errors=True)
        part = self.folder.with_name(f".{self.folder.name}.part")
        part.mkdir(parents=True)
        try:
            found = fill(part / _ONNX)
            manifest = Manifest(_sha256(part / _ONNX), self._made_from, **found._asdict())
            (part / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
            self.drop()
            part.rename(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for folder in self.folder.parent.glob(f"{self._stem}-*"):
            if folder != self.folder and self._replaces(folder):
                shutil.rmtree(folder, ignore_errors=True)
        return manifest

    def _replaces(self, folder: Path) -> bool:
        """Whether nobody will ask for that entry: only versions tell it from this one, or it is none.

        One of other threads or settings can be in use beside this one, and each would remove the other's for ever.
        """
        try:
            made_from = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=_MadeFrom).made_from
        except (OSError, msgspec.DecodeError):
            return True
        return all(made_from.get(name) == value for name, value in self._made_from.items() if name not in _VERSIONS)

    def drop(self) -> None:
        """Remove the entry."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sha256(*paths: Path) -> str:
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                sha.update(chunk)
    return sha.hexdigest()


def _processor() -> str:
    """The processor's name: kernels are chosen by what it can do, so what is fastest depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(named, platform.processor() or platform.machine())

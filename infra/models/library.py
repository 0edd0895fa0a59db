"""Models on this machine: where they lie, what they must be, which one a setting means.

A model lies in a folder of its own, `<home>/<name>/`, with `rewatch-model.json` beside its files: what the hub
published of each. The folder can be carried to a machine without a line, and verified there.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from infra.models.catalogue import CATALOGUE, Kind, Model
from infra.models.download import Promise, WrongFileError, check
from processors.detect.settings import ModelError

MANIFEST = "rewatch-model.json"
DEMO = Path(__file__).parent / "weights"


class Manifest(msgspec.Struct, frozen=True):
    """What a hub published of a model's files."""

    name: str
    repo: str
    revision: str
    """The hub's commit."""
    files: dict[str, Promise]

    def write(self, folder: Path) -> None:
        """Put it beside the files."""
        part = folder / f".{MANIFEST}.part"
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2))
        part.replace(folder / MANIFEST)


class Found(NamedTuple):
    """A model that is here."""

    path: Path
    """What a setting names: a detector's folder, an LLM's GGUF file."""
    folder: Path
    """Where its files lie."""
    manifest: Manifest | None
    """None where it was not pulled by `rewatch models`, so nothing says what it must be."""


class Progress(NamedTuple):
    """How far a pull or a verification is."""

    file: str
    done: int
    """Bytes."""
    total: int
    """Bytes."""


OnProgress = Callable[[Progress], None]


def folders(data_dir: Path) -> tuple[Path, ...]:
    """Where models are looked for, in order; the first is where they are pulled to."""
    home = Path.home()
    return (data_dir / "models", home / ".cache" / "rewatch" / "models", home / "models", Path("/models"))


def find(model: Model, data_dir: Path) -> Found | None:
    """The model, where it is first found; LLMs also by the hub's file name in a folder shared with others."""
    for folder in folders(data_dir):
        own = folder / model.name
        if (path := usable(model, own)) is not None:
            return Found(path, own, read_manifest(own))
        if model.kind == "llm":
            name = model.repo.split("/")[1].removesuffix("-GGUF").removeprefix("google_")
            if (path := _first(folder, f"*{name}{model.files[0].format(quant=model.quant)}")) is not None:
                return Found(path, folder, None)
    return None


def usable(model: Model, folder: Path, quant: str = "*") -> Path | None:
    """What a setting would name of the model in a folder of its own; None where a file is missing."""
    if model.kind == "detector":
        return folder if all((folder / name).is_file() for name in model.files) else None
    return _first(folder, model.files[0].format(quant=quant))


def resolve(setting: str, kind: Kind, data_dir: Path) -> str:
    """What `detector.model_path` or `llm.model_path` means: `demo`, a name of the catalogue, a path, a hub's name.

    Raises:
        ModelError: a name of the catalogue whose model is not here; the message names the command.
    """
    if setting == "demo":
        return str(DEMO / ("detector" if kind == "detector" else "analyst.gguf"))
    known = next((m for m in CATALOGUE.values() if m.kind == kind and setting in {m.name, m.repo}), None)
    if known is None or Path(setting).exists():
        return setting
    found = find(known, data_dir)
    if found is not None:
        return str(found.path)
    if kind == "detector" and setting == known.repo:
        return setting  # transformers knows the way to a hub, too
    looked = ", ".join(str(folder) for folder in folders(data_dir))
    raise ModelError(
        f"{kind}.model_path: {known.name} is not on this machine (looked in {looked}): "
        f"`rewatch models pull {known.name}`"
    )


def verify(folder: Path, manifest: Manifest, on_progress: OnProgress = lambda _: None) -> list[str]:
    """Compare every file with what was published; what is wrong, a line each."""
    return list(
        _wrong(
            [(folder / name, promise) for name, promise in manifest.files.items()],
            on_progress,
        )
    )


def verify_demo(root: Path = DEMO, on_progress: OnProgress = lambda _: None) -> list[str]:
    """Compare the models that come with the product with their SHA256SUMS; what is wrong, a line each."""
    wrong: list[str] = []
    for name, digest in _demo_sums(root).items():
        path = root / name
        try:
            size = path.stat().st_size
            wrong += _wrong([(path, Promise(size, "sha256", digest))], on_progress)
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}")
    return wrong


def demo_digests(root: Path = DEMO) -> frozenset[str]:
    """SHA-256 of the demo models' weights: by these records tell what made them."""
    return frozenset(digest for name, digest in _demo_sums(root).items() if name.endswith((".gguf", ".safetensors")))


def _demo_sums(root: Path) -> dict[str, str]:
    lines = (line.split("  ", 1) for line in (root / "SHA256SUMS").read_text().splitlines())
    return {name: digest for digest, name in lines}


def read_manifest(folder: Path) -> Manifest | None:
    """What the hub published of the model in a folder; None where nothing says so.

    Raises:
        WrongFileError: the file that should say it cannot be read.
    """
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise WrongFileError(f"{folder / MANIFEST} cannot be read ({error}): pull the model again") from error


def _first(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return next((path for path in found if path.is_file() and not path.name.startswith(".")), None)


def _wrong(files: Sequence[tuple[Path, Promise]], on_progress: OnProgress) -> Iterator[str]:
    for path, promise in files:
        try:
            check(path, promise, lambda done, p=path, all_=promise.size: on_progress(Progress(p.name, done, all_)))  # type: ignore[misc]
        except WrongFileError as error:
            yield str(error)
        except OSError as error:
            yield f"{path}: {error.strerror}"

"""The models that a person can choose from here: listed, verified, named in the settings file."""

import shutil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from infra.config import Settings, load
from infra.models import library
from infra.models.catalogue import CATALOGUE, Kind, Model
from infra.models.download import WrongFileError
from infra.models.library import MANIFEST, OnProgress
from processors.detect.settings import ModelError


def listed(settings: Settings) -> list[dict[str, Any]]:
    """Every model, the demo's first: `name`, `kind`, `repo`, `gigabytes`, `path` (None: not here), `in_use` ..."""
    return [_demo(settings, "detector"), _demo(settings, "llm"), *(_row(m, settings) for m in CATALOGUE.values())]


def folders(settings: Settings, model: Model | None = None) -> dict[str, Path]:
    """The folders of one model, or of all that were pulled, by name.

    Raises:
        ModelError: the model is not here.
    """
    if model is not None:
        return {model.name: _here(model, settings).folder}
    found = {model.name: library.find(model, settings.data_dir) for model in CATALOGUE.values()}
    return {name: there.folder for name, there in found.items() if there is not None and there.manifest is not None}


def verify(folder: Path, on_progress: OnProgress) -> list[str]:
    """What is wrong with the model in a folder, a line each."""
    try:
        manifest = library.read_manifest(folder)
    except WrongFileError as error:
        return [str(error)]
    if manifest is None:
        return [f"{folder} has no {MANIFEST}: nothing says what its files must be; pull the model"]
    return library.verify(folder, manifest, on_progress)


def choice(model: Model, settings: Settings, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The settings, by section, that name the model where it lies, or in `folder`.

    Raises:
        ModelError: it is not there.
    """
    if folder is None:
        path = _here(model, settings).path
    elif (usable := library.usable(model, folder)) is not None:
        path = usable
    else:
        needs = ", ".join(model.files).format(quant=model.quant)
        raise ModelError(f"{folder} holds no {model.name}: it needs {needs}")
    values: dict[str, Any] = {"model_path": str(path.resolve())}
    if model.context_size is not None:
        values["context_size"] = model.context_size
    return {model.kind: values}


DEMO: dict[str, dict[str, Any]] = {"detector": {"model_path": "demo"}, "llm": {"model_path": "demo"}}
"""The settings that name the models that come with the product."""


def write(file: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Change the settings file; comments and all else in it stay. The file is as before where it would be no good.

    Raises:
        ConfigError: with the change the product could not read it.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    file = file.resolve()  # a link to it stays one
    tree = (yaml.load(file.read_text()) if file.exists() else None) or yaml.map()
    for section, values in changes.items():
        if not isinstance(tree.get(section), dict):
            tree[section] = yaml.map()
        tree[section].update(values)
    part = file.with_name(f".{file.name}.part")
    try:
        if file.exists():
            part.touch(mode=0o600)  # it may hold passwords: nobody reads it who may not read the file
        with part.open("w") as out:
            yaml.dump(tree, out)
        if file.exists():
            shutil.copymode(file, part)
        load(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _here(model: Model, settings: Settings) -> library.Found:
    found = library.find(model, settings.data_dir)
    if found is None:
        raise ModelError(
            f"{model.name} is not on this machine: `rewatch models pull {model.name}`, or name its folder by --path"
        )
    return found


def _row(model: Model, settings: Settings) -> dict[str, Any]:
    found = library.find(model, settings.data_dir)
    named = {model.name, model.repo} | ({str(found.path), str(found.path.resolve())} if found else set())
    return {
        "name": model.name,
        "kind": model.kind,
        "repo": model.repo,
        "gigabytes": model.gigabytes,
        "path": str(found.path) if found else None,
        "in_use": _setting(settings, model.kind) in named,
        "licence": model.licence,
        "about": model.about,
    }


def _demo(settings: Settings, kind: Kind) -> dict[str, Any]:
    path = Path(library.resolve("demo", kind, settings.data_dir))
    files = path.rglob("*") if path.is_dir() else [path]
    return {
        "name": "demo",
        "kind": kind,
        "repo": None,
        "gigabytes": round(sum(file.stat().st_size for file in files) / 1e9, 3),
        "path": str(path),
        "in_use": _setting(settings, kind) == "demo",
        "licence": "Apache-2.0",
        "about": "a toy, trained on rendered scenes: shows the product, guards nothing",
    }


def _setting(settings: Settings, kind: Kind) -> str:
    return settings.detector.model_path if kind == "detector" else settings.llm.model_path

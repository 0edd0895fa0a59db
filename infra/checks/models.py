"""Checks of the models' files: there, whole, and for those that come with the product byte for byte theirs."""

import asyncio
from pathlib import Path

from infra.checks.check import Check, Context
from infra.config import Settings
from infra.models import fits, library, room
from infra.models.catalogue import Kind
from infra.models.header import HeaderError
from processors.detect.settings import ModelError

_GGUF = b"GGUF"


async def weights(context: Context) -> list[Check]:
    """The detector's and the LLM's weights, where they are loaded on this machine."""
    settings = context.settings
    checks: list[Check] = []
    if settings.detector.url is None:
        checks.append(_detector(settings))
    if settings.local_llm:
        checks.append(await _analyst(context))
    if "demo" in {settings.detector.model_path, settings.llm.model_path}:
        wrong = await asyncio.to_thread(library.verify_demo)
        fix = "`git checkout -- infra/models/weights`, or install rewatch again"
        checks.append(
            Check("demo models", "failed", "; ".join(wrong), fix)
            if wrong
            else Check("demo models", "ok", "as their SHA256SUMS say")
        )
    return checks


def _detector(settings: Settings) -> Check:
    name = settings.detector.model_path
    fix = "set detector.model_path (RTDETR_MODEL_PATH) to a directory with config.json and model.safetensors"
    path, problem = _resolved(settings, name, "detector")
    if problem is not None:
        return problem
    if not path.exists() and not name.startswith((".", "/", "~")):
        return Check("detector", "ok", f"{name}: a hub name, fetched when detect starts")
    if not (path / "config.json").is_file():
        return Check("detector", "failed", f"no model at {path}", fix)
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        return Check("detector", "failed", f"no weights in {path}", fix)
    return Check("detector", "ok", name)


async def _analyst(context: Context) -> Check:
    settings = context.settings
    name = settings.llm.model_path
    path, problem = _resolved(settings, name, "llm")
    if problem is not None:
        return problem
    fix = "set llm.model_path (NEMOTRON_MODEL_PATH) to a GGUF file; `rewatch models ls` lists some"
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF))
    except OSError as error:
        return Check("llm model", "failed", f"{path}: {error.strerror}", fix)
    if magic != _GGUF:
        return Check("llm model", "failed", f"{path} is no GGUF file", fix)
    try:
        fit = await room.fit(settings, path)
    except HeaderError as error:
        return Check("llm model", "failed", str(error), fix)
    if not fit.ok:
        return Check("llm model", "failed", f"{name}: {fits.why_not(fit)}", fits.ways(fit, room.asked(settings)))
    return Check("llm model", "ok", f"{name}, {fits.where(fit)}")


def _resolved(settings: Settings, name: str, kind: Kind) -> tuple[Path, Check | None]:
    """Where the model lies, or why nobody knows."""
    try:
        return Path(library.resolve(name, kind, settings.data_dir)), None
    except ModelError as error:
        check = "detector" if kind == "detector" else "llm model"
        return Path(), Check(check, "failed", str(error), f"`rewatch models pull {name}`")

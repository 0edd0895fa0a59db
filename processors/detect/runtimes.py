"""Which runtime a model gets. Each is imported only when it is chosen: torch takes seconds, OpenVINO half of one.

On a GPU it is torch. On a CPU `auto` is a measurement: where the cache has the model, its manifest says which was
fastest on this machine, and torch need not even be imported, so a restarted detector is back at once. Where it has not,
torch serves, and `UpgradingDetector` sees to the rest. A runtime that is named is gone over to in the same way, but its
export begins at once.
"""

import os
from pathlib import Path

import structlog

from processors.detect.card import Card
from processors.detect.detector import Detector
from processors.detect.exported import Cache
from processors.detect.settings import DetectorSettings, ModelError
from processors.detect.upgrading import EXPORT_S, WAITING, UpgradingDetector

log = structlog.get_logger(__name__)

# Drivers' doors: NVIDIA's, WSL's, AMD's. Asking torch takes seconds that a machine without a GPU need not wait.
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def load(settings: DetectorSettings, path: str, cache: Path) -> Detector:
    """The detector of a model's folder, warmed up.

    Args:
        settings: which device, which runtime.
        path: the folder, or a hub's name.
        cache: the folder of exported models.

    Raises:
        ModelError: the model cannot be loaded, or not so; the message names the setting.
    """
    if settings.device == "cuda" and settings.runtime not in {"auto", "torch"}:
        raise ModelError(
            f"detector.runtime {settings.runtime} runs on the CPU, and detector.device is cuda: set one of them to auto"
        )
    card = Card.read(path)
    detector = _load(settings, card, cache)
    log.info("the model is warm", model=detector.name, runtime=detector.runtime)
    return detector


def _load(settings: DetectorSettings, card: Card, root: Path) -> Detector:
    on_cpu = settings.model_copy(update={"device": "cpu"})
    if settings.runtime in {"auto", "torch"} and _may_have_gpu(settings):
        os.environ.setdefault(*WAITING)
        from torch.cuda import is_available  # noqa: PLC0415 - see the module

        if settings.device == "cuda" or is_available():
            return _torch(settings, card)
    if settings.runtime == "torch":
        return _torch(on_cpu, card)
    cache = Cache(root, card, settings.threads)
    chosen = _choice(on_cpu, cache)
    if chosen is not None:
        try:
            return _open(chosen, on_cpu, card, cache)
        except Exception as error:  # noqa: BLE001 (the entry is whole, and yet of no use: made anew, it may be)
            log.warning("an exported model cannot be used: it is made anew", runtime=chosen, error=repr(error))
            cache.drop()
    detector = UpgradingDetector(
        _torch(on_cpu, card),
        ["-m", "processors.detect.export", str(card.folder), str(root), "--threads", str(settings.threads)],
        lambda: _exported(on_cpu, card, cache),
        due_s=EXPORT_S if settings.runtime == "auto" else 0.0,
    )
    if settings.runtime != "auto":
        detector.begin()
    return detector


def _may_have_gpu(settings: DetectorSettings) -> bool:
    return settings.device == "cuda" or (settings.device == "auto" and any(door.exists() for door in _GPU_DEVICES))


def _choice(settings: DetectorSettings, cache: Cache) -> str | None:
    """The runtime to use by the cache; None where it has no such model."""
    manifest = cache.read()
    if manifest is None:
        return None
    if settings.runtime == "auto":
        return manifest.fastest
    if settings.runtime in manifest.left_out:
        log.warning(
            "the model runs by torch",
            why=f"detector.runtime {settings.runtime}: {manifest.left_out[settings.runtime]}",
            fix="set detector.runtime to auto",
        )
        return "torch"
    return settings.runtime


def _exported(settings: DetectorSettings, card: Card, cache: Cache) -> Detector | None:
    """What the export has brought; None where torch stays."""
    chosen = _choice(settings, cache)
    return None if chosen in {None, "torch"} else _open(chosen or "", settings, card, cache)


def _open(runtime: str, settings: DetectorSettings, card: Card, cache: Cache) -> Detector:
    if runtime == "openvino":
        from processors.detect.openvino_detector import OpenVinoDetector  # noqa: PLC0415 - see the module

        return OpenVinoDetector(card, cache.onnx, settings.threads)
    if runtime == "onnxruntime":
        from processors.detect.onnx_detector import OnnxDetector  # noqa: PLC0415

        return OnnxDetector(card, cache.onnx, settings.threads)
    return _torch(settings, card)


def _torch(settings: DetectorSettings, card: Card) -> Detector:
    os.environ.setdefault(*WAITING)
    from processors.detect.torch_detector import TorchDetector  # noqa: PLC0415

    return TorchDetector(card, settings)

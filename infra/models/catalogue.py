"""The models that `rewatch models` knows: where a hub has them, which files they are, what they ask of a machine."""

import difflib
from typing import Literal, NamedTuple

Kind = Literal["detector", "llm"]


class Model(NamedTuple):
    """One model, as a hub publishes it."""

    name: str
    """What people call it here."""
    kind: Kind
    repo: str
    """`owner/name` on the hub."""
    files: tuple[str, ...]
    """File names; those with a `*` are patterns that exactly one file fits. `{quant}` is the quantisation."""
    gigabytes: float
    """About what is downloaded, 10^9 bytes."""
    licence: str
    about: str
    """For whom, in a line."""
    context_size: int | None = None
    """Context that suits it, tokens; None for detectors."""
    quant: str = ""
    """The quantisation that is pulled unless another is asked for."""


_DETECTOR_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")

_MODELS = (
    Model(
        "rtdetr_v2_r18vd",
        "detector",
        "PekingU/rtdetr_v2_r18vd",
        _DETECTOR_FILES,
        0.08,
        "Apache-2.0",
        "20 M parameters, COCO AP 48.1: the one for CPUs",
    ),
    Model(
        "rtdetr_v2_r34vd",
        "detector",
        "PekingU/rtdetr_v2_r34vd",
        _DETECTOR_FILES,
        0.13,
        "Apache-2.0",
        "31 M parameters, COCO AP 49.9",
    ),
    Model(
        "rtdetr_v2_r50vd",
        "detector",
        "PekingU/rtdetr_v2_r50vd",
        _DETECTOR_FILES,
        0.17,
        "Apache-2.0",
        "42 M parameters, COCO AP 53.4: the one for a GPU",
    ),
    Model(
        "rtdetr_v2_r101vd",
        "detector",
        "PekingU/rtdetr_v2_r101vd",
        _DETECTOR_FILES,
        0.31,
        "Apache-2.0",
        "76 M parameters, COCO AP 54.3",
    ),
    Model(
        "rtdetr_r50vd_coco_o365",
        "detector",
        "PekingU/rtdetr_r50vd_coco_o365",
        _DETECTOR_FILES,
        0.17,
        "Apache-2.0",
        "RT-DETR v1, also trained on Objects365, COCO AP 55.3",
    ),
    Model(
        "nemotron-mini-4b",
        "llm",
        "bartowski/Nemotron-Mini-4B-Instruct-GGUF",
        ("*-{quant}.gguf",),
        2.7,
        "NVIDIA Community Model License",
        "4 GB of GPU memory, or a patient CPU",
        4096,
        "Q4_K_M",
    ),
    Model(
        "nemotron-3-nano-30b",
        "llm",
        "unsloth/Nemotron-3-Nano-30B-A3B-GGUF",
        ("*-{quant}.gguf",),
        24.6,
        "NVIDIA Open Model License",
        "3 B of 30 B parameters at work: 24 GB of GPU memory, or 16 and some on the CPU",
        12288,
        "Q4_K_M",
    ),
    Model(
        "llama-3.2-3b",
        "llm",
        "bartowski/Llama-3.2-3B-Instruct-GGUF",
        ("*-{quant}.gguf",),
        2.0,
        "Llama 3.2 Community License",
        "small enough for a CPU",
        4096,
        "Q4_K_M",
    ),
    Model(
        "gemma-3-4b",
        "llm",
        "bartowski/google_gemma-3-4b-it-GGUF",
        ("*-{quant}.gguf",),
        2.5,
        "Gemma Terms of Use",
        "4 GB of GPU memory",
        4096,
        "Q4_K_M",
    ),
)

CATALOGUE: dict[str, Model] = {model.name: model for model in _MODELS}


class UnknownModelError(ValueError):
    """There is no such model in the catalogue; the message names what is near."""


def lookup(name: str) -> Model:
    """The model of that name, or of that `owner/name` on the hub.

    Raises:
        UnknownModelError: there is none.
    """
    for model in _MODELS:
        if name in {model.name, model.repo}:
            return model
    near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CATALOGUE)}"
    raise UnknownModelError(f"there is no model {name!r}; {hint}")

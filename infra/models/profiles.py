"""How each LLM is served: context, slots, layers on a GPU, and how long its start may take. Pure.

Context and layers are those that the model's users settled on for the card named in `about`; `infra.models.fits` has
the arithmetic. Slots are those of the embedded server where nothing asks for others.
"""

import difflib
import re
from typing import NamedTuple

from processors.analyze.settings import SLOTS

ALL = 999
"""Layers: more than any model has, so all of them. Also builds of llama-server that do not know `all` know numbers."""

AS_MANY_AS_FIT = -1
"""Layers: llama-server looks at the card's free memory itself."""


class Profile(NamedTuple):
    """How one model is served on one kind of machine."""

    name: str
    about: str
    """For which model and machine, in a line."""
    context: int
    """Tokens, shared by the slots."""
    gpu_layers: int
    """Layers on a GPU; `ALL`, `AS_MANY_AS_FIT`, or 0 for the CPU. Where there is no GPU it has no meaning."""
    allowance_s: float
    """Seconds from start to healthy: weights at 100 MB/s or more, from a disk that has not been read yet."""
    slots: int = SLOTS
    architectures: tuple[str, ...] = ()
    """`general.architecture` of the model's header."""
    named: str = ""
    """A pattern of its `general.name`, or of its file's name; lower case, words with a dash between."""
    largest_card: int | None = None
    """For cards with up to so many bytes; None for every other card and for none."""


# A card of 16 GB has 15 to 16 GiB, one of 24 GB has 22 to 24.
_SMALL_CARD = 20 * 2**30

PROFILES = (
    Profile(
        "nemotron-mini-4b",
        "Nemotron Mini 4B, all of it on a card with 4 GB free",
        context=4096,
        gpu_layers=ALL,
        allowance_s=60,
        architectures=("nemotron",),
        named=r"nemotron-mini-4b",
    ),
    Profile(
        "nemotron-3-nano-30b-16gb",
        "Nemotron 3 Nano 30B-A3B, part of it on a card of 16 GB",
        context=4096,
        gpu_layers=30,
        allowance_s=90,
        slots=2,
        architectures=("nemotron_h_moe",),
        named=r"nemotron-3-nano-30b",
        largest_card=_SMALL_CARD,
    ),
    Profile(
        "nemotron-3-nano-30b",
        "Nemotron 3 Nano 30B-A3B, most of it on a card of 24 GB or more",
        context=12288,
        gpu_layers=45,
        allowance_s=90,
        architectures=("nemotron_h_moe",),
        named=r"nemotron-3-nano-30b",
    ),
    Profile(
        "llama-3.2-3b-cpu",
        "Llama 3.2 3B on the CPU, where there is no card or it is the detector's",
        context=4096,
        gpu_layers=0,
        allowance_s=60,
        architectures=("llama",),
        named=r"llama-3-2-3b",
    ),
    Profile(
        "gemma-3-4b",
        "Gemma 3 4B, all of it on a card with 4 GB free",
        context=4096,
        gpu_layers=ALL,
        allowance_s=60,
        architectures=("gemma3",),
        named=r"gemma-3-4b",
    ),
    Profile(
        "demo",
        "the demo's toy: 3 MB, on the CPU",
        context=2048,  # it was trained on 1,024 tokens, and has two slots
        gpu_layers=0,
        allowance_s=60,  # next to nothing to load, but on a machine that may be busy with all the rest
        architectures=("nemotron",),
        named=r"rewatch-demo-analyst",
    ),
    Profile(
        "other",
        "any other model: as many layers on a card as fit there",
        context=4096,
        gpu_layers=AS_MANY_AS_FIT,
        allowance_s=300,
    ),
)


class UnknownProfileError(ValueError):
    """There is no such profile; the message names what is near."""


def lookup(name: str) -> Profile:
    """The profile of that name.

    Raises:
        UnknownProfileError: there is none.
    """
    names = [profile.name for profile in PROFILES]
    if name in names:
        return PROFILES[names.index(name)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise UnknownProfileError(f"there is no profile {name!r}; {hint}")


def choose(architecture: str, name: str, file: str, card: int | None) -> Profile:
    """The profile for a model on this machine.

    Args:
        architecture: `general.architecture` of its header.
        name: `general.name` of its header; whoever converted the model wrote it, so it counts before the file's.
        file: the file's name.
        card: memory of the largest GPU, bytes; None where there is none.
    """
    for called in (name, file):
        for profile in PROFILES:
            fits = profile.largest_card is None or (card is not None and card <= profile.largest_card)
            if fits and architecture in profile.architectures and re.search(profile.named, _words(called)):
                return profile
    return PROFILES[-1]


def _words(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())

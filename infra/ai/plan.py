"""How a service is to be run: address, model, profile, and what each value is from.

A plan lies in `<data_dir>/ai/SERVICE/plan.json`, where whoever keeps the service running reads it and notes what became
of it. It holds no key: keys travel by environment.
"""

import sys
from pathlib import Path
from typing import Literal

import msgspec

Service = Literal["detector", "llm"]
SERVICES: tuple[Service, ...] = ("detector", "llm")
"""In the order of their start: what an LLM may have of a card is what the detector leaves."""


class Options(msgspec.Struct, frozen=True):
    """What a person asked of `rewatch ai start`; a restart asks for the same. None or empty: as it is set."""

    model: str = ""
    profile: str = ""
    host: str = ""
    open: bool = False
    """Listen beyond loopback without a key, all the same."""
    allowance_s: float | None = None
    anyway: bool = False
    """Start a model that does not fit by the arithmetic."""


class Value(msgspec.Struct, frozen=True):
    """One value, and what it is from: a setting, the profile."""

    value: int
    source: str


class Plan(msgspec.Struct):
    """One service, as it is to be run."""

    service: Service
    url: str
    """Where this machine reaches it."""
    host: str
    port: int
    model: str
    """What a setting would name: a folder, a GGUF file."""
    allowance_s: float
    """Seconds from start to healthy."""
    asked: Options
    config: str | None = None
    """The settings file that was named."""
    server: str | None = None
    """The llama-server that runs; None for the wheel's, and for the detector."""
    profile: str = ""
    values: dict[str, Value] = {}
    """`context`, `slots`, `gpu_layers`, `threads`."""
    layers: int = 0
    """How many layers the model has, the output among them."""
    seed: int = -1
    prompt_cache: bool = True
    notes: list[str] = []
    """What people should know: what did not fit, what it fell back to and why."""
    gave_up: str = ""
    """Why nobody keeps it running any more."""


def folder(data_dir: Path, service: Service) -> Path:
    """Where a service's plan, state and logs lie."""
    return (data_dir / "ai" / service).resolve()


def load(place: Path) -> Plan | None:
    """The plan of a service's folder; None where nothing was started."""
    try:
        return msgspec.json.decode((place / "plan.json").read_bytes(), type=Plan)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def save(place: Path, plan: Plan) -> None:
    """Write the plan, whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    draft = place / "plan.json.new"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1))
    draft.replace(place / "plan.json")


def detector_argv(plan: Plan) -> list[str]:
    """The command line of the detector's service."""
    config = ["--config", plan.config] if plan.config else []
    return [sys.executable, "-m", "infra.cli", *config, "serve", "detector"]

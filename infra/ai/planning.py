"""Decides how a service is to be run here, before anything starts: what cannot work is said at once, with its fix."""

import asyncio
from pathlib import Path
from typing import NamedTuple

from infra import gpus
from infra.ai.plan import Options, Plan, Value, folder
from infra.config import Settings
from infra.local.llama import HOST, find_server, url_of
from infra.local.process import free_port
from infra.models import library, profiles
from infra.models.fits import Asked, Room, fits, shape_of, ways, why_not
from infra.models.header import Header, HeaderError, read
from infra.models.profiles import Profile
from infra.models.room import free_memory, held, room
from processors.detect.settings import ModelError, ServiceSettings

# The detector's imports, export and warm-up: 22 s for a trace of R18 alone on two cores, and a cold disk before it.
_DETECTOR_ALLOWANCE_S = 300.0


def of_detector(settings: Settings, options: Options, config: Path | None) -> Plan:
    """The detector's service.

    Raises:
        ModelError: its model is not on this machine.
        ValueError: it would listen to others without a key; the message names the setting.
    """
    service = settings.detector.service
    if options.host:
        service = ServiceSettings.model_validate({**service.model_dump(), "host": options.host})
    service = service.model_copy(update={"port": service.port or free_port()})
    return Plan(
        service="detector",
        url=service.url,
        host=service.host,
        port=service.port,
        model=library.resolve(settings.detector.model_path, "detector", settings.data_dir),
        allowance_s=options.allowance_s or _DETECTOR_ALLOWANCE_S,
        asked=options,
        config=str(config.resolve()) if config else None,
    )


async def of_llm(settings: Settings, options: Options) -> Plan:
    """The LLM's service.

    Raises:
        ModelError: the model is not on this machine, is no GGUF file, or does not fit here; the message says why.
        StartError: the llama-server that is set is no program.
        UnknownProfileError: there is no profile of that name.
        ValueError: it would listen to others without a key.
    """
    host = options.host or HOST
    if not (options.open or settings.llm.api_key or ServiceSettings.model_construct(host=host).is_local):
        raise ValueError(
            f"{host} can be reached by others: set a key (NEMOTRON_API_KEY, here and where it is asked from), "
            "or say --open to let in whoever reaches it"
        )
    here = await _look(settings, options)
    values = values_of(settings, here.profile)
    plan = Plan(
        service="llm",
        url=url_of(host, settings.local.llama_port),
        host=host,
        port=settings.local.llama_port,
        model=str(here.model),
        allowance_s=options.allowance_s or here.profile.allowance_s,
        asked=options,
        server=_text(find_server(settings.llm.server_path)),
        profile=here.profile.name,
        values=values,
        layers=len(shape_of(here.header).layers) + 1,
        seed=settings.llm.seed,
        prompt_cache=settings.llm.prompt_cache,
    )
    if not options.anyway:
        plan.notes += here.refused(values)
    return plan


def values_of(settings: Settings, profile: Profile) -> dict[str, Value]:
    """Context, slots, layers and threads: what somebody set, else the profile's."""
    llm = settings.llm
    chosen = {}
    for name, setting, value in (
        ("context", "context_size", profile.context),
        ("slots", "slots", profile.slots),
        ("gpu_layers", "gpu_layers", profile.gpu_layers),
    ):
        own = getattr(llm, setting) if setting in llm.model_fields_set else None
        source = f"profile {profile.name}" if own is None else f"llm.{setting}"
        chosen[name] = Value(value if own is None else own, source)
    source = "llm.threads" if "threads" in llm.model_fields_set else "default"
    return chosen | {"threads": Value(llm.threads, source)}


class Here(NamedTuple):
    """A model on this machine."""

    model: Path
    header: Header
    profile: Profile
    place: Room
    """What is free, and what our own server holds that runs now."""

    def refused(self, values: dict[str, Value]) -> list[str]:
        """What does not fit, though it will run somehow.

        Raises:
            ModelError: it fits neither as it is asked for nor on the CPU.
        """
        asked = Asked(values["context"].value, values["slots"].value, values["gpu_layers"].value)
        shape = shape_of(self.header)
        fit = fits(shape, asked, self.place)
        if fit.ok:
            return []
        if fits(shape, asked._replace(gpu_layers=0), self.place).ok:
            return [f"by the arithmetic {why_not(fit)}. Where memory runs out it is started with fewer layers there"]
        raise ModelError(f"{self.model.name}: {why_not(fit)}. {ways(fit, asked)}; --anyway tries it all the same")


async def _look(settings: Settings, options: Options) -> Here:
    name = options.model or settings.llm.model_path
    path = Path(library.resolve(name, "llm", settings.data_dir)).expanduser()
    fix = "name one by --model or llm.model_path (NEMOTRON_MODEL_PATH); `rewatch models ls` lists some"
    if path.is_dir():
        path = next(iter(sorted(path.glob("*.gguf"))), path)
    if not path.is_file():
        raise ModelError(f"there is no model at {path}: {fix}")
    try:
        header, seen = await asyncio.gather(asyncio.to_thread(read, path), gpus.look())
    except (HeaderError, OSError) as error:
        raise ModelError(f"{error}: {fix}") from error
    cards = [card.memory_total for card in seen.cards if card.memory_total is not None]
    profile = (
        profiles.lookup(options.profile)
        if options.profile
        else profiles.choose(
            str(header.values.get("general.architecture", "")),
            str(header.values.get("general.name", "")),
            path.name,
            max(cards, default=None),
        )
    )
    ours = await asyncio.to_thread(held, folder(settings.data_dir, "llm"), "llm")
    return Here(path.resolve(), header, profile, room(seen, free_memory(), ours))


async def chosen(settings: Settings) -> str:
    """The profile that the model of these settings would get here; empty where it cannot be told."""
    try:
        return (await _look(settings, Options())).profile.name
    except ModelError:
        return ""


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)

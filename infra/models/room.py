"""Whether an LLM fits on this machine, as it is now: the arithmetic of `fits` with what is free here."""

import asyncio
from pathlib import Path

import psutil

from infra import gpus
from infra.config import Settings
from infra.local.supervisor import running
from infra.models.fits import Asked, Fit, Room, fits, shape_of
from infra.models.header import read
from processors.analyze.settings import SLOTS
from processors.telemetry.core import Seen

_LIMIT = Path("/sys/fs/cgroup/memory.max")


def asked(settings: Settings) -> Asked:
    """How the embedded server runs by these settings."""
    llm = settings.llm
    return Asked(llm.context_size, llm.slots or SLOTS, llm.gpu_layers)


async def fit(settings: Settings, model: Path) -> Fit:
    """Whether the model at this path fits, run as the settings say. What our own server holds now counts as free.

    Raises:
        HeaderError: it is no whole GGUF file.
        OSError: it cannot be read.
    """
    header, ours = await asyncio.gather(
        asyncio.to_thread(read, model), asyncio.to_thread(held, settings.data_dir, "llama")
    )
    seen = await gpus.look() if settings.llm.gpu_layers else Seen()
    return fits(shape_of(header), asked(settings), room(seen, free_memory(), ours))


def room(seen: Seen, ram: int, ours: dict[int, int]) -> Room:
    """What is free, bytes.

    Args:
        seen: the GPUs; the one with the most room counts.
        ram: free memory of this machine, bytes.
        ours: resident bytes of our own server's processes, by id: they end before the next one starts.
    """
    cards = {
        card.memory_free + sum(p.memory or 0 for p in card.processes or () if p.pid in ours): card.name
        for card in seen.cards
        if card.memory_free is not None
    }
    ram += sum(ours.values())
    return Room(ram, max(cards), cards[max(cards)]) if cards else Room(ram)


def free_memory(limit: Path = _LIMIT) -> int:
    """Bytes that programs can have; a container's limit counts."""
    free = psutil.virtual_memory().available
    try:
        text = limit.read_text().strip()
    except OSError:
        return free
    return min(free, int(text)) if text.isdigit() else free


def held(data_dir: Path, name: str) -> dict[int, int]:
    """Resident bytes of a process that a supervisor runs on this data directory now, and of its children, by id."""
    pid = running(data_dir).get(name, {}).get("pid")
    found: dict[int, int] = {}
    if pid is not None:
        try:
            parent = psutil.Process(pid)
            for process in (parent, *parent.children(recursive=True)):
                found[process.pid] = process.memory_info().rss
        except psutil.Error:  # it ended just now
            pass
    return found

"""Every check, asked side by side and sorted by severity."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, get_args

from infra.checks import certificates, keys, machine, models, services, work
from infra.checks.check import PATIENCE_S, Check, Context, Status
from infra.config import Settings
from infra.local.supervisor import running
from infra.masks import Masks, secrets_of

CHECKS: dict[str, Callable[[Context], Coroutine[Any, Any, list[Check]]]] = {
    "versions": machine.versions,
    "memory": machine.memory,
    "files": machine.open_files,
    "time zone": machine.time_zone,
    "gpu": machine.gpu,
    "data_dir": machine.data_dir,
    "images": machine.images,
    "inbox": machine.inbox,
    "ports": machine.ports,
    "keys": keys.keys,
    "certificates": certificates.certificates,
    "tokens": keys.tokens,
    "certificates of doors": keys.certificates_of_doors,
    "broker": services.broker,
    "clickhouse": services.clickhouse,
    "llm": services.llm,
    "detector": services.detector,
    "models": models.weights,
    "processes": work.processes,
    "stages": work.stages,
    "cameras": work.cameras,
    "not taken": work.not_taken,
    "dead letters": work.dead_letters,
}


async def examine(settings: Settings) -> list[Check]:
    """Every check's answers, what is worst first."""
    context = Context(settings, await asyncio.to_thread(running, settings.data_dir))
    found = await asyncio.gather(*(_guarded(name, check(context)) for name, check in CHECKS.items()))
    order, masks = get_args(Status), Masks(secrets_of(settings))
    # What they found goes to terminals and into tickets, and names addresses and libraries' errors.
    told = (check._replace(found=masks.text(check.found), fix=masks.text(check.fix)) for g in found for check in g)
    return sorted(told, key=lambda check: order.index(check.status))


async def _guarded(name: str, check: Awaitable[list[Check]]) -> list[Check]:
    try:
        return await asyncio.wait_for(check, PATIENCE_S + 5)
    except TimeoutError:
        return [Check(name, "failed", "no answer in time", "look at the address in the settings, and at the service")]
    except Exception as error:  # noqa: BLE001 (a doctor reports what he meets, and goes on with the rest)
        found = f"{type(error).__name__}: {error}"
        return [Check(name, "failed", found, "`rewatch --verbose doctor` says more; report this if it does not help")]

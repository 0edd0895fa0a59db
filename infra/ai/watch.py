"""How the services of this host are: what `rewatch ai status` and `rewatch ai health` say."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from infra import gpus
from infra.ai import hold
from infra.ai import plan as plans
from infra.ai.plan import SERVICES, Plan, Service
from infra.models.profiles import ALL

_PATIENCE_S = 5.0
_GIB = 2**30


class Health(NamedTuple):
    """One answer of a service, or none."""

    service: Service
    ok: bool
    ms: float | None
    """How long the answer took, milliseconds; None where there was none."""
    says: str
    """In a line."""


async def status(data_dir: Path, names: tuple[Service, ...] = SERVICES) -> list[dict[str, Any]]:
    """Each service, as `rewatch ai status --json` says it."""
    return list(await asyncio.gather(*(_status(data_dir, name) for name in names)))


async def _status(data_dir: Path, name: Service) -> dict[str, Any]:
    place = plans.folder(data_dir, name)
    plan, state = plans.load(place), hold.alive(place)
    if plan is None:
        return {"service": name, "state": "not started"}
    process: dict[str, Any] = (state or {}).get("processes", {}).get(name, {})
    reason = plan.gave_up or process.get("reason", "")
    if plan.gave_up:
        now = "given up"
    elif state is not None:
        now = process.get("state", "starting")
    elif hold.busy(place):
        now = "starting"
    else:
        now, reason = "gone", "its keeper was killed, or the machine restarted: `rewatch ai start` starts it again"
    ready = now == "ready"
    return {
        "service": name,
        "state": now,
        "pid": process.get("pid"),
        "keeper": (state or {}).get("pid"),
        "url": plan.url,
        "host": plan.host,
        "port": plan.port,
        "model": plan.model,
        "server": plan.server or ("llama.cpp of the wheel" if name == "llm" else None),
        "profile": plan.profile or None,
        "values": {key: {"value": value.value, "from": value.source} for key, value in plan.values.items()},
        "device": await _device(plan, process.get("pid")) if ready else None,
        "since": process.get("started_at") if ready else None,
        "restarts": process.get("restarts", 0),
        "reason": reason,
        "notes": plan.notes,
        "log": str(place / "logs" / f"{name}.log"),
    }


async def health(data_dir: Path, names: tuple[Service, ...] = ()) -> list[Health]:
    """One question to each of these services, or to each that has been started."""
    started = names or tuple(name for name in SERVICES if plans.load(plans.folder(data_dir, name)) is not None)
    return list(await asyncio.gather(*(_health(data_dir, name) for name in started)))


async def _health(data_dir: Path, name: Service) -> Health:
    plan = plans.load(plans.folder(data_dir, name))
    if plan is None:
        return Health(name, ok=False, ms=None, says=f"not started: `rewatch ai start {name}`")
    began = time.monotonic()
    code, said = await _asked(plan)
    ms = (time.monotonic() - began) * 1000
    if code == 200:
        told = "; ".join([plan.url, *plan.notes])
        return Health(name, ok=True, ms=ms, says=told)
    now = await _status(data_dir, name)
    why = str(now["reason"]).partition("\n")[0]
    says = f"{plan.url}: {said}, {now['state']}" + (f": {why}" if why else "") + f"; its log: {now['log']}"
    return Health(name, ok=False, ms=None if code is None else ms, says=says)


async def _asked(plan: Plan) -> tuple[int | None, str]:
    code, answer = await _get(plan)
    if code is None:
        return None, "no answer"
    return code, str(answer.get("status") or f"HTTP {code}")


async def _get(plan: Plan) -> tuple[int | None, dict[str, Any]]:
    """The answer to GET /health, which asks for no key; None where there is none."""
    try:
        # Its certificate may name another host than this one's own address: it is our own child that answers.
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=_PATIENCE_S) as client:  # noqa: S501
            response = await client.get(f"{plan.url}/health")
    except httpx.HTTPError:
        return None, {}
    with contextlib.suppress(ValueError):
        answer = response.json()
        if isinstance(answer, dict):
            return response.status_code, answer
    return response.status_code, {}


async def _device(plan: Plan, pid: int | None) -> str | None:
    """What computes: as the detector says, or as the driver lists the LLM's process; None where nobody tells."""
    if plan.service == "detector":
        _, answer = await _get(plan)
        return answer.get("device")
    layers = plan.values["gpu_layers"].value
    seen = await gpus.look()
    if not seen.cards or not layers:
        return "cpu"
    for card in seen.cards:
        for process in card.processes or ():
            if process.pid == pid:
                held = f", {process.memory / _GIB:.1f} GiB" if process.memory else ""
                return f"{card.name}{held}"
    return None  # in a container the driver lists no process, or by other numbers


def layers_said(layers: int) -> str:
    """The number of layers on a GPU, as people say it."""
    return (
        "all layers on a GPU"
        if layers >= ALL
        else (
            "as many layers on a GPU as fit" if layers < 0 else f"{layers} layers on a GPU" if layers else "on the CPU"
        )
    )

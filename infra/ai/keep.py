"""Keeps one service running: `python -m infra.ai.keep FOLDER`. What `rewatch ai start` leaves in the background.

It reads the folder's plan, starts the service and starts it again when it dies or hangs, until SIGTERM or until it is
given up. The service dies with it, whatever kills it. LLAMA_API_KEY is the key that the LLM's server asks for.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx

from infra.ai import plan as plans
from infra.ai.ladder import Ladder
from infra.ai.plan import Plan, Value
from infra.local import llama
from infra.local.llama import LlamaSettings
from infra.local.process import ProcessSpec, StartError, last_run, require_free_port
from infra.local.supervisor import AlreadyRunningError, ProcessFailedError, Supervisor
from infra.stopping import stop_event

# A server answers /health between two steps of its model; nothing at all for so long, seconds, is no slow answer.
SILENCE_S = 60.0
# Of a log: ggml prints a stack of some kilobytes below the error that it aborts on.
_LOOK_BACK = 256 * 1024


async def keep(place: Path, stop: asyncio.Event) -> int:
    """Run the service of a folder until told to stop; the exit code."""
    plan = plans.load(place)
    if plan is None:
        print(f"nothing is planned in {place}", file=sys.stderr)
        return 2
    ladder = Ladder(plan.values["gpu_layers"].value if plan.values else 0, plan.layers, _noting(place, plan))
    spec = _detector(plan) if plan.service == "detector" else _llm(plan, ladder, place)
    stopped = asyncio.create_task(stop.wait())
    try:
        supervisor = await _up(place, spec, ladder, stopped)
        if supervisor is None:
            return 0
        try:
            failed = asyncio.create_task(supervisor.wait())
            await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
            failed.cancel()
        finally:
            await supervisor.stop()
    except AlreadyRunningError as error:
        print(error, file=sys.stderr)
        return 1
    except (StartError, ProcessFailedError) as error:
        plan.gave_up = str(error)
        plans.save(place, plan)
        print(error, file=sys.stderr)
        return 1
    finally:
        stopped.cancel()
    return 0


async def _up(place: Path, spec: ProcessSpec, ladder: Ladder, stopped: "asyncio.Task[bool]") -> Supervisor | None:
    """The supervisor of a healthy service; None where it was told to stop before that.

    Raises:
        StartError: it cannot be started, with fewer layers on the GPU either.
    """
    while True:
        supervisor = Supervisor(place, [spec])
        starting = asyncio.create_task(supervisor.start())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return None
        try:
            starting.result()
        except StartError:
            if ladder.lower and llama.ran_out_of_gpu_memory(_said(place, spec.name)):
                continue  # `prepare` takes the step down
            raise
        return supervisor


def _llm(plan: Plan, ladder: Ladder, place: Path) -> ProcessSpec:
    settings = LlamaSettings(
        model=Path(plan.model),
        port=plan.port,
        host=plan.host,
        ctx=plan.values["context"].value,
        parallel=plan.values["slots"].value,
        threads=plan.values["threads"].value,
        gpu_layers=plan.values["gpu_layers"].value,
        prompt_cache=plan.prompt_cache,
        seed=plan.seed,
        api_key=os.environ.get("LLAMA_API_KEY", ""),
        server_path=Path(plan.server) if plan.server else None,
    )
    usual = llama.spec(settings, allowance_s=plan.allowance_s)
    # Both are read at each start, so what `prepare` writes into them is how the next run is.
    argv, env = list(usual.argv), dict(usual.env)

    async def prepare() -> None:
        assert usual.prepare is not None, "the server's own preparations"
        await usual.prepare()
        layers = ladder.next(_said(place, "llm"))
        argv[:] = llama.child_argv(replace(settings, gpu_layers=layers))
        if ladder.without_gpu:
            # A server that sees a card takes some of its memory though it keeps no layer there.
            env["CUDA_VISIBLE_DEVICES"] = ""

    return replace(usual, name="llm", argv=argv, env=env, prepare=prepare, stalled=Silence(plan.url).stalled)


def _detector(plan: Plan) -> ProcessSpec:
    async def prepare() -> None:
        require_free_port(plan.host, plan.port, what="The detector's service", setting="detector.service.port")

    return ProcessSpec(
        name="detector",
        argv=plans.detector_argv(plan),
        env={
            "PYTHONUNBUFFERED": "1",
            "REWATCH_DETECTOR__SERVICE__HOST": plan.host,
            "REWATCH_DETECTOR__SERVICE__PORT": str(plan.port),
        },
        prepare=prepare,
        ready=lambda: healthy(plan.url),
        stalled=Silence(plan.url).stalled,
        port=plan.port,
        ready_timeout=plan.allowance_s,
    )


async def healthy(url: str) -> bool:
    """Whether the service says that it is."""
    return await _answer(url) == 200


async def _answer(url: str) -> int | None:
    """The status of GET /health; None where nothing answers. Its certificate is its own affair: it is our child."""
    try:
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:  # noqa: S501
            return (await client.get(f"{url}/health", timeout=1.5)).status_code
    except httpx.HTTPError:
        return None


class Silence:
    """Whether a service has stopped answering, for the supervisor: any answer is a sign of life."""

    def __init__(
        self,
        url: str,
        ask: Callable[[str], Awaitable[int | None]] = _answer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._ask = ask
        self._clock = clock
        self._since: float | None = None

    async def stalled(self) -> str | None:
        """The reason to restart it; None while it answers, or is silent for a short while only."""
        if await self._ask(self._url) is not None:
            self._since = None
            return None
        if self._since is None:
            self._since = self._clock()
        if (silent := self._clock() - self._since) < SILENCE_S:
            return None
        self._since = None  # the next run begins anew
        return f"nothing answered {self._url}/health for {silent:.0f} s"


def _said(place: Path, name: str) -> list[str]:
    with contextlib.suppress(OSError):
        return last_run(place / "logs" / f"{name}.log", _LOOK_BACK)
    return []


def _noting(place: Path, plan: Plan) -> Callable[[int, str], None]:
    def note(layers: int, sentence: str) -> None:
        plan.values["gpu_layers"] = Value(layers, "CUDA memory ran out")
        plan.notes.append(f"{sentence} (since {time.strftime('%Y-%m-%d %H:%M:%S')})")
        plans.save(place, plan)
        print(sentence, file=sys.stderr, flush=True)

    return note


async def _main(place: Path) -> int:
    return await keep(place, stop_event())


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(Path(sys.argv[1]))))

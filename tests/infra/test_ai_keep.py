"""What keeps a service running: starts, deaths, hangs, memory that runs out; on a program in llama-server's place."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.ai import keep as keeping
from infra.ai import plan as plans
from infra.ai import watch
from infra.ai.hold import alive
from infra.ai.keep import SILENCE_S, Silence, keep
from infra.ai.plan import Options, Plan, Value
from infra.local import supervisor
from infra.local.process import free_port
from infra.local.supervisor import Supervisor
from infra.models.library import DEMO
from tests.infra.fake_llama_server import write_fake


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_FIRST_SECONDS", 0.01)


def plan_of(program: Path, *, layers: int = 45, allowance_s: float = 30.0) -> Plan:
    port = free_port()
    values = {"context": 12288, "slots": 2, "gpu_layers": layers, "threads": 0}
    return Plan(
        service="llm",
        url=f"http://127.0.0.1:{port}",
        host="127.0.0.1",
        port=port,
        model=str(DEMO / "analyst.gguf"),
        allowance_s=allowance_s,
        asked=Options(),
        server=str(program),
        profile="nemotron-3-nano-30b",
        values={name: Value(value, "profile nemotron-3-nano-30b") for name, value in values.items()},
        layers=53,
    )


@asynccontextmanager
async def kept(data_dir: Path, plan: Plan) -> AsyncIterator[Path]:
    """The service, kept by this process; gone afterwards."""
    place, stop = plans.folder(data_dir, plan.service), asyncio.Event()
    plans.save(place, plan)
    keeper = asyncio.create_task(keep(place, stop))
    try:
        yield place
    finally:
        stop.set()
        await keeper


def starts(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


def ready(place: Path) -> bool:
    state = alive(place)
    return bool(state and state["processes"].get(place.name, {}).get("state") == "ready")


def gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


async def test_a_server_gets_what_is_planned_and_status_and_health_tell_of_it(tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path)
    plan = plan_of(program)
    async with kept(tmp_path, plan) as place:
        await until(lambda: ready(place))
        (found,) = await watch.status(tmp_path, ("llm",))
        (health,) = await watch.health(tmp_path)
    assert [(start["layers"], start["ctx"], start["cards"]) for start in starts(notes)] == [(45, "12288", None)]
    assert (found["state"], found["profile"], found["server"]) == ("ready", "nemotron-3-nano-30b", str(program))
    assert found["values"]["gpu_layers"] == {"value": 45, "from": "profile nemotron-3-nano-30b"}
    assert (found["pid"], found["port"], found["restarts"]) == (starts(notes)[0]["pid"], plan.port, 0)
    assert health.ok
    assert health.ms is not None
    assert health.says == plan.url
    assert gone(found["pid"])


async def test_where_cuda_memory_runs_out_fewer_layers_and_then_the_cpu_serve_and_it_is_said(tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path, fit=0)
    async with kept(tmp_path, plan_of(program)) as place:
        await until(lambda: ready(place))
        (found,) = await watch.status(tmp_path, ("llm",))
        (health,) = await watch.health(tmp_path)
    assert [start["layers"] for start in starts(notes)] == [45, 22, 0]
    assert [start["cards"] for start in starts(notes)] == [None, None, ""], "it must not touch the card at all"
    assert found["values"]["gpu_layers"] == {"value": 0, "from": "CUDA memory ran out"}
    assert found["device"] == "cpu"
    assert len(found["notes"]) == 2
    assert health.ok
    assert "it runs on the CPU now" in health.says


async def test_half_the_layers_stay_where_there_is_room_for_them(tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path, fit=30)
    async with kept(tmp_path, plan_of(program)) as place:
        await until(lambda: ready(place))
        (found,) = await watch.status(tmp_path, ("llm",))
    assert [start["layers"] for start in starts(notes)] == [45, 22]
    assert found["notes"][0].startswith("CUDA memory ran out with 45 layers on the GPU: 22 of its layers are there now")


async def test_memory_that_runs_out_while_it_serves_is_met_at_the_next_start(tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path, dies="of memory, later")
    async with kept(tmp_path, plan_of(program)) as place:
        await until(lambda: ready(place) and len(starts(notes)) == 3)
        (found,) = await watch.status(tmp_path, ("llm",))
    assert [start["layers"] for start in starts(notes)] == [45, 22, 0]
    assert found["values"]["gpu_layers"]["value"] == 0


async def test_one_that_dies_at_once_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path, dies="at once")
    plan = plan_of(program)
    place = plans.folder(tmp_path, "llm")
    plans.save(place, plan)
    assert await keep(place, asyncio.Event()) == 1
    (found,) = await watch.status(tmp_path, ("llm",))
    (health,) = await watch.health(tmp_path)
    assert found["state"] == "given up"
    assert "ended with code 1 before it was ready" in found["reason"]
    assert "unknown model architecture: 'martian'" in found["reason"]
    assert str(place / "logs" / "llm.log") in found["reason"]
    assert len(starts(notes)) == 1, "a start that cannot succeed is not tried again"
    assert not health.ok
    assert health.ms is None
    assert "no answer, given up" in health.says


async def test_one_that_hangs_at_its_start_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path, dies="never answers")
    place = plans.folder(tmp_path, "llm")
    plans.save(place, plan_of(program, allowance_s=1.0))
    assert await keep(place, asyncio.Event()) == 1
    assert "llm was not ready within 1 s" in (await watch.status(tmp_path, ("llm",)))[0]["reason"]
    assert all(gone(start["pid"]) for start in starts(notes))


async def test_one_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "Supervisor", partial(Supervisor, max_restarts=2))
    program, notes = write_fake(tmp_path, dies="soon")
    place = plans.folder(tmp_path, "llm")
    plans.save(place, plan_of(program))
    async with asyncio.timeout(60):
        assert await keep(place, asyncio.Event()) == 1
    (found,) = await watch.status(tmp_path, ("llm",))
    assert found["state"] == "given up"
    assert "llm failed 3 times in a row and is given up; last: ended with code 7" in found["reason"]
    assert len(starts(notes)) == 3


async def test_a_stop_in_the_middle_of_a_start_leaves_nothing(tmp_path: Path) -> None:
    program, notes = write_fake(tmp_path, dies="never answers")
    async with kept(tmp_path, plan_of(program)):
        await until(lambda: bool(starts(notes)))
    assert gone(starts(notes)[0]["pid"])


async def test_silence_is_a_reason_to_restart_once_it_has_lasted() -> None:
    now, answers = [0.0], [200, None, None, 503, None, None, None, None]

    async def ask(_url: str) -> int | None:
        return answers.pop(0)

    silence = Silence("http://x", ask, lambda: now[0])
    found = []
    for at in (0.0, 1.0, SILENCE_S, SILENCE_S + 1, 100.0, 130.0, 100.0 + SILENCE_S, 101.0 + SILENCE_S):
        now[0] = at
        found.append(await silence.stalled())
    assert found[:6] == [None] * 6, "busy (503) is an answer, too"
    assert found[6] == "nothing answered http://x/health for 60 s"
    assert found[7] is None, "the next run begins anew"


async def test_the_detector_is_run_with_the_address_and_the_settings_file_that_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, notes = write_fake(tmp_path)
    plan = plan_of(program)
    plan.service, plan.values, plan.config = "detector", {}, "site.yaml"
    assert plans.detector_argv(plan)[1:] == ["-m", "infra.cli", "--config", "site.yaml", "serve", "detector"]
    flags = "--n-gpu-layers 0 --ctx-size 1 --model m"
    listen = "--host $REWATCH_DETECTOR__SERVICE__HOST --port $REWATCH_DETECTOR__SERVICE__PORT"
    monkeypatch.setattr(keeping.plans, "detector_argv", lambda _: ["sh", "-c", f"exec {program} {flags} {listen}"])
    async with kept(tmp_path, plan) as place:
        await until(lambda: ready(place))
        (health,) = await watch.health(tmp_path)
    assert health.ok
    assert len(starts(notes)) == 1

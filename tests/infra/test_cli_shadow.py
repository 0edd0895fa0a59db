"""`rewatch shadow`: begun, listed with what it said, and stopped; on a topic in memory, and for real."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from infra import prompts as prompts_of_people
from infra.cli import shadow as commands
from infra.config import Settings, load
from processors.replay.plan import Bound, Plan, Unit
from processors.replay.shadows import said, shadows
from processors.store.queries import Queries
from schemas import prompts
from schemas.records import DeadLetter, Replay, ReplayEvent
from streams.admin import read_meta
from streams.control import ControlTable
from streams.kafka import Kafka
from streams.messages import Incoming
from streams.prompts import Prompts
from tests import examples
from tests.infra.cli_kit import answer, invoke, put_in_store
from tests.infra.prompt_kit import in_memory, pointer
from tests.processors.replay_kit import plan, replay

DEFAULT, STRICT = prompts.default(), prompts.deliveries_strict_nights()
SINCE = (Bound(topic="contexts", epoch="e1", partition=0, offset=42),)


class Replays:
    """`replays` in memory."""

    def __init__(self) -> None:
        self.steps: list[Replay] = []

    def all(self) -> dict[str, Replay]:
        return {step.replay_id: step for step in self.steps}

    async def append(self, step: Replay) -> None:
        self.steps.append(step)


class Site:
    """What the commands find."""

    def __init__(self) -> None:
        self.known, _ = in_memory([DEFAULT.to_record(1, "first"), pointer(DEFAULT.digest)])
        self.table = Replays()
        self.at_work = True

    @property
    def last(self) -> tuple[Replay, Plan]:
        step = self.table.steps[-1]
        return step, Plan.decode(step.plan)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Site:
    monkeypatch.chdir(tmp_path)
    found = Site()

    async def loaded(_: Settings) -> tuple[Prompts, Any]:
        return found.known, found.table

    async def since(_: Settings) -> tuple[Bound, ...]:
        return SINCE

    async def check_camera(_: Settings, camera: str) -> None:
        if camera == "nowhere":
            commands.fail("camera nowhere is not known", 1)

    @asynccontextmanager
    async def servers(_: Settings) -> AsyncIterator[list[Any]]:
        yield []

    monkeypatch.setattr(commands, "_load", loaded)
    monkeypatch.setattr(commands, "_since", since)
    monkeypatch.setattr(commands, "_at_work", lambda _: found.at_work)
    monkeypatch.setattr(commands, "check_camera", check_camera)
    monkeypatch.setattr(prompts_of_people, "servers", servers)
    return found


def test_start_writes_down_a_shadow_that_runs_from_where_live_windows_end(site: Site) -> None:
    told = answer(
        *("shadow", "start", "--prompt", STRICT.digest[:8], "--share", "0.5"),
        *("--camera", "yard", "--camera", "door", "--camera", "yard"),
    )
    step, made = site.last
    assert told == {"replay_id": step.replay_id, "name": f"shadow-{STRICT.name}", "prompt": STRICT.digest, "share": 0.5}
    assert (step.state, made.kind, made.change.prompt, made.share) == ("running", "shadow", STRICT.digest, 0.5)
    assert (made.scope.cameras, made.since) == (("yard", "door"), SINCE)
    assert STRICT.digest in site.known._made, "a version that came with the product is on the log from now on"


def test_each_has_a_name_of_its_own_and_says_how_it_ends(site: Site) -> None:
    first = invoke("shadow", "start", "--prompt", STRICT.name)
    assert f"`rewatch shadow stop shadow-{STRICT.name}` ends it" in first.stdout.replace("\n", " ")
    assert "nothing judges" not in first.stderr
    assert site.last[1].share == 0.2
    assert answer("shadow", "start", "--prompt", STRICT.name)["name"] == f"shadow-{STRICT.name}-2"
    taken = invoke("shadow", "start", "--prompt", STRICT.name, "--name", f"shadow-{STRICT.name}")
    assert taken.exit_code == 2
    assert "has it" in taken.stderr
    site.at_work = False
    assert "rewatch up" in invoke("shadow", "start", "--prompt", STRICT.name, "--name", "mine").stderr


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--prompt", "nothing"), 1),
        (("--prompt", "default", "--camera", "nowhere"), 1),
        (("--prompt", "default", "--name", "no way"), 2),
        (("--prompt", "default", "--share", "1.5"), 2),
        ((), 2),
    ],
)
def test_what_cannot_be_a_shadow_is_refused_and_nothing_is_written(
    options: tuple[str, ...], code: int, site: Site
) -> None:
    assert invoke("shadow", "start", *options).exit_code == code
    assert site.table.steps == []


def test_stop_ends_the_one_that_is_meant_once(site: Site) -> None:
    site.table.steps = [
        replay("rshadow1", plan("shadow", since=SINCE)),
        replay("rshadow2", plan("shadow")),
        replay("rchange1", plan()),
    ]
    assert answer("shadow", "stop", "the rshadow1") == {
        "replay_id": "rshadow1",
        "name": "the rshadow1",
        "state": "done",
    }
    step, made = site.last
    assert (step.state, made.since) == ("done", SINCE)
    again = invoke("shadow", "stop", "rshadow1")
    assert again.exit_code == 1
    assert "was stopped at" in again.stderr
    for wrong in ("rchange1", "rshadow", "nobody"):
        refused = invoke("shadow", "stop", wrong)
        assert refused.exit_code == 1
        assert "running: the rshadow2" in refused.stderr
    assert invoke("shadow", "stop", "rshadow2").exit_code == 0


def test_who_runs_comes_first_and_what_cannot_be_read_is_none() -> None:
    ended = replace(replay("old", plan("shadow"), "done"), updated_at=9)
    bad = replace(replay("bad", plan("shadow")), plan="{")
    found = shadows([ended, bad, replay("change", plan()), replay("new", plan("shadow"))])
    assert [one.replay_id for one in found] == ["new", "old"]


@pytest.mark.real
def test_a_shadow_is_begun_counted_against_the_live_verdicts_and_stopped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.kafka.system
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"cli_{secrets.token_hex(4)}")
    mine = load()
    name = f"shadow-{secrets.token_hex(4)}"
    told = answer("shadow", "start", "--prompt", STRICT.name, "--name", name)

    async def look() -> None:
        kafka = Kafka(mine.kafka)
        table = ControlTable(kafka, "replays", Replay)
        await table.load()
        made = Plan.decode(table.all()[told["replay_id"]].plan)
        assert {bound.partition for bound in made.since} == set(range(mine.kafka.partitions))
        assert {bound.epoch for bound in made.since} == {(await read_meta(kafka))["contexts"].epoch}

    async def say() -> None:
        """Three windows, judged live and by the shadow: the same, an alarm lost, an alarm new; and one that failed."""
        records: list[Incoming] = []
        for number, (live, again) in enumerate((("low", "low"), ("critical", "medium"), ("medium", "high"))):
            batch = f"door:{number}"
            event = replace(examples.risk_event, batch_id=batch, event_id=f"{batch}:live", risk_level=live)
            other = replace(event, event_id=f"{batch}:{told['replay_id']}", run=told["replay_id"], risk_level=again)
            shadowed = ReplayEvent(
                replay_id=told["replay_id"],
                unit_id=str(Unit(told["replay_id"], batch)),
                event_id=other.event_id,
                camera_id=other.camera_id,
                reused=False,
                event=other,
            )
            records += [
                examples.incoming("risk_events", event, offset=number),
                examples.incoming("replay_events", shadowed, offset=number),
            ]
        letter: DeadLetter = replace(
            examples.dead_letter, origin=f"{told['replay_id']}:door:9", stage="replay", kind="error"
        )
        await put_in_store(mine, [*records, examples.incoming("dead_letters", letter)])

    asyncio.run(look())
    asyncio.run(say())
    [listed] = [one for one in answer("shadow", "ls") if one["name"] == name]
    assert {key: listed[key] for key in ("state", "share", "verdicts", "compared", "flips", "failed")} == {
        "state": "running",
        "share": 0.2,
        "verdicts": 3,
        "compared": 3,
        "flips": 2,
        "failed": 1,
    }
    assert (listed["alarms_new"], listed["alarms_lost"]) == (1, 1)
    assert "2 of 3 (66.7%)" in invoke("shadow", "ls").stdout
    assert answer("shadow", "stop", name)["state"] == "done"
    assert next(one for one in answer("shadow", "ls") if one["name"] == name)["state"] == "done"


@pytest.mark.real
async def test_of_no_shadow_nothing_is_asked(settings: Settings) -> None:
    store = Queries(settings.clickhouse)
    assert await said(store, []) == {}
    await store.aclose()

"""`rewatch replay`: what it refuses; and on the real broker, ClickHouse engine and LLM server, killed in the middle."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys

import msgspec
import pytest
import typer
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from infra import replays
from infra.cli import replay
from infra.cli.replay_work import Outcome
from infra.config import Settings, load
from infra.local.process import free_port
from infra.replays import Made
from processors.replay.history import unit_of
from processors.replay.plan import Change, Plan
from processors.replay.planner import Progress
from schemas import ids, prompts
from schemas.records import DeadLetterStatus, ReplayEvent
from streams import codec
from streams.admin import read_meta
from streams.delivery import FencedProducer
from streams.kafka import Kafka, incoming
from streams.topics import partition_of
from tests.infra.cli_kit import answer, invoke
from tests.processors.planner_kit import CAMERAS, letter
from tests.processors.recorded_kit import judged, on_log, put, windows

OTHER = "deliveries-strict-nights"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "--since", "yesterday"), "--since yesterday: neither an age (30m, 12h, 7d) nor a time"),
        (("plan", "--until", "1e"), "--until 1e: neither an age"),
        (("plan", "--window", "long"), "--window long: write idle=45s, max=2m, or both"),
        (("plan", "--window", "idle=soon"), "--window idle=soon: no time"),
        (("run", "--window", "idle=0s"), "--window idle=0s: no time passes in it"),
        (("plan", "--threshold", "2"), "less than or equal to 1"),
        (("run", "--mode", "quick"), "'--mode'"),
        (("run", "--sample", "0"), "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(arguments, said, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("replay", *arguments)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("command", [("ls",), ("show", "x"), ("plan",), ("run",), ("resume", "x"), ("cancel", "x")])
def test_where_nothing_was_recorded_it_says_what_comes_first(command, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "data"))
    result = invoke("replay", *command)
    assert result.exit_code == 2, result.output
    assert "nothing was recorded" in result.output
    assert "`rewatch demo` or `rewatch up` comes first" in result.output


STRICT = Plan(kind="baseline", mode="strict")


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({}, 0, ""),
        ({"strict": (9, 9)}, 1, "1 of 10 verdicts were not compared"),
        ({"strict": (10, 9)}, 1, "1 of 10 verdicts differ"),
        ({"strict": (0, 0)}, 1, "no verdict was compared"),
        ({"settled": False}, 1, "ClickHouse does not have all verdicts yet"),
        ({"failed": 2}, 1, "2 windows failed"),
        ({"state": "paused", "strict": None}, 1, "it is paused"),
        ({"state": "paused", "strict": None, "stopped": True}, 130, "it is paused"),
        ({"state": "failed", "strict": None}, 1, "it is failed"),
        ({"plan": Plan(kind="change"), "state": "paused", "strict": None}, 0, ""),
        ({"plan": Plan(kind="change"), "failed": 2, "strict": None}, 0, ""),
    ],
)
def test_a_strict_run_is_well_only_where_every_verdict_was_compared_and_the_same(changed, code, said, capsys) -> None:
    plan = changed.pop("plan", STRICT)
    counts = Progress(10, 10, 0, changed.pop("failed", 0), 0, 0, 1000, 1.0, 0.0)
    given = {"state": "done", "settled": True, "stopped": False, "strict": (10, 10)} | changed
    one = Outcome(Made("r1", "n", plan), why="", progress=counts, seconds=1.0, left_out={}, failures={}, **given)
    assert one.unproven == said
    for as_json in (False, True):
        found = 0
        try:
            replay._tell([one], as_json=as_json)
        except typer.Exit as ended:
            found = ended.exit_code
        assert found == code
        told = capsys.readouterr()
        if as_json:
            assert json.loads(told.out).get("unproven", "") == said
        else:
            assert (f"strict: it does not show that the answers are the same: {said}" in told.err) == bool(said)


COUNT = 24
CALMER = f"calmer-{secrets.token_hex(3)}"

MINE = tuple(f"{camera}-{secrets.token_hex(3)}" for camera in CAMERAS)
"""Cameras of these tests alone: a sink brings what the others put on the broker, too."""
OF_MINE = tuple(word for camera in MINE for word in ("--camera", camera))


@pytest.fixture
def mine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The running servers, with a database of this test's own: windows as they were recorded, with their verdicts."""
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"replay_{secrets.token_hex(4)}")
    monkeypatch.setenv("REWATCH_METRICS__PORT", str(free_port()))
    return load()


def recorded(settings: Settings, count: int = COUNT) -> list[str]:
    """Windows of this test alone: the broker is shared, and what another test had judged would be reused."""
    contexts = windows(count, first=100 * secrets.randbelow(100_000), cameras=MINE)
    # As the model of the stack would have been named: a baseline repeats only what the same weights judged.
    events = judged(contexts, model="analyst", model_digest="")
    asyncio.run(put(settings.clickhouse, on_log("contexts", contexts), on_log("risk_events", events)))
    return [one.batch_id for one in contexts]


def results(settings: Settings) -> list[ReplayEvent]:
    async def read() -> list[ReplayEvent]:
        tps = [TopicPartition("replay_events", p) for p in range(settings.kafka.partitions)]
        records = await Kafka(settings.kafka).read(tps, within=60)
        return [codec.decode(record, ReplayEvent) for record in records]

    return asyncio.run(read())


def units(settings: Settings, replay: str) -> list[str]:
    async def read() -> list[str]:
        tps = [TopicPartition("replay_units", p) for p in range(settings.kafka.partitions)]
        records = await Kafka(settings.kafka).read(tps, within=60)
        return [(record.key or b"").decode() for record in records]

    return [unit for unit in asyncio.run(read()) if unit.startswith(f"{replay}:")]


def of(settings: Settings, replay: str) -> list[str]:
    return sorted(event.event.batch_id for event in results(settings) if event.replay_id == replay)


async def ends(settings: Settings) -> dict[TopicPartition, int]:
    """Where `replay_events` ends now."""
    tps = [TopicPartition("replay_events", p) for p in range(settings.kafka.partitions)]
    return {tp: end for tp, (_, end) in (await Kafka(settings.kafka).bounds(tps)).items()}


async def until_judged(settings: Settings, starts: dict[TopicPartition, int], count: int) -> str:
    """Wait for so many results; the replay that they are of."""
    async with Kafka(settings.kafka).reading() as consumer, asyncio.timeout(300):
        consumer.assign(list(starts))
        for tp, start in starts.items():
            consumer.seek(tp, start)
        found: list[ReplayEvent] = []
        while len(found) < count:
            for records in (await consumer.getmany(timeout_ms=100)).values():
                found += [codec.decode(incoming(record, ""), ReplayEvent) for record in records]
    return found[0].replay_id


@pytest.mark.real
def test_a_replay_from_its_plan_to_its_end_and_what_it_never_does_twice(mine: Settings) -> None:
    batches = sorted(recorded(mine))
    plan = answer("replay", "plan", "--prompt", OTHER, *OF_MINE, "--since", "2026-01-01")
    assert (plan["windows"], plan["reused"], plan["entry"], plan["kind"]) == (COUNT, 0, "contexts", "change")
    assert plan["prompt_tokens"] == COUNT * 80

    for model in ("demo", "http://127.0.0.1:1", "http://127.0.0.1:1/v1/"):
        other = answer("replay", "plan", "--model", model, "--since", "2026-01-01", *OF_MINE)
        assert (other["windows"], other["reused"], other["kind"]) == (COUNT, 0, "change")
        llm = other["change"]["llm"]
        assert (llm["url"], bool(llm["model_path"])) == (
            ("", True) if model == "demo" else ("http://127.0.0.1:1", False)
        )
    for model in ("no-such.gguf", "http://"):
        refused = invoke("replay", "plan", "--model", model)
        assert (refused.exit_code, f"--model {model}: n" in refused.output) == (2, True), refused.output

    wrong = invoke("replay", "plan", "--where", "no_such_column = 1")
    assert (wrong.exit_code, "--where: ClickHouse says: Unknown expression" in wrong.output) == (2, True)
    assert answer("replay", "plan", "--camera", "nowhere", code=1)["windows"] == 0

    first = answer("replay", "run", "--prompt", OTHER, "--name", CALMER, *OF_MINE, "--baseline", "5")
    assert {name: first[name] for name in ("name", "state", "judged", "reused", "failed", "left_out")} == {
        "name": CALMER,
        "state": "done",
        "judged": COUNT,
        "reused": 0,
        "failed": 0,
        "left_out": 0,
    }
    assert first["in_clickhouse"]
    assert first["tokens"] > 0
    noise = first["baseline"]
    assert (noise["name"], noise["kind"], noise["judged"], noise["state"]) == (
        f"{CALMER}-baseline",
        "baseline",
        5,
        "done",
    )
    assert of(mine, first["replay_id"]) == batches
    assert sorted(units(mine, first["replay_id"])) == [f"{first['replay_id']}:{batch}" for batch in batches]
    digests = {event.replay_id: event.event.prompt_digest for event in results(mine)}
    assert digests[first["replay_id"]] == prompts.deliveries_strict_nights().digest
    assert digests[noise["replay_id"]] == prompts.default().digest

    again = answer("replay", "run", "--prompt", OTHER, "--baseline", "0", "--name", f"{CALMER}-again", *OF_MINE)
    assert (again["judged"], again["reused"], again["tokens"]) == (0, COUNT, 0)

    rows = answer("replay", "ls")
    found = {row["name"]: (row["state"], row["judged"], row["reused"]) for row in rows}
    assert {name: found[name] for name in found if name.startswith(CALMER)} == {
        CALMER: ("done", COUNT, 0),
        f"{CALMER}-baseline": ("done", 5, 0),
        f"{CALMER}-again": ("done", 0, COUNT),
    }
    shown = invoke("replay", "show", CALMER).output
    assert f"rewatch replay diff live {CALMER}" in shown
    assert "there is nothing to go on with" in invoke("replay", "resume", CALMER).output
    assert f"{CALMER} is done" in invoke("replay", "cancel", CALMER).output


@pytest.mark.real
@pytest.mark.chaos
def test_killed_in_the_middle_it_goes_on_and_nothing_is_there_twice(mine: Settings) -> None:
    batches = sorted(recorded(mine, 60))
    command = ("replay", "run", "--prompt", OTHER, "--name", "killed", *OF_MINE, "--baseline", "0")
    code = "import sys; from infra.cli import main; sys.argv[1:] = " + repr(list(command)) + "; main()"
    starts = asyncio.run(ends(mine))
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ), stderr=subprocess.DEVNULL)
    replay = asyncio.run(until_judged(mine, starts, 3))
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    half = len(of(mine, replay))
    assert 3 <= half < 60, "some were judged, not all"
    done = answer("replay", "resume", "killed")
    assert (done["state"], done["judged"]) == ("done", 60)
    assert of(mine, done["replay_id"]) == batches
    assert sorted(units(mine, done["replay_id"])) == [f"{done['replay_id']}:{batch}" for batch in batches]


@pytest.mark.real
def test_paused_it_stops_resumed_it_ends_and_cancelled_it_stays_so(mine: Settings) -> None:
    batches = sorted(recorded(mine))
    thrifty = ("--name", "thrifty", "--baseline", "0", "--max-tokens", "1500")
    few = answer("replay", "run", "--prompt", OTHER, *OF_MINE, *thrifty)
    assert few["state"] == "paused"
    assert "tokens are spent, 1500 are allowed" in few["detail"]
    assert 0 < few["judged"] < COUNT
    assert "thrifty is paused" in invoke("replay", "pause", "thrifty").output
    done = answer("replay", "resume", "thrifty", "--max-tokens", "1000000")
    assert (done["state"], done["judged"]) == ("done", COUNT)
    assert of(mine, done["replay_id"]) == batches
    given_up = ("--name", "given-up", "--baseline", "0", "--max-tokens", "1")
    other = answer("replay", "run", "--prompt", "default", *OF_MINE, *given_up)
    assert other["state"] == "paused"
    assert "given-up is cancelled" in invoke("replay", "cancel", "given-up").output
    refused = invoke("replay", "resume", "given-up")
    assert (refused.exit_code, "was cancelled" in refused.output) == (1, True)


async def lacking_its_llm(settings: Settings) -> tuple[Made, str]:
    """A replay of one window that is done, but for its unit: the worker that took it says that the LLM was away."""
    prompt = prompts.deliveries_strict_nights()
    async with replays.office(settings) as office:
        await office.prompts.add(prompt, "")
        plan = await office.drawn(Plan(kind="change", change=Change(prompt=prompt.digest)))
        made = await office.make("lacking", plan)
        [[window]] = [page async for page in office.windows(plan).pages(lambda _: False)]
        unit = unit_of(made.replay_id, window.context, prompt.digest, 1)
        tp = TopicPartition("replay_units", partition_of(unit.camera_id, settings.kafka.partitions, None))
        epoch = (await read_meta(office.kafka))[tp.topic].epoch
        producer = FencedProducer(office.kafka, office.kafka.transactional_id("replay", tp.topic, tp.partition))
        await producer.open()
        try:
            [offset] = await producer.transact([codec.emit(tp.topic, unit, tp.partition)])
            found = msgspec.structs.replace(
                letter(unit.unit_id, unit.camera_id),
                origin=ids.origin(tp.topic, epoch, tp.partition, offset),
                message="http://127.0.0.1:1, the LLM of replay lacking, is away: connection refused",
            )
            done = {tp: OffsetAndMetadata(offset + 1, epoch)}
            emit = codec.emit("dead_letters", found, tp.partition)
            await producer.transact([emit], offsets=(office.kafka.group("replay"), done))
        finally:
            await producer.close()
        await put(settings.clickhouse, on_log("dead_letters", [found]))
        await office.say(made, "done", "")
        return made, found.origin


@pytest.mark.real
def test_what_failed_while_the_llm_was_away_is_judged_once_when_the_replay_is_resumed(mine: Settings) -> None:
    [batch] = recorded(mine, 1)
    made, origin = asyncio.run(lacking_its_llm(mine))
    done = answer("replay", "resume", made.name)
    assert (done["state"], done["judged"], done["failed"]) == ("done", 1, 0)
    assert of(mine, made.replay_id) == [batch]
    assert len(units(mine, made.replay_id)) == 2
    status = asyncio.run(Kafka(mine.kafka).read([TopicPartition("dead_letter_status", 0)], within=60))
    said = [codec.decode(record, DeadLetterStatus) for record in status]
    assert [one.status for one in said if one.origin == origin] == ["resolved"]
    assert "there is nothing to go on with" in invoke("replay", "resume", made.name).output

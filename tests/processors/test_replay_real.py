"""The stage replay beside analyze on the real broker and ClickHouse: where its verdicts go, and where they cannot."""

import asyncio
import os
import secrets
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from aiokafka import TopicPartition
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from infra import topology
from infra.config import Settings, load
from infra.rewatching import build
from processors.analyze.stage import build_judge
from processors.replay.plan import Bound, Plan, Scope
from processors.replay.stage import ReplayStage
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries
from schemas import ids
from schemas.records import Context, DeadLetter, Record, Replay, ReplayEvent, RiskEvent
from streams import codec
from streams.admin import read_meta
from streams.control import ControlTable
from streams.delivery import FencedProducer
from streams.health import workers
from streams.host_raw import RawHost
from streams.kafka import Kafka
from streams.messages import Emit, Incoming
from streams.prompts import Prompts
from streams.topics import partition_of
from tests.processors.analyze_samples import RudeServer, answer, completion
from tests.processors.replay_kit import STRICT, plan, replay, unit, window

pytestmark = pytest.mark.real

CRITICAL = 95


@pytest.fixture
async def critical() -> AsyncIterator[str]:
    """An LLM server to which everything is critical."""

    async def chat(_):
        await asyncio.sleep(0.02)
        return 200, completion(answer(CRITICAL))

    async with RudeServer(chat).running() as url:
        yield url


@pytest.fixture
def mine(settings: Settings, critical: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The running stack with that server, and a database of this test's own."""
    assert settings.kafka.system
    monkeypatch.setenv("REWATCH_LLM__URL", critical)
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"replay_{secrets.token_hex(4)}")
    return load()


class Log:
    """The shared log, as one test with a camera and replays of its own sees it."""

    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka
        self.camera = f"door-{kafka.settings.system}"
        self.partition = partition_of(self.camera, kafka.settings.partitions)
        self.replays = ControlTable(kafka, "replays", Replay)
        self._written: list[Replay] = []

    def named(self, kind: str) -> str:
        """The id of this test's replay of a kind."""
        return f"{kind}-{self.kafka.settings.system}"

    def windows(self, numbers: Iterable[int]) -> list[Context]:
        return [window(number, self.camera) for number in numbers]

    async def write(self, name: str, of: Plan, state: str = "running") -> None:
        record = replay(name, of, state)
        await self.replays.append(record)
        self._written.append(record)

    async def end(self) -> None:
        """No replay of this test runs on: the log is other tests' too."""
        for record in {record.replay_id: record for record in self._written}.values():
            await self.replays.append(Replay(**{**_plain(record), "state": "done"}))

    async def put(self, topic: str, records: Sequence[Record]) -> None:
        producer = FencedProducer(self.kafka, self.kafka.transactional_id("test", secrets.token_hex(4)))
        await producer.open()
        try:
            await producer.transact([codec.emit(topic, record, self.partition) for record in records])
        finally:
            await producer.close()

    async def read(self, topic: str) -> list[Incoming]:
        return await self.kafka.read([TopicPartition(topic, self.partition)])

    async def live(self) -> list[RiskEvent]:
        found = [codec.decode(record, RiskEvent) for record in await self.read("risk_events")]
        return [event for event in found if event.camera_id == self.camera]

    async def again(self) -> list[ReplayEvent]:
        found = [codec.decode(record, ReplayEvent) for record in await self.read("replay_events")]
        return [event for event in found if event.camera_id == self.camera]

    async def end_of(self, topic: str) -> int:
        tp = TopicPartition(topic, self.partition)
        return (await self.kafka.bounds([tp]))[tp][1]


@pytest.fixture
async def log(kafka: Kafka) -> AsyncIterator[Log]:
    log = Log(kafka)
    try:
        yield log
    finally:
        await log.end()


def _plain(record: Replay) -> dict:
    return {name: getattr(record, name) for name in record.__struct_fields__}


async def until(holds: Callable[[], Awaitable[bool]], what: str, within: float = 60) -> None:
    deadline = asyncio.get_running_loop().time() + within
    while not await holds():
        assert asyncio.get_running_loop().time() < deadline, f"not yet: {what}"
        await asyncio.sleep(0.1)


@asynccontextmanager
async def at_work(settings: Settings, *names: str) -> AsyncIterator[None]:
    """Stages in this process, as `rewatch up` has them in processes of their own."""
    stop = asyncio.Event()
    runs = {
        name: asyncio.create_task(
            topology.run(settings, name, stop, settings.data_dir / "status" / f"{name}.json", metrics_port=0)
        )
        for name in names
    }
    try:
        yield
        assert not any(run.done() for run in runs.values())
    finally:
        stop.set()
        await asyncio.wait_for(asyncio.gather(*runs.values()), 30)


async def test_nothing_of_a_replay_or_a_shadow_reaches_what_alerts(mine: Settings, kafka: Kafka, log: Log) -> None:
    tables = ClickHouseStore(mine.clickhouse)
    await tables.migrate()
    await tables.close()
    await Prompts(kafka).add(STRICT, "tried")
    old, new = log.windows(range(6)), log.windows(range(6, 10))
    again, shadow = log.named("again"), log.named("shadow")
    async with at_work(mine, "analyze", "sink"):
        await log.put("contexts", old)

        async def judged() -> bool:
            return len(await log.live()) == len(old)

        await until(judged, "live events")
        alerts, letters = await log.end_of("alerts"), await log.end_of("dead_letters")

        epoch = (await read_meta(kafka))["contexts"].epoch
        since = (Bound(topic="contexts", epoch=epoch, partition=log.partition, offset=await log.end_of("contexts")),)
        await log.write(again, plan())
        await log.write(shadow, plan("shadow", since=since, scope=Scope(cameras=(log.camera,))))
        await asyncio.sleep(0.5)  # the follower's fetch: nothing tells from outside when it has read
        await log.put("replay_units", [unit(again, one) for one in old])
        await log.put("contexts", new)

        async def judged_again() -> bool:
            return len(await log.again()) >= len(old) + len(new) and len(await log.live()) >= len(old) + len(new)

        await until(judged_again, "what the replay and the shadow say")
        said = await log.again()
        assert {one.event.risk_level for one in said} == {"critical"}
        assert Counter(one.replay_id for one in said) == {again: len(old), shadow: len(new)}
        assert {one.event_id for one in said} == {
            *(ids.event_id(one.batch_id, again) for one in old),
            *(ids.event_id(one.batch_id, shadow) for one in new),
        }
        live = await log.live()
        assert Counter(event.event_id for event in live) == {ids.event_id(one.batch_id): 1 for one in (*old, *new)}, (
            "what is live was judged once, and live"
        )
        assert (await log.end_of("alerts"), await log.end_of("dead_letters")) == (alerts, letters)

        async with aclosing(Queries(mine.clickhouse)) as store:

            async def counted(table: str) -> dict[str, int]:
                run = "splitByChar(':', event_id)[-1] AS run"
                asked = f"SELECT {run}, count() AS n FROM {table} WHERE camera_id = {{camera:String}} GROUP BY run"
                return {row["run"]: row["n"] for row in await store.rows(asked, camera=log.camera)}

            async def stored() -> bool:
                return sum((await counted("replay_events FINAL")).values()) == len(said)

            await until(stored, "their rows")
            assert await counted("replay_events FINAL") == {again: len(old), shadow: len(new)}
            for table in ("risk_events FINAL", "events"):
                assert await counted(table) == {"live": len(old) + len(new)}
            [row] = await store.rows(
                "SELECT count() AS n FROM alerts WHERE camera_id = {camera:String}", camera=log.camera
            )
            assert row["n"] == 0


class Traitor(ReplayStage):
    """A stage that would have people called out of bed for a rehearsal."""

    forbidden: Emit

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        made = await super().handle(record)
        return [*made, self.forbidden] if made else []


@pytest.mark.parametrize("topic", ["risk_events", "alerts", "labels"])
async def test_its_host_refuses_whatever_it_would_append_elsewhere(
    mine: Settings, kafka: Kafka, log: Log, topic: str, tmp_path: Path
) -> None:
    from tests.examples import RECORDS

    prompts = Prompts(kafka)
    await prompts.add(STRICT, "tried")
    name = log.named("traitor")
    await log.write(name, plan())
    await log.replays.load()
    made = build(mine, log.replays, prompts, build_judge(mine.llm))
    stage = Traitor(made._judges, made._look, deadline_s=30.0)
    stage.forbidden = codec.emit(topic, RECORDS[topic])
    before = await log.end_of(topic)
    metas = await read_meta(kafka)
    host = RawHost(kafka, stage, epochs=lambda topic: metas[topic].epoch, status=tmp_path / "status.json")
    stop = asyncio.Event()
    running = asyncio.create_task(host.run(stop))
    [one] = log.windows([0])
    await log.put("replay_units", [unit(name, one)])

    async def refused() -> list[DeadLetter]:
        found = [codec.decode(record, DeadLetter) for record in await log.read("dead_letters")]
        return [letter for letter in found if letter.camera_id.startswith(name) or log.camera in letter.camera_id]

    async def is_refused() -> bool:
        return bool(await refused())

    try:
        await until(is_refused, "its dead letter")
    finally:
        stop.set()
        await running
    [letter] = await refused()
    assert (letter.stage, letter.message) == ("replay", f"replay may not append to {topic}, only to replay_events")
    assert await log.end_of(topic) == before
    assert await log.again() == []


async def test_one_process_tells_of_both_stages(mine: Settings, kafka: Kafka) -> None:
    async with at_work(mine, "analyze"):

        def there() -> dict[str, dict]:
            return {report["stage"]: dict(report) for report in workers(mine.data_dir) if report["generation"] >= 0}

        async def both() -> bool:
            return set(there()) == {"analyze", "replay"}

        await until(both, "two reports of one process")
        analyze, beside = there()["analyze"], there()["replay"]
        assert analyze["pid"] == beside["pid"]
        assert beside["metrics"] is None, "one process is one target"
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(analyze["metrics"], headers=accept)).text
        families = list(text_string_to_metric_families(text))
        names = [family.name for family in families]
        assert len(names) == len(set(names)), "each family once"
        told = {family.name: {s.labels.get("stage") for s in family.samples} for family in families}
        assert told["rewatch_results"] == told["rewatch_stalled"] == {"analyze", "replay"}
        assert {"rewatch_replay_verdicts", "rewatch_llm_slots"} <= set(names)
    assert not list((mine.data_dir / "status").glob("*")), "whoever ended says nothing any more"


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_kill_the_process_during_a_replay_and_every_unit_has_one_result(
    mine: Settings, kafka: Kafka, log: Log
) -> None:
    await Prompts(kafka).add(STRICT, "tried")
    name, shadow = log.named("killed"), log.named("watching")
    old, new = log.windows(range(150)), log.windows(range(150, 200))
    epoch = (await read_meta(kafka))["contexts"].epoch
    since = (Bound(topic="contexts", epoch=epoch, partition=log.partition, offset=await log.end_of("contexts")),)
    await log.write(name, plan())
    await log.write(shadow, plan("shadow", since=since, scope=Scope(cameras=(log.camera,))))
    await log.put("replay_units", [unit(name, one) for one in old])
    await log.put("contexts", new)
    kills = 0
    while True:
        async with process(mine) as worker:
            enough = len(await log.again()) + 30

            async def some() -> bool:
                return len(await log.again()) >= min(enough, len(old) + len(new))  # noqa: B023

            await until(some, "some results")
            if len(await log.again()) < len(old) + len(new):
                worker.send_signal(signal.SIGKILL)
                kills += 1
                continue

            async def live() -> bool:
                return len(await log.live()) >= len(new)

            await until(live, "live events")
            break
    assert kills >= 3
    assert Counter(one.unit_id for one in await log.again()) == {
        f"{run}:{one.batch_id}": 1 for run, many in ((name, old), (shadow, new)) for one in many
    }
    assert Counter(event.event_id for event in await log.live()) == {ids.event_id(one.batch_id): 1 for one in new}


@asynccontextmanager
async def process(settings: Settings) -> AsyncIterator[asyncio.subprocess.Process]:
    """Analyze in a process of its own, as the supervisor starts it: always under the same name."""
    status = settings.data_dir / "status" / "analyze.json"
    made = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "infra.worker", "analyze", "--status", str(status), "--metrics-port", "0"),
        *("--member", f"{settings.kafka.system}-analyze-1"),
        env=dict(os.environ),
        stderr=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        yield made
    finally:
        if made.returncode is None:
            made.send_signal(signal.SIGTERM)
        await made.wait()

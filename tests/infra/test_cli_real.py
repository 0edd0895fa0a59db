"""The commands on the real broker and the real ClickHouse engine: what the fakes cannot know."""

import asyncio
import csv
import io
import json
import secrets
from datetime import UTC, datetime, timedelta

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata
from typer.testing import CliRunner

from infra.cli import complete
from infra.cli.main import app
from infra.config import Settings, load
from infra.local.stack import LocalStack
from schemas.records import Frame, IngestState
from streams import codec
from streams.admin import ensure_topics, read_meta
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.messages import Emit
from streams.survey import survey
from streams.topics import partition_of
from tests.conftest import PARTITIONS
from tests.infra.cli_kit import answer, invoke, put_in_store, put_on_log, story

pytestmark = pytest.mark.real


@pytest.fixture
def mine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The running stack, with a database of this test's own, empty."""
    assert settings.kafka.system
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"cli_{secrets.token_hex(4)}")
    return load()


@pytest.fixture(scope="module")
def told(stack: LocalStack) -> tuple[str, str]:
    """A camera whose story is on the log and in a database that holds nothing else: `(camera, database)`."""
    camera, database = f"cam-{secrets.token_hex(4)}", f"cli_{secrets.token_hex(4)}"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("REWATCH_KAFKA__BOOTSTRAP_SERVERS", stack.bootstrap_servers)
        environment.setenv("REWATCH_KAFKA__PARTITIONS", str(PARTITIONS))
        environment.setenv("REWATCH_CLICKHOUSE__URL", stack.clickhouse_url)
        environment.setenv("REWATCH_CLICKHOUSE__DATABASE", database)
        settings = load()

    async def tell() -> None:
        await ensure_topics(Kafka(settings.kafka))
        await put_in_store(settings, await put_on_log(settings, camera))

    asyncio.run(tell())
    return camera, database


@pytest.fixture
def camera(told: tuple[str, str], settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """The camera of the story, with settings that look into its database."""
    assert settings.kafka.system
    camera, database = told
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", database)
    return camera


def test_an_event_is_found_and_explained_to_its_frames(camera: str) -> None:
    [event] = answer("events", "ls", "--camera", camera, "--level", "high")
    assert event["summary"].startswith("A person")
    lineage = answer("explain", event["event_id"][:20])
    expected = [frame for frame in story(camera)["frames"] if isinstance(frame, Frame)]
    assert [entry["frame"]["sha256"] for entry in lineage["frames"]] == [frame.sha256 for frame in expected]
    assert [entry["frame"]["captured_at"] for entry in lineage["frames"]] == [
        f"2026-11-02T10:00:0{n}+00:00" for n in range(3)
    ]
    first = lineage["frames"][0]
    assert [box["label"] for box in first["detections"]["boxes"]] == ["person", "car", "bird"]
    assert [box["stationary"] for box in first["boxes"]] == [False, True]
    assert lineage["context"]["sections.text"] == ["Nobody comes at this hour."]
    output = invoke("explain", event["event_id"]).output
    for part in (*(frame.sha256 for frame in expected), "has not moved", "1 more below the threshold", "72 high"):
        assert part in output


def test_an_event_is_found_without_the_cameras_name(camera: str) -> None:
    event_id = answer("events", "ls")[0]["event_id"]
    assert answer("events", "show", event_id.split(":", 1)[1])["event_id"] == event_id


def test_tab_offers_the_events_and_dead_letters_that_are_there(
    camera: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(complete, "_PATIENCE_S", 10.0)  # what is asked is right; how long it may take is another test
    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", settings.clickhouse.url)
    [event] = answer("events", "ls")
    [letter] = answer("dlq", "ls")
    for line, offered in (
        ("rewatch explain ", event["event_id"].split(":")[1]),
        ("rewatch dlq show ", letter["origin"]),
        ("rewatch events ls --camera ", ""),  # the story has no record of its camera
    ):
        bash = {
            "_REWATCH_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(line.count(" ")),
        }
        assert CliRunner().invoke(app, [], prog_name="rewatch", env=bash).stdout.strip() == offered


def test_events_are_filtered(camera: str) -> None:
    assert answer("events", "ls", "--level", "low") == []
    assert answer("events", "ls", "--camera", "another") == []
    assert answer("events", "ls", "--since", (datetime.now(UTC) + timedelta(days=3650)).isoformat()) == []


def test_counts_are_by_id_however_often_rows_came(mine: Settings) -> None:
    async def twice() -> None:
        await put_on_log(mine, "twice")
        await put_in_store(mine, await put_on_log(mine, "twice"))  # the same ids at other offsets

    asyncio.run(twice())
    assert answer("sql", "SELECT count() AS n FROM log WHERE topic = 'frames' AND NOT tick") == [{"n": 6}]
    counts = {topic["topic"]: topic["in_clickhouse"] for topic in answer("status")["topics"]}
    assert counts["frames"] == counts["detections"] == 3
    assert counts["batches"] == counts["contexts"] == counts["risk_events"] == 1


def test_status_and_lag_see_records_and_neither_markers_nor_aborted_ones(settings: Settings, camera: str) -> None:
    kafka = Kafka(settings.kafka)
    tp = TopicPartition("frames", partition_of(camera, settings.kafka.partitions))

    async def look() -> tuple[int, int, int]:
        found = await survey(kafka)
        assert found.records["frames"].exact
        position = next(p for p in found.positions["detect"] if p.partition == tp)
        return found.records["frames"].records, position.behind.records, position.end

    async def main() -> None:
        before, behind, end = await look()
        producer = kafka.producer(transactional_id=f"{settings.kafka.system}-aborted")
        await producer.start()
        await producer.begin_transaction()
        await producer.send_and_wait("frames", b"gone", key=b"gone", partition=tp.partition)
        await producer.abort_transaction()
        await producer.stop()
        after = await look()
        assert after[:2] == (before, behind)
        assert after[2] > end
        # One record and its position committed together leave nothing before the stage but markers.
        metas = await read_meta(kafka)
        owner = FencedProducer(kafka, kafka.transactional_id("detect", tp.partition))
        await owner.open()
        emit = Emit("batches", b"x", None, partition=tp.partition)
        await owner.transact(
            [emit], offsets=(kafka.group("detect"), {tp: OffsetAndMetadata(after[2], metas["frames"].epoch)})
        )
        await owner.close()
        assert (await look())[1] == 0

    asyncio.run(main())


def test_a_position_in_an_earlier_life_of_the_topic_is_none(settings: Settings, camera: str) -> None:
    kafka = Kafka(settings.kafka)
    tp = TopicPartition("contexts", partition_of(camera, settings.kafka.partitions))

    async def main() -> None:
        owner = FencedProducer(kafka, kafka.transactional_id("analyze", tp.partition))
        await owner.open()
        await owner.transact([], offsets=(kafka.group("analyze"), {tp: OffsetAndMetadata(10**6, "another life")}))
        await owner.close()
        position = next(p for p in (await survey(kafka, count=False)).positions["analyze"] if p.partition == tp)
        assert position.committed is None
        assert position.behind.records >= 1

    asyncio.run(main())


@pytest.mark.parametrize("bound", ["COUNT_OFFSETS", "COUNT_BYTES"])
def test_a_topic_too_long_to_read_is_estimated(
    settings: Settings, camera: str, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"streams.survey.{bound}", 1)
    monkeypatch.setattr("streams.survey.FETCH_RECORDS", 1)
    found = asyncio.run(survey(Kafka(settings.kafka)))
    assert not found.records["frames"].exact
    assert found.records["frames"].records >= 4  # markers and the tick too
    assert not all(position.behind.exact for position in found.positions["detect"])


def test_lag_ends_with_1_while_there_is_work(camera: str) -> None:
    state = answer("lag", code=1)
    assert next(stage for stage in state["stages"] if stage["stage"] == "detect")["lag"] >= 3


def test_dead_letters_are_listed_and_shown(camera: str) -> None:
    [letter] = answer("dlq", "ls", "--stage", "detect")
    assert letter["camera_id"] == camera
    [shown] = answer("dlq", "show", letter["origin"])
    assert shown["value"] == "hex " + b"\x00\xffgarbage".hex()
    assert shown["headers"] == {"fp": "hex 0102"}
    assert answer("status")["dead_letters"] == [{"stage": "detect", "kind": "error", "count": 1}]
    assert answer("dlq", "ls", "--kind", "gap") == []


def test_sql_in_three_formats(camera: str) -> None:
    query = "SELECT camera_id, risk_score, risk_factors FROM events"
    assert answer("sql", query) == [{"camera_id": camera, "risk_score": 72, "risk_factors": ["night", "stays"]}]
    assert camera in invoke("sql", query).output
    rows = list(csv.reader(io.StringIO(invoke("sql", "SELECT camera_id, risk_score FROM events", "--csv").stdout)))
    assert rows == [["camera_id", "risk_score"], [camera, "72"]]


def test_sql_limits_rows_unless_told_otherwise(camera: str) -> None:
    limited = invoke("sql", "SELECT number FROM numbers(5000)", "--limit", "3")
    assert "the first 3 rows" in limited.stderr
    assert len(json.loads(invoke("sql", "SELECT number FROM numbers(5000)", "--json").stdout)) == 1000
    assert len(json.loads(invoke("sql", "SELECT number FROM numbers(5000)", "--json", "--limit", "0").stdout)) == 5000
    assert invoke("sql", "SHOW TABLES").exit_code == 0


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO schema_migrations (version) VALUES (99)",
        "DROP TABLE log",
        "ALTER TABLE log DELETE WHERE 1",
        "TRUNCATE TABLE log",
        "CREATE TABLE x (a UInt8) ENGINE = Memory",
    ],
)
def test_sql_cannot_write(camera: str, query: str) -> None:
    result = invoke("sql", query)
    assert result.exit_code == 1
    assert "readonly" in result.stderr
    assert answer("sql", "SELECT count() AS n FROM log")[0]["n"] > 0


def test_wrong_sql_is_the_engines_own_words(camera: str) -> None:
    result = invoke("sql", "SELECT nothing FROM events")
    assert result.exit_code == 1
    assert "nothing" in result.stderr
    assert "Traceback" not in result.output + result.stderr
    assert "JSONCompact" not in result.stderr


def test_tables_that_are_not_there_name_migrate(mine: Settings) -> None:
    for command in (("events", "ls"), ("status",)):
        result = invoke(*command)
        assert result.exit_code == 3
        assert "rewatch migrate" in result.stderr


def test_migrate_says_what_it_did_and_can_be_repeated(mine: Settings) -> None:
    first = answer("migrate")
    assert first["migrations_applied"][0] == "000_schema_migrations"
    assert "frames" in first["topics"]
    again = answer("migrate")
    assert (again["migrations_applied"], again["topics_made"]) == ([], [])
    assert "are there" in invoke("migrate").output


def test_another_partition_count_is_a_settings_error(mine: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_KAFKA__PARTITIONS", str(mine.kafka.partitions + 1))
    result = invoke("migrate")
    assert result.exit_code == 2
    assert "kafka.partitions" in result.stderr
    topics = next(c for c in answer("doctor", code=1)["checks"] if c["name"] == "topics")
    assert "kafka.partitions" in topics["fix"]


def test_doctor_finds_services_that_run(mine: Settings) -> None:
    invoke("migrate")
    found = {check["name"]: check for check in answer_of_doctor()["checks"]}
    for name in ("broker", "topics", "clickhouse", "clock", "tables", "llm"):
        assert found[name]["status"] == "ok", found[name]


def test_a_camera_is_added_set_and_moved_only_before_its_first_frame(mine: Settings) -> None:
    name = f"cam-{secrets.token_hex(4)}"
    added = answer("camera", "add", name, "--name", "Yard", "--time-zone", "Europe/Berlin")
    other = (added["partition"] + 1) % mine.kafka.partitions
    assert answer("camera", "set", name, "--partition", str(other), "--idle", "20")["partition"] == other
    [listed] = [c for c in answer("camera", "ls") if c["camera_id"] == name]
    assert (listed["name"], listed["pinned"], listed["window"]["idle_ms"]) == ("Yard", True, 20_000)

    async def take_a_frame() -> None:
        kafka = Kafka(mine.kafka)
        way_in = FencedProducer(kafka, kafka.transactional_id("ingest", name))
        await way_in.open()
        state = IngestState(camera_id=name, digests=b"", frames=1, unchanged=0)
        await way_in.transact([codec.emit("ingest_state", state, other)])
        await way_in.close()

    asyncio.run(take_a_frame())
    result = invoke("camera", "set", name, "--partition", str(added["partition"]))
    assert result.exit_code == 1
    assert "has frames" in result.stderr


def answer_of_doctor() -> dict[str, list[dict[str, str]]]:
    """Its answer, whatever the machine under the test lacks besides."""
    document: dict[str, list[dict[str, str]]] = json.loads(invoke("doctor", "--json").stdout)
    return document

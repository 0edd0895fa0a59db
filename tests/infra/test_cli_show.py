"""`rewatch status` and `lag` on fakes: shapes, exit codes, and what is said when services are away."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError

from infra.config import load
from schemas.records import TopicMeta
from streams.errors import UnavailableError
from streams.survey import READS, Count, Position, Survey
from streams.topics import STORED
from tests.infra.cli_kit import FakeQueries, answer, invoke

Look = Callable[..., Survey]


def look(*, behind: int = 0, frames: Count = Count(3, exact=True)) -> Survey:  # noqa: B008 (immutable)
    def position(topic: str) -> Position:
        late = behind if topic == "contexts" else 0
        return Position(TopicPartition(topic, 0), 5, 0, 5 + 2 * late, Count(late, exact=True))

    return Survey(
        {t: TopicMeta(topic=t, epoch="e", status="ready", partitions=1, created_at=0) for t in STORED},
        {topic: frames if topic == "frames" else Count(0, exact=True) for topic in STORED},
        {stage: [position(topic) for topic in topics] for stage, topics in READS.items()},
    )


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[[Survey | Exception], None]:
    """Sets what the log looks like; a store that has the story stands beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("processors.store.queries.Queries", FakeQueries)
    monkeypatch.setattr(FakeQueries, "away", None)

    def use(found: Survey | Exception) -> None:
        async def survey(*_: Any, **__: Any) -> Survey:
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr("streams.survey.survey", survey)

    use(look())
    return use


def report(stage: str, *, pid: int | None = None, written_at: float | None = None, **life: Any) -> None:
    """A worker's status file, as `streams.liveness` writes it."""
    path = load().data_dir / "status" / f"{stage}-{pid}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "stage": stage,
                "pid": pid or os.getpid(),
                "written_at": written_at or time.time(),
                "generation": 1,
                "stall": None,
                "waiting_on": ["llm"],
                "partitions": {"contexts-0": {"position": 5, "in_hand": 2, "waiting_on": "llm"} | life},
            }
        )
    )


def test_status_says_of_each_topic_what_is_on_the_log_and_in_clickhouse(log: Any) -> None:
    state = answer("status")
    assert [topic["topic"] for topic in state["topics"]] == list(STORED)
    assert state["topics"][0] == {"topic": "frames", "records": 3, "exact": True, "in_clickhouse": 3}
    assert [stage["stage"] for stage in state["stages"]] == list(READS)
    assert state["problems"] == []
    assert state["dead_letters"] == [{"stage": "detect", "kind": "error", "count": 1}]


def test_status_tells_what_a_stage_waits_on(log: Any) -> None:
    report("analyze")
    stage = next(stage for stage in answer("status")["stages"] if stage["stage"] == "analyze")
    assert stage["waiting_on"] == ["llm"]
    assert stage["workers"] == [
        {"pid": os.getpid(), "partitions": 1, "in_hand": 2, "waiting_on": ["llm"], "stall": None}
    ]
    assert "llm" in invoke("status").output


def test_status_names_the_model_and_the_runtime_that_detect_has_now(log: Any) -> None:
    assert "detect runs" not in invoke("status").output
    report("detect")
    path = next((load().data_dir / "status").iterdir())
    tells = {"detector": {"model": "r18", "runtime": "openvino-cpu"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | tells))
    stage = next(stage for stage in answer("status")["stages"] if stage["stage"] == "detect")
    assert stage["workers"][0]["detector"] == tells["detector"]
    assert "detect runs r18 by openvino-cpu" in invoke("status").output


@pytest.mark.parametrize("left", [{"pid": 2**22 - 1}, {"written_at": 1.0}])
def test_a_report_that_a_dead_worker_left_is_not_shown(log: Any, left: dict[str, Any]) -> None:
    report("analyze", **left)
    assert all(stage["workers"] == [] for stage in answer("status")["stages"])


def test_status_says_where_the_metrics_are(log: Any) -> None:
    assert answer("status")["metrics"] == []
    assert "metrics" not in invoke("status").output
    report("analyze")
    path = next((load().data_dir / "status").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": "http://127.0.0.1:9450/metrics"}))
    assert answer("status")["metrics"] == ["http://127.0.0.1:9450/metrics"]
    assert "http://127.0.0.1:9450/metrics; http://127.0.0.1:9450/targets lists" in invoke("status").output


def test_half_a_report_is_no_report(log: Any) -> None:
    report("analyze")
    next((load().data_dir / "status").iterdir()).write_text('{"stage": "ana')
    assert all(stage["workers"] == [] for stage in answer("status")["stages"])


def test_an_estimate_is_marked(log: Any) -> None:
    log(look(frames=Count(70_000, exact=False)))
    assert "~70000" in invoke("status").output
    assert answer("status")["topics"][0]["exact"] is False


def test_status_without_a_broker_still_tells_of_clickhouse_and_ends_with_3(log: Any) -> None:
    log(KafkaConnectionError("refused"))
    state = answer("status", code=3)
    assert state["topics"][0] == {"topic": "frames", "records": None, "exact": True, "in_clickhouse": 3}
    assert state["stages"][0]["lag"] is None
    assert "kafka.bootstrap_servers" in state["problems"][0]["message"]
    result = invoke("status")
    assert result.exit_code == 3
    assert "rewatch up" in result.stderr


def test_status_without_clickhouse_still_tells_of_the_log_and_ends_with_3(
    log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeQueries, "away", UnavailableError("store", "ClickHouse does not answer (clickhouse.url)"))
    state = answer("status", code=3)
    assert state["topics"][0] == {"topic": "frames", "records": 3, "exact": True, "in_clickhouse": None}
    assert "clickhouse.url" in state["problems"][0]["message"]


def test_status_while_everything_is_away_says_so_and_shows_no_tables_of_nothing(
    log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(KafkaConnectionError("refused"))
    monkeypatch.setattr(FakeQueries, "away", UnavailableError("store", "ClickHouse does not answer (clickhouse.url)"))
    result = invoke("status")
    assert result.exit_code == 3
    assert result.stdout.startswith("nothing is run here by `rewatch up`")
    [_, gpu] = result.stdout.splitlines()
    assert gpu.startswith("gpu: ")
    assert "kafka.bootstrap_servers" in result.stderr
    assert "clickhouse.url" in result.stderr
    report("analyze")  # of what is known it tells
    assert "analyze" in invoke("status").stdout


def test_status_names_what_lies_in_the_inbox_and_is_nobodys(log: Any) -> None:
    inbox = load().ingest.folder.root
    assert answer("status")["not_taken"] == []
    for folder in ("front", "Front Door", ".rewatch"):
        (inbox / folder).mkdir(parents=True)
    for file in ("front/a.jpg", "b.jpg", "notes.txt"):
        (inbox / file).touch()
    assert answer("status")["not_taken"] == ["Front Door/", "b.jpg"]
    assert "'Front Door/', 'b.jpg': `rewatch doctor` says why" in invoke("status").output


def test_lag_is_0_when_caught_up_and_1_when_not(log: Any) -> None:
    assert answer("lag")["caught_up"] is True
    log(look(behind=7))
    state = answer("lag", code=1)
    analyze = next(stage for stage in state["stages"] if stage["stage"] == "analyze")
    assert (analyze["lag"], analyze["caught_up"]) == (7, False)
    # Fourteen offsets, seven of them markers.
    assert analyze["partitions"] == [
        {
            "topic": "contexts",
            "partition": 0,
            "committed": 5,
            "end": 19,
            "behind": 7,
            "exact": True,
            "waiting_on": None,
        }
    ]
    result = invoke("lag")
    assert result.exit_code == 1
    assert "contexts-0" in result.output


def test_lag_names_what_a_partition_waits_on(log: Any) -> None:
    log(look(behind=7))
    report("analyze")
    partitions = next(s for s in answer("lag", code=1)["stages"] if s["stage"] == "analyze")["partitions"]
    assert partitions[0]["waiting_on"] == "llm"


def test_lag_without_a_broker_is_3(log: Any) -> None:
    log(KafkaConnectionError("refused"))
    result = invoke("lag")
    assert result.exit_code == 3
    assert "kafka.bootstrap_servers" in result.stderr


@pytest.mark.parametrize("error", [KafkaConnectionError("refused"), TimeoutError("60 s")])
def test_every_command_says_the_same_of_a_broker_that_is_away(log: Any, error: Exception) -> None:
    log(error)
    [problem] = answer("status", code=3)["problems"]
    assert "start it with `rewatch up`, or set kafka.bootstrap_servers" in problem["message"]
    assert invoke("lag").stderr == f"error: {problem['message']}\n"


def test_lag_before_the_first_start_says_what_makes_topics(log: Any) -> None:
    log(Survey({}, {}, {stage: [] for stage in READS}))
    result = invoke("lag")
    assert result.exit_code == 1
    assert "rewatch migrate" in result.stderr


def test_status_of_a_new_broker_counts_nothing(log: Any) -> None:
    log(Survey({}, {}, {stage: [] for stage in READS}))
    assert {topic["records"] for topic in answer("status")["topics"]} == {0}

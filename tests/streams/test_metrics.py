"""What is counted, and what a scrape of a stage on the real broker tells."""

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from schemas.records import DeadLetter
from streams import codec
from streams.kafka import Kafka
from streams.liveness import STALL_S, Liveness
from streams.messages import Emit
from streams.metrics import WAITS, Counts, Distribution, LivenessCollector, StageCollector, StageMetrics
from streams.scraping import Endpoint, MetricsSettings, build_app, targets
from tests.conftest import PARTITIONS
from tests.streams.conformance.harness import Road, hosting, road, until
from tests.streams.conformance.toys import EchoStage
from tests.streams.conformance.worker import HOSTS

NOW = 1_800_000_000.0

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class One(Collector):
    """A collector of one thing."""

    def __init__(self, thing: Counts | Distribution) -> None:
        self._thing = thing

    def collect(self) -> Iterator[Metric]:
        yield self._thing.family()


def scraped(text: str) -> Samples:
    """Every series of a scrape; one that is there twice fails."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def series(collector: Collector) -> Samples:
    registry = CollectorRegistry()
    registry.register(collector)
    return scraped(generate_latest(registry).decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def letter(kind: str) -> Emit:
    made = DeadLetter(
        origin="frames:e1:2:7", camera_id="yard", stage="toy", kind=kind, error="E", message="no", attempt=1,
        headers={}, detail="", failed_at=0,
    )  # fmt: skip
    return codec.emit("dead_letters", made)


class Toy:
    name = "toy"
    inputs = ("frames",)
    outputs = ("detections",)
    state_topic = "batch_state"


def test_a_distribution_counts_each_value_in_the_first_bucket_that_holds_it() -> None:
    took = Distribution("took_seconds", "How long.", (0.1, 1), stage="toy")
    for seconds in (0.1, 0.5, 0.5, 7):
        took.observe(seconds)
    found = series(One(took))
    buckets = [value(found, "took_seconds_bucket", stage="toy", le=le) for le in ("0.1", "1.0", "+Inf")]
    assert buckets == [1, 3, 4]
    assert value(found, "took_seconds_count", stage="toy") == 4
    assert math.isclose(value(found, "took_seconds_sum", stage="toy"), 8.1)


def test_the_age_of_footage_that_was_played_back_is_no_latency() -> None:
    age = Distribution("age_seconds", "How old.", (1, 10))
    for since in (NOW - 5, NOW + 60, NOW - 3 * 86_400):
        age.observe_age(int(since * 1000), NOW)
    found = series(One(age))
    assert value(found, "age_seconds_count") == 2
    assert value(found, "age_seconds_sum") == 5  # a clock that runs ahead makes no negative age


def test_a_counter_is_there_before_its_first_event() -> None:
    counts = Counts("rewatch_things", "Things.", "kind", stage="toy")
    counts.add("good", by=0)
    assert value(series(One(counts)), "rewatch_things_total", stage="toy", kind="good") == 0


def test_a_commit_counts_results_by_topic_dead_letters_by_kind_and_neither_state(
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = StageMetrics(Toy(), clock=lambda: NOW)
    result = Emit("detections", b"yard", b"x", since=int((NOW - 2) * 1000))
    state = Emit("batch_state", b"yard", b"x")
    metrics.committed([result, result, letter("error"), letter("gap"), state], 0.02)
    found = series(StageCollector(Toy(), metrics, Liveness("toy")))
    assert value(found, "rewatch_results_total", stage="toy", topic="detections") == 2
    assert value(found, "rewatch_dead_letters_total", stage="toy", kind="error") == 1
    assert value(found, "rewatch_dead_letters_total", stage="toy", kind="gap") == 1
    assert value(found, "rewatch_record_age_seconds_sum", stage="toy") == 4
    assert value(found, "rewatch_commit_seconds_count", stage="toy") == 1
    assert not [key for key in found if ("topic", "batch_state") in key[1]]
    assert "frames:e1:2:7" in capsys.readouterr().out, "each dead letter is logged with its origin"


def test_waits_are_one_or_zero_for_each_known_word_and_a_stall_is_said() -> None:
    now = [0.0]
    liveness = Liveness("toy", clock=lambda: now[0])
    liveness.partition("in-0").waiting_on = "llm"
    liveness.waiting_on = "disk, camera front-door"
    found = series(LivenessCollector(liveness))
    waits = {what: value(found, "rewatch_waiting_on", stage="toy", what=what) for what in WAITS}
    assert {what for what, on in waits.items() if on} == {"llm", "disk", "camera"}
    assert value(found, "rewatch_stalled", stage="toy") == 0
    liveness.waiting_on = None
    now[0] = STALL_S + 1
    assert value(series(LivenessCollector(liveness)), "rewatch_stalled", stage="toy") == 1


class Consumer:
    """As much of aiokafka's as the lag is read from."""

    def __init__(self, states: dict[TopicPartition, tuple[int | None, int | None]]) -> None:
        self._subscription = self
        self.subscription = self
        self.assignment = self
        self._states = states
        self.tps = set(states)

    def state_value(self, tp: TopicPartition) -> Any:
        position, lso = self._states[tp]

        class State:
            has_valid_position = position is not None

        State.position, State.lso = position, lso  # type: ignore[attr-defined]
        return State


def test_lag_is_what_is_in_hand_and_what_is_not_fetched() -> None:
    liveness = Liveness("toy")
    liveness.partition("in-0").hold(3)
    liveness.partition("in-with-dashes-1").hold(2)
    collector = StageCollector(Toy(), StageMetrics(Toy()), liveness)
    collector.consumer = Consumer(
        {
            TopicPartition("in", 0): (10, 17),
            TopicPartition("in", 2): (5, 5),
            TopicPartition("in", 3): (None, 9),  # just assigned
            TopicPartition("in", 4): (9, None),  # nothing answered yet
        }
    )
    found = series(collector)
    lag = {
        (dict(labels)["topic"], dict(labels)["partition"]): count
        for (name, labels), count in found.items()
        if name == "rewatch_lag_records"
    }
    assert lag == {("in", "0"): 10, ("in", "2"): 0, ("in-with-dashes", "1"): 2}


def test_a_process_without_a_consumer_yet_is_scraped_all_the_same() -> None:
    found = series(StageCollector(Toy(), StageMetrics(Toy()), Liveness("toy")))
    assert value(found, "rewatch_records_total", stage="toy", topic="frames") == 0
    assert not [key for key in found if key[0] == "rewatch_lag_records"]


def client(endpoint: Endpoint) -> httpx.AsyncClient:
    assert endpoint.url is not None
    return httpx.AsyncClient(base_url=endpoint.url.removesuffix("/metrics"), trust_env=False)


async def test_a_taken_port_is_replaced_by_a_free_one(tmp_path: Path) -> None:
    async with Endpoint(MetricsSettings(port=0), tmp_path) as first:
        assert first.url is not None
        port = int(first.url.split(":")[2].split("/")[0])
        async with Endpoint(MetricsSettings(port=port), tmp_path) as second, client(second) as http:
            assert second.url not in (None, first.url)
            assert (await http.get("/metrics")).status_code == 200


async def test_an_address_that_cannot_be_had_costs_the_metrics_and_not_the_stage(tmp_path: Path) -> None:
    key = {"api_key": "k"}
    async with Endpoint(MetricsSettings(host="203.0.113.1", port=0, **key), tmp_path) as endpoint:  # type: ignore[arg-type]
        assert endpoint.url is None


async def test_metrics_can_be_off(tmp_path: Path) -> None:
    async with Endpoint(MetricsSettings(enabled=False), tmp_path) as endpoint:
        assert endpoint.url is None


async def test_with_a_key_metrics_and_targets_ask_for_it(tmp_path: Path) -> None:
    settings = MetricsSettings(port=0, api_key="open sesame")  # type: ignore[arg-type]
    async with Endpoint(settings, tmp_path) as endpoint, client(endpoint) as http:
        for path in ("/metrics", "/targets"):
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"Authorization": "Bearer wrong"})).status_code == 401
            assert (await http.get(path, headers={"Authorization": "Bearer open sesame"})).status_code == 200


def test_each_process_has_its_own_port() -> None:
    settings = MetricsSettings()
    ports = [settings.port_of(place, index) for place in range(7) for index in range(10)]
    assert (ports[0], ports[10], ports[11], len(set(ports))) == (9400, 9410, 9411, 70)
    assert settings.port_of(1, 10) == 0, "beyond the tenth a free one, not the next stage's"
    assert MetricsSettings(port=0).port_of(3, 2) == 0


def report(directory: Path, name: str, **more: Any) -> Path:
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"stage": name, **more}))
    return path


def test_targets_are_the_processes_that_reported_lately(tmp_path: Path) -> None:
    report(tmp_path, "ingest", metrics="http://127.0.0.1:9400/metrics")
    report(tmp_path, "detect-2", metrics="https://[::1]:9411/metrics")
    report(tmp_path, "old-version")
    report(tmp_path, "batch", metrics=None)
    (tmp_path / "half.json").write_text("{")
    gone = report(tmp_path, "sink-4711", metrics="http://127.0.0.1:9450/metrics")
    os.utime(gone, (0, 0))
    assert targets(tmp_path) == [
        {"targets": ["[::1]:9411"], "labels": {"__scheme__": "https", "process": "detect-2"}},
        {"targets": ["127.0.0.1:9400"], "labels": {"__scheme__": "http", "process": "ingest"}},
    ]
    assert [found["targets"] for found in targets(tmp_path, host="cam-pc", now=time.time())] == [
        ["cam-pc:9411"],
        ["cam-pc:9400"],
    ]


async def test_one_endpoint_lists_all_for_prometheus_by_the_name_it_was_asked_at(tmp_path: Path) -> None:
    report(tmp_path, "detect", metrics="http://127.0.0.1:9410/metrics")
    app = build_app(CollectorRegistry(), MetricsSettings(), tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cam-pc:9400") as http:
        answer = await http.get("/targets")
    assert answer.json() == [{"targets": ["cam-pc:9410"], "labels": {"__scheme__": "http", "process": "detect"}}]
    assert answer.headers["content-type"] == "application/json"


@asynccontextmanager
async def watched(
    kafka: Kafka, made: Road, host: str, directory: Path, number: int = 1
) -> AsyncIterator[httpx.AsyncClient]:
    """An echo stage on a host, and a client of its endpoint."""
    stage = EchoStage(made.source, made.target, made.control)
    status = directory / f"status-{number}.json"
    runner = HOSTS[host](kafka, stage, epochs=lambda _: made.epoch, status=status)
    async with Endpoint(MetricsSettings(port=0), directory) as endpoint, client(endpoint) as http:
        endpoint.registry.register(runner.workers.collector)
        runner.workers.liveness.metrics = endpoint.url
        async with hosting(runner.run):
            yield http


async def scrape(http: httpx.AsyncClient) -> Samples:
    answer = await http.get("/metrics")
    assert answer.status_code == 200
    return scraped(answer.text)


def total(samples: Samples, name: str) -> float:
    return sum(count for (found, _), count in samples.items() if found == name)


@pytest.mark.real
async def test_a_scrape_tells_what_went_through_what_failed_and_what_is_waited_for(
    kafka: Kafka, tmp_path: Path, host: str
) -> None:
    async with road(kafka, tmp_path) as made, watched(kafka, made, host, tmp_path) as http:
        await made.send(20)
        await made.send(1, partition=1, value=b"bad")

        async def through() -> bool:
            found = await scrape(http)
            return (
                total(found, "rewatch_results_total") == 20
                and total(found, "rewatch_dead_letters_total") == 1
                and total(found, "rewatch_lag_records") == 0
            )

        await until(through)
        found = await scrape(http)
        assert value(found, "rewatch_records_total", stage="echo", topic=made.source) == 21
        assert value(found, "rewatch_results_total", stage="echo", topic=made.target) == 20
        assert value(found, "rewatch_dead_letters_total", stage="echo", kind="error") == 1
        assert value(found, "rewatch_handle_seconds_count", stage="echo") == 20
        assert value(found, "rewatch_commit_seconds_count", stage="echo") >= PARTITIONS
        assert value(found, "rewatch_acquires_total", stage="echo") == PARTITIONS
        assert value(found, "rewatch_fenced_total", stage="echo") == 0
        assert value(found, "rewatch_waiting_on", stage="echo", what="llm") == 0
        assert value(found, "rewatch_stalled", stage="echo") == 0
        assert total(found, "rewatch_build_info") == 1
        assert total(found, "process_resident_memory_bytes") > 0
        lag = [labels for name, labels in found if name == "rewatch_lag_records"]
        assert len(lag) == PARTITIONS, "every assigned partition, transaction markers at its end or not"
        status = json.loads((tmp_path / "status-1.json").read_text())
        assert (await http.get(status["metrics"])).status_code == 200

        (tmp_path / "away").touch()
        await made.send(7, partition=2)

        async def waits() -> bool:
            found = await scrape(http)
            here = {"stage": "echo", "topic": made.source, "partition": "2"}
            return (
                value(found, "rewatch_waiting_on", stage="echo", what="llm") == 1
                and value(found, "rewatch_in_hand", **here) == 7
                and value(found, "rewatch_lag_records", **here) == 7
            )

        await until(waits)
        (tmp_path / "away").unlink()

        async def caught_up() -> bool:
            found = await scrape(http)
            return (
                total(found, "rewatch_results_total") == 27
                and total(found, "rewatch_lag_records") == 0
                and value(found, "rewatch_waiting_on", stage="echo", what="llm") == 0
            )

        await until(caught_up)


@pytest.mark.real
async def test_two_workers_in_one_process_share_nothing(kafka: Kafka, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    async with road(kafka, tmp_path / "one") as one, road(kafka, tmp_path / "two") as two:
        other = Kafka(kafka.settings.model_copy(update={"system": f"{kafka.settings.system}x"}))
        async with (
            watched(kafka, one, "raw", tmp_path, 1) as first,
            watched(other, two, "raw", tmp_path, 2) as second,
        ):
            await one.send(4)
            await two.send(9)
            await asyncio.gather(one.until_echoed(), two.until_echoed())

            async def counted() -> bool:
                return [total(await scrape(http), "rewatch_results_total") for http in (first, second)] == [4, 9]

            await until(counted)
            listed = (await first.get("/targets")).json()
    assert [found["labels"]["process"] for found in listed] == ["status-1", "status-2"]


async def test_every_metric_has_help_and_a_unit_in_its_name_where_it_has_one(tmp_path: Path) -> None:
    endpoint = Endpoint(MetricsSettings(), tmp_path)
    endpoint.registry.register(StageCollector(Toy(), StageMetrics(Toy()), Liveness("toy")))
    families = list(parse_openmetrics(generate_openmetrics(endpoint.registry).decode()))
    assert len(families) > 15
    for family in families:
        assert family.documentation.strip(), family.name
        assert not family.unit or family.name.endswith(f"_{family.unit}"), family.name
        if family.type == "histogram":
            assert family.unit, family.name

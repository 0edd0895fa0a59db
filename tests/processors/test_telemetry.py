"""telemetry: what is read of GPUs, told of them, and what it does without one. No test here has seen a real card."""

import asyncio
import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import httpx
import psutil
import pynvml
import pytest
from aiokafka import TopicPartition

from infra import gpus, topology
from infra.config import Settings, load
from processors.sink import core as sink
from processors.telemetry import core
from processors.telemetry.core import Reading, Seen
from processors.telemetry.fakes import FakeNvml, gt_710, h100, rtx_a5500
from processors.telemetry.metrics import TelemetryMetrics
from processors.telemetry.nvml import Nvml
from processors.telemetry.outbox import Outbox
from processors.telemetry.service import Service
from processors.telemetry.settings import TelemetrySettings
from processors.telemetry.watch import Watch
from schemas.records import GpuMetrics
from streams import codec
from streams.kafka import Kafka, KafkaSettings
from streams.liveness import read_report
from streams.scraping import Endpoint, MetricsSettings
from streams.stages import Range
from streams.topics import partition_of
from tests import examples
from tests.conftest import PARTITIONS
from tests.streams.test_metrics import series, value

AT = 1_800_000_000_000
AWAY = Kafka(KafkaSettings(bootstrap_servers="127.0.0.1:1"))
OFTEN = TelemetrySettings().model_copy(update={"every_s": 0.02})


@pytest.fixture
def hanging() -> Iterator[FakeNvml]:
    """A driver that hangs from its first question on; the thread in it is let go at the end."""
    nvml = FakeNvml(h100())
    nvml.let_go.clear()
    yield nvml
    nvml.let_go.set()


async def until(condition: Callable[[], bool], within: float = 30) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.01)


def seen(*cards: Reading) -> Seen:
    return Seen(cards, driver="570.86.15", cuda="12.8")


def test_a_card_at_work_is_read_whole() -> None:
    (card,) = Nvml(FakeNvml(rtx_a5500())).look().cards
    assert (card.device, card.name, card.uuid) == (0, "NVIDIA RTX A5500", rtx_a5500().uuid)
    assert (card.utilization, card.memory_utilization) == (0.97, 0.63)
    assert (card.memory_used, card.memory_total) == (16_844_324_864, 25_757_220_864)
    assert card.memory_free == 8_912_896_000
    assert (card.temperature, card.power, card.power_limit) == (71.0, 229.48, 230.0)
    assert (card.clock_sm, card.clock_memory) == (1_695, 7_600)
    assert card.throttle_reasons == ("power cap",)
    assert (card.ecc_volatile, card.ecc_aggregate) == (None, None)


def test_processes_are_named_without_their_arguments() -> None:
    nvml = FakeNvml(rtx_a5500())
    nvml.names.pop(3_300)
    (card,) = Nvml(nvml).look().cards
    assert card.processes is not None
    assert [(p.pid, p.name) for p in card.processes] == [(901, "Xorg"), (3_181, "llama-server"), (3_300, None)]
    assert card.processes[1].memory == 15_204_352_000


def test_an_idle_card_is_not_held_down_and_has_no_process() -> None:
    (card,) = Nvml(FakeNvml(h100())).look().cards
    assert (card.throttle_reasons, card.processes) == ((), ())
    assert (card.ecc_volatile, card.ecc_aggregate) == (0, 2)


def test_what_a_card_does_not_tell_is_null_and_never_0() -> None:
    look = Nvml(FakeNvml(gt_710())).look()
    (card,) = look.cards
    assert (card.temperature, card.memory_total) == (44.0, 2_099_904_512)
    silent = ("utilization", "memory_utilization", "power", "power_limit", "clock_sm", "clock_memory")
    assert [getattr(card, name) for name in (*silent, "ecc_volatile", "throttle_reasons", "processes")] == [None] * 9
    (record,) = core.records(look, "tower", AT)
    assert math.isnan(record.utilization)
    assert math.isnan(record.power)
    assert (record.throttled, record.process_count, record.clock_sm) == (None, None, None)
    typed = sink.rows(Range("gpu_metrics", "e", 0, 0, 0), [examples.incoming("gpu_metrics", record)]).typed
    row = {name: values[0] for name, values in typed.columns.items()}
    assert [row[name] for name in (*silent, "throttled", "process_count")] == [None] * 8
    assert row["temperature"] == 44.0
    told = series(TelemetryMetrics(lambda: look, Outbox(AWAY)))
    assert not [name for name, _ in told if "power" in name or "utilization" in name or "throttled" in name]


def test_memory_that_a_card_does_not_tell_is_null_in_clickhouse_too() -> None:
    (record,) = core.records(seen(Reading(0, "GPU-1", "NVIDIA GB10")), "spark", AT)
    typed = sink.rows(Range("gpu_metrics", "e", 0, 0, 0), [examples.incoming("gpu_metrics", record)]).typed
    assert typed.columns["memory_used"] == typed.columns["memory_total"] == [None]


def test_drivers_of_before_535_tell_throttling_by_its_older_name() -> None:
    nvml = FakeNvml(rtx_a5500())
    nvml.old = True
    look = Nvml(nvml).look()
    assert (look.driver, look.cuda) == ("470.256.02", "11.4")
    assert look.cards[0].throttle_reasons == ("power cap",)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x0, ()),
        (0x1, ()),
        (0x4 | 0x20, ("power cap", "heat (driver)")),
        (0x8 | 0x40 | 0x80, ("hardware slowdown", "heat (hardware)", "power brake")),
        (0x400 | 0x4, ("power cap", "reason 0x400")),
    ],
)
def test_throttling_is_said_in_words(bits: int, words: tuple[str, ...]) -> None:
    assert core.throttle_words(bits) == words


def test_every_reason_of_the_library_has_a_word() -> None:
    known = {
        getattr(pynvml, name) for name in dir(pynvml) if name.startswith("nvmlClocksEventReason") and name[-3:] != "All"
    }
    assert {bit for bit in known if bit > 1} == core.REASONS.keys()


@pytest.mark.skipif(gpus.driver_found(), reason="a driver is installed here")
def test_no_driver_here_is_a_state_said_plainly() -> None:
    look = Nvml().look()  # the real library, which does not find the driver's
    assert (look.state, look.cards) == ("none", ())
    assert "no NVIDIA GPU" in core.sentence(core.report(look))
    assert asyncio.run(gpus.look()).state == "none"


def test_a_driver_that_is_installed_later_is_found() -> None:
    nvml = FakeNvml(h100(), installed=False)
    here = Nvml(nvml)
    assert here.look().state == "none"
    nvml.error = None
    assert here.look().state == "cards"


def test_a_driver_that_is_exchanged_is_opened_anew() -> None:
    nvml = FakeNvml(h100())
    here = Nvml(nvml)
    here.look()
    nvml.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    assert here.look().cards[0].error
    nvml.error = None
    assert here.look().cards[0].error is None
    assert nvml.opened == 2


def test_a_card_that_falls_off_the_bus_is_told_with_its_name_and_the_others_go_on() -> None:
    nvml = FakeNvml(h100(), rtx_a5500())
    here = Nvml(nvml)
    here.look()
    nvml.cards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
    lost, other = here.look().cards
    assert (lost.name, lost.uuid) == (h100().name, h100().uuid)
    assert "lost" in (lost.error or "").lower()
    assert (other.error, other.utilization) == (None, 0.97)
    assert nvml.opened == 1, "the others' handles stay as they are"
    told = series(TelemetryMetrics(here.look, Outbox(AWAY)))
    assert value(told, "rewatch_gpu_lost", gpu="0", uuid=h100().uuid) == 1
    assert value(told, "rewatch_gpu_lost", gpu="1", uuid=rtx_a5500().uuid) == 0
    assert value(told, "rewatch_gpus") == 1


def test_a_card_that_nvml_lists_no_more_is_told_as_lost() -> None:
    nvml = FakeNvml(h100(), rtx_a5500())
    here = Nvml(nvml)
    here.look()
    del nvml.cards[0]
    cards = {card.name: card for card in here.look().cards}
    assert cards[h100().name].error
    assert cards[rtx_a5500().name].error is None


def test_a_card_s_metrics_are_in_base_units() -> None:
    look = Nvml(FakeNvml(rtx_a5500())).look()
    told = series(TelemetryMetrics(lambda: look, Outbox(AWAY)))
    card = {"gpu": "0", "uuid": rtx_a5500().uuid}
    assert value(told, "rewatch_gpu_memory_used_bytes", **card) == 16_844_324_864
    assert value(told, "rewatch_gpu_utilization_ratio", **card) == 0.97
    assert value(told, "rewatch_gpu_clock_hertz", **card, clock="sm") == 1_695_000_000
    assert value(told, "rewatch_gpu_throttled", **card, reason="power cap") == 1
    assert value(told, "rewatch_gpu_throttled", **card, reason="heat (hardware)") == 0
    assert value(told, "rewatch_gpu_process_memory_bytes", **card, pid="3181", process="llama-server") == 15_204_352_000
    info = card | {"name": "NVIDIA RTX A5500", "driver": "570.86.15", "cuda": "12.8"}
    assert told["rewatch_gpu_info", frozenset(info.items())] == 1


def test_people_read_a_line_a_card() -> None:
    line = core.sentence(core.report(Nvml(FakeNvml(rtx_a5500(), gt_710())).look()))
    assert line == (
        "NVIDIA RTX A5500 (0): 8.3 GiB free of 24.0, 97% busy, 71 °C, 229 W, held down by power cap; "
        "NVIDIA GeForce GT 710 (1): 1.8 GiB free of 2.0, 44 °C; driver 570.86.15, CUDA 12.8"
    )


async def test_a_driver_that_hangs_is_said_and_no_second_thread_joins_the_first(hanging: FakeNvml) -> None:
    watch = Watch(Nvml(hanging), patience_s=0.05)
    first, second = await watch.look(), await watch.look()
    assert first.hung
    assert second.hung
    assert "has not answered" in second.why
    assert sum(thread.name == "nvml" for thread in threading.enumerate()) == 1
    hanging.let_go.set()
    await until(lambda: not watch.busy)
    assert (await watch.look()).state == "cards"


async def test_a_driver_that_hangs_does_not_stop_the_heartbeat_and_the_process_ends(
    hanging: FakeNvml, tmp_path: Path
) -> None:
    stop, status = asyncio.Event(), tmp_path / "status" / "telemetry.json"
    service = Service(Outbox(AWAY), OFTEN, Nvml(hanging), status=status, patience_s=0.05)
    running = asyncio.create_task(service.run(stop))
    await until(lambda: service.seen.hung)
    first = service.liveness.polled_at
    await until(lambda: service.liveness.polled_at > first)
    await until(lambda: (read_report(status) or {}).get("gpu", {}).get("state") == "hung")
    assert service.liveness.stall() is None
    stop.set()
    await asyncio.wait_for(running, 5)


async def test_without_a_gpu_it_says_so_looks_again_and_connects_to_nothing(tmp_path: Path) -> None:
    nvml = FakeNvml(rtx_a5500(), installed=False)
    stop, status = asyncio.Event(), tmp_path / "telemetry.json"
    outbox = Outbox(AWAY)
    service = Service(outbox, OFTEN, Nvml(nvml), status=status, again_s=0.02)
    running = asyncio.create_task(service.run(stop))
    await until(status.exists)
    report = read_report(status)
    assert report is not None
    assert (report["gpu"]["state"], report["waiting_on"], outbox.waiting_on) == ("none", [], None)
    nvml.error = None
    await until(lambda: service.seen.state == "cards")
    stop.set()
    await running


async def test_a_broker_that_is_away_costs_the_oldest_readings_and_they_are_counted() -> None:
    outbox = Outbox(AWAY, most=3, again_s=0.01)
    readings = [core.records(seen(Reading(0)), "tower", AT + n)[0] for n in range(5)]
    outbox.put(readings)
    assert outbox.dropped == 2
    stop = asyncio.Event()
    running = asyncio.create_task(outbox.run(stop))
    await until(lambda: outbox.waiting_on == "broker")
    stop.set()
    await running
    assert (outbox.sent, outbox.dropped) == (0, 5)


class _Slow:
    """A Kafka whose producer takes a reading when it is let, or never begins."""

    def __init__(self, *, begins: bool = True) -> None:
        self.begins = asyncio.Event()
        if begins:
            self.begins.set()
        self.let = asyncio.Event()
        self.asked: list[int] = []
        self.took: list[int] = []

    def producer(self) -> Self:
        return self

    async def start(self) -> None:
        await self.begins.wait()

    async def stop(self) -> None: ...

    async def send_and_wait(self, _: str, value: bytes, *__: object, **___: object) -> None:
        self.asked.append(len(value))
        await self.let.wait()
        self.took.append(len(value))


async def test_a_reading_that_is_being_sent_costs_no_other_one_when_the_buffer_fills() -> None:
    kafka = _Slow()
    outbox = Outbox(kafka, most=2)  # type: ignore[arg-type]
    readings = [core.records(seen(Reading(0)), "tower" * n, AT)[0] for n in range(1, 4)]
    outbox.put(readings[:1])
    stop = asyncio.Event()
    running = asyncio.create_task(outbox.run(stop))
    await until(lambda: kafka.asked)
    outbox.put(readings[1:])
    kafka.let.set()
    await until(lambda: outbox.sent + outbox.dropped >= 3)
    stop.set()
    await running
    assert (outbox.sent, outbox.dropped) == (3, 0)
    assert len(set(kafka.took)) == 3


async def test_a_stop_is_heeded_while_the_broker_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("processors.telemetry.outbox._LAST_S", 0.05)
    outbox = Outbox(_Slow(begins=False))  # type: ignore[arg-type]
    outbox.put(core.records(seen(Reading(0)), "tower", AT))
    stop = asyncio.Event()
    running = asyncio.create_task(outbox.run(stop))
    await asyncio.sleep(0)
    stop.set()
    await asyncio.wait_for(running, 2)
    assert outbox.dropped == 1


def test_cards_are_named_as_lost_where_nvml_is_shut_down_already(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(rtx_a5500())
    watched = Nvml(nvml)
    assert watched.look().state == "cards"

    def shut() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    monkeypatch.setattr(nvml, "nvmlShutdown", shut)
    nvml.error = pynvml.NVML_ERROR_UNINITIALIZED
    (card,) = watched.look().cards
    assert card.name == rtx_a5500().name
    assert "sees it no more" in str(card.error)


async def test_readings_are_on_the_log_by_host_and_scraped(kafka: Kafka, tmp_path: Path) -> None:
    stop = asyncio.Event()
    async with Endpoint(MetricsSettings(port=0), tmp_path) as endpoint:
        cards = Nvml(FakeNvml(rtx_a5500(), h100()))
        service = Service(Outbox(kafka), OFTEN, cards, host="tower", endpoint=endpoint, clock=lambda: AT / 1000)
        running = asyncio.create_task(service.run(stop))
        await until(lambda: service.outbox.sent >= 2)
        async with httpx.AsyncClient(trust_env=False) as client:
            assert endpoint.url is not None
            text = (await client.get(endpoint.url)).text
        stop.set()
        await running
    assert "rewatch_gpu_temperature_celsius" in text
    assert 'rewatch_waiting_on{stage="telemetry",what="broker"} 0.0' in text
    at = TopicPartition("gpu_metrics", partition_of("tower", PARTITIONS))
    found = [codec.decode(record, GpuMetrics) for record in await kafka.read([at]) if record.key == b"tower"]
    assert [(r.device, r.name, r.read_at) for r in found[:2]] == [(0, rtx_a5500().name, AT), (1, h100().name, AT)]
    assert len(found) == service.outbox.sent


def test_up_runs_it_where_a_driver_is_found_or_the_settings_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    for found in (True, False):
        monkeypatch.setattr(topology, "driver_found", lambda found=found: found)
        assert topology.processes(settings, "telemetry") == found
    monkeypatch.setenv("REWATCH_TELEMETRY__ENABLED", "true")
    assert topology.processes(load(), "telemetry") == 1
    monkeypatch.setattr(topology, "driver_found", lambda: True)
    monkeypatch.setenv("REWATCH_TELEMETRY__ENABLED", "false")
    assert topology.processes(load(), "telemetry") == 0


async def test_the_process_runs_without_a_gpu_and_obeys_a_stop(settings: Settings, tmp_path: Path) -> None:
    status = tmp_path / "telemetry.json"
    arguments = ("-m", "infra.worker", "telemetry", "--status", str(status), "--metrics-port", "0")
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments)
    await until(status.exists, within=60)
    report = read_report(status)
    assert report is not None
    assert report["stage"] == "telemetry"
    assert psutil.Process(process.pid).memory_info().rss < 200 * 2**20
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 20) == 0

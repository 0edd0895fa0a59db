"""What each stage counts of its own: by hand through the stage, then as a scrape tells it."""

import asyncio
from pathlib import Path

import httpx
import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from processors.analyze.fakes import FakeLlm
from processors.analyze.settings import LlmSettings
from processors.analyze.stage import build as build_analyze
from processors.batch.stage import build as build_batch
from processors.detect.detector import FakeDetector
from processors.detect.settings import DetectorSettings
from processors.detect.stage import DetectStage
from processors.ingest import core
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.http import build_app
from processors.ingest.settings import UploadSettings
from processors.sink.fakes import MemoryStore
from processors.sink.stage import SinkStage
from streams import codec
from streams.claims import ClaimStore
from streams.messages import Emit, Incoming
from streams.stages import Range
from tests import examples
from tests.processors import test_detect
from tests.processors.analyze_samples import answer, context
from tests.processors.batch_kit import DEFAULT, T0, box, on_log, seen
from tests.processors.ingest_kit import NOW, appenders, jpeg


def counted(collector: Collector, name: str) -> dict[tuple[str, ...], float]:
    """A metric's series, by their labels' values in the order of the labels' names; those at 0 are left out."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        tuple(sample.labels[label] for label in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if sample.name == name and sample.value
    }


def as_incoming(emit: Emit) -> Incoming:
    return Incoming(emit.topic, "e", 0, 0, emit.key, emit.value, emit.headers)


async def test_detect_counts_images_and_how_full_batches_run(tmp_path: Path) -> None:
    stage = DetectStage(FakeDetector(), ClaimStore(str(tmp_path)), DetectorSettings(batch_size=2, wait_ms=500))
    frames = [as_incoming(codec.emit("frames", test_detect.frame(test_detect.jpeg(shade)))) for shade in range(3)]
    results = await asyncio.gather(*(stage.handle(one) for one in frames))
    await stage.close()
    assert counted(stage.metrics, "rewatch_detect_images_total") == {(): 3}
    assert counted(stage.metrics, "rewatch_detect_batch_images_bucket") == {
        ("1.0",): 1,
        **{(le,): 2 for le in ("2.0", "4.0", "8.0", "16.0", "32.0", "64.0", "128.0", "+Inf")},
    }
    assert counted(stage.metrics, "rewatch_detect_batch_seconds_count") == {(): 2}
    assert results[0][0].since == 9, "a result's age counts from the frame's arrival"


def test_batch_counts_windows_by_what_closed_them() -> None:
    stage = build_batch(DEFAULT, lambda _: None)
    fold = stage.open(3, "e1", [])
    fold.feed(on_log(0, seen(0, T0, box(0, score=0.99))))  # seen for sure: closed at once
    fold.feed(on_log(1, seen(1, T0 + 1000, box(300))))
    (emit,) = fold.feed(on_log(2, seen(2, T0 + 60_000)))
    metrics = stage.metrics  # type: ignore[attr-defined]
    assert sum(counted(metrics, "rewatch_batch_windows_total").values()) == 2
    assert len(counted(metrics, "rewatch_batch_windows_total")) == 2
    assert counted(metrics, "rewatch_batch_window_frames_count") == {(): 2}
    assert emit.since == T0 + 1000, "a window's age counts from its last frame"


async def test_analyze_counts_what_it_forgave() -> None:
    async def script(_messages: object) -> str:
        return f"```json\n{answer(72.0)}\n```"

    stage = build_analyze(LlmSettings(), llm=FakeLlm(script))
    await stage.handle(as_incoming(codec.emit("contexts", context())))
    counts = counted(stage.metrics, "rewatch_llm_forgiven_total")  # type: ignore[attr-defined]
    assert counts == {("fence",): 1, ("score as decimal",): 1}


async def test_analyze_counts_verdicts_tokens_repairs_failures_and_slots() -> None:
    answers = iter(["no JSON", answer(71), answer(10)])
    release = asyncio.Event()

    async def script(_messages: object) -> str:
        text = next(answers)
        if text == answer(10):
            await release.wait()
        return text

    stage = build_analyze(LlmSettings(slots=2), llm=FakeLlm(script))
    metrics = stage.metrics  # type: ignore[attr-defined]
    one = as_incoming(codec.emit("contexts", context()))
    (emit,) = await stage.handle(one)
    assert counted(metrics, "rewatch_analyze_events_total") == {("high",): 1}
    assert counted(metrics, "rewatch_llm_repairs_total") == {(): 1}
    tokens = counted(metrics, "rewatch_llm_tokens_total")
    assert tokens["completion",] == len(answer(71))
    assert tokens["prompt",] > 100
    assert counted(metrics, "rewatch_llm_seconds_count") == {(): 1}
    assert emit.since == context().batch.ended_at
    judging = asyncio.create_task(stage.handle(one))
    while not counted(metrics, "rewatch_llm_slots_busy"):
        await asyncio.sleep(0)
    assert counted(metrics, "rewatch_llm_slots_busy") == {(): 1}
    assert counted(metrics, "rewatch_llm_slots") == {(): 2}
    release.set()
    await judging
    assert counted(metrics, "rewatch_llm_slots_busy") == {}


async def test_sink_counts_rows_by_table_and_the_age_of_the_oldest() -> None:
    store = MemoryStore()
    stage = SinkStage(store, clock=lambda: examples.frame.arrived_at / 1000 + 3)
    frames = [
        examples.incoming("frames", msgspec.structs.replace(examples.frame, frame_id=f"f{offset}"), offset=offset)
        for offset in (4, 5, 6)
    ]
    store.poison.add("f5")
    await stage.insert(Range("frames", examples.EPOCH, examples.PARTITION, 4, 6), frames)
    rows = counted(stage.metrics, "rewatch_sink_rows_total")
    assert rows == {("log",): 4, ("frames",): 2, ("sink_progress",): 1}, "the refused row's reason is a row of log"
    assert counted(stage.metrics, "rewatch_sink_refused_rows_total") == {("frames",): 1}
    assert counted(stage.metrics, "rewatch_sink_oldest_row_seconds_sum") == {(): 6}, "two inserts of typed rows"
    assert counted(stage.metrics, "rewatch_sink_insert_seconds_count") == {(): 5}


async def test_ingest_counts_images_by_camera_way_in_and_outcome_and_answers_by_status(tmp_path: Path) -> None:
    made = appenders(MemoryLog(), tmp_path, cameras=MemoryCameras("front"))
    app = made.metrics.counting(build_app(made, UploadSettings(max_waiting=1)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as http:
        for data in (jpeg(1), jpeg(1), b"no image"):
            await http.post("/api/upload?camera=front", content=data)
        for stranger in ("nobody", "../../etc", "x" * 500):
            await http.post(f"/api/upload?camera={stranger}", content=jpeg(1))
        entered, release = asyncio.Event(), asyncio.Event()

        async def slowly():
            yield jpeg(2)
            entered.set()
            await release.wait()

        slow = asyncio.create_task(http.post("/api/upload?camera=front", content=slowly()))
        await entered.wait()
        assert (await http.post("/api/upload?camera=front", content=jpeg(3))).status_code == 429
        release.set()
        await slow
        await http.get("/health")
    bad = core.Submission("front", b"GIF89a", "folder", "a.jpg", int(NOW * 1000))
    await made.append("front", [await made.reject(bad, core.RejectedError("not a JPEG"), 6)])
    await made.append("front", [made.end_of_stream("front")])
    await made.close()
    images = counted(made.metrics, "rewatch_ingest_images_total")
    assert images == {
        ("front", "accepted", "upload"): 2,
        ("front", "unchanged", "upload"): 1,
        ("front", "rejected", "upload"): 1,
        ("front", "shed", "upload"): 1,
        ("front", "rejected", "folder"): 1,
        ("", "rejected", "upload"): 2,
    }
    answers = counted(made.metrics, "rewatch_ingest_responses_total")
    assert answers == {("200",): 3, ("400",): 3, ("404",): 1, ("429",): 1}

"""The detector's service: what clients of RT-DETR services send and get, its limits, its stop, and a mixed load."""

import asyncio
import base64
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest
from PIL import Image
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from processors.detect.detector import Detector, FakeDetector
from processors.detect.service import gpu
from processors.detect.service.forms import form_of
from processors.detect.service.room import Room
from processors.detect.service.service import Service
from processors.detect.settings import DetectorSettings, ModelError, ServiceSettings
from schemas.records import Box
from streams.serving import SettingsError
from tests.bench.service_load import LIMITS, SETTINGS, bomb, bound_mb, picture, run, sees

SIZE = (40, 30)
BRIGHT = picture(SIZE)
KEY = "k" * 16


class Held(FakeDetector):
    """Answers when it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.asked = threading.Event()

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        self.asked.set()
        assert self.let_go.wait(30)
        return super().detect(images)


class Unsure(FakeDetector):
    """Sees a cat at 0.9, another at 0.5 and a dog at 0.1."""

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        scores = {"cat": 0.9, "lynx": 0.5, "dog": 0.1}
        return [
            tuple(Box(label=label, score=score, x=1, y=2, width=3, height=4) for label, score in scores.items())
            for _ in images
        ]


class Allergic(FakeDetector):
    """Fails on whatever holds an image of one pixel."""

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        if any(image.size == (1, 1) for image in images):
            raise RuntimeError("out of shape")
        return super().detect(images)


@asynccontextmanager
async def served(
    load: Callable[[], Detector] = FakeDetector, *, warm: bool = True, **service: object
) -> AsyncIterator[tuple[httpx.AsyncClient, Service, asyncio.Event]]:
    """The service on a free port, a client of it, and what stops it."""
    settings = DetectorSettings(service=ServiceSettings(**{"port": 0} | service), wait_ms=1)
    made, stop = Service(load, settings), asyncio.Event()
    running = asyncio.create_task(made.run(stop))
    try:
        async with httpx.AsyncClient(base_url=await made.url, timeout=30, trust_env=False) as http:
            if warm:
                await made.warm.wait()
            yield http, made, stop
    finally:
        stop.set()
        await running


def one(data: bytes = BRIGHT, name: str = "file") -> dict[str, tuple[str, bytes]]:
    return {name: ("a.jpg", data)}


def several(*data: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (f"{n}.jpg", one_of_them)) for n, one_of_them in enumerate(data)]


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with served() as (client, _, _):
        yield client


async def test_one_picture_is_answered_as_clients_know_it(http: httpx.AsyncClient) -> None:
    answer = await http.post("/detect", files=one())
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said.pop("inference_time_ms") >= 0
    assert said == {
        "detections": [
            {"class": "person", "confidence": 0.9, "bbox": {"x": 0, "y": 0, "width": SIZE[0], "height": SIZE[1]}}
        ],
        "image_width": SIZE[0],
        "image_height": SIZE[1],
        "model": "fake",
        "model_digest": "0" * 64,
        "runtime": "fake",
    }


@pytest.mark.parametrize("prefix", ["", "data:image/jpeg;base64,"])
@pytest.mark.parametrize("key", ["image", "image_base64"])
async def test_one_picture_in_base64(http: httpx.AsyncClient, key: str, prefix: str) -> None:
    answer = await http.post("/detect", json={key: prefix + base64.encodebytes(BRIGHT).decode()})
    assert sees(answer.json(), SIZE), answer.text


async def test_a_png_with_transparency_is_a_picture_too(http: httpx.AsyncClient) -> None:
    data = picture(SIZE, kind="PNG")
    assert sees((await http.post("/detect", files=one(data))).json(), SIZE)


async def test_a_batch_is_answered_in_order_and_its_bad_files_in_their_places(http: httpx.AsyncClient) -> None:
    sizes = [(10, 20), (30, 40), (50, 60)]
    good = [picture(size, bright=bright) for size, bright in zip(sizes, [True, False, True], strict=True)]
    answer = await http.post("/detect/batch", files=several(good[0], b"no picture", good[1], good[2][:-60], good[2]))
    assert answer.status_code == 200
    said = answer.json()
    assert said["num_images"] == 5
    first, bad, second, cut, third = said["results"]
    assert sees(first, sizes[0])
    assert sees(second, sizes[1], bright=False)
    assert sees(third, sizes[2])
    assert bad == {"filename": "1.jpg", "error": "neither a JPEG nor a PNG", "status": 400}
    assert "not a readable image" in cut["error"]
    assert [one["filename"] for one in said["results"]] == [f"{n}.jpg" for n in range(5)]
    assert said["total_inference_time_ms"] == pytest.approx(
        sum(one.get("inference_time_ms", 0) for one in said["results"]), abs=0.01
    )


async def test_a_batch_in_base64(http: httpx.AsyncClient) -> None:
    answer = await http.post("/detect/batch", json={"images": [base64.b64encode(BRIGHT).decode(), "*"]})
    good, bad = answer.json()["results"]
    assert sees(good, SIZE)
    assert bad["status"] == 400


async def test_boxes_below_a_half_are_given_to_those_who_ask_for_them() -> None:
    async with served(Unsure) as (http, _, _):

        async def seen(query: str) -> list[str]:
            answer = await http.post(f"/detect{query}", files=one())
            return [one["class"] for one in answer.json()["detections"]]

        assert await seen("") == ["cat", "lynx"]
        assert await seen("?min_confidence=0.1") == ["cat", "lynx", "dog"]
        assert await seen("?min_confidence=0.51") == ["cat"]
    async with served(Unsure, min_confidence=0.9) as (http, _, _):
        assert await seen("") == ["cat"]


async def test_a_picture_that_the_model_cannot_bear_takes_no_other_along() -> None:
    async with served(Allergic) as (http, _, _):
        good, bad = (await http.post("/detect/batch", files=several(BRIGHT, picture((1, 1))))).json()["results"]
        assert sees(good, SIZE)
        assert (bad["status"], "log says why" in bad["error"]) == (500, True)
        assert (await http.post("/detect", files=one(picture((1, 1))))).status_code == 500


JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        ({"files": one(b"")}, 400, "empty"),
        ({"files": one(b"GIF89a")}, 400, "neither a JPEG nor a PNG"),
        ({"files": one(BRIGHT[:-60])}, 400, "not a readable image"),
        ({"files": one(bomb(60_000, 60_000))}, 400, "max_pixels"),
        ({"files": one(bomb(1, LIMITS.max_pixels + 1))}, 400, "max_pixels"),
        ({"files": one(BRIGHT[:2] + b"\xff\xda" * 101)}, 400, "scans"),
        ({"files": one(name="picture")}, 400, "a part named `file`"),
        ({"files": several(BRIGHT, BRIGHT)}, 413, "/detect/batch"),
        ({"content": BRIGHT}, 400, "multipart/form-data"),
        ({"content": b"--x\r\nnonsense", "headers": FORM}, 400, "multipart form"),
        ({"content": b"--x\r\n\r\nabc", "headers": FORM}, 400, "cut off"),
        ({"content": b"", "headers": FORM}, 400, "cut off"),
        ({"content": b'{"image":', "headers": JSON}, 400, "not JSON"),
        ({"content": b'{"x":' + b"[" * 100_000, "headers": JSON}, 400, "not JSON"),
        ({"content": b'{"image": "\xff"}', "headers": JSON}, 400, "not JSON"),
        ({"json": {"image": [1]}}, 400, "not JSON"),
        ({"json": {"image": "*"}}, 400, "empty"),
        ({"json": {"image": "abcde"}}, 400, "not base64"),
        ({"json": {}}, 400, "no file"),
        ({"json": {"images": ["a"] * 1000}}, 413, "more than one file"),
        ({"files": one(bytes(LIMITS.max_bytes + 1))}, 413, "max_bytes"),
        ({"json": {"image": "A" * 4 * (LIMITS.max_bytes // 3 + 1)}}, 413, "max_bytes"),
        ({"content": b"x" * (LIMITS.max_bytes * 2), "headers": FORM}, 413, "max_bytes"),
        ({"params": {"min_confidence": "2"}, "files": one()}, 400, "min_confidence"),
        ({"params": {"min_confidence": "nan"}, "files": one()}, 400, "min_confidence"),
        ({"headers": {"origin": "http://elsewhere"}, "files": one()}, 403, "web pages"),
    ],
)
async def test_what_is_wrong_is_said(sent: dict[str, object], status: int, says: str) -> None:
    async with served(**LIMITS.model_dump()) as (http, _, _):
        answer = await http.post("/detect", **sent)
        assert answer.status_code == status, answer.text
        assert says in answer.json()["error"]
        assert (await http.post("/detect", files=one())).status_code == 200  # and it goes on


def test_json_of_nothing_but_little_strings_is_refused_before_it_becomes_many_times_its_size() -> None:
    form = form_of("application/json", LIMITS, LIMITS.max_files, lambda _: None)
    form.feed(b'{"images": [' + b'"ab",' * 200_000 + b'""]}')  # decoded: 12 MB
    tracemalloc.start()
    with pytest.raises(HTTPException, match="more than 16 files"):
        form.end()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


async def test_a_file_that_is_too_long_is_refused_in_its_place() -> None:
    async with served(**LIMITS.model_dump()) as (http, _, _):
        answer = await http.post("/detect/batch", files=several(bytes(LIMITS.max_bytes + 1), BRIGHT))
        bad, good = answer.json()["results"]
        assert (bad["status"], "max_bytes" in bad["error"]) == (413, True)
        assert sees(good, SIZE)
        answer = await http.post("/detect/batch", files=several(*[BRIGHT] * (LIMITS.max_files + 1)))
        assert (answer.status_code, answer.json()["error"]) == (413, "more than 16 files")


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"--x\r\n"
        await asyncio.sleep(0.5)

    async with served(timeout_s=0.1) as (http, _, _):
        answer = await http.post("/detect", content=slowly(), headers=FORM)
        assert (answer.status_code, "detector.service.timeout_s" in answer.text) == (408, True)


async def test_more_than_it_may_hold_is_told_to_come_back() -> None:
    model = Held()
    async with served(lambda: model, max_waiting=2, max_files=2) as (http, _, _):
        waiting = asyncio.create_task(http.post("/detect/batch", files=several(BRIGHT, BRIGHT)))
        await asyncio.to_thread(model.asked.wait)
        answer = await http.post("/detect", files=one())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "detector.service.max_waiting" in answer.json()["error"]
        model.let_go.set()
        assert (await waiting).status_code == 200
        assert (await http.post("/detect", files=one())).status_code == 200


async def test_bodies_have_so_much_room_together() -> None:
    model = Held()
    long = BRIGHT + bytes(900_000)
    async with served(lambda: model, max_bytes=1_000_000, bodies_mb=3) as (http, _, _):
        waiting = [asyncio.create_task(http.post("/detect", files=one(long))) for _ in range(3)]
        await asyncio.to_thread(model.asked.wait)

        async def refused() -> bool:
            answer = await http.post("/detect", files=one(long))
            return answer.status_code == 429 and "detector.service.bodies_mb" in answer.json()["error"]

        assert await refused()
        model.let_go.set()
        assert {(await answer).status_code for answer in waiting} <= {200, 429}
        assert (await http.post("/detect", files=one(long))).status_code == 200
        answer = await http.post("/detect/batch", files=several(long, long, long, long))
        assert (answer.status_code, "in one request" in answer.text) == (413, True)  # to come back would not help


async def test_a_model_that_hangs_is_not_waited_for_without_end() -> None:
    model = Held()
    async with served(lambda: model, deadline_s=0.2) as (http, _, _):
        answer = await http.post("/detect", files=one())
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert "detector.service.deadline_s" in answer.json()["error"]
        model.let_go.set()


async def test_whoever_left_is_not_inferred_and_holds_nothing() -> None:
    model = Held()
    async with served(lambda: model, max_waiting=2, max_files=2) as (http, _, _):
        first = asyncio.create_task(http.post("/detect", files=one()))
        await asyncio.to_thread(model.asked.wait)
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/detect", files=one(), timeout=0.2)
        async with asyncio.timeout(10):
            while "rewatch_detector_in_hand 1.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.01)
        model.let_go.set()
        assert (await first).status_code == 200
        assert "rewatch_detect_images_total 1.0" in (await http.get("/metrics")).text


async def test_it_is_healthy_when_the_model_is_warm_and_not_before() -> None:
    loaded = threading.Event()

    def load() -> Detector:
        assert loaded.wait(30)
        return FakeDetector()

    async with served(load, warm=False) as (http, service, _):
        answer = await http.get("/health")
        assert answer.status_code == 503
        assert answer.json() == {
            "status": "loading",
            "model_loaded": False,
            "model_name": None,
            "model_digest": None,
            "runtime": None,
            "device": "cpu",
            "cuda_available": answer.json()["cuda_available"],
            "vram_used_gb": None,
            "gpu_utilization": None,
            "temperature": None,
            "power_watts": None,
        }
        answer = await http.post("/detect", files=one())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        loaded.set()
        await service.warm.wait()
        answer = await http.get("/health")
        assert answer.status_code == 200
        said = answer.json()
        assert (said["status"], said["model_loaded"]) == ("healthy", True)
        assert (said["model_name"], said["model_digest"], said["runtime"]) == ("fake", "0" * 64, "fake")


async def test_a_model_that_cannot_be_loaded_ends_it() -> None:
    def load() -> Detector:
        raise ModelError("no such model (detector.model_path)")

    service = Service(load, DetectorSettings(service=ServiceSettings(port=0)))
    with pytest.raises(ModelError, match=r"detector\.model_path"):
        await service.run(asyncio.Event())


async def test_a_stop_answers_what_is_in_hand_and_takes_no_more() -> None:
    model = Held()
    async with served(lambda: model) as (http, service, stop):
        waiting = asyncio.create_task(http.post("/detect", files=one()))
        await asyncio.to_thread(model.asked.wait)
        stop.set()
        async with asyncio.timeout(5):
            while (health := await http.get("/health")).status_code == 200:
                await asyncio.sleep(0.01)
        assert health.json()["status"] == "stopping"
        for _ in range(5):  # for as long as something is in hand it says so, on new connections too
            await asyncio.sleep(0.1)
            assert (await http.get("/health", headers={"connection": "close"})).status_code == 503
        answer = await http.post("/detect", files=one())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        model.let_go.set()
        assert sees((await waiting).json(), SIZE)
    assert not service.torn


async def test_a_stop_waits_for_no_model_that_hangs() -> None:
    model = Held()
    began = asyncio.get_running_loop().time()
    async with served(lambda: model, drain_s=0.2) as (http, service, stop):
        waiting = asyncio.create_task(http.post("/detect", files=one()))
        await asyncio.to_thread(model.asked.wait)
        stop.set()
        answer = await waiting
        assert (answer.status_code, answer.json()["error"]) == (503, "the detector is stopping")
    assert asyncio.get_running_loop().time() - began < 5
    assert service.torn
    model.let_go.set()


async def test_a_stop_waits_for_no_model_that_loads() -> None:
    loaded = threading.Event()

    def load() -> Detector:
        loaded.wait(30)
        return FakeDetector()

    async with served(load, warm=False) as (_, service, stop):
        stop.set()
    assert service.torn
    loaded.set()


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
async def test_with_a_key_set_nobody_without_it_gets_an_answer(headers: dict[str, str]) -> None:
    async with served(api_key=KEY) as (http, _, _):
        for path in ("/detect", "/detect/batch"):
            answer = await http.post(path, files=one())
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "detector.service.api_key" in answer.json()["error"]
            assert (await http.post(path, files=one(), headers={"x-api-key": "wrong"})).status_code == 401
            assert (await http.post(path, files=one(), headers=headers)).status_code == 200
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/metrics", headers=headers)).status_code == 200
        assert (await http.get("/health")).status_code == 200  # whoever watches it needs no key


@pytest.mark.parametrize(
    ("service", "says"),
    [
        ({"host": "0.0.0.0"}, "detector.service.api_key"),
        ({"max_waiting": 4}, "max_files"),
        ({"bodies_mb": 8}, "three times max_bytes"),
        ({"pixels_mb": 100}, "at least 500"),
    ],
)
def test_settings_that_cannot_hold_are_refused(service: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ServiceSettings(**service)


async def test_a_port_that_is_taken_is_named() -> None:
    async with served() as (http, _, _):
        taken = DetectorSettings(service=ServiceSettings(port=http.base_url.port))
        with pytest.raises(SettingsError, match=r"detector\.service\.port"):
            await Service(FakeDetector, taken).run(asyncio.Event())


async def test_its_metrics_count_answers_files_and_batches(http: httpx.AsyncClient) -> None:
    await http.post("/detect/batch", files=several(BRIGHT, b""))
    await http.post("/detect", files=one(b""))
    await http.get("/etc/passwd")
    told = (await http.get("/metrics")).text
    for line in (
        'rewatch_detector_responses_total{code="200",path="/detect/batch"} 1.0',
        'rewatch_detector_responses_total{code="400",path="/detect"} 1.0',
        'rewatch_detector_responses_total{code="404",path="other"} 1.0',
        'rewatch_detector_files_total{outcome="answered"} 1.0',
        'rewatch_detector_files_total{outcome="refused"} 2.0',
        "rewatch_detect_images_total 1.0",
        "rewatch_detector_in_hand 0.0",
    ):
        assert line in told


async def test_room_that_is_given_while_a_cancelled_one_still_waits_is_counted_right() -> None:
    room = Room(10)
    assert room.grab(8)
    waiting = asyncio.create_task(room.take(4))
    await asyncio.sleep(0)
    waiting.cancel()
    room.give(8)  # before the cancelled one runs: its turn is taken off and goes to nobody
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert room.taken == 0


async def test_a_driver_that_hangs_costs_one_thread_and_no_health() -> None:
    let, asked = threading.Event(), []

    def hangs(runtime: str) -> dict[str, object]:
        asked.append(threading.current_thread())
        let.wait(20)
        return {"device": runtime}

    probe = gpu.Probe(hangs, patience_s=0.05)
    for _ in range(3):
        assert (await probe.readings("torch-cuda"))["temperature"] is None
    assert [thread.daemon for thread in asked] == [True]
    let.set()
    await asyncio.to_thread(asked[0].join)
    await asyncio.sleep(0)
    assert await probe.readings("torch-cuda") == {"device": "torch-cuda"}


async def test_room_is_given_in_the_order_of_asking_and_comes_back_from_those_who_left() -> None:
    room = Room(10)
    assert room.grab(7)
    large, small = asyncio.create_task(room.take(10)), asyncio.create_task(room.take(2))
    await asyncio.sleep(0)
    assert not room.grab(1)  # nobody overtakes
    large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    await small
    assert room.taken == 9
    waiting = asyncio.create_task(room.take(4))
    await asyncio.sleep(0)
    room.give(7)
    waiting.cancel()  # at the very moment when its turn came
    await asyncio.gather(waiting, return_exceptions=True)
    assert room.taken == 2


async def test_mixed_requests_meet_no_fault_and_bounded_memory_and_each_good_one_is_answered_right() -> None:
    """The whole: `python -m tests.bench.service_load --requests 10000`."""
    report = await run(500)
    assert report.wrong == []
    assert not [status for status in report.statuses if status.endswith(" 500")]
    assert report.peak_mb - report.at_rest_mb < bound_mb(SETTINGS.service)


def test_the_settings_go_to_the_process_of_the_load_as_they_are() -> None:
    told = json.dumps(SETTINGS.model_dump(mode="json", exclude={"api_key"}))
    assert DetectorSettings.model_validate_json(told) == SETTINGS

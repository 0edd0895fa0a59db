"""The stage's client of a detector service: tries again, leaves alone, blames nobody wrongly; and our own service."""

import asyncio
import json
import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest
from PIL import Image

from processors.detect.breaker import Breaker
from processors.detect.core import MIN_SCORE
from processors.detect.detector import Batcher, FakeDetector
from processors.detect.http_detector import HttpDetector, _jpeg
from processors.detect.service.service import Service
from processors.detect.settings import ClientSettings, DetectorSettings, ServiceSettings
from processors.detect.stage import DetectStage
from schemas.records import Box, Detections
from streams import codec
from streams.claims import ClaimStore
from streams.errors import UnavailableError, UnprocessableError
from tests.processors.test_detect import as_incoming, frame, jpeg

PICTURE = Image.new("RGB", (8, 8))
BOX = {"class": "dog", "confidence": 0.7, "bbox": {"x": 1, "y": 2, "width": 3, "height": 4}}
DOG = Box(label="dog", score=0.7, x=1, y=2, width=3, height=4)


class Clock:
    """Seconds that pass when they are slept."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.slept.append(seconds)
        self.now += seconds
        return False


class Server:
    """Answers one after another; the last one for ever."""

    def __init__(self, *answers: httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200, json={"model_name": "rtdetr_r50vd"})
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer


def client(server: Server, clock: Clock | None = None, **settings: float) -> HttpDetector:
    clock = clock or Clock()
    section = DetectorSettings(url="http://detector", client=ClientSettings(**settings))
    detector = HttpDetector(section, transport=httpx.MockTransport(server), clock=clock)
    detector._closed.wait = clock.wait  # type: ignore[assignment, method-assign]
    return detector


def good(request: httpx.Request) -> httpx.Response:
    """A dog in each picture."""
    count = request.content.count(b'name="files"')
    return httpx.Response(200, json={"results": [{"detections": [BOX]}] * count})


def error(status: int = 400) -> httpx.Response:
    return httpx.Response(200, json={"results": [{"error": "the model choked", "status": status}]})


def test_a_detector_service_answers_in_its_known_shape() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.url.path, float(request.url.params["min_confidence"])) == ("/detect/batch", MIN_SCORE)
        return httpx.Response(200, json={"results": [{"detections": [BOX, BOX | {"confidence": 0.05}]}]})

    detector = client(Server(answer))
    assert detector.detect([PICTURE]) == [(DOG,)]
    assert (detector.name, detector.digest, detector.runtime) == ("rtdetr_r50vd", "", "http")


def test_the_boxes_are_of_the_model_that_the_answer_names_whenever_it_changes() -> None:
    def by(model: str, digest: str) -> httpx.Response:
        told = {"detections": [], "model": model, "model_digest": digest, "runtime": "openvino-cpu"}
        return httpx.Response(200, json={"results": [told]})

    detector = client(Server(by("r18", "a" * 64), by("r50", "b" * 64)))
    detector.detect([PICTURE])
    assert (detector.name, detector.digest, detector.runtime) == ("r18", "a" * 64, "http:openvino-cpu")
    detector.detect([PICTURE])
    assert (detector.name, detector.digest) == ("r50", "b" * 64)


@pytest.mark.parametrize(
    "passing",
    [
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("cut"),
        httpx.Response(502),
        httpx.Response(504),
        httpx.Response(429, headers={"retry-after": "1"}),
    ],
    ids=repr,
)
def test_what_passes_within_seconds_is_tried_again(passing: httpx.Response | Exception) -> None:
    clock = Clock()
    server = Server(passing, passing, good)
    assert client(server, clock).detect([PICTURE]) == [(DOG,)]
    assert len(server.asked) == 3
    assert sum(clock.slept) < 5
    if isinstance(passing, httpx.Response) and "retry-after" in passing.headers:
        assert all(seconds >= 1 for seconds in clock.slept)  # as long as it was told
    else:
        assert 0.1 < clock.slept[0] < 0.4 < clock.slept[1] * 2  # longer and longer, never all at once


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError("refused"),
        httpx.Response(503),
        httpx.Response(401, json={"error": "an API key is needed"}),
        httpx.Response(404),
        httpx.Response(200, content=b"<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"results": []}),  # one is missing
        httpx.Response(200, json={"results": [{"detections": 7}]}),
        httpx.Response(200, json={"results": [None]}),
    ],
    ids=repr,
)
def test_what_lasts_is_waited_for_and_no_frame_is_blamed(answer: httpx.Response | Exception) -> None:
    server = Server(answer)
    with pytest.raises(UnavailableError, match="RTDETR_URL") as raised:
        client(server).detect([PICTURE])
    assert raised.value.waiting_on == "detector"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "odd", [{"confidence": 97}, {"confidence": math.nan}, {"bbox": {"x": math.inf, "y": 1, "width": 1, "height": 1}}]
)
def test_a_detector_service_that_answers_nonsense_is_waited_for(odd: dict[str, object]) -> None:
    """Every frame would be refused for it: whoever set it up must hear of it first."""
    answer = httpx.Response(200, content=json.dumps({"results": [{"detections": [BOX | odd]}]}))
    with pytest.raises(UnavailableError, match="RTDETR_URL"):
        client(Server(answer)).detect([PICTURE])


def test_a_service_that_failed_five_times_is_left_alone_then_tried_once() -> None:
    clock = Clock()
    server = Server(httpx.ConnectError("refused"))
    detector = client(server, clock)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            detector.detect([PICTURE])
    assert len(server.asked) == 5
    with pytest.raises(UnavailableError, match=r"not asked for .* s more: ConnectError"):
        detector.detect([PICTURE])
    assert len(server.asked) == 5  # nothing went out
    clock.now += 16
    with pytest.raises(UnavailableError):
        detector.detect([PICTURE])
    assert len(server.asked) == 6  # one trial, and closed to all again
    with pytest.raises(UnavailableError, match="not asked"):
        detector.detect([PICTURE])
    clock.now += 16
    server.answers = [good]
    assert detector.detect([PICTURE]) == [(DOG,)]
    server.answers = [httpx.ConnectError("refused"), good]
    assert detector.detect([PICTURE]) == [(DOG,)]  # closed: tried again as before


def test_an_answer_that_does_not_come_is_waited_for_once_and_not_by_the_next_batch() -> None:
    server = Server(httpx.ReadTimeout("60 s"))
    detector = client(server)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            detector.detect([PICTURE])
    assert len(server.asked) == 1


def test_a_service_that_names_a_time_is_not_asked_before_it() -> None:
    clock = Clock()
    server = Server(httpx.Response(503, headers={"retry-after": "30"}), good)
    detector = client(server, clock)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            detector.detect([PICTURE])
        clock.now += 14
    assert len(server.asked) == 1
    clock.now += 3
    assert detector.detect([PICTURE]) == [(DOG,)]


@pytest.mark.parametrize("refusal", [error(), httpx.Response(400), httpx.Response(413), httpx.Response(422)], ids=repr)
def test_a_picture_that_is_refused_while_others_are_taken_cannot_be_processed(refusal: httpx.Response) -> None:
    with pytest.raises(UnprocessableError, match="no such picture"):
        client(Server(refusal, good)).detect([PICTURE])


@pytest.mark.parametrize("fault", [error(500), httpx.Response(500)], ids=repr)
def test_a_picture_that_breaks_the_service_is_tried_as_often_as_a_record_is(fault: httpx.Response) -> None:
    """An ordinary error: the stage counts attempts, and makes a dead letter of the third."""
    with pytest.raises(RuntimeError, match="failed on this picture"):
        client(Server(fault, good)).detect([PICTURE])


@pytest.mark.parametrize("refusal", [error(), error(500), httpx.Response(400), httpx.Response(500)], ids=repr)
def test_a_service_that_refuses_every_picture_is_waited_for_and_left_alone(refusal: httpx.Response) -> None:
    server = Server(refusal)
    detector = client(server)
    for _ in range(5):
        with pytest.raises(UnavailableError, match="refuses every picture"):
            detector.detect([PICTURE])
    with pytest.raises(UnavailableError, match="not asked"):
        detector.detect([PICTURE])
    assert len(server.asked) == 10  # the picture and the good one, five times


async def test_one_bad_file_of_a_batch_is_that_frames_error_alone() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        parts = request.content.split(b'name="files"')[1:]
        results = [
            {"error": "no picture", "status": 400} if b"0.jpg" in one else {"detections": [BOX]} for one in parts
        ]
        # Alone it is 0.jpg too, and so is every other: told apart by their size.
        if len(parts) == 1:
            results = [{"detections": [BOX]} if len(parts[0]) < 2000 else {"error": "no picture"}]
        return httpx.Response(200, json={"results": results})

    batcher = Batcher(client(Server(answer)), size=3, wait_s=0.05)
    pictures = [Image.effect_noise((200, 200), 99).convert("RGB"), PICTURE, PICTURE]
    bad, *others = await asyncio.gather(*(batcher.detect(one) for one in pictures), return_exceptions=True)
    await batcher.close()
    assert isinstance(bad, UnprocessableError)
    assert [seen.boxes for seen in others] == [(DOG,), (DOG,)]


@pytest.mark.parametrize("fault", [httpx.ReadTimeout("75 s"), httpx.RemoteProtocolError("cut")], ids=repr)
async def test_a_picture_that_hangs_or_crashes_the_service_is_blamed_alone_after_three_attempts(
    fault: Exception,
) -> None:
    poison = Image.effect_noise((64, 64), 99).convert("RGB")

    def answer(request: httpx.Request) -> httpx.Response:
        if _jpeg(poison) in request.content:
            raise fault
        return good(request)

    clock = Clock()
    batcher = Batcher(client(Server(answer), clock), size=3, wait_s=0.02)

    async def as_the_stage(picture: Image.Image) -> tuple[Box, ...] | int:
        attempts = 0
        async with asyncio.timeout(10):
            while attempts < 3:
                try:
                    return (await batcher.detect(picture)).boxes
                except UnavailableError:
                    clock.now += 20
                except RuntimeError:
                    attempts += 1
        return attempts

    found = await asyncio.gather(*(as_the_stage(one) for one in (poison, PICTURE, Image.new("RGB", (9, 9)))))
    await batcher.close()
    assert found == [3, (DOG,), (DOG,)]


def test_a_service_that_hangs_whatever_it_is_asked_blames_no_picture_and_one_that_is_back_answers() -> None:
    clock = Clock()
    server = Server(httpx.ReadTimeout("75 s"))
    detector = client(server, clock)
    for _ in range(6):
        with pytest.raises(UnavailableError):
            detector.detect([PICTURE])
        clock.now += 20
    server.answers = [good]
    with pytest.raises(RuntimeError, match="answers others"):  # one attempt: it had this picture when it hung
        detector.detect([PICTURE])
    assert detector.detect([PICTURE]) == [(DOG,)]
    assert detector._suspects == {}


def test_a_service_that_cannot_be_reached_makes_no_suspects() -> None:
    clock = Clock()
    server = Server(httpx.ConnectError("refused"))
    detector = client(server, clock)
    with pytest.raises(UnavailableError):
        detector.detect([PICTURE])
    server.answers = [good]
    assert detector.detect([PICTURE]) == [(DOG,)]


def test_our_services_own_deadline_comes_before_the_clients() -> None:
    assert ClientSettings().read_timeout_s > ServiceSettings().deadline_s


def test_a_closed_client_waits_for_nothing() -> None:
    server = Server(httpx.ConnectError("refused"))
    detector = HttpDetector(DetectorSettings(url="http://detector"), transport=httpx.MockTransport(server))
    detector.close()
    with pytest.raises(UnavailableError):
        detector.detect([PICTURE])


def test_the_key_is_sent_and_in_no_error() -> None:
    server = Server(httpx.Response(401, json={"error": "an API key is needed"}))
    settings = DetectorSettings(url="http://detector", api_key="hush-hush", client=ClientSettings(retries=0))
    detector = HttpDetector(settings, transport=httpx.MockTransport(server))
    with pytest.raises(UnavailableError, match="an API key is needed") as raised:
        detector.detect([PICTURE])
    assert server.asked[0].headers["authorization"] == "Bearer hush-hush"
    assert "hush" not in str(raised.value)


def test_a_breaker_that_is_told_a_time_opens_for_it_and_forgets_at_an_answer() -> None:
    clock = Clock()
    breaker = Breaker(2, 10, clock)
    breaker.failed("x")
    breaker.answered()
    breaker.failed("x")
    assert (breaker.wait_s(), breaker.is_trial) == (0, False)
    breaker.open_for(3, "busy")
    assert (breaker.wait_s(), breaker.is_trial) == (3, False)
    breaker.failed("x")
    assert 10 <= breaker.wait_s() <= 15
    clock.now += 20
    assert (breaker.wait_s(), breaker.is_trial) == (0, True)


class Named(FakeDetector):
    """Sees what other clients are not told of: a dog, hardly."""

    name, digest, runtime = "r18", "d" * 64, "torch-cpu"

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        return [(Box(label="dog", score=0.1, x=1, y=2, width=3, height=4),) for _ in images]


async def test_the_stage_over_our_own_service_records_every_box_and_who_made_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = {"api_key": "k" * 16}
    served = DetectorSettings(service=ServiceSettings(port=port, **key), wait_ms=1)
    asking = DetectorSettings(url=f"http://127.0.0.1:{port}", client=ClientSettings(retries=0, breaker_s=0.1), **key)
    stage = DetectStage(HttpDetector(asking), ClaimStore(str(tmp_path)), asking)
    record = as_incoming(codec.emit("frames", frame(jpeg())))
    with pytest.raises(UnavailableError):  # it waits, and nothing is lost
        await stage.handle(record)
    service, stop = Service(Named, served), asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    await service.warm.wait()
    (emit,) = await stage.handle(record)
    found = codec.decode(as_incoming(emit), Detections)
    assert [(box.label, box.score) for box in found.boxes] == [("dog", 0.1)]
    assert (found.model, found.model_digest, found.runtime) == ("r18", "d" * 64, "http:torch-cpu")
    stop.set()
    await running
    await stage.close()

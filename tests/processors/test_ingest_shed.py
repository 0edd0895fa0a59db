"""Too much work waits: who is told to come later, what is dropped and said to be, and how it ends by itself."""

import asyncio

import httpx
import pytest
from aiokafka.errors import KafkaConnectionError
from pydantic import ValidationError

from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.folder import Folder
from processors.ingest.http import build_app
from processors.ingest.service import Service
from processors.ingest.settings import FolderSettings, IngestSettings, SnapshotSettings, UploadSettings
from processors.ingest.shed import Shed, ShedSettings
from processors.ingest.snapshot import Snapshots
from streams.claims import ClaimStore
from streams.errors import UnavailableError
from tests.processors.camera_kit import camera, picture
from tests.processors.ingest_kit import appenders, jpeg

ON = {"enabled": True, "detect_above": 100, "detect_below": 20, "analyze_above": 10, "analyze_below": 2}
LATE = {"detect": 101, "analyze": 0}
QUIET = {"detect": 20, "analyze": 2}


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
async def ways(log, tmp_path):
    made = []

    def open_(**shed):
        made.append(appenders(log, tmp_path, shed=ShedSettings(**(ON | shed))))
        return made[-1]

    yield open_
    for one in made:
        await one.close()


def test_it_begins_above_the_upper_bound_and_ends_at_the_lower_one():
    shed = Shed(ShedSettings(**ON))
    said = []
    for detect, analyze in [(100, 10), (101, 10), (50, 11), (21, 11), (20, 11), (20, 3), (20, 2), (99, 9)]:
        shed.seen({"detect": detect, "analyze": analyze})
        said.append(bool(shed.why))
    assert said == [False, True, True, True, True, True, False, False]


def test_what_is_said_names_what_waits_and_the_setting():
    shed = Shed(ShedSettings(**ON))
    shed.seen({"detect": 4321, "analyze": 11})
    assert shed.why == (
        "4,321 records wait for detect (ingest.shed.detect_above: 100) and "
        "11 records wait for analyze (ingest.shed.analyze_above: 10)"
    )


def test_bounds_that_would_flutter_are_refused():
    with pytest.raises(ValidationError, match="detect_below must be less than detect_above"):
        ShedSettings(detect_above=5, detect_below=5)


async def test_by_default_nothing_is_looked_at_and_nothing_shed():
    async def look():
        raise AssertionError("nobody asked")

    shed = Shed(ShedSettings())
    async with asyncio.timeout(1):
        await shed.run(look, asyncio.Event())
    shed.check("folder")
    assert not shed.drops("snapshot")


async def test_what_was_so_holds_while_the_broker_does_not_answer():
    answers = iter([LATE, KafkaConnectionError("away"), TimeoutError(), QUIET])
    stop, said = asyncio.Event(), []

    async def look():
        said.append(bool(shed.why))
        answer = next(answers, None)
        if answer is None:
            stop.set()
            return QUIET
        if isinstance(answer, Exception):
            raise answer
        return answer

    shed = Shed(ShedSettings(**ON, look_s=0.001))
    await shed.run(look, stop)
    assert said == [False, True, True, True, False]


async def test_uploads_are_told_when_to_come_back_and_taken_again_by_themselves(ways, log):
    made = ways(retry_after_s=7)
    app = build_app(made, UploadSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as http:
        made.shed.seen(LATE)
        answer = await http.post("/api/upload?camera=front", content=jpeg(1))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert "101 records wait for detect" in answer.json()["error"]
        assert log.records == []  # it was not accepted, so nothing is recorded
        made.shed.seen(QUIET)
        assert (await http.post("/api/upload?camera=front", content=jpeg(1))).status_code == 200
    assert counted(made, "shed") == 1


async def test_files_stay_where_they_are_until_there_is_room(ways, log, tmp_path):
    made = ways()
    path = tmp_path / "inbox/front/a.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(jpeg(1))
    now = [1000.0]
    folder = Folder(FolderSettings(root=tmp_path / "inbox", stable_s=0), made, monotonic=lambda: now[0])
    made.shed.seen(LATE)
    await folder.sweep()
    assert (path.exists(), log.records, folder.waiting_on) == (True, [], {"front": "backlog"})
    made.shed.seen(QUIET)
    now[0] += 60
    await folder.sweep()
    assert (path.exists(), len(log.frames()), folder.waiting_on) == (False, 1, {})


async def test_a_folder_that_is_told_so_drops_files_and_says_of_each_that_it_did(ways, log, tmp_path):
    made = ways(drop=("folder",))
    for shade in range(3):
        path = tmp_path / f"inbox/front/{shade}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(shade))
    made.shed.seen(LATE)
    await Folder(FolderSettings(root=tmp_path / "inbox", stable_s=0), made).sweep()
    letters = log.dead_letters()
    assert len(letters) == 3
    assert {(letter.stage, letter.kind, letter.value, letter.claim) for letter in letters} == {
        ("ingest", "shed", None, None)
    }
    assert letters[0].message == "not taken: 101 records wait for detect (ingest.shed.detect_above: 100)"
    assert letters[0].origin.startswith("folder:front/0.jpg@")
    assert log.frames() == []
    assert len(list((tmp_path / "inbox/front/.done").rglob("*.jpg"))) == 3  # as `after` says
    assert counted(made, "shed") == 3


async def test_a_picture_that_was_dropped_is_recorded_once_and_taken_when_there_is_room(ways, log):
    made = ways()
    made.shed.seen(LATE)
    async with camera() as cam:
        cam.says(picture(jpeg(1), etag='"a"'))  # it would answer 304 for ever
        source = Snapshots("front", SnapshotSettings(url=cam.url + "/snap.jpg"), made, sleep=at_once)
        await source.run(asyncio.Event(), count=3)
        assert [(letter.kind, letter.value) for letter in log.dead_letters()] == [("shed", None)]
        made.shed.seen(QUIET)
        await source.run(asyncio.Event(), count=4)
    assert [frame.image for frame in log.frames()] == [jpeg(1)]


async def test_a_camera_that_may_wait_is_not_asked(ways, log):
    made = ways(drop=())
    made.shed.seen(LATE)
    turns = 0

    async def sleep(_seconds):
        nonlocal turns
        turns += 1
        if turns == 5:
            made.shed.seen(QUIET)
        await asyncio.sleep(0)

    async with camera() as cam:
        cam.says(jpeg(1))
        source = Snapshots("front", SnapshotSettings(url=cam.url + "/snap.jpg"), made, sleep=sleep)
        watch = await source.run(asyncio.Event(), count=1)
        assert len(cam.asked) == 1
    assert (watch.accepted, watch.shed, log.dead_letters()) == (1, 0, [])


async def test_the_service_says_that_it_waits_and_prometheus_why(log, tmp_path):
    looked = asyncio.Event()

    async def look():
        looked.set()
        return LATE

    settings = IngestSettings(
        folder=FolderSettings(enabled=False), upload=UploadSettings(enabled=False), shed=ShedSettings(**ON)
    )
    service = Service(log, settings, MemoryCameras("front"), ClaimStore(str(tmp_path / "images")), look=look)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    await looked.wait()
    await asyncio.sleep(0)
    assert service.waiting_on() == ["backlog"]
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in service.appenders.metrics.collect()
        for sample in family.samples
    }
    assert found["rewatch_ingest_shedding",] == 1
    assert found["rewatch_ingest_backlog", "detect"] == 101
    stop.set()
    await running


async def at_once(_seconds):
    await asyncio.sleep(0)


def counted(made, outcome):
    samples = [sample for sample in made.metrics.images.family().samples if sample.labels.get("outcome") == outcome]
    return sum(sample.value for sample in samples)


def test_waiting_is_an_error_that_others_know():
    shed = Shed(ShedSettings(**ON))
    shed.seen(LATE)
    with pytest.raises(UnavailableError) as found:
        shed.check("folder")
    assert found.value.waiting_on == "backlog"

"""Another detector before recorded frames: what it saw is kept once, and its windows are those of live work with it."""

import asyncio
import hashlib
import io
import secrets
from contextlib import aclosing

import msgspec
import pytest
import pytest_asyncio
from PIL import Image

from processors.detect.detector import FakeDetector
from processors.detect.settings import DetectorSettings
from processors.detect.stage import DetectStage
from processors.replay import redetect
from processors.replay.plan import Change
from processors.replay.redetect import Redetection, RemadeLog, RemadeWindows
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas import ids
from schemas.records import Detections, Frame, ReplayUnit
from streams import codec
from streams.claims import ClaimStore
from streams.errors import UnavailableError
from streams.messages import Incoming, Tick
from tests.processors.batch_kit import DEFAULT, T0, box
from tests.processors.cut_kit import PARTITION, Past, keep, keep_records

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real

REPLAY = "r0123456789a"


class Sharp(FakeDetector):
    """Sees a car where the other sees a person, and one in every picture that is not quite dark."""

    name = "sharp"

    def detect(self, images):
        return [
            (box(image.getpixel((0, 0))[2], label="car", score=0.7),)
            if image.convert("L").getpixel((0, 0)) > 60
            else ()
            for image in images
        ]


@pytest.fixture(scope="module")
def kept(clickhouse_url):
    settings = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")

    async def migrate():
        store = ClickHouseStore(settings)
        await store.migrate()
        await store.close()

    asyncio.run(migrate())
    return settings


@pytest_asyncio.fixture
async def store(kept):
    made = ClickHouseStore(kept)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def queries(kept):
    made = Queries(kept)
    yield made
    await made.aclose()


def picture(number, shade):
    out = io.BytesIO()
    Image.new("RGB", (640, 480), (shade, shade, number % 256)).save(out, "JPEG")
    return out.getvalue()


def frame(camera, number, shade, claim=None):
    data = picture(number, shade)
    sha256 = hashlib.sha256(data).hexdigest()
    at = T0 + 1000 * number
    return Frame(
        frame_id=ids.frame_id(camera, sha256, at),
        camera_id=camera,
        sha256=sha256,
        size=len(data),
        width=640,
        height=480,
        captured_at=at,
        captured_from="exif",
        arrived_at=at + 200,
        image=None if claim else data,
        claim=f"sha256:{sha256}" if claim else None,
        source="folder",
        source_name="x.jpg",
    )


class Footage:
    """Frames on the log, and what live work with a detector made of them."""

    def __init__(self, camera, shades, detector, every=1, claims=()):
        self.camera = camera
        self.detector = detector
        self.frames = [frame(camera, every * n, shade, n in claims) for n, shade in enumerate(shades)]
        self.epoch = secrets.token_hex(4)

    @property
    def on_log(self):
        return [
            Incoming("frames", self.epoch, PARTITION, offset, made.key, made.value, made.headers)
            for offset, made in enumerate(codec.emit("frames", one) for one in self.frames)
        ]

    async def lived(self, claims, epoch=None, detector=None):
        """The past with its own detector, or with another one."""
        stage = DetectStage(detector or self.detector, claims, DetectorSettings(), clock=lambda: T0 / 1000)
        items = []
        for number, record in enumerate(self.on_log):
            [made] = await stage.handle(record)
            items.append(codec.decode_bytes("detections", made.value, None, Detections))
            if number % 10 == 9:
                items.append(Tick(T0 + 40_000 * number))
        await stage.close()
        return Past([*items, Tick(T0, self.camera)], epoch=epoch)


@pytest.fixture
def claims(tmp_path):
    return ClaimStore(str(tmp_path))


async def stored(footage, claims, store):
    for one in footage.frames:
        if one.claim:
            await claims.put(picture(round((one.captured_at - T0) / 1000), 200))
    past = await footage.lived(claims)
    await keep_records(store, footage.on_log)
    await keep(store, past)
    return past


class Log:
    """The replay's log in memory; a planner that dies loses nothing of it."""

    def __init__(self):
        self.records = []
        self.forgotten = False
        self.left = None

    async def open(self):
        self.read = 0

    async def history(self):
        yield await self.news(0)

    async def news(self, wait_s):
        found, self.read = self.records[self.read :], len(self.records)
        return found

    async def append(self, emits):
        if self.left is not None and len(self.records) >= self.left:
            raise ConnectionError("killed")
        for emit in emits:
            self.records.append(
                Incoming(emit.topic, "log", emit.partition, len(self.records), emit.key, emit.value, emit.headers)
            )

    async def close(self):
        pass


async def run(queries, plan, detector, claims, log):
    """A planner's run up to the windows: fence, learn, look, cut."""

    async def open_stage():
        return DetectStage(detector, claims, DetectorSettings())

    redetection = Redetection(queries, plan, DEFAULT, open_stage, replay_id=REPLAY)
    kept = RemadeLog(log, REPLAY)
    windows = RemadeWindows(queries, plan, DEFAULT, redetection, kept)
    await kept.open()
    shown = [record async for records in kept.history() for record in records]
    async with aclosing(windows.pages(lambda _: False)) as pages:
        made = [window.context async for page in pages for window in page]
    return made, redetection, shown


def told(windows):
    """What does not depend on the time of looking."""
    return [(window.batch_id, window.batch) for window in windows]


SHADES = [200, 200, 30, 100, 100, 100, 30, 30, 200, 30] * 4


async def test_the_same_detector_makes_the_very_windows_that_were_recorded(queries, store, claims):
    past = await stored(Footage("same", SHADES, FakeDetector(), every=7, claims=(1, 8)), claims, store)
    made, redetection, _ = await run(queries, past.plan(Change(detector="x")), FakeDetector(), claims, Log())
    assert told(made) == told(past.windows)
    assert (redetection.looked, redetection.skipped.count) == (len(SHADES), 0)


async def test_another_detector_makes_the_windows_that_live_work_with_it_would_have_made(queries, store, claims):
    footage = Footage("other", SHADES, FakeDetector(), every=7)
    past = await stored(footage, claims, store)
    would = await footage.lived(claims, epoch=past.epoch, detector=Sharp())
    assert {w.batch_id for w in would.windows} != {w.batch_id for w in past.windows}
    made, *_ = await run(queries, past.plan(Change(detector="x")), Sharp(), claims, Log())
    assert told(made) == told(would.windows)
    # and with another threshold besides
    made, *_ = await run(queries, past.plan(Change(detector="x", threshold=0.75)), Sharp(), claims, Log())
    assert made == []


async def test_frames_that_are_gone_or_corrupt_are_skipped_counted_and_named(queries, store, claims, tmp_path):
    footage = Footage("gone", [200] * 12, FakeDetector(), every=7, claims=(3,))
    past = await stored(footage, claims, store)
    gone = footage.frames[5]
    for table in ("log", "frames"):
        await _drop(store, table, footage, 5)
    [image] = [path for path in tmp_path.rglob("*") if path.is_file()]
    image.write_bytes(b"no picture")
    made, redetection, _ = await run(queries, past.plan(Change(detector="x")), FakeDetector(), claims, Log())
    assert set(redetection.skipped.named) == {gone.frame_id, footage.frames[3].frame_id}
    assert "corrupt" in redetection.skipped.named[footage.frames[3].frame_id]
    left = [one.frame_id for number, one in enumerate(footage.frames) if number not in {3, 5}]
    assert [f.frame_id for window in made for f in window.batch.frames] == left[:1]  # the rest has stood still


async def _drop(store, table, footage, offset):
    client = await store.connection.client()
    topic = "topic = 'frames' AND " if table == "log" else ""
    await client.command(f"DELETE FROM {table} WHERE {topic}epoch = '{footage.epoch}' AND offset = {offset}")


async def test_killed_after_any_page_it_looks_at_no_frame_twice(queries, store, claims, monkeypatch):
    monkeypatch.setattr(redetect, "PAGE", 8)
    past = await stored(Footage("killed", SHADES, FakeDetector(), every=7), claims, store)
    plan = past.plan(Change(detector="x"))
    log, looked = Log(), 0
    for left in (8, 16, 32):
        log.left = left
        with pytest.raises(ConnectionError):
            await run(queries, plan, FakeDetector(), claims, log)
    log.left = None
    made, redetection, shown = await run(queries, plan, FakeDetector(), claims, log)
    looked = redetection.looked
    units = [codec.decode(record, ReplayUnit) for record in log.records]
    assert looked == len(SHADES) - 32
    assert sorted(unit.unit_id for unit in units) == sorted({unit.unit_id for unit in units})
    assert len(units) == len(SHADES)
    assert {(unit.kind, unit.camera_id, record.partition) for unit, record in zip(units, log.records, strict=True)} == {
        ("detect", "killed", PARTITION)
    }
    assert shown == []  # a ledger would wait for verdicts on them
    assert told(made) == told(past.windows)


async def test_frames_that_are_in_two_lives_of_the_log_are_looked_at_once(queries, store, claims):
    """Also those that cannot be looked at: nobody would remember that they were tried."""

    class Counting(FakeDetector):
        seen = 0

        def detect(self, images):
            self.seen += len(images)
            if any(image.getpixel((0, 0))[0] < 60 for image in images):
                raise RuntimeError("no")
            return super().detect(images)

    footage = Footage("twice", [200] * 9 + [30], FakeDetector(), every=7)
    past = await stored(footage, claims, store)
    again = await footage.lived(claims)
    again.log.append(again.log[0]._replace(offset=len(again.log)))  # taken in twice by the same life
    await keep(store, again)
    plan = msgspec.structs.replace(past.plan(Change(detector="x")), upto=(*past.bounds, *again.bounds))
    log, detector = Log(), Counting()
    made, redetection, _ = await run(queries, plan, detector, claims, log)
    units = [codec.decode(record, ReplayUnit).unit_id for record in log.records]
    assert len(units) == len(set(units)) == redetection.looked == 9
    assert detector.seen <= 10 + 9  # a batch with a picture that it cannot bear is looked at one by one
    assert list(redetection.skipped.named) == [footage.frames[9].frame_id]
    assert sorted(w.batch_id for w in made) == sorted({w.batch_id for w in made})
    # Whoever hears of nothing meanwhile is not given a frame twice, either.
    chunks = redetection.chunks(lambda _: False)
    assert sum([len(chunk.units) async for chunk in chunks]) == 9


async def test_what_others_appended_is_shown(queries, claims):
    log = Log()
    unit = ReplayUnit(
        unit_id=f"{REPLAY}:gate:1", replay_id=REPLAY, camera_id="gate", kind="judge", payload=b"", created_at=0
    )
    another = msgspec.structs.replace(unit, unit_id="r2:gate:2", replay_id="r2", kind="detect")
    await log.append([codec.emit("replay_units", one, 0) for one in (unit, another)])
    kept = RemadeLog(log, REPLAY)
    await kept.open()
    assert [record.offset async for records in kept.history() for record in records] == [0, 1]


async def test_only_frames_that_can_decide_on_windows_of_the_scope_are_looked_at(queries, store, claims):
    past = await stored(Footage("scope", [200, 30] * 60, FakeDetector(), every=20), claims, store)
    since, until = T0 + 1_000_000, T0 + 1_400_000
    plan = past.plan(Change(detector="x"), since=since, until=until)
    made, redetection, _ = await run(queries, plan, FakeDetector(), claims, Log())
    assert told(made) == [one for one in told(past.windows) if since <= one[1].started_at < until]
    reach = DEFAULT.max_ms + DEFAULT.fast_cooldown_ms
    assert redetection.looked <= (until - since + 2 * reach) / 20_000 + 1


async def test_a_picture_that_the_detector_cannot_bear_is_named_and_a_broken_detector_ends_it(queries, store, claims):
    class Choosy(FakeDetector):
        bears = True

        def detect(self, images):
            if not self.bears or any(image.getpixel((0, 0))[0] < 60 for image in images):
                raise RuntimeError("no")
            return super().detect(images)

    class Away(FakeDetector):
        def detect(self, images):
            raise UnavailableError("detector", "it is away")

    past = await stored(Footage("choosy", [200] * 9 + [30], FakeDetector(), every=7), claims, store)
    plan = past.plan(Change(detector="x"))
    detector = Choosy()
    _, redetection, _ = await run(queries, plan, detector, claims, Log())
    assert list(redetection.skipped.named.values()) == ["the detector failed on it: RuntimeError('no')"]
    detector.bears = False
    with pytest.raises(RuntimeError):
        await run(queries, plan, detector, claims, Log())
    with pytest.raises(UnavailableError):
        await run(queries, plan, Away(), claims, Log())

"""Every kind of bad input against one whole running installation: what becomes of each, and that the road goes on.

Each test is a row of the matrix. It gives the bad input by every door that can take it, asserts the exact outcome,
then sends a good frame of the same camera (so of the same partition) and sees it come out. The last test audits the
whole: nothing lost, nothing doubled, no dead letter and no unreadable record that no row explains, and no process
that was restarted.
"""

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from msgspec.structs import replace

from infra.installation import Installation
from infra.local.process import free_port
from schemas import prompts
from schemas.records import PromptRecord
from streams.kafka import MAX_RECORD_BYTES
from streams.messages import CAMERA, KIND, TICK, WALL, Headers
from streams.serving import HEAD_S
from streams.topics import STORED, partition_of
from tests.e2e import bad_input
from tests.e2e.bad_input import FAULTS, MAX_BYTES, PICTURES
from tests.e2e.installation import PARTITIONS, pictures, settings_for
from tests.e2e.watch import Watch

pytestmark = [pytest.mark.real, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

KEY = "open sesame"
REPOSITORY = Path(__file__).parents[2]

# One camera a partition: a stage that stopped on one would be seen.
HURT, FOLDER, CLOCK, SET = (
    next(name for number in range(1000) if partition_of(name := f"cam-{number}", PARTITIONS) == partition)
    for partition in range(PARTITIONS)
)
CAMERAS = (HURT, FOLDER, CLOCK, SET)
GOOD = bad_input.jpeg()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watch]:
    """The installation, its cameras known, every picture of the matrix dropped into its folder."""
    directory = tmp_path_factory.mktemp("matrix")
    shots = await asyncio.to_thread(pictures)
    with pytest.MonkeyPatch.context() as patch:
        settings = settings_for(
            directory,
            patch,
            INGEST__MAX_BYTES=str(MAX_BYTES),
            INGEST__UPLOAD__API_KEY=KEY,
            INGEST__UPLOAD__AUTO_CREATE="false",
            INGEST__UPLOAD__TIMEOUT_S="2",
            INGEST__FOLDER__STABLE_S="0.3",
            INGEST__FOLDER__INCOMPLETE_S="2",
        )
        async with Installation(settings) as installation, Watch(installation, shots, KEY).looking() as watch:
            for camera in CAMERAS:
                await watch.camera(camera)
            for name, picture in PICTURES.items():
                watch.drop(FOLDER, f"{name}.jpg", picture.data)
            await watch.eventually_answers(CAMERAS[-1], 200)
            watch.slow_head = asyncio.create_task(slow_head(watch))
            yield watch


# Pictures, by both doors


@pytest.mark.parametrize("name", PICTURES)
async def test_a_picture_by_upload(here: Watch, name: str) -> None:
    picture = PICTURES[name]
    answer = await here.upload(HURT, picture.data, name=f"{name}.jpg")
    assert answer.status_code == picture.status, answer.text
    if picture.status == 200:
        await here.record_of("detections", frame_id=answer.json()["frame_id"])
    else:
        assert picture.reason in answer.json()["error"]
    await here.goes_on(HURT)


@pytest.mark.parametrize("name", PICTURES)
async def test_a_picture_in_the_folder(here: Watch, name: str) -> None:
    picture, inbox, file = PICTURES[name], here.inbox / FOLDER, f"{name}.jpg"
    if picture.status == 200:
        await here.taken_from_folder(FOLDER, file)
        await here.eventually(lambda: list(inbox.glob(f".done/*/{file}")), "the file's move")
    else:
        letter = await here.rejection(FOLDER, file)
        assert (letter.stage, letter.kind) == ("ingest", "rejected")
        assert picture.reason in letter.message
        assert letter.value == (picture.data if len(picture.data) <= MAX_BYTES else b"")
        rejected = inbox / ".rejected" / file
        await here.eventually(rejected.exists, "the file's move")
        assert rejected.read_bytes() == picture.data
        assert picture.reason in (inbox / ".rejected" / f"{file}.reason.txt").read_text()
    assert not (inbox / file).exists()


async def test_a_hostile_picture_fills_no_log(here: Watch) -> None:
    """Pillow has a word to say of each of 20,000 EXIF entries."""
    for process in ("ingest", "detect"):
        assert not here.said(process, "Skipping tag")


# The folder alone


async def test_a_half_written_file_is_taken_once_when_it_is_whole(here: Watch) -> None:
    whole = await asyncio.to_thread(here.good)
    path = here.inbox / HURT / "half.jpg"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as out:
        out.write(whole[:5000])
        out.flush()
        await asyncio.sleep(1.2)  # stands still for longer than ingest.folder.stable_s, and is still not given up
        assert path.exists()
        out.write(whole[5000:])
    frame = await here.taken_from_folder(HURT, "half.jpg")
    assert frame.sha256 == hashlib.sha256(whole).hexdigest()
    await here.goes_on(HURT)


async def test_the_same_file_twice_is_one_frame(here: Watch) -> None:
    picture = await asyncio.to_thread(here.good)
    answers = [await here.upload(HURT, picture) for _ in range(2)]
    assert [answer.json()["status"] for answer in answers] == ["accepted", "known"]
    first, second = here.drop(HURT, "twice.jpg", picture), here.drop(HURT, "twice-again.jpg", picture)
    await here.eventually(lambda: not first.exists() and not second.exists(), "both files' move")
    assert len(list((here.inbox / HURT).glob(".done/*/twice*.jpg"))) == 2, "known files move too"
    await here.goes_on(HURT)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (b"caf\xe9 \xff.jpg", "caf? ?.jpg"),  # Latin-1, as old recorders write it
        (b"\x1b[31mred\nlog line.jpg", "?[31mred?log line.jpg"),
        (b"n" * 251 + b".jpg", "n" * 251 + ".jpg"),  # as long as a file system takes
    ],
    ids=["not UTF-8", "control characters", "255 bytes"],
)
async def test_an_odd_file_name_keeps_no_picture_out(here: Watch, name: bytes, kept: str) -> None:
    """The first one ends the events of the folder: what comes after it must be seen all the same."""
    folder = here.inbox / HURT
    folder.mkdir(exist_ok=True)
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    path.write_bytes(await asyncio.to_thread(here.good))
    await here.taken_from_folder(HURT, kept)
    await here.eventually(lambda: not path.exists(), "the file's move")
    await here.goes_on(HURT)


async def test_what_only_looks_like_a_file_is_left_alone_and_said(here: Watch, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(await asyncio.to_thread(here.good))
    folder = here.inbox / HURT
    folder.mkdir(exist_ok=True)
    (folder / "link.jpg").symlink_to(secret)
    (folder / "dangling.jpg").symlink_to(tmp_path / "nothing.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    for name in ("link.jpg", "dangling.jpg", "pipe.jpg"):
        await here.eventually(lambda name=name: here.said("ingest", rf"{name} is no file"), f"a word about {name}")
    await here.goes_on(HURT)
    assert {path.name for path in folder.iterdir()} >= {"link.jpg", "dangling.jpg", "pipe.jpg", "folder.jpg"}
    assert not [frame for frame in here.decoded("frames") if frame.source_name == "link.jpg"]
    for name in ("link.jpg", "dangling.jpg", "pipe.jpg"):
        (folder / name).unlink()
    (folder / "folder.jpg").rmdir()


# A second ingest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def second(here: Watch, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """Another ingest of the same installation, with a folder and a port of its own; it may not read every file.

    Root reads whatever it likes by two capabilities, so this one, where it is root, is started without them.
    """
    inbox = tmp_path_factory.mktemp("second")
    port = free_port()
    here.second = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, headers={"X-API-Key": KEY})
    plain = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    log = here.settings.data_dir / "logs" / "second.log"
    with log.open("w") as out:
        process = await asyncio.create_subprocess_exec(
            *plain,
            *(sys.executable, "-m", "infra.worker", "ingest", "--status", str(inbox / ".status.json")),
            env=os.environ
            | {"REWATCH_INGEST__FOLDER__ROOT": str(inbox), "REWATCH_INGEST__UPLOAD__PORT": str(port)}
            | {"PYTHONPATH": str(REPOSITORY)},
            stdout=out,
            stderr=out,
        )
    try:
        await here.eventually(lambda: here.said("second", "taking uploads"), "the second ingest")
        yield inbox
    finally:
        await here.second.aclose()
        process.terminate()
        await process.wait()


async def test_an_unreadable_file_is_said_and_holds_up_no_other(here: Watch, second: Path) -> None:
    folder = second / SET
    folder.mkdir()
    unreadable = folder / "unreadable.jpg"
    unreadable.write_bytes(await asyncio.to_thread(here.good))
    unreadable.chmod(0)
    (folder / "readable.jpg").write_bytes(await asyncio.to_thread(here.good))
    await here.taken_from_folder(SET, "readable.jpg")
    await here.eventually(lambda: here.said("second", "cannot read .*unreadable.jpg: .*Permission denied"), "a word")
    assert unreadable.exists(), "it stays where it is"
    assert not (folder / ".rejected").exists()
    unreadable.chmod(0o600)
    os.utime(unreadable)  # a change of rights alone is looked at again after half a minute
    await here.taken_from_folder(SET, "unreadable.jpg")
    await here.goes_on(SET)


async def test_two_replicas_upload_the_same_frame(here: Watch, second: Path) -> None:
    assert second.exists()
    for _ in range(4):
        picture = await asyncio.to_thread(here.good)
        one, other = await asyncio.gather(
            here.http.post("/api/upload", params={"camera": SET}, content=picture),
            here.second.post("/api/upload", params={"camera": SET}, content=picture),
        )
        assert (one.status_code, other.status_code) == (200, 200), f"{one.text} {other.text}"
        assert sorted([one.json()["status"], other.json()["status"]]) == ["accepted", "known"]
        assert here.taken(SET, one).json()["frame_id"] == here.taken(SET, other).json()["frame_id"]
    await here.goes_on(SET)


# Uploads alone


@pytest.mark.parametrize("headers", [{"X-API-Key": "wrong"}, {}, {"Authorization": "Bearer wrong"}])
async def test_a_wrong_key_is_401(here: Watch, headers: dict[str, str]) -> None:
    answer = await here.http.post(
        "/api/upload", params={"camera": HURT}, content=GOOD, headers={"X-API-Key": ""} | headers
    )
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "ingest.upload.api_key" in answer.json()["error"]
    await here.goes_on(HURT)


async def test_an_unknown_camera_is_404_and_names_the_command(here: Watch) -> None:
    answer = await here.upload("nobody", GOOD)
    assert answer.status_code == 404
    assert answer.json()["error"] == "camera nobody is not known: `rewatch camera add nobody` adds it"
    await here.goes_on(HURT)


async def test_what_is_no_camera_id_is_400(here: Watch) -> None:
    for camera in ("..", "../etc", "Front Door", "front/door", "caméra", "c" * 300, "-door", "door\n", "\0", ""):
        answer = await here.upload(camera, GOOD)
        assert answer.status_code == 400, camera
        assert "is no camera id: 1 to 63 lower-case letters" in answer.json()["error"]
    await here.goes_on(HURT)


async def test_a_capture_time_that_is_none_is_400(here: Watch) -> None:
    for captured_at in ("yesterday", "2026-13-01T00:00:00Z", "1790000000", "-1", "9" * 20, "9" * 5000, "NaN", "\u0661"):
        answer = await here.upload(HURT, GOOD, captured_at=captured_at)
        assert answer.status_code == 400, f"{captured_at}: {answer.text}"
        assert "captured_at" in answer.json()["error"]
    await here.goes_on(HURT)


async def test_a_name_that_leads_elsewhere_leads_nowhere(here: Watch) -> None:
    for name in ("../../../etc/cron.d/x.jpg", "..\\..\\windows\\x.jpg", "/etc/passwd", "a\0b\nc.jpg"):
        answer = await here.upload(HURT, await asyncio.to_thread(here.good), name=name)
        assert answer.status_code == 200
        frame = await here.record_of("frames", frame_id=answer.json()["frame_id"])
        assert ".." not in frame.source_name
        assert not frame.source_name.startswith("/")
        assert frame.source_name.isprintable()
    await here.goes_on(HURT)


async def test_a_body_without_a_length_is_cut_off_at_the_limit(here: Watch) -> None:
    """Chunked, it never says how long it will be: 413 comes while it still comes in, and then the line is cut."""
    head = (
        f"POST /api/upload?camera={HURT} HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    began = time.monotonic()
    answer = await spoken(here, head.encode(), *([chunk] * 1000), pause=0.01)
    assert time.monotonic() - began < 9, "1,000 chunks take 10 s: it was cut before"
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"(ingest.max_bytes)" in answer
    await here.goes_on(HURT)


_FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"files": [("file", ("a.jpg", GOOD)), ("file", ("b.jpg", GOOD))]}, "Too many files"),
        ({"files": [("picture", ("a.jpg", GOOD))]}, "no file part named `file`"),
        ({"data": {"file": "text"}, "files": [("other", b"")]}, "no file part named `file`"),
        ({"data": {"note": "n" * 5000}, "files": [("file", ("a.jpg", GOOD))]}, "exceeded maximum size"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, "boundary"),
        ({"content": b'--y\r\ncontent-disposition: form-data; name="file"\r\n\r\n' + GOOD, "headers": _FORM}, ""),
        ({"content": b"", "headers": _FORM}, ""),
        ({"content": bytes(range(256)) * 8, "headers": _FORM}, ""),
    ],
    ids=["two files", "no file", "a field for a file", "long field", "no boundary", "wrong boundary", "empty", "noise"],
)
async def test_a_form_that_is_none_is_400(here: Watch, form: dict[str, Any], says: str) -> None:
    answer = await here.http.post("/api/upload", params={"camera": HURT}, **form)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]
    await here.goes_on(HURT)


async def test_a_slow_body_is_408(here: Watch) -> None:
    """A byte every tenth of a second, for longer than `ingest.upload.timeout_s`; others are served meanwhile."""
    head = f"POST /api/upload?camera={HURT} HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 5000\r\n\r\n"
    slow = asyncio.create_task(spoken(here, head.encode(), *([b"x"] * 100), pause=0.1))
    await here.goes_on(HURT)
    answer = await slow
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"(ingest.upload.timeout_s)" in answer
    await here.goes_on(HURT)


async def test_a_slow_head_is_hung_up_on(here: Watch) -> None:
    """A header that never ends, a byte a second: it began with the module, for it is given `HEAD_S`."""
    answer, seconds = await here.slow_head
    assert answer == b""
    assert HEAD_S - 1 < seconds < HEAD_S + 5
    await here.goes_on(HURT)


@pytest.mark.parametrize(
    "head",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"POST /" + b"a" * 100_000, bytes(range(256))],
    ids=["TLS", "no HTTP", "an endless line", "noise"],
)
async def test_what_is_no_http_is_hung_up_on(here: Watch, head: bytes) -> None:
    answer = await spoken(here, head)
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    await here.goes_on(HURT)


async def spoken(here: Watch, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the endpoint says to these bytes, sent with pauses, until it hangs up; fails if it never does."""
    upload = here.settings.ingest.upload
    reader, writer = await asyncio.open_connection(upload.host, upload.port)
    said = bytearray()

    async def listen() -> None:
        with contextlib.suppress(ConnectionError):
            while some := await reader.read(65_536):
                said.extend(some)

    listening = asyncio.create_task(listen())
    try:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.wait({listening}, timeout=pause)
                if listening.done():
                    break
        await asyncio.wait_for(listening, HEAD_S + 5)
    finally:
        listening.cancel()
        writer.close()
    return bytes(said)


async def slow_head(here: Watch) -> tuple[bytes, float]:
    """What the endpoint says to a head that never ends, and after how many seconds."""
    began = time.monotonic()
    said = await spoken(here, b"POST /api/upload HTTP/1.1\r\nX-", *([b"a"] * 100), pause=1)
    return said, time.monotonic() - began


# Time


async def test_frames_a_year_ahead_are_judged_at_their_arrival(here: Watch) -> None:
    ahead = [
        await here.upload(CLOCK, await asyncio.to_thread(here.good), captured_at=f"2099-11-21T12:00:0{second}Z")
        for second in range(2)
    ]
    await here.goes_on(CLOCK, judged=True)
    for answer in ahead:
        event = await here.judged(answer.json()["frame_id"])
        assert abs(event.started_at / 1000 - time.time()) < 60


# Settings


async def test_a_config_with_a_typo_ends_the_start_and_names_the_setting(here: Watch, tmp_path: Path) -> None:
    """Every way to get a setting wrong is in `test_config.py`; this is how a process ends by one."""
    file = tmp_path / "rewatch.yaml"
    file.write_text("ingest: {max_bites: 5}")
    command = [sys.executable, "-m", "infra.worker", "ingest", "--config", str(file)]
    ended = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY
    )
    assert ended.returncode == 2
    assert "ingest.max_bites: there is no such setting; did you mean ingest.max_bytes?" in ended.stderr
    assert "Traceback" not in ended.stderr
    await here.goes_on(HURT)


# Records that nobody can read, on every topic

READ_BY = {
    "frames": "detect",
    "detections": "batch",
    "batches": "enrich",
    "contexts": "analyze",
    "replay_units": "replay",
}
"""The stage that reads a topic, besides the sink."""


@pytest.mark.parametrize("topic", READ_BY)
async def test_records_that_nobody_can_read_are_dead_letters(here: Watch, topic: str) -> None:
    """With their bytes and origin, by the stage that reads the topic; in ClickHouse's `log` with the reason."""
    records = {
        fault: await here.append(topic, HURT, **bad_input.unreadable(topic, fault)._asdict()) for fault in FAULTS
    }
    letters = {fault: await here.letter(record, READ_BY[topic]) for fault, record in records.items()}
    errors = dict(zip(FAULTS, await here.unread(*records.values()), strict=True))
    for fault, letter in letters.items():
        assert errors[fault].startswith(letter.message[:4000]), fault
        assert (letter.claim is not None) == (" MB " in fault), fault
    await here.goes_on(HURT, judged=True)


@pytest.mark.parametrize("topic", [topic for topic in STORED if topic not in READ_BY])
async def test_records_that_nobody_can_read_are_in_the_log_table_with_the_reason(here: Watch, topic: str) -> None:
    """Topics that only the sink reads, and control topics, whose readers skip it and keep what they know."""
    records = [await here.append(topic, HURT, **bad_input.unreadable(topic, fault)._asdict()) for fault in FAULTS]
    errors = dict(zip(FAULTS, await here.unread(*records), strict=True))
    assert "Confluent's framing" in errors["empty"]
    assert "upgrade the reader first" in errors["unknown schema"]
    assert "its key is b'somebody-else'" in errors["another's key"]
    if topic in {"cameras", "prompts"}:
        said = rf"control record skipped.*topic={topic} offset={records[-1].offset} "
        for process in ("ingest", "detect", "batch", "enrich", "analyze"):
            await here.eventually(lambda process=process: here.said(process, said), f"a word of {process}")
    await here.goes_on(HURT)


async def test_a_record_above_the_topics_bound_does_not_get_in(here: Watch) -> None:
    """Our producers refuse it, and the broker refuses it of others."""
    big = bytes(MAX_RECORD_BYTES + 1)
    with pytest.raises(MessageSizeTooLargeError):
        await here.append("frames", HURT, key=None, value=big)
    loose = AIOKafkaProducer(**here.kafka.connection(), max_request_size=2 * len(big))
    await loose.start()
    try:
        with pytest.raises(KafkaError, match=r"(?i)large"):
            await loose.send_and_wait("frames", big, partition=0)
    finally:
        await loose.stop()
    await here.goes_on(HURT)


@pytest.mark.parametrize("topic", ["ingest_state", "batch_state", "sink_state", "meta"])
async def test_a_stranger_s_record_on_a_topic_of_our_own_is_skipped(here: Watch, topic: str) -> None:
    """What a stage remembers is read back at its next start: nobody's garbage may stop it then."""
    key = {"meta": b"frames", "sink_state": f"frames-{here.partition(HURT)}".encode()}.get(topic, HURT.encode())
    for value in (b"garbage", b"\0\0\0\0\0garbage"):
        await here.append(topic, HURT, key=key, value=value)
    if topic == "meta":
        assert (await here.epochs())["frames"] == here.epoch("frames")


# Records that can be read, and are nonsense


@pytest.mark.parametrize("fault", bad_input.frames(HURT))
async def test_a_frame_that_is_not_what_it_says_is_a_dead_letter(here: Watch, fault: str) -> None:
    frame, says = bad_input.frames(HURT)[fault]
    letter = await here.letter(await here.forge("frames", HURT, frame), "detect")
    assert says in letter.message
    assert letter.camera_id == HURT
    await here.goes_on(HURT)


@pytest.mark.parametrize("fault", bad_input.detections(HURT))
async def test_detections_of_no_detector_are_a_dead_letter(here: Watch, fault: str) -> None:
    """Taken, they would stay: a camera's last boxes are remembered, and its clock never goes back."""
    seen, says = bad_input.detections(HURT)[fault]
    letter = await here.letter(await here.forge("detections", HURT, seen), "batch")
    assert says in letter.message
    await here.goes_on(HURT, judged=fault in {"100,000 boxes", "in the year 292,278,994"})


@pytest.mark.parametrize("fault", bad_input.batches(HURT))
async def test_a_batch_of_no_window_is_a_dead_letter(here: Watch, fault: str) -> None:
    batch, says = bad_input.batches(HURT)[fault]
    letter = await here.letter(await here.forge("batches", HURT, batch), "enrich")
    assert says in letter.message
    await here.goes_on(HURT, judged=fault == "no frames")


@pytest.mark.parametrize("fault", bad_input.contexts(HURT))
async def test_a_context_that_cannot_be_judged_is_a_dead_letter(here: Watch, fault: str) -> None:
    context, says = bad_input.contexts(HURT)[fault]
    letter = await here.letter(await here.forge("contexts", HURT, context), "analyze")
    assert says in letter.message
    assert letter.camera_id == HURT
    await here.goes_on(HURT, judged=fault == "hundreds of classes")


@pytest.mark.parametrize(
    "headers",
    [
        ((KIND, TICK),),
        ((KIND, TICK), (WALL, b"")),
        ((KIND, TICK), (WALL, b"noon")),
        ((KIND, TICK), (WALL, b"9" * 5000)),
        ((KIND, TICK), (WALL, b"1"), (CAMERA, b"\xff\xff")),
        ((KIND, b"tock"), (WALL, b"1")),
    ],
    ids=["nothing", "empty", "a word", "5,000 digits", "a camera that is no text", "no tick"],
)
async def test_a_tick_that_tells_no_time_is_a_dead_letter(here: Watch, headers: Headers) -> None:
    record = await here.append("frames", HURT, key=b"tick", value=None, headers=headers)
    await here.letter(record, "detect")
    await here.unread(record)
    await here.goes_on(HURT)


# Cameras and prompts


async def test_a_camera_s_impossible_settings_are_not_used(here: Watch) -> None:
    """A pin to no partition is skipped; windows without end give way to the default; a time zone names its fix."""
    good = await here.camera(SET)
    pinned = await here.forge("cameras", SET, replace(good, partition=PARTITIONS))
    said = rf"control record skipped.* offset={pinned.offset} "
    await here.eventually(lambda: here.said("ingest", said), "a word of ingest")
    await here.goes_on(SET)

    await here.forge("cameras", SET, replace(good, window=replace(good.window, max_frames=2**31 - 1)))
    await here.goes_on(SET, judged=True)

    await here.forge("cameras", SET, replace(good, time_zone="Mars/Olympus"))
    answer = await here.eventually_answers(SET, 503)
    assert f"`rewatch camera set {SET} --time-zone Europe/Berlin`" in answer.json()["error"]
    assert answer.headers["retry-after"]
    await here.forge("cameras", SET, good)
    await here.eventually_answers(SET, 200)
    await here.goes_on(SET, judged=True)


async def test_a_pointer_to_no_prompt_waits_for_one_and_judges_by_no_other(here: Watch) -> None:
    pointer = PromptRecord(
        kind="active",
        digest="0" * 32,
        scope=SET,
        name="",
        template="",
        output_schema="",
        parameters="",
        comment="",
        created_at=1,
    )
    await here.forge("prompts", SET, pointer)
    await here.goes_on(SET)
    answer = await here.upload(SET, await asyncio.to_thread(here.good))
    await here.end(SET)
    await here.eventually(
        lambda: here.said("analyze", "prompt version 0{32}, .*it is active but not in `prompts`"), "a word of analyze"
    )
    await here.goes_on(HURT, judged=True)  # other cameras are judged meanwhile
    await here.forge("prompts", SET, replace(pointer, digest=prompts.default().digest))
    await here.judged(answer.json()["frame_id"])


# The end


async def test_a_restart_finds_its_way_past_what_strangers_left(here: Watch) -> None:
    await here.restart("ingest", "batch", "sink")
    await here.goes_on(HURT, judged=True)
    for process in ("ingest", "batch"):
        await here.eventually(
            lambda process=process: here.said(process, "state record skipped"), f"a word of {process}"
        )


async def test_everything_is_accounted_for(here: Watch) -> None:
    await here.end(*CAMERAS)
    await here.drained()
    assert await here.unexplained() == []

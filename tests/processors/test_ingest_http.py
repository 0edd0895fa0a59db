"""The upload endpoint: answers only what is committed, and says what to change when it refuses."""

import asyncio
import socket

import httpx
import pytest
from pydantic import ValidationError

from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.http import build_app
from processors.ingest.service import Service
from processors.ingest.settings import IngestSettings, UploadSettings
from streams.claims import ClaimStore
from streams.serving import SettingsError
from tests.processors.ingest_kit import appenders, away, jpeg, png

URL = "/api/upload?camera=front"


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
async def client(log, tmp_path):
    """Opens clients of an app with given settings; `upload` has the section's keys."""
    opened = []

    def open_(cameras=None, upload=None, **settings):
        made = appenders(log, tmp_path, cameras=cameras, **settings)
        app = build_app(made, UploadSettings(**(upload or {})), lambda: sorted(made.waiting_on.values()))
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://t")
        opened.append((made, http))
        return http

    yield open_
    for made, http in opened:
        await http.aclose()
        await made.close()


async def test_raw_body(client, log):
    answer = await client().post(URL, content=jpeg(1))
    assert answer.status_code == 200
    (frame,) = log.frames()
    assert answer.json() == {"frame_id": frame.frame_id, "status": "accepted"}
    assert (frame.image, frame.source, frame.captured_from) == (jpeg(1), "upload", "none")


async def test_multipart(client, log):
    files = {"file": ("../../../etc/front.jpg", jpeg(1), "image/jpeg")}
    data = {"camera": "front", "captured_at": "2026-11-01T12:00:00Z"}
    answer = await client().post("/api/upload", files=files, data=data)
    assert answer.status_code == 200, answer.text
    (frame,) = log.frames()
    assert (frame.source_name, frame.captured_at, frame.captured_from) == (
        "etc/front.jpg",
        1_793_534_400_000,
        "client",
    )


async def test_the_same_upload_again_appends_nothing(client, log):
    http = client()
    answers = [await http.post(f"{URL}&captured_at=1793534400000", content=jpeg(1)) for _ in range(3)]
    assert [answer.json()["status"] for answer in answers] == ["accepted", "known", "known"]
    assert len({answer.json()["frame_id"] for answer in answers}) == 1
    assert len(log.frames()) == 1


async def test_the_same_bytes_at_another_time_are_another_frame(client, log):
    http = client()
    for at in ("1793534400000", "2026-11-01T12:00:01Z"):
        assert (await http.post(f"{URL}&captured_at={at}", content=jpeg(1))).json()["status"] == "accepted"
    assert len(log.frames()) == 2


async def test_an_unknown_camera_names_the_command(client, log):
    answer = await client().post("/api/upload?camera=back", content=jpeg(1))
    assert answer.status_code == 404
    assert "rewatch camera add back" in answer.json()["error"]
    assert log.records == []


async def test_unless_cameras_are_made(client, log):
    cameras = MemoryCameras()
    answer = await client(cameras, {"auto_create": True}).post("/api/upload?camera=back", content=jpeg(1))
    assert answer.status_code == 200
    assert cameras.get("back")
    assert log.frames()[0].camera_id == "back"


@pytest.mark.parametrize(
    ("url", "body", "reason"),
    [
        (URL, b"", "empty"),
        (URL, png(), "PNG"),
        (URL, jpeg(1)[:-20], "cut off"),
        (URL, b"GIF89a", "GIF"),
        ("/api/upload", jpeg(1), "which camera?"),
        ("/api/upload?camera=..%2F..%2Fetc", jpeg(1), "no camera id"),
        (f"{URL}&captured_at=1793534400", jpeg(1), "milliseconds"),
        (f"{URL}&captured_at=soon", jpeg(1), "ISO 8601"),
    ],
)
async def test_what_is_wrong_is_said(client, log, url, body, reason):
    answer = await client().post(url, content=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert log.records == []


async def test_a_form_without_a_file_is_refused(client):
    for form in ({"data": {"file": "text"}, "files": {"x": b"1"}}, {"files": {"image": ("a.jpg", jpeg(1))}}):
        answer = await client().post(URL, **form)
        assert answer.status_code == 400
        assert "named `file`" in answer.json()["error"]


async def test_a_broken_form_is_refused(client):
    answer = await client().post(URL, content=b"--x\r\nno", headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400


async def test_a_bomb_is_refused(client):
    answer = await client(max_pixels=100).post(URL, content=jpeg(1))
    assert answer.status_code == 400
    assert "ingest.max_pixels" in answer.json()["error"]


async def test_too_long_by_its_head(client, log):
    answer = await client(max_bytes=500).post(URL, content=jpeg(1) + bytes(500))
    assert answer.status_code == 413
    assert "ingest.max_bytes" in answer.json()["error"]
    assert log.records == []


async def test_too_long_while_it_streams_is_refused_before_its_end(client):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    answer = await client(max_bytes=5000).post(URL, content=endless())
    assert answer.status_code == 413
    assert sent < 10_000


async def test_a_form_that_is_too_long(client):
    files = {"file": ("a.jpg", jpeg(1) + bytes(200_000))}
    assert (await client(max_bytes=1000).post(URL, files=files)).status_code == 413


async def test_a_slow_upload_is_given_up(client, log):
    async def slow():
        yield jpeg(1)[:100]
        await asyncio.Event().wait()

    answer = await client(upload={"timeout_s": 0.02}).post(URL, content=slow())
    assert answer.status_code == 408
    assert log.records == []


async def test_away_broker_is_503_and_health_says_so(client, log):
    log.fault = away()
    http = client()
    answer = await http.post(URL, content=jpeg(1))
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert (await http.get("/health")).json() == {"status": "waiting", "waiting_on": ["broker"]}
    log.fault = lambda _: None
    assert (await http.post(URL, content=jpeg(1))).json()["status"] == "accepted"
    assert (await http.get("/health")).json() == {"status": "ok", "waiting_on": []}
    assert len(log.frames()) == 1


async def test_no_ok_before_the_commit(client, log):
    def lost(step):
        if step == "committed":
            log.fault = lambda _: None
            raise RuntimeError("the answer is lost")

    log.fault = lost
    http = client()
    assert (await http.post(URL, content=jpeg(1))).status_code == 500
    assert (await http.post(URL, content=jpeg(1))).json()["status"] == "known"
    assert len(log.frames()) == 1


async def test_too_many_at_once_are_told_to_come_back(client):
    begun, go = asyncio.Event(), asyncio.Event()

    async def held():
        begun.set()
        await go.wait()
        yield jpeg(1)

    http = client(upload={"max_waiting": 1})
    first = asyncio.create_task(http.post(URL, content=held()))
    await begun.wait()
    second = await http.post(URL, content=jpeg(2))
    assert second.status_code == 429
    assert int(second.headers["retry-after"]) > 0
    go.set()
    assert (await first).status_code == 200
    assert (await http.post(URL, content=jpeg(2))).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        {"Origin": "http://elsewhere"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_uploads_by_web_pages_are_refused(client, header):
    http = client()
    answer = await http.post(URL, content=jpeg(1), headers=header)
    assert (answer.status_code, "web pages" in answer.text) == (403, True)
    assert (await http.post(URL, content=jpeg(1))).status_code == 200


@pytest.mark.parametrize("header", [{"Authorization": "Bearer s3cret"}, {"X-API-Key": "s3cret"}])
async def test_a_key_is_asked_for_before_anything_else(client, header):
    http = client(upload={"api_key": "s3cret"})
    assert (await http.post(URL, content=jpeg(1))).status_code == 401
    assert (await http.post(URL, content=jpeg(1), headers={"X-API-Key": "s3cre"})).status_code == 401
    assert (await http.post(URL, content=jpeg(1), headers={"Authorization": "Basic s3cret"})).status_code == 401
    assert (await http.post(URL, content=jpeg(1), headers=header)).status_code == 200
    assert (await http.get("/health")).status_code == 200


def test_open_to_others_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValidationError, match=r"ingest\.upload\.api_key"):
            UploadSettings(host=host)
        UploadSettings(host=host, api_key="k")
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        UploadSettings(host=host)
    with pytest.raises(ValidationError, match="is empty"):
        UploadSettings(api_key="")


async def test_the_service_takes_uploads_and_files_and_stops_in_order(log, tmp_path):
    (tmp_path / "inbox/front").mkdir(parents=True)
    settings = IngestSettings.model_validate(
        {"upload": {"port": 0}, "folder": {"root": tmp_path / "inbox", "stable_s": 0.0}},
    )
    cameras, claims = MemoryCameras("front"), ClaimStore(str(tmp_path / "images"))
    service = Service(log, settings, cameras, claims, status=tmp_path / "status/ingest.json")
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    async with asyncio.timeout(20), httpx.AsyncClient(base_url=await service.url) as http:
        assert (await http.get("/health")).json()["status"] == "ok"
        assert (await http.post(URL, content=jpeg(1))).json()["status"] == "accepted"
        (tmp_path / "inbox/front/a.jpg").write_bytes(jpeg(2))
        await log.until(2)
        stop.set()
        await running
    assert (tmp_path / "status/ingest.json").exists()
    assert sorted(frame.source for frame in log.frames()) == ["folder", "upload"]


async def test_a_taken_port_names_the_setting(log, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = IngestSettings.model_validate(
            {"upload": {"port": taken.getsockname()[1]}, "folder": {"enabled": False}}
        )
        service = Service(log, settings, MemoryCameras(), ClaimStore(str(tmp_path)))
        with pytest.raises(SettingsError, match=r"ingest\.upload\.port"):
            await service.run(asyncio.Event())

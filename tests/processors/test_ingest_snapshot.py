"""Snapshots of a real HTTP camera: each picture once, a frozen one counted, nothing secret told, nothing elsewhere."""

import asyncio
import ipaddress
import logging
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpcore
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError
from starlette.responses import RedirectResponse, Response

from processors.ingest import fetch
from processors.ingest.address import AddressError, parse
from processors.ingest.core import RejectedError
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.reach import is_refused
from processors.ingest.service import Service
from processors.ingest.settings import IngestSettings, SnapshotSettings
from processors.ingest.snapshot import LastingError, Snapshots, next_due, pause_after
from streams.claims import ClaimStore
from tests.processors.camera_kit import camera, endless, half, picture, slow, with_digest
from tests.processors.ingest_kit import appenders, away, jpeg, png


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
async def cam():
    async with camera() as one:
        yield one


@pytest.fixture
async def watch(log, tmp_path, cam):
    """Fetches `count` answers of the camera, or until nothing came so often; pauses take no time."""
    made = []

    async def fetch_(count, *, path="/snap.jpg", fails=0, hasty=False, limits=None, **settings):
        ways_in = appenders(log, tmp_path, **(limits or {}))
        made.append(ways_in)
        stop = asyncio.Event()
        pauses = []

        async def sleep(seconds):
            pauses.append(seconds)
            await asyncio.sleep(0)

        def show(now):
            if fails and now.failed >= fails:
                stop.set()

        source = Snapshots(
            "front",
            SnapshotSettings(**{"url": cam.url + path, "every_s": 60, **settings}),
            ways_in,
            on_progress=show,
            sleep=sleep,
            chance=lambda: 0.0,
        )
        watched = await source.run(stop, count=count, hasty=hasty)
        await ways_in.close()
        return watched, pauses

    yield fetch_
    for ways_in in made:
        await ways_in.close()


async def test_each_picture_is_a_frame_once(log, cam, watch):
    cam.says(jpeg(1), jpeg(2), jpeg(3))
    watched, _ = await watch(3, path="/api/driveway/latest.jpg?h=720")
    assert [frame.image for frame in log.frames()] == [jpeg(1), jpeg(2), jpeg(3)]
    frame = log.frames()[0]
    assert (frame.source, frame.captured_at, frame.captured_from) == ("snapshot", None, "none")
    assert frame.source_name == cam.url.removeprefix("http://") + "/api/driveway/latest.jpg"
    assert str(cam.asked[0].url).endswith("/api/driveway/latest.jpg?h=720")
    assert (watched.accepted, watched.unchanged, watched.failed) == (3, 0, 0)


async def test_a_frozen_picture_is_no_new_frame_and_no_silent_camera(log, cam, watch):
    cam.says(picture(jpeg(1), etag='"a"'))
    watched, _ = await watch(4)
    assert [request.headers.get("if-none-match") for request in cam.asked] == [None, '"a"', '"a"', '"a"']
    assert (watched.accepted, watched.unchanged) == (1, 3)
    cam.says(jpeg(1))  # without validators: the same bytes
    await watch(2)
    assert len(log.frames()) == 1
    state = log.state("front")
    assert (state.frames, state.unchanged) == (1, 5)


async def test_last_modified_is_asked_by_where_it_can_tell_two_pictures_apart(log, cam, watch):
    hour_ago = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    old = format_datetime(hour_ago, usegmt=True)
    cam.says(picture(jpeg(1), modified=old))
    watched, _ = await watch(3)
    assert (watched.accepted, watched.unchanged) == (1, 2)
    assert cam.asked[-1].headers["if-modified-since"] == old
    assert log.frames()[0].file_at == hour_ago.timestamp() * 1000
    cam.asked.clear()

    def this_second(_):
        return Response(
            jpeg(10 + len(cam.asked)),
            headers={"last-modified": format_datetime(datetime.now(UTC), usegmt=True)},
        )

    cam.says(this_second)
    watched, _ = await watch(3)
    assert watched.accepted == 3
    assert not any("if-modified-since" in request.headers for request in cam.asked)


async def test_a_validator_that_never_changes_is_not_believed_for_ever(log, cam, watch, monkeypatch):
    monkeypatch.setattr(fetch, "_DISTRUST_S", 0.0)
    cam.says(*(picture(jpeg(shade), etag='"always"') for shade in range(3)))
    watched, _ = await watch(3)
    assert watched.accepted == 3


async def test_a_camera_that_wants_digest_gets_it_and_is_asked_twice_only_once(log, cam, watch):
    cam.says(with_digest(picture(jpeg(1)), "admin", "pa:ss/w@rd"))
    watched, _ = await watch(3, path="/snap.jpg?ch=1", user="admin", password="pa:ss/w@rd")
    assert (watched.accepted, watched.unchanged) == (1, 2)
    assert len(cam.asked) == 4


async def test_basic_only_where_it_is_asked_for(log, cam, watch):
    def answer(request):
        if request.headers.get("authorization") == "Basic YWRtaW46czNjcmV0":
            return Response(jpeg(1))
        return Response(status_code=401, headers={"www-authenticate": 'Basic realm="camera"'})

    cam.says(answer)
    address = cam.url.replace("http://", "http://admin:s3cret@") + "/snap.jpg"
    watched, _ = await watch(2, url=address)
    assert watched.accepted == 1
    assert [("authorization" in request.headers) for request in cam.asked] == [False, True, True]


async def test_a_wrong_password_is_said_and_not_tried_often(log, cam, watch):
    cam.says(with_digest(picture(jpeg(1)), "admin", "right"))
    watched, pauses = await watch(1, fails=2, user="admin", password="wrong")
    assert "refuses this user or this password" in watched.why
    assert watched.waiting_on == "camera front"
    assert min(pauses) >= 300
    with pytest.raises(LastingError, match="refuses this user"):
        await watch(1, user="admin", password="wrong", hasty=True)
    with pytest.raises(LastingError, match="asks for a user and a password: give --user"):
        await watch(1, hasty=True)


async def test_an_endless_challenge_is_not_read(log, cam, watch):
    challenge = endless(status=401, www_authenticate='Basic realm="camera"')
    cam.says(challenge, picture(jpeg(1)))
    watched, _ = await watch(1, user="a", password="b")
    assert watched.accepted == 1
    assert challenge.sent < 10_000_000


async def test_a_digest_that_is_not_known_is_said(log, cam, watch):
    challenge = 'Digest realm="c", nonce="1", algorithm=ROT13'
    cam.says(Response(status_code=401, headers={"www-authenticate": challenge}))
    with pytest.raises(LastingError, match="digest authentication that is not known"):
        await watch(1, user="a", password="b", hasty=True)


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_honoured(log, cam, watch, status):
    cam.says(Response(status_code=status, headers={"retry-after": "120"}), jpeg(1))
    watched, pauses = await watch(1)
    assert (watched.accepted, watched.failed, watched.waiting_on) == (1, 1, "")
    assert pauses == [120]
    later = format_datetime(datetime.fromtimestamp(datetime.now(UTC).timestamp() + 100, UTC), usegmt=True)
    cam.says(Response(status_code=status, headers={"retry-after": later}), jpeg(1))
    _, pauses = await watch(1)
    assert 95 < pauses[0] <= 100
    cam.says(Response(status_code=status, headers={"retry-after": "99999999999999"}), jpeg(1))
    _, pauses = await watch(1)
    assert pauses == [900]


async def test_a_camera_that_is_away_is_asked_less_and_less_often(log, cam, watch):
    cam.says(*[Response(status_code=500)] * 9, jpeg(1))
    watched, pauses = await watch(1)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert (watched.failed, watched.accepted) == (9, 1)


async def test_what_is_no_picture_is_one_dead_letter_each_and_the_source_goes_on(log, cam, watch):
    page = b"<html>please log in</html>"
    cam.says(page, page, png(), jpeg(9)[:-20], jpeg(1))
    watched, pauses = await watch(5)
    assert [letter.message.split(" (")[0] for letter in log.dead_letters()] == [
        "this is a web page",
        "this is a PNG, whatever its name says: send JPEG",
        "the JPEG is cut off: image file is truncated",
    ]
    assert log.dead_letters()[0].value == page
    assert [frame.image for frame in log.frames()] == [jpeg(1)]
    assert (watched.accepted, watched.rejected, watched.failed) == (1, 3, 0)
    assert pauses == [1, 2, 4, 8]  # whoever sends a page sends it for a while
    await watch(1)
    cam.says(page)
    await watch(1)
    assert len(log.dead_letters()) == 3


async def test_an_endless_body_is_read_to_the_limit_and_is_one_dead_letter(log, cam, watch):
    flood = endless()
    cam.says(flood, flood, jpeg(1))
    watched, _ = await watch(3, limits={"max_bytes": 1_000_000})
    assert [(letter.value, "max_bytes 1,000,000" in letter.message) for letter in log.dead_letters()] == [(b"", True)]
    assert flood.sent < 20_000_000
    assert watched.accepted == 1


async def test_a_long_body_that_is_announced_is_not_read(log, cam, watch):
    flood = endless(content_length="5000000000")
    cam.says(flood, jpeg(1))
    await watch(2, limits={"max_bytes": 1_000_000})
    assert "5,000,000,000 bytes" in log.dead_letters()[0].message
    assert flood.sent < 10_000_000


async def test_a_slow_body_is_given_up(log, cam, watch):
    cam.says(slow(jpeg(1), 0.05), jpeg(2))
    watched, _ = await watch(1, timeout_s=0.3)
    assert (watched.failed, watched.accepted) == (1, 1)
    assert log.frames()[0].image == jpeg(2)
    assert log.dead_letters() == []


async def test_half_a_picture_is_asked_for_again(log, cam, watch):
    cam.says(half(jpeg(1)), jpeg(2))
    watched, _ = await watch(1)
    assert (watched.failed, watched.accepted, log.dead_letters()) == (1, 1, [])


async def test_an_empty_answer_and_a_304_that_nobody_asked_for_are_no_pictures(log, cam, watch):
    cam.says(b"", Response(status_code=304), Response(status_code=204), jpeg(1))
    watched, _ = await watch(1)
    assert (watched.failed, watched.accepted, log.dead_letters()) == (3, 1, [])


async def test_a_video_stream_is_named_as_one(log, cam, watch):
    cam.says(endless(content_type="multipart/x-mixed-replace; boundary=x"))
    with pytest.raises(LastingError, match=r"endless stream \(MJPEG\), no snapshot"):
        await watch(1, hasty=True)


async def test_redirects_are_followed_to_the_same_host_only(log, cam, watch):
    cam.says(RedirectResponse("/other.jpg?x=1"), RedirectResponse(f"{cam.url}/there.jpg", 301), jpeg(1))
    watched, _ = await watch(1)
    assert watched.accepted == 1
    assert [request.url.path for request in cam.asked] == ["/snap.jpg", "/other.jpg", "/there.jpg"]
    async with camera() as other:
        for elsewhere in (
            other.url.replace("127.0.0.1", "localhost"),
            "//localhost/x",
            "file:///etc/passwd",
            "http://[",
        ):
            cam.says(RedirectResponse(elsewhere))
            with pytest.raises(LastingError, match="redirects to"):
                await watch(1, hasty=True)
        assert other.asked == []
        cam.says(RedirectResponse(f"{other.url}/?query=SELECT"))
        with pytest.raises(LastingError, match="redirects to another port"):
            await watch(1, hasty=True)
        assert other.asked == [], "another port of this machine is another service"
    cam.says(RedirectResponse("/round"))
    with pytest.raises(LastingError, match="in a circle"):
        await watch(1, hasty=True)


METADATA = (
    "169.254.169.254",
    "169.254.0.1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fe80::1",
    "fe80::1%eth0",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    # Of networks' own NAT64, by each length of its prefix: 96, 64, 56 and 48 bits.
    "64:ff9b:1:2:3:4:a9fe:a9fe",
    "64:ff9b:1:2:a9:fea9:fe00:0",
    "64:ff9b:1:2a9:fe:a9fe::",
    "64:ff9b:1:a9fe:a9:fe00::",
    "64:ff9b:1::6464:64c8",
    "2002:a9fe:a9fe::1",
    "100.100.100.200",
)


@pytest.mark.parametrize("address", METADATA)
async def test_credentials_of_a_clouds_machine_are_not_asked_for(address: str, monkeypatch) -> None:
    """Neither by the address nor by a name that leads there; a name is looked up once, where it is connected to."""
    assert is_refused(address)
    looked_up, connected = [], []

    async def rebinding(_self, host, port, **_):
        looked_up.append(host)
        there = address if len(looked_up) != 2 else "127.0.0.1"  # each time another answer
        return [(0, 0, 0, "", (there, port))]

    async def connect(_self, host, *_, **__):
        connected.append(host)
        raise httpcore.ConnectError("refused")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rebinding)
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    given = f"[{address}]" if ":" in address and "%" not in address else "cam.example"
    pictures = fetch.HttpPictures(parse(f"http://{given}/latest/meta-data"), max_bytes=1000, timeout_s=5)
    with pytest.raises(fetch.FetchError, match=r"link-local.*which is not asked.*--link-local") as told:
        await pictures.get()
    assert (told.value.lasting, connected) == (True, [])
    with pytest.raises(fetch.FetchError, match="cannot connect"):
        await pictures.get()
    assert connected == ["127.0.0.1"], "what is connected to is what was looked at"
    await pictures.close()
    allowed = fetch.HttpPictures(parse(f"http://{given}/"), max_bytes=1000, timeout_s=5, link_local=True)
    with pytest.raises(fetch.FetchError, match="cannot connect"):
        await allowed.get()
    assert connected == ["127.0.0.1", address]
    await allowed.close()


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "192.168.1.20", "10.0.0.1", "fd12::1", "203.0.113.7", "64:ff9b:1::c0a8:114"]
)
def test_cameras_of_a_house_are_asked(address: str) -> None:
    assert not is_refused(address)


async def test_a_certificate_of_its_own_making_is_refused_unless_it_is_allowed(log, tmp_path, caplog):
    cert, key = _certificate(tmp_path)
    async with camera(ssl_certfile=cert, ssl_keyfile=key) as cam:
        cam.says(jpeg(1))
        ways_in = appenders(log, tmp_path)
        settings = SnapshotSettings(url=f"{cam.url}/snap.jpg")
        with pytest.raises(LastingError, match=r"certificate is not trusted \(self-signed.*--insecure"):
            await Snapshots("front", settings, ways_in).run(asyncio.Event(), count=1, hasty=True)
        with structlog.testing.capture_logs() as said:
            allowed = settings.model_copy(update={"insecure": True})
            watched = await Snapshots("front", allowed, ways_in).run(asyncio.Event(), count=1)
        assert watched.accepted == 1
        assert any("certificate" in line["event"] for line in said)
        await ways_in.close()


async def test_no_secret_is_told(log, cam, watch, caplog, capsys):
    """Whatever the camera answers, neither words nor records hold user or password."""
    caplog.set_level(logging.WARNING)
    secrets = ("hunter2", "hunter%32", "topsecret", "sneaky")
    query = "cmd=Snap&user=sneaky&password=topsecret"
    address = cam.url.replace("http://", "http://sneaky:hunter%32@") + f"/snap.cgi?{query}"
    echo = f"<html>{query} hunter2 not found</html>".encode()
    cam.says(
        Response(status_code=401, headers={"www-authenticate": 'Digest realm="c", nonce="1", qop="auth"'}),
        Response(status_code=401),
        Response(echo, 404),
        RedirectResponse(f"http://elsewhere/?{query}"),
        Response(status_code=503),
        half(jpeg(1)),
        echo,
        jpeg(2),
    )
    with structlog.testing.capture_logs() as said:
        watched, _ = await watch(2, url=address)
    assert watched.accepted == 1
    settings = SnapshotSettings(url=address)
    told = [repr(watched), repr(said), caplog.text, repr(settings), str(settings.url), settings.model_dump_json()]
    told += [str(log.records), log.frames()[0].source_name, log.dead_letters()[0].origin, *capsys.readouterr()]
    for text in told:
        for secret in secrets:
            assert secret not in text
    assert log.dead_letters()[0].value == b"<html>*** *** not found</html>"
    assert "topsecret" in str(cam.asked[-1].url)


async def test_an_away_broker_holds_the_picture_and_the_camera_is_left_in_peace(log, cam, watch):
    cam.says(jpeg(1), jpeg(2))
    log.fault = away(3)
    watched, _ = await watch(2)
    assert [frame.image for frame in log.frames()] == [jpeg(1), jpeg(2)]
    assert len(cam.asked) == 2
    assert watched.failed == 0


async def test_a_picture_whose_append_failed_unforeseen_is_asked_for_again(log, cam, watch):
    cam.says(picture(jpeg(1), etag='"a"'))
    calls = 0

    def fault(step):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("not foreseen")

    log.fault = fault
    watched, _ = await watch(2)
    assert (watched.accepted, watched.failed) == (1, 1)
    assert len(log.frames()) == 1


async def test_the_service_watches_cameras_and_one_that_is_away_does_not_stop_the_others(log, tmp_path, cam):
    cam.says(*(jpeg(shade) for shade in range(3)))
    settings = IngestSettings(
        folder={"enabled": False},
        upload={"enabled": False},
        snapshots={"back": "http://127.0.0.1:9/x.jpg", "front": {"url": f"{cam.url}/x.jpg", "every_s": 0.05}},
    )
    service = Service(log, settings, MemoryCameras(), ClaimStore(str(tmp_path)), status=tmp_path / "status")
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    await log.until(frames=3)
    while service.waiting_on() != ["camera back"]:
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.wait_for(running, 5)
    assert {frame.camera_id for frame in log.frames()} == {"front"}


async def test_it_stops_at_once_while_a_camera_hangs(log, tmp_path, cam):
    cam.says(slow(jpeg(1), 10))
    ways_in = appenders(log, tmp_path)
    stop = asyncio.Event()
    settings = SnapshotSettings(url=f"{cam.url}/x.jpg")
    running = asyncio.create_task(Snapshots("front", settings, ways_in).run(stop))
    await cam.until_asked(1)
    stop.set()
    await asyncio.wait_for(running, 1)
    watched = await Snapshots("front", settings, ways_in).run(asyncio.Event(), for_s=0.05)
    assert watched.answers == 0
    await ways_in.close()


def test_beats_do_not_pile_up():
    assert next_due(10, 10.2, 1) == 11
    assert next_due(10, 11.4, 1) == 12
    assert next_due(10, 75, 1) == 75
    assert next_due(10, 10, 1) == 11


def test_pauses_grow_to_a_minute_or_the_beat_and_part_by_chance():
    assert [pause_after(n, 1, 0, 0) for n in (1, 2, 7, 1000)] == [1, 2, 60, 60]
    assert [pause_after(n, 300, 0, 0) for n in (1, 9, 10)] == [1, 256, 300]
    assert pause_after(1, 0.2, 0, 0) == 0.2
    assert pause_after(3, 1, 0, 1) == 2
    assert pause_after(1, 1, 30, 0.5) == pytest.approx(31.5)


@pytest.mark.parametrize(
    "text",
    [
        "ftp://admin:hunter2@cam/x.jpg",
        "admin:hunter2@cam/x.jpg",
        "http://admin:hunt/er2@cam/x.jpg",
        "http://ad/min:hunter2@cam/x.jpg",
        "http://admin:12/hunter2@cam/x.jpg",
        "http://admin:1#hunter2@cam/x.jpg",
        "http://admin:1?hunter2@cam/x.jpg",
        "http://:hunter2@/x.jpg",
        "http://admin:hunter2@cam:99999999/x.jpg",
        "http://[admin:hunter2@cam/x.jpg",
        "http://cam/hunter2\n.jpg",
        "",
    ],
)
def test_what_is_no_address_is_refused_without_being_repeated(text):
    with pytest.raises(AddressError) as refused:
        parse(text)
    assert "er2" not in str(refused.value)
    with pytest.raises(ValidationError, match="no http:// or https:// address"):
        SnapshotSettings(url=text)


def test_an_address_is_taken_apart():
    found = parse("https://ad%40min:p%2Fw@[::1]:8443/a b.jpg?token=abcd1234&h=7")
    assert (found.user, found.password) == ("ad@min", "p/w")
    assert found.shown == "https://[::1]:8443/a b.jpg?..."
    assert found.name == "[::1]:8443/a b.jpg"
    assert found.scrub("p/w p%2Fw abcd1234 h=7") == "*** *** *** h=7"
    assert parse("http://u:p@cam", "other", "word")[:3] == ("http://cam/", "other", "word")


async def test_a_camera_id_that_is_none_is_refused(log, tmp_path):
    ways_in = appenders(log, tmp_path)
    with pytest.raises(RejectedError, match="no camera id"):
        await Snapshots("../x", SnapshotSettings(url="http://cam"), ways_in).run(asyncio.Event(), count=1)
    with pytest.raises(ValidationError, match="no camera id"):
        IngestSettings(snapshots={"Front Door": "http://cam"})


def _certificate(tmp_path):
    """A certificate for 127.0.0.1 that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "camera")])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    paths[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain),
    )
    return paths

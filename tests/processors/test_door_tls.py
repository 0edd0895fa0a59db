"""TLS at every door, spoken for real: the certificate that was set, no older version than was set, nothing in clear."""

import asyncio
import contextlib
import io
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from PIL import Image

from infra.tls import certificates
from processors.detect.detector import FakeDetector
from processors.detect.http_detector import HttpDetector
from processors.detect.service.service import Service as DetectService
from processors.detect.settings import ClientSettings, DetectorSettings, ServiceSettings
from processors.gateway.fakes import FakeSource
from processors.gateway.settings import GatewaySettings
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.service import Service as IngestService
from processors.ingest.settings import IngestSettings
from streams.claims import ClaimStore
from streams.scraping import Endpoint, MetricsSettings
from streams.serving import SettingsError, listen, serve
from tests.processors.test_detect import jpeg
from tests.processors.test_gateway_api import FRONT, app_of, event
from tests.streams.test_serving import Settings

KEY = "correct horse battery staple"


class Files(NamedTuple):
    """Where an authority's certificate, and a server's with its key, lie."""

    authority: Path
    cert: Path
    key: Path

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"port": 0, "api_key": KEY, "tls_cert_path": self.cert, "tls_key_path": self.key} | more


def made(folder: Path, *, hosts: tuple[str, ...] = ("127.0.0.1",), now: datetime | None = None) -> Files:
    now = now or datetime.now(UTC)
    authority = certificates.authority("a home's authority", now)
    pair = certificates.issue(authority, "door", hosts, now)
    folder.mkdir(exist_ok=True)
    files = Files(folder / "ca.pem", folder / "door.pem", folder / "door.key")
    for path, data in zip(files, (authority.certificate, *pair), strict=True):
        path.write_bytes(data)
        path.chmod(0o600)
    return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return made(tmp_path / "tls")


def client_context(files: Files, *, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.authority)
    context.maximum_version = newest
    return context


@asynccontextmanager
async def gateway(settings: dict[str, Any], _folder: Path) -> AsyncIterator[tuple[str, str]]:
    door = GatewaySettings(**settings)
    listener, stop = listen(door), asyncio.Event()
    app = app_of(FakeSource(cameras=[FRONT], events=[event()]), api_key=KEY)
    running = asyncio.create_task(serve(app, door, listener, stop))
    yield door.model_copy(update={"port": listener.getsockname()[1]}).url, "/api/events"
    stop.set()
    await running


@asynccontextmanager
async def upload(settings: dict[str, Any], folder: Path) -> AsyncIterator[tuple[str, str]]:
    section = IngestSettings.model_validate({"upload": settings, "folder": {"enabled": False}})
    service = IngestService(MemoryLog(), section, MemoryCameras("front"), ClaimStore(str(folder / "images")))
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    yield await service.url, "/health"
    stop.set()
    await running


@asynccontextmanager
async def detector(settings: dict[str, Any], _folder: Path) -> AsyncIterator[tuple[str, str]]:
    service = DetectService(FakeDetector, DetectorSettings(service=ServiceSettings(**settings), wait_ms=1))
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    url = await service.url
    await service.warm.wait()
    yield url, "/health"
    stop.set()
    await running


@asynccontextmanager
async def metrics(settings: dict[str, Any], folder: Path) -> AsyncIterator[tuple[str, str]]:
    async with Endpoint(MetricsSettings(**settings), folder) as endpoint:
        assert endpoint.url is not None
        yield endpoint.url.removesuffix("/metrics"), "/metrics"


Door = Callable[[dict[str, Any], Path], AbstractAsyncContextManager[tuple[str, str]]]


def hands(url: str, context: ssl.SSLContext) -> str | None:
    """The version that was agreed on; None where there was no agreement."""
    address = httpx.URL(url)
    assert address.port is not None
    with socket.create_connection((address.host, address.port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=address.host) as spoken:
                return spoken.version()
        except ssl.SSLError:
            return None


@pytest.mark.parametrize("door", [gateway, upload, detector, metrics], ids=lambda door: door.__name__)
async def test_a_door_speaks_tls_with_its_certificate_and_nothing_in_clear(
    door: Door, files: Files, tmp_path: Path
) -> None:
    stranger = made(tmp_path / "stranger")
    async with door(files.settings(tls_min_version="1.3"), tmp_path) as (url, path):
        assert url.startswith("https://")
        headers = {"x-api-key": KEY}
        async with httpx.AsyncClient(verify=client_context(files), trust_env=False) as http:
            assert (await http.get(url + path, headers=headers)).status_code == 200
        async with httpx.AsyncClient(verify=client_context(stranger), trust_env=False) as http:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await http.get(url + path, headers=headers)
        async with httpx.AsyncClient(trust_env=False) as http:
            with pytest.raises(httpx.HTTPError):
                await http.get(url.replace("https", "http") + path, headers=headers)
        old = client_context(files, newest=ssl.TLSVersion.TLSv1_2)
        assert await asyncio.to_thread(hands, url, client_context(files)) == "TLSv1.3"
        assert await asyncio.to_thread(hands, url, old) is None
    async with door(files.settings(), tmp_path) as (url, _):
        assert await asyncio.to_thread(hands, url, old) == "TLSv1.2"
        ancient = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        ancient.check_hostname, ancient.verify_mode = False, ssl.CERT_NONE
        ancient.set_ciphers("DEFAULT@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            ancient.minimum_version = ancient.maximum_version = ssl.TLSVersion.TLSv1_1
        assert await asyncio.to_thread(hands, url, ancient) is None
    async with door(files.settings(tls="off"), tmp_path) as (url, _):
        assert url.startswith("http://"), "a proxy in front has the certificate"


async def test_the_detect_stage_asks_by_tls_and_believes_no_other_certificate(files: Files, tmp_path: Path) -> None:
    async with detector(files.settings(), tmp_path) as (url, _):
        for authority, taken in ((files.authority, True), (made(tmp_path / "stranger").authority, False)):
            client = ClientSettings(ca_path=authority, retries=0)
            asks = HttpDetector(DetectorSettings.model_validate({"url": url, "api_key": KEY, "client": client}))
            try:
                refused: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
                if not taken:
                    refused = pytest.raises(Exception, match=r"(?i)certificate")
                with refused:
                    (boxes,) = await asyncio.to_thread(asks.detect, [Image.open(io.BytesIO(jpeg()))])
                    assert boxes
            finally:
                asks.close()


def test_a_key_that_is_not_the_certificates_is_told_before_anything_runs(files: Files, tmp_path: Path) -> None:
    other = made(tmp_path / "other")
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"a password"),
        )
    )
    (tmp_path / "text.pem").write_text("hello")
    for cert, secret in (
        (files.cert, other.key),
        (files.cert, locked),  # nobody is asked for its password: a service has no terminal
        (tmp_path / "text.pem", files.key),
        (tmp_path / "none.pem", files.key),
        (files.key, files.cert),
    ):
        with pytest.raises(SettingsError, match=r"toy\.tls_cert_path or \.tls_key_path cannot be used"):
            listen(Settings(tls_cert_path=cert, tls_key_path=secret))
    listen(Settings(tls_cert_path=files.cert, tls_key_path=files.key)).close()


async def test_doctor_tells_of_certificates_that_end_and_keys_that_others_read(tmp_path: Path) -> None:
    from infra.checks import keys
    from infra.checks.check import Context
    from infra.config import load

    async def told(files: Files) -> dict[str, tuple[str, str]]:
        door = GatewaySettings(**files.settings())
        settings = load().model_copy(update={"gateway": door})
        return {c.name: (c.status, c.found) for c in await keys.certificates_of_doors(Context(settings, {}))}

    now, days = datetime.now(UTC), certificates.SERVER_DAYS
    ages = {"good": 0, "soon": days - 29, "over": days + 1, "early": -2}
    found = {name: await told(made(tmp_path / name, now=now - timedelta(days=age))) for name, age in ages.items()}
    name = "gateway.tls_cert_path"
    assert {key: value[name][0] for key, value in found.items()} == {
        "good": "ok",
        "soon": "warning",
        "over": "failed",
        "early": "failed",
    }
    assert "it ended on" in found["over"][name][1]
    good = made(tmp_path / "good")
    good.key.chmod(0o644)
    assert (await told(good))["gateway.tls_key_path"][0] == "warning"
    good.cert.write_text("hello")
    assert (await told(good))[name] == ("failed", f"{good.cert}: no certificate in PEM")
    good.cert.unlink()
    assert (await told(good))[name] == ("failed", f"{good.cert}: No such file or directory")

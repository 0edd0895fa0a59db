"""Tokens at every door: which scope opens what, on the page too; and that a door is still a door."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from joserfc import jwk, jwt
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from starlette.routing import Route

from infra.checks import keys
from infra.checks.check import Context
from infra.config import load
from processors.detect.service.http import Door as DetectDoor
from processors.detect.settings import ServiceSettings
from processors.gateway import rights
from processors.gateway.fakes import FakeSource
from processors.gateway.settings import GatewaySettings
from processors.ingest.fakes import MemoryLog
from processors.ingest.http import build_app as build_ingest
from processors.ingest.settings import UploadSettings
from streams.scraping import MetricsSettings
from streams.scraping import build_app as build_metrics
from streams.serving import SettingsError, listen
from tests.processors.gateway_kit import KEY, client_of, served
from tests.processors.ingest_kit import appenders, jpeg
from tests.processors.test_gateway_api import FRONT, app_of, event
from tests.streams.test_serving import Settings

ISSUER = "https://id.example"
SECRET = "fedcba9876543210" * 2
TOKENS = {"issuer": ISSUER, "secret": SECRET}
LABEL = {"verdict": "true_alarm", "event_id": "front:0123:live"}
FORM = {"verdict": "true_alarm"}
HERE = {"origin": "http://localhost"}


def token(scope: str, **more: Any) -> str:
    claims = {"iss": ISSUER, "aud": "rewatch", "exp": int(time.time()) + 600, "scope": scope} | more
    return jwt.encode({"alg": "HS256"}, claims, jwk.OctKey.import_key(SECRET))


def bearer(scope: str, **more: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {token(scope, **more)}"}


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(cameras=[FRONT], events=[event()])


@pytest.fixture(params=[{}, {"api_key": KEY}], ids=["tokens alone", "beside a key"])
async def gateway(request: pytest.FixtureRequest, source: FakeSource):
    async with client_of(app_of(source, jwt=TOKENS, **request.param)) as client:
        yield client


async def test_a_token_opens_what_its_scopes_say_and_nothing_else(
    gateway: httpx.AsyncClient, source: FakeSource
) -> None:
    asked = {
        ("GET", "/api/events"): "read",
        ("GET", "/pipeline"): "read",
        ("GET", "/api/openapi.json"): "read",
        ("POST", "/api/labels"): "label",
        ("POST", "/events/front:0123:live/labels"): "label",
        ("POST", "/cameras/front/missed"): "label",
        ("POST", "/api/upload?camera=front"): "upload",
        ("POST", "/api/holds"): "admin",
        ("DELETE", "/api/events/x"): "admin",
    }
    for (method, path), needed in asked.items():
        for scope in ("read", "label", "upload", "admin", ""):
            body: dict[str, Any] = {"json": LABEL} if path.startswith("/api") else {"data": FORM}
            answer = await gateway.request(method, path, headers=bearer(scope), **body)
            if scope in {needed, "admin"}:
                assert answer.status_code not in {401, 403}, (method, path, scope)
            else:
                assert answer.status_code == 403, (method, path, scope)
                assert f"needs the scope {needed}" in answer.text
                assert answer.headers["www-authenticate"].endswith(f'scope="{needed}"')
    assert len(source.given) == 4, "two ways, by two scopes each"


async def test_a_token_that_is_not_taken_is_refused_with_the_reason_and_shuts_nobody_out(
    gateway: httpx.AsyncClient,
) -> None:
    for _ in range(8):  # more than wrong keys are taken
        answer = await gateway.get("/api/events", headers=bearer("read", exp=int(time.time()) - 60))
        assert answer.status_code == 401
        assert answer.json()["error"] == "this token is not taken: it has expired (gateway.jwt)"
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    changed = await gateway.get("/api/events", headers={"authorization": f"Bearer {token('read')[:-3]}AAA"})
    assert (changed.status_code, "not signed by a key" in changed.text) == (401, True)
    assert (await gateway.get("/api/events", headers=bearer("read"))).status_code == 200
    assert "gateway.jwt" in (await gateway.get("/api/events")).json()["error"]
    assert (await gateway.get("/health")).status_code == 200


async def test_a_token_signs_in_on_the_page_with_its_scopes_until_it_ends(gateway: httpx.AsyncClient) -> None:
    answer = await gateway.get("/events/x", headers={"accept": "text/html"} | bearer("read", aud="other"))
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fevents%2Fx")
    wrong = await gateway.post("/login", data={"key": token("read", aud="other")}, headers=HERE)
    assert wrong.headers["location"].startswith("/login?wrong=")
    elsewhere = await gateway.post("/login", data={"key": token("read")}, headers={"origin": "http://evil.example"})
    assert (elsewhere.status_code, "set-cookie" in elsewhere.headers) == (403, False)
    answer = await gateway.post("/login", data={"key": token("read", exp=int(time.time()) + 60)}, headers=HERE)
    assert answer.status_code == 303
    ends = int(re.findall(r"Max-Age=(\d+)", answer.headers["set-cookie"])[0])
    assert 60 <= ends <= 91, "the token's own end, with the leeway"
    assert (await gateway.get("/pipeline")).status_code == 200
    labelled = await gateway.post("/api/labels", json=LABEL, headers=HERE)
    assert (labelled.status_code, "needs the scope label" in labelled.text) == (403, True)
    cookie = gateway.cookies["rewatch"].replace(".read.", ".admin.")
    gateway.cookies.clear()
    assert (await gateway.get("/api/events", headers={"cookie": f"rewatch={cookie}"})).status_code == 401
    await gateway.post("/login", data={"key": token("label")}, headers=HERE)
    assert (await gateway.post("/api/labels", json=LABEL, headers=HERE)).status_code == 201
    for headers in ({}, {"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert (await gateway.post("/api/labels", json=LABEL, headers=headers)).status_code == 403


async def test_a_stream_ends_with_its_token(source: FakeSource) -> None:
    async with served(app_of(source, jwt=TOKENS | {"leeway_s": 0})) as url, httpx.AsyncClient(base_url=url) as client:
        async with asyncio.timeout(10):
            answer = await client.get("/api/events/stream", headers=bearer("read", exp=int(time.time()) + 2))
        assert (answer.status_code, answer.text[:6]) == (200, "retry:")


def test_every_route_that_changes_something_says_which_scope_it_needs(source: FakeSource) -> None:
    app = app_of(source)._app  # type: ignore[attr-defined]
    assert isinstance(app, FastAPI)
    routes = [route for route in app.router.routes if isinstance(route, Route)]
    changing = {
        (method, re.sub(r"\{[^}]*\}", "x", route.path))
        for route in _all(app.router.routes)
        for method in route.methods or ()
        if not rights.is_safe(method)
    }
    assert routes
    assert ("POST", "/api/labels") in changing
    open_ = {path for method, path in changing if rights.needed(method, path) is None}
    assert open_ == {"/login", "/logout"}
    assert [path for method, path in changing if rights.needed(method, path) == "admin"] == []


def _all(routes: Any) -> list[Any]:
    found = []
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        found += (
            _all(inner) if inner and not hasattr(route, "methods") else [route] if hasattr(route, "methods") else []
        )
    return found


async def test_the_api_describes_the_scopes(gateway: httpx.AsyncClient) -> None:
    described = (await gateway.get("/api/openapi.json", headers=bearer("read"))).json()["paths"]
    assert described["/api/labels"]["post"]["security"] == [{"bearer": ["label"]}, {"header": []}]
    assert described["/api/events"]["get"]["security"] == [{"bearer": ["read"]}, {"header": []}]
    assert described["/health"]["get"]["security"] == []


async def test_the_detectors_service_and_metrics_take_tokens(tmp_path: Path) -> None:
    detector = DetectDoor(ServiceSettings.model_validate({"jwt": TOKENS}), CollectorRegistry())
    metrics = build_metrics(CollectorRegistry(), MetricsSettings.model_validate({"jwt": TOKENS}), tmp_path)
    try:
        async with client_of(detector.app()) as http:
            loading = await http.post("/detect", headers=bearer("upload"), content=b"x")
            assert (loading.status_code, "loading" in loading.text) == (503, True)
            refused = await http.post("/detect", headers=bearer("read"), content=b"x")
            assert (refused.status_code, "needs the scope upload" in refused.text) == (403, True)
            assert (await http.post("/detect", content=b"x")).status_code == 401
            assert (await http.get("/metrics", headers=bearer("read"))).status_code == 200
            assert (await http.get("/metrics", headers=bearer("upload"))).status_code == 403
    finally:
        detector.close()
    async with client_of(metrics) as http:
        for path in ("/metrics", "/targets"):
            assert (await http.get(path, headers=bearer("read"))).status_code == 200
            assert (await http.get(path, headers=bearer("label"))).status_code == 403
            assert (await http.get(path)).json()["error"].endswith("(metrics.jwt)")


async def test_an_upload_needs_the_scope_upload_before_anything_of_it_is_read(tmp_path: Path) -> None:
    log = MemoryLog()
    made = appenders(log, tmp_path)
    app = build_ingest(made, UploadSettings.model_validate({"jwt": TOKENS, "api_key": KEY}))
    async with client_of(app) as http:
        for headers, status in (
            ({}, 401),
            (bearer("read label"), 403),
            (bearer("upload", exp=1), 401),
            (bearer("upload"), 200),
            ({"x-api-key": KEY}, 200),
        ):
            answer = await http.post("/api/upload?camera=front", headers=headers, content=jpeg(1))
            assert answer.status_code == status, answer.text
        assert (await http.get("/health")).status_code == 200
    await made.close()
    assert len(log.frames()) == 1


async def test_doctor_tells_of_keys_of_tokens_that_cannot_be_used(tmp_path: Path) -> None:
    keys_file = tmp_path / "jwks.json"
    door = GatewaySettings.model_validate({"jwt": {"issuer": ISSUER, "keys_file": keys_file}})
    context = Context(load().model_copy(update={"gateway": door}), {})
    [check] = await keys.tokens(context)
    assert (check.status, "No such file" in check.found) == ("failed", True)
    assert "gateway.jwt.keys_file" in check.fix
    keys_file.write_text(json.dumps({"keys": [jwk.ECKey.generate_key("P-256").as_dict(private=False)]}))
    assert [check.status for check in await keys.tokens(context)] == ["ok"]


def test_a_door_for_others_is_content_with_tokens_and_uploads_keep_their_key(tmp_path: Path) -> None:
    assert Settings(host="0.0.0.0", jwt=TOKENS)
    with pytest.raises(ValidationError, match=r"ingest\.upload\.jwt alone shuts the gateway out"):
        UploadSettings.model_validate({"jwt": TOKENS})
    assert UploadSettings.model_validate({"jwt": TOKENS, "api_key": KEY})
    keys = {"issuer": ISSUER, "keys_file": tmp_path / "none.json"}
    with pytest.raises(SettingsError, match=r"toy\.jwt\.keys_file .*none\.json: No such file"):
        listen(Settings(jwt=keys))

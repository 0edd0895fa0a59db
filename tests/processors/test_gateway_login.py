"""Signing in and out: the form, the cookie, and where it leads."""

import time

import httpx
import pytest

from processors.gateway.fakes import FakeSource
from processors.gateway.login import local
from processors.gateway.sessions import Sessions
from processors.gateway.settings import GatewaySettings
from tests.processors.gateway_kit import KEY, client_of, signed_in
from tests.processors.test_gateway_api import app_of

pytest_plugins = ["tests.processors.door_kit"]


async def test_a_browser_is_led_to_the_login_and_back(keyed: httpx.AsyncClient) -> None:
    answer = await keyed.get("/events/a?b=c", headers={"accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fevents%2Fa%3Fb%3Dc")
    assert (await keyed.get(answer.headers["location"])).status_code == 200
    assert (await keyed.get("/static/app.css")).status_code == 200
    answer = await signed_in(keyed)
    assert (answer.status_code, answer.headers["location"]) == (303, "/pipeline")
    cookie = answer.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=strict", "Path=/"):
        assert part in cookie
    assert KEY not in cookie
    assert (await keyed.get("/pipeline")).status_code == 200
    assert (await keyed.get("/api/events")).status_code == 200


async def test_by_tls_the_cookie_is_secure_and_of_this_host_alone(source: FakeSource) -> None:
    async with client_of(app_of(source, api_key=KEY), base_url="https://cams.example") as client:
        answer = await client.post("/login", data={"key": KEY}, headers={"origin": "https://cams.example"})
        assert answer.headers["set-cookie"].startswith("__Host-rewatch=")
        assert "Secure" in answer.headers["set-cookie"]
        assert (await client.get("/api/events")).status_code == 200


async def test_a_cookie_that_was_changed_or_has_ended_opens_nothing(
    keyed: httpx.AsyncClient, source: FakeSource
) -> None:
    await signed_in(keyed)
    good = keyed.cookies["rewatch"]
    keyed.cookies.clear()
    end, scopes, signature = good.split(".")
    assert scopes == "admin"
    for value in (
        f"{int(end) + 1}.{scopes}.{signature}",
        f"{end}.read.{signature}",
        f"{end}.{scopes}.{signature[:-1]}{'1' if signature[-1] == '0' else '0'}",
        end,
        f".{signature}",
        f"{end}.{scopes}.",
        f"{end}.{signature}",
        "x.y",
        "é.é",
        "",
    ):
        answer = await keyed.get("/api/events", headers={"cookie": f"rewatch={value}".encode()})
        assert answer.status_code == 401, value
    assert (await keyed.get("/api/events", headers={"cookie": f"other=1; rewatch={good}"})).status_code == 200
    async with client_of(app_of(source, api_key="another key")) as other:
        assert (await other.get("/api/events", headers={"cookie": f"rewatch={good}"})).status_code == 401
    scope = {"type": "http", "scheme": "http", "headers": [(b"cookie", f"rewatch={good}".encode())]}
    for hours, holds in ((11, True), (13, False)):
        sessions = Sessions(GatewaySettings(api_key=KEY), clock=lambda: time.time() + hours * 3600)  # noqa: B023 (called here)
        assert (sessions.pass_of(scope) is not None) == holds


async def test_signing_out_takes_the_cookie_back(keyed: httpx.AsyncClient) -> None:
    await signed_in(keyed)
    answer = await keyed.post("/logout", headers={"origin": "http://localhost"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert (await keyed.get("/api/events")).status_code == 401


async def test_wrong_keys_are_slowed_down(keyed: httpx.AsyncClient) -> None:
    for _ in range(5):
        answer = await keyed.post("/login", data={"key": "guess", "next": "/x"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?wrong=&next=%2Fx")
    answer = await keyed.post("/login", data={"key": KEY})
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example", "/\\evil.example", "evil", "", "/a\r\nb: c", "/\t/evil"]
)
def test_a_sign_in_leads_nowhere_else(target: str) -> None:
    assert local(target) == "/"


def test_a_sign_in_leads_where_one_wanted_to() -> None:
    assert local("/events/a:b?c=d") == "/events/a:b?c=d"


async def test_a_form_that_is_none_is_refused(keyed: httpx.AsyncClient) -> None:
    assert (await keyed.post("/login", content=b"\xff\xfe")).status_code == 400
    assert (await keyed.post("/login", content=b"&".join(b"a=b" for _ in range(50)))).status_code == 400
    assert (await keyed.post("/login", content=b"")).status_code == 303

"""Who may come in: keys, cookies, names and origins."""

import time

import httpx
import pytest
from pydantic import ValidationError

from processors.gateway import auth
from processors.gateway.auth import Sessions, Throttle, local
from processors.gateway.fakes import FakeSource
from processors.gateway.settings import GatewaySettings
from tests.processors.gateway_kit import client_of, served
from tests.processors.test_gateway_api import FRONT, app_of, event

KEY = "correct horse battery staple"
LABEL = {"verdict": "true_alarm", "event_id": "front:0123:live"}


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(cameras=[FRONT], events=[event()])


@pytest.fixture
async def keyed(source: FakeSource):
    """A client of a gateway that asks for a key."""
    async with client_of(app_of(source, api_key=KEY)) as client:
        yield client


@pytest.fixture
async def open_(source: FakeSource):
    """A client of a gateway that only this machine reaches."""
    async with client_of(app_of(source)) as client:
        yield client


async def signed_in(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/login", data={"key": KEY, "next": "/pipeline"}, headers={"origin": "http://localhost"})


def test_listening_to_others_needs_a_key() -> None:
    with pytest.raises(ValidationError, match=r"gateway\.api_key"):
        GatewaySettings(host="0.0.0.0")
    assert GatewaySettings().host == "127.0.0.1"


async def test_programs_send_the_key(keyed: httpx.AsyncClient) -> None:
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
        assert (await keyed.get("/api/events", headers=headers)).status_code == 200
        # No page of another site can set these headers: no proof of origin is asked for.
        assert (await keyed.post("/api/labels", json=LABEL, headers=headers)).status_code == 201
    paths = ("/api/events", "/api/openapi.json", "/api/nothing", "/api/images/front/x.jpg")
    for path, headers in (
        *((path, headers) for path in paths for headers in ({}, {"x-api-key": ""}, {"authorization": "Basic eDp5"})),
        (paths[0], {"authorization": "Bearer wrong"}),
        (paths[1], {"x-api-key": KEY[:-1]}),
        (paths[2], {"x-api-key": "é".encode()}),
        (paths[3], {"authorization": f"Basic {KEY}", "x-api-key": "wrong"}),
    ):
        answer = await keyed.get(path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "gateway.api_key" in answer.json()["error"]
    assert (await keyed.get("/health")).status_code == 200


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
    end, signature = good.split(".")
    for value in (
        f"{int(end) + 1}.{signature}",
        f"{end}.{signature[:-1]}0",
        end,
        f".{signature}",
        f"{end}.",
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
        assert sessions.holds(scope) == holds


async def test_signing_out_takes_the_cookie_back(keyed: httpx.AsyncClient) -> None:
    await signed_in(keyed)
    answer = await keyed.post("/logout", headers={"origin": "http://localhost"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert (await keyed.get("/api/events")).status_code == 401


async def test_a_cookie_changes_something_from_pages_of_ours_alone(
    keyed: httpx.AsyncClient, source: FakeSource
) -> None:
    await signed_in(keyed)
    for headers in (
        {},
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:81"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://localhost"},
    ):
        for path in ("/api/labels", "/api/upload?camera=front", "/events/front:0123:live/labels", "/logout"):
            answer = await keyed.post(path, json=LABEL, headers=headers)
            assert answer.status_code == 403, (path, headers)
    assert not source.given
    for headers in ({"origin": "http://localhost"}, {"sec-fetch-site": "same-origin"}):
        assert (await keyed.post("/api/labels", json=LABEL, headers=headers)).status_code == 201


async def test_without_a_key_programs_of_this_machine_may_and_other_sites_may_not(
    open_: httpx.AsyncClient, source: FakeSource
) -> None:
    assert (await open_.post("/api/labels", json=LABEL)).status_code == 201
    assert (await open_.post("/api/labels", json=LABEL, headers={"origin": "http://localhost"})).status_code == 201
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        answer = await open_.post("/api/labels", json=LABEL, headers=headers)
        assert answer.status_code == 403
        assert "another site" in answer.json()["error"]
    assert len(source.given) == 2


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "LOCALHOST."]
)
async def test_without_a_key_it_answers_to_this_machines_names(open_: httpx.AsyncClient, host: str) -> None:
    assert (await open_.get("/api/events", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "[", ""]
)
async def test_a_name_that_was_made_to_point_here_is_refused(open_: httpx.AsyncClient, host: str) -> None:
    for path in ("/api/events", "/", "/static/app.css", "/login"):
        answer = await open_.get(path, headers={"host": host})
        assert answer.status_code == 403
        assert "gateway.hosts" in answer.text
    assert (await open_.get("/health", headers={"host": host})).status_code == 200


async def test_names_that_were_set_are_answered_to(source: FakeSource) -> None:
    async with client_of(app_of(source, hosts=["cams.example"])) as client:
        assert (await client.get("/api/events", headers={"host": "cams.example:443"})).status_code == 200
        assert (await client.get("/api/events", headers={"host": "evil.example"})).status_code == 403
        # A proxy in front calls us by an inner name; browsers name the outer one as origin.
        proxied = {"host": "localhost", "origin": "https://cams.example"}
        assert (await client.post("/api/labels", json=LABEL, headers=proxied)).status_code == 201
    async with client_of(app_of(source, hosts=["*"])) as client:
        assert (await client.get("/api/events", headers={"host": "any.example"})).status_code == 200
    async with client_of(app_of(source, api_key=KEY)) as client:
        answer = await client.get("/api/events", headers={"host": "any.example", "x-api-key": KEY})
        assert answer.status_code == 200


async def test_wrong_keys_are_slowed_down(keyed: httpx.AsyncClient) -> None:
    for _ in range(5):
        answer = await keyed.post("/login", data={"key": "guess", "next": "/x"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?wrong=&next=%2Fx")
    answer = await keyed.post("/login", data={"key": KEY})
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize("path", ["/api/events", "/", "/static/app.css", "/login"])
async def test_wrong_keys_with_requests_are_slowed_down_too(keyed: httpx.AsyncClient, path: str) -> None:
    for _ in range(5):
        answer = await keyed.get(path, headers={"authorization": "Bearer guess"})
        assert answer.status_code != 429
    guesses = [await keyed.get(path, headers={"authorization": f"Bearer {key}"}) for key in ("guess", KEY)]
    assert [answer.status_code for answer in guesses] == [429, 429], "one that is right tells nothing"
    assert guesses[0].text == guesses[1].text
    assert 0 < int(guesses[1].headers["retry-after"]) <= 60
    assert (await signed_in(keyed)).status_code == 429, "the login counts with it"
    assert (await keyed.get("/health", headers={"x-api-key": "guess"})).status_code == 200


async def test_who_sends_the_right_key_is_not_shut_out_by_who_does_not(keyed: httpx.AsyncClient) -> None:
    assert (await keyed.get("/api/events", headers={"x-api-key": KEY})).status_code == 200
    answers = [await keyed.get("/api/events", headers={"x-api-key": "an old key"}) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [401] * 5 + [429] * 2
    assert (await keyed.get("/api/events", headers={"x-api-key": KEY})).status_code == 200


async def test_who_is_signed_in_has_nothing_to_guess(keyed: httpx.AsyncClient) -> None:
    await signed_in(keyed)
    for _ in range(7):
        assert (await keyed.get("/api/events", headers={"x-api-key": "an old key"})).status_code == 200


def test_a_proof_ends_after_a_day() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    assert not throttle.is_proven("a")
    throttle.succeeded("a")
    assert throttle.is_proven("a")
    assert not throttle.is_proven("b")
    now = 86_400.0
    assert not throttle.is_proven("a")


def test_the_throttle_opens_again_and_bounds_everybody_together() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    for _ in range(5):
        assert throttle.wait("a") == 0
        throttle.failed("a")
        now += 1
    assert throttle.wait("a") == 55
    assert throttle.wait("b") == 0
    now = 60.0
    assert throttle.wait("a") == 0
    for n in range(60):
        throttle.failed(f"address {n}")
    assert throttle.wait("somebody else") > 0
    now = 121.0
    assert throttle.wait("somebody else") == 0


def test_the_throttle_remembers_a_bounded_number_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_ADDRESSES", 3)
    throttle = Throttle(lambda: 0.0)
    for n in range(10):
        throttle.failed(str(n))
        throttle.succeeded(str(n))
    assert len(throttle._of) == len(throttle._proven) == 3


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


async def test_a_refusal_comes_before_the_body_is_read(source: FakeSource) -> None:
    async with served(app_of(source, api_key=KEY)) as url, httpx.AsyncClient(base_url=url) as client:
        sent = 0

        async def picture():
            nonlocal sent
            for _ in range(200):
                sent += 1
                yield bytes(65_536)

        answer = await client.post("/api/upload?camera=front", content=picture())
        assert answer.status_code == 401

"""Who may come in: keys, names and origins."""

import httpx
import pytest
from pydantic import ValidationError

from processors.gateway.fakes import FakeSource
from processors.gateway.settings import GatewaySettings
from tests.processors.gateway_kit import KEY, client_of, served, signed_in
from tests.processors.test_gateway_api import app_of

pytest_plugins = ["tests.processors.door_kit"]
LABEL = {"verdict": "true_alarm", "event_id": "front:0123:live"}


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

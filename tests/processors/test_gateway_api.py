"""The JSON API over a source in memory: shapes, statuses, streams, and what a request may not do."""

import asyncio
import json
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from urllib.parse import quote

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from processors.gateway import api
from processors.gateway.app import build_app
from processors.gateway.fakes import FakeSource
from processors.gateway.metrics import GatewayMetrics
from processors.gateway.models import CameraCard, EventDetail, Label, Step
from processors.gateway.settings import GatewaySettings
from processors.gateway.upload import Uploads
from streams.errors import UnavailableError
from tests.processors.gateway_kit import client_of, served

AT = datetime(2026, 11, 2, 10, tzinfo=UTC)
SHA = "ab" * 32


def event(name: str = "front:0123:live", **changes) -> EventDetail:
    plain = {
        "event_id": name,
        "camera_id": name.split(":", maxsplit=1)[0],
        "camera_name": "Front",
        "time_zone": "UTC",
        "started_at": AT,
        "ended_at": AT,
        "judged_at": AT,
        "risk_score": 70,
        "risk_level": "high",
        "summary": "Somebody.",
        "recommended_action": "review",
        "frames": 1,
        "model": "analyst",
        "reasoning": "",
        "risk_factors": (),
        "entities": (),
        "batch_id": "front:0123",
        "closed_by": "idle",
        "prompt_digest": "",
        "prompt_name": "",
        "verdict_digest": "",
        "model_digest": "",
        "parameters": {},
        "conditions": {},
        "rendered_prompt": "",
        "raw_completion": "",
        "sections_dropped": (),
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "duration_ms": 1,
        "context": (),
        "frame_views": (),
        "lineage": Step(topic="risk_events", title="verdict", record_id=name, position="", made_by="", facts={}),
        "labels": (),
    }
    return EventDetail(**(plain | changes))


FRONT = CameraCard(
    camera_id="front",
    name="Front",
    time_zone="UTC",
    last_frame_at=None,
    last_image=None,
    frames_24h=0,
    events_24h=0,
    top_level_24h=None,
    silent=True,
)


def app_of(source: FakeSource, **settings):
    uploads = Uploads("http://127.0.0.1:9", at_once=2, timeout_s=5)
    return build_app(source, GatewaySettings(**settings), uploads)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(cameras=[FRONT], events=[event()], images={("front", SHA): b"\xff\xd8jpeg"})


@pytest.fixture
async def client(source: FakeSource):
    async with client_of(app_of(source)) as made:
        yield made


async def test_events_are_listed_and_shown(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/api/events", params={"limit": 1})).json()
    assert [found["event_id"] for found in listed["events"]] == ["front:0123:live"]
    assert listed["events"][0]["started_at"] == "2026-11-02T10:00:00Z"
    assert "lineage" not in listed["events"][0]
    assert (await client.get("/api/events/front:0123:live")).json()["lineage"]["title"] == "verdict"


@pytest.mark.parametrize("name", ["a/b:c/d:live", "a%2Fb", "ü:ß", "stream:", "'"])
async def test_an_id_may_hold_anything(source: FakeSource, client: httpx.AsyncClient, name: str) -> None:
    await source.add(event(name))
    answer = await client.get(f"/api/events/{quote(name, safe='')}")
    assert answer.json()["event_id"] == name


async def test_errors_are_one_line_of_json_everywhere(source: FakeSource, client: httpx.AsyncClient) -> None:
    asked = {
        ("GET", "/api/events/none"): 404,
        ("GET", "/api/nothing"): 404,
        ("GET", "/nothing"): 404,
        ("GET", "/api/events?limit=0"): 422,
        ("GET", "/api/events?level=loud"): 422,
        ("GET", "/api/events?before=nope"): 422,
        ("GET", "/api/events?since=yesterday"): 422,
        ("GET", "/api/events/"): 422,
        ("GET", "/api/cameras/UP/timeline"): 422,
        ("GET", "/api/cameras/back/timeline"): 404,
        ("GET", "/api/cameras/front/timeline?until=0001-01-01T00:00"): 422,
        ("GET", f"/api/images/front/{'0' * 64}.jpg"): 404,
        ("GET", "/api/images/front/short.jpg"): 422,
        ("DELETE", "/api/events"): 405,
        ("TRACE", "/api/events"): 405,
        ("POST", "/api/health"): 405,
    }
    for (method, path), status in asked.items():
        answer = await client.request(method, path)
        assert answer.status_code == status, path
        assert list(answer.json()) == ["error"], path
    assert (await client.delete("/api/events")).headers["allow"] == "GET"


async def test_a_person_gets_a_page_where_a_program_gets_json(client: httpx.AsyncClient) -> None:
    answer = await client.get("/nothing", headers={"accept": "text/html"})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    answer = await client.get("/api/nothing", headers={"accept": "text/html"})
    assert answer.headers["content-type"] == "application/json"


async def test_what_is_away_is_503_with_the_fix_and_when_to_come_back(
    source: FakeSource, client: httpx.AsyncClient
) -> None:
    source.away = UnavailableError("store", "ClickHouse does not answer (clickhouse.url)")
    for path in ("/api/events", "/api/events/x", "/api/cameras", f"/api/images/front/{SHA}.jpg"):
        answer = await client.get(path)
        assert answer.status_code == 503, path
        assert int(answer.headers["retry-after"]) > 0
        assert "clickhouse.url" in answer.json()["error"]
    page = await client.get("/", headers={"accept": "text/html"})
    assert page.status_code == 503
    assert "clickhouse.url" in page.text
    assert (await client.get("/api/health")).status_code == 200
    assert (await client.get("/health")).json() == {"status": "ok"}


async def test_a_fault_of_ours_is_500_and_tells_nothing_of_itself(
    client: httpx.AsyncClient, source: FakeSource
) -> None:
    async def broken() -> tuple[CameraCard, ...]:
        raise ZeroDivisionError("password")

    source.cameras = broken  # type: ignore[method-assign]
    answer = await client.get("/api/cameras")
    assert answer.status_code == 500
    assert answer.json() == {"error": "the gateway failed on this request; its log says why"}


async def test_an_image_is_kept_for_ever_and_asked_for_once(source: FakeSource, client: httpx.AsyncClient) -> None:
    path = f"/api/images/front/{SHA}.jpg"
    answer = await client.get(path)
    assert (answer.content, answer.headers["content-type"]) == (b"\xff\xd8jpeg", "image/jpeg")
    assert "immutable" in answer.headers["cache-control"]
    assert "private" in answer.headers["cache-control"]
    source.away = UnavailableError("store", "away")
    again = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = await client.get(path, headers={"if-none-match": '"another"'})
    assert other.status_code == 503


async def test_a_label_is_given(source: FakeSource, client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/labels", json={"verdict": "true_alarm", "event_id": "front:0123:live"})
    assert answer.status_code == 201
    assert Label(**answer.json()).verdict == "true_alarm"
    for wrong in ({}, {"verdict": "perhaps"}, {"verdict": "missed", "more": 1}, [], None, {"verdict": "missed"}):
        assert (await client.post("/api/labels", json=wrong)).status_code == 422
    assert (
        await client.post("/api/labels", content=b"{", headers={"content-type": "application/json"})
    ).status_code == 422
    assert len(source.given) == 1


async def test_a_body_that_is_too_long_is_not_read(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 4096

    answer = await client.post("/api/labels", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert sent < 20
    assert (await client.post("/login", content=b"key=" + b"x" * 100_000)).status_code == 413


async def test_a_body_that_does_not_come_is_given_up(
    monkeypatch: pytest.MonkeyPatch, client: httpx.AsyncClient
) -> None:
    monkeypatch.setattr("processors.gateway.bodies._BODY_S", 0.05)

    async def never():
        yield b"{"
        await asyncio.sleep(60)

    answer = await client.post("/api/labels", content=never(), headers={"content-type": "application/json"})
    assert answer.status_code == 408


async def test_every_answer_keeps_browsers_in_their_bounds(client: httpx.AsyncClient) -> None:
    for path in (
        "/",
        "/api/events",
        "/api/nothing",
        "/health",
        "/static/app.css",
        "/login",
        f"/api/images/front/{SHA}.jpg",
    ):
        headers = (await client.get(path)).headers
        assert "unsafe" not in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        # `no-referrer` would make browsers send `Origin: null` with our own forms.
        assert headers["referrer-policy"] == "same-origin"
        assert "cache-control" in headers
    assert (await client.get("/api/events")).headers["cache-control"] == "no-store"


async def test_the_description_names_every_error_and_no_other_schema(client: httpx.AsyncClient) -> None:
    described = (await client.get("/api/openapi.json")).json()
    assert set(described["paths"]) == {
        "/api/events",
        "/api/events/stream",
        "/api/events/{event_id}",
        "/api/cameras",
        "/api/cameras/{camera_id}/timeline",
        "/api/images/{camera_id}/{sha256}.jpg",
        "/api/health",
        "/api/labels",
        "/api/upload",
        "/health",
    }
    assert "HTTPValidationError" not in described["components"]["schemas"]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if status >= "400":
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}, (path, status)
                    assert ("Retry-After" in answer.get("headers", {})) == (status in {"429", "503"})
    assert "securitySchemes" not in described["components"]
    async with client_of(app_of(FakeSource(), api_key="k")) as other:
        keyed = (await other.get("/api/openapi.json", headers={"x-api-key": "k"})).json()
    assert set(keyed["components"]["securitySchemes"]) == {"bearer", "header"}


class Listener:
    """Reads a stream of events line by line."""

    def __init__(self, lines) -> None:
        self._lines = lines

    async def next(self) -> dict[str, str]:
        """The next event's or comment's fields."""
        fields: dict[str, str] = {}
        async for line in self._lines:
            if not line:
                return fields
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        raise EOFError


@pytest.fixture
async def listen(source: FakeSource):
    """Opens streams of an app behind a real socket: a client in this process would wait for their end."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(app_of(source)))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=10))

        async def open_(path: str = "/api/events/stream", **headers: str) -> Listener:
            answer = await stack.enter_async_context(client.stream("GET", path, headers=headers))
            assert answer.status_code == 200, await answer.aread()
            assert answer.headers["content-type"].startswith("text/event-stream")
            listener = Listener(answer.aiter_lines())
            assert await listener.next() == {"retry": "2000"}
            return listener

        yield open_
        await source.end()


async def test_events_come_as_they_are_stored_and_resume_behind_the_last_one(source: FakeSource, listen) -> None:
    one, other = await listen(), await listen()
    waiting = asyncio.create_task(one.next())
    await asyncio.sleep(0.05)
    await source.add(event("front:1:live"))
    first = await waiting
    assert (first["event"], json.loads(first["data"])["event_id"]) == ("event", "front:1:live")
    assert json.loads((await other.next())["data"])["event_id"] == "front:1:live"
    await source.add(event("front:2:live"))
    for resumed in (
        await listen(**{"last-event-id": first["id"]}),
        await listen(f"/api/events/stream?after={first['id']}"),
        # A browser's last id is newer than the address that it connects to again.
        await listen("/api/events/stream?after=0", **{"last-event-id": first["id"]}),
    ):
        assert json.loads((await resumed.next())["data"])["event_id"] == "front:2:live"


async def test_a_stream_that_has_nothing_to_say_says_so(
    source: FakeSource, listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "HEARTBEAT_S", 0.05)
    quiet = await listen()
    assert await quiet.next() == {"": "still here"}
    await source.add(event("front:1:live"))
    while "data" not in (found := await quiet.next()):
        pass
    assert json.loads(found["data"])["event_id"] == "front:1:live"


async def test_a_stream_ends_when_its_source_does(source: FakeSource, listen) -> None:
    stream = await listen()
    await source.end()
    with pytest.raises(EOFError):
        await stream.next()


async def test_a_cursor_that_is_none_is_refused_but_never_keeps_a_browser_out(
    client: httpx.AsyncClient, listen
) -> None:
    answer = await client.get("/api/events/stream?after=garbage")
    assert answer.status_code == 422
    await listen(**{"last-event-id": "garbage"})


async def test_streams_are_bounded_and_those_that_ended_make_room(
    source: FakeSource, listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_STREAMS", 1)
    await listen()
    with pytest.raises(AssertionError, match="too many streams"):
        await listen()
    await source.end()
    async with asyncio.timeout(5):
        while True:
            try:
                await listen()
            except (AssertionError, EOFError):
                await asyncio.sleep(0.02)
            else:
                break


async def test_answers_are_counted_by_their_kind(source: FakeSource) -> None:
    metrics = GatewayMetrics()
    registry = CollectorRegistry()
    registry.register(metrics)
    async with client_of(metrics.counting(app_of(source))) as client:
        for path in ("/", "/api/events", "/api/events/none", f"/api/images/front/{SHA}.jpg", "/some/strangers/path"):
            await client.get(path)
    text = generate_latest(registry).decode()
    assert 'rewatch_gateway_responses_total{code="200",kind="page"} 1.0' in text
    assert 'rewatch_gateway_responses_total{code="404",kind="page"} 1.0' in text
    assert 'rewatch_gateway_responses_total{code="404",kind="api"} 1.0' in text
    assert 'rewatch_gateway_answer_seconds_count{kind="image"} 1.0' in text
    assert 'rewatch_gateway_open{kind="stream"} 0.0' in text
    assert "strangers" not in text

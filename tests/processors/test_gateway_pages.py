"""The pages' HTML, without a browser: what stands on them, what can be asked of them, and what they take."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import httpx
import pytest

from infra.models.stories import STORIES
from processors.analyze import core as analyze
from processors.gateway import drawing, words
from processors.gateway.app import build_app
from processors.gateway.fakes import FakeSource
from processors.gateway.models import Box, EventDetail, FrameView
from processors.gateway.settings import GatewaySettings
from processors.gateway.upload import Uploads
from streams.errors import UnavailableError
from tests.browser import showcase

NOW = datetime.now(UTC)


class Client(httpx.AsyncClient):
    def __init__(self, source: FakeSource) -> None:
        app = build_app(source, GatewaySettings(), Uploads("http://127.0.0.1:9", at_once=1, timeout_s=1))
        super().__init__(
            transport=httpx.ASGITransport(app),
            base_url="http://localhost",
            headers={"accept": "text/html", "origin": "http://localhost"},
        )
        self.source = source


class Outline(HTMLParser):
    """What a page is made of, as far as these tests look."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag) and dict(attrs).get("id") != "keys-title":
            self.headings.append(int(tag[1]))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def day() -> showcase.Day:
    """Three stories, two frames each."""
    told = tuple(
        s for s in STORIES if s.name in {"cat at noon", "unknown car by night", "two people at the back by night"}
    )
    return showcase.make(most=2, stories=told)


@pytest.fixture
async def client(day: showcase.Day) -> AsyncIterator[Client]:
    async with Client(showcase.source(day)) as client:
        yield client


def the(day: showcase.Day, camera: str) -> EventDetail:
    return next(event for event in day.events if event.camera_id == camera)


def addresses(day: showcase.Day) -> list[str]:
    return [
        "/",
        "/?level=high",
        *(f"/events/{event.event_id}" for event in day.events),
        "/cameras",
        *(f"/cameras/{camera.camera_id}" for camera in day.cameras),
        "/pipeline",
        "/login",
        "/events/none",
        "/nowhere",
    ]


async def test_every_page_is_whole_and_nothing_on_it_is_inline(client: Client, day: showcase.Day) -> None:
    for address in addresses(day):
        answer = await client.get(address)
        assert answer.headers["content-type"].startswith("text/html"), address
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        page = Outline(answer.text)
        assert page.headings.count(1) == 1, address
        # No level is left out on the way down.
        assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False)), (address, page.headings)
        assert [tag for tag, attrs in page.tags if tag == "style" or "style" in attrs] == []
        assert [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)] == []
        assert [(attrs["type"], attrs["src"].startswith("/static/")) for attrs in page.all("script")] == [
            ("module", True)
        ]
        assert all("alt" in attrs for attrs in page.all("img"))
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids)), address


async def test_what_cameras_and_models_write_stays_text(day: showcase.Day) -> None:
    event = showcase.hostile(the(day, "back-yard"))
    cameras = [camera.model_copy(update={"name": " ".join(showcase.HOSTILE)}) for camera in day.cameras]
    async with Client(FakeSource(cameras=cameras, events=[event], images=day.images)) as client:
        for address in (
            "/",
            "/cameras",
            f"/cameras/{event.camera_id}?day={event.started_at.date()}",
            f"/events/{event.event_id}",
        ):
            page = Outline((await client.get(address)).text)
            assert len(page.all("script")) == 1
            assert not any("onerror" in attrs or "onload" in attrs for _, attrs in page.tags)
            assert not any((attrs.get("href") or "").startswith("javascript:") for _, attrs in page.tags)
            # Marks that turn the direction of writing stay within their own word.
            assert page.all("bdi")


async def test_an_events_pictures_say_camera_time_and_what_was_seen(client: Client, day: showcase.Day) -> None:
    event = the(day, "back-yard")
    alts = [attrs["alt"] or "" for attrs in Outline((await client.get("/")).text).all("img")]
    when = words.moment(event.started_at, event.time_zone)
    assert f"Back yard, {when}: {event.summary}" in alts
    alts = [attrs["alt"] or "" for attrs in Outline((await client.get(f"/events/{event.event_id}")).text).all("img")]
    assert any(re.search(r"Back yard, .* C.T: person 0\.\d\d", alt) for alt in alts)


async def test_levels_are_a_word_a_score_and_a_shape(client: Client) -> None:
    text = (await client.get("/")).text
    for level, score in (("low", 6), ("medium", 52), ("high", 79)):
        assert re.search(rf'class="shape shape-{level}".*?{score}</span> <span class="word">{level}<', text, re.DOTALL)


def test_the_bands_are_the_analysts() -> None:
    for band in words.BANDS:
        assert {analyze.risk_level(score) for score in range(band.low, band.high + 1)} == {band.level}
    assert [score for band in words.BANDS for score in range(band.low, band.high + 1)] == list(range(101))


async def test_filters_narrow_the_list_and_refuse_what_is_none(client: Client, day: showcase.Day) -> None:
    async def found(query: str) -> list[str]:
        return re.findall(r'data-event="([^"]+)"', (await client.get(f"/?{query}")).text)

    assert len(await found("camera=&level=&span=&from=&until=")) == 3
    assert await found("camera=driveway") == [the(day, "driveway").event_id]
    assert set(await found("level=medium")) == {the(day, "driveway").event_id, the(day, "back-yard").event_id}
    assert await found("level=critical") == []
    assert len(await found("span=7d")) == 3
    local = the(day, "back-yard").started_at.astimezone(words.zone(showcase.ZONE)).date()
    on_that_day = {e.event_id for e in day.events if words.local_date(e.started_at, showcase.ZONE) == local}
    assert set(await found(f"from={local}&until={local}")) == on_that_day
    for wrong, said in (
        ("level=worse", "choose from low"),
        ("span=9y", "choose from 1h"),
        ("from=tomorrow", "2026-03-14"),
        (f"from={local}&until={local - timedelta(days=2)}", "no span"),
        ("from=0001-01-01", "beyond"),
        ("until=9999-12-31", "beyond"),
    ):
        answer = await client.get(f"/?{wrong}")
        assert answer.status_code == 422, wrong
        assert said in answer.text, wrong


async def test_older_events_are_a_link_that_keeps_the_filter(day: showcase.Day) -> None:
    event = the(day, "driveway")
    many = [
        event.model_copy(update={"event_id": f"driveway:{n:032x}:live", "started_at": NOW - timedelta(minutes=n)})
        for n in range(120)
    ]
    async with Client(FakeSource(cameras=day.cameras, events=many)) as client:
        seen: list[str] = []
        address = "/?camera=driveway&level=medium"
        for _ in range(3):
            text = (await client.get(address)).text
            seen += re.findall(r'data-event="([^"]+)"', text)
            more = re.search(r'href="([^"]+)" rel="next"', text)
            assert 'id="live"' not in text or address.count("before") == 0
            if more is None:
                break
            address = more[1].replace("&amp;", "&")
            assert "camera=driveway" in address
            assert "level=medium" in address
        assert seen == [one.event_id for one in many]


def test_times_are_the_cameras() -> None:
    at = datetime(2026, 7, 1, 21, 50, tzinfo=UTC)
    assert words.clock(at, "Europe/Berlin") == "23:50:00"
    assert words.moment(at, "Asia/Kolkata") == "2 Jul 2026, 03:20:00 IST"
    assert words.day(at, "America/Los_Angeles") == "Wednesday 1 July 2026"
    assert words.moment(at, "Mars/Olympus") == words.moment(at, "../../etc/passwd") == "1 Jul 2026, 21:50:00 UTC"
    assert words.local_date(at, "Asia/Tokyo").isoformat() == "2026-07-02"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-30, "just now"), (4, "just now"), (5, "5 s ago"), (60, "1 min ago"), (7199, "1 h ago"), (172800, "2 days ago")],
)
def test_ages_in_words(seconds: int, said: str) -> None:
    assert words.ago(NOW - timedelta(seconds=seconds), NOW) == said


@pytest.mark.parametrize(("date", "hours"), [("2026-03-29", 23), ("2026-10-25", 25), ("2026-07-01", 24)])
async def test_a_day_is_as_long_as_the_cameras_clock_makes_it(client: Client, date: str, hours: int) -> None:
    asked = []
    timeline = client.source.timeline

    async def spy(camera_id: str, since: datetime, until: datetime):
        asked.append((until - since) / timedelta(hours=1))
        return await timeline(camera_id, since, until)

    client.source.timeline = spy  # type: ignore[method-assign]
    assert (await client.get(f"/cameras/driveway?day={date}")).status_code == 200
    assert asked == [hours]


async def test_the_first_run_tells_how_to_get_a_picture_in(day: showcase.Day) -> None:
    async with Client(FakeSource()) as client:
        text = (await client.get("/")).text
        for way in (
            "inbox/front-door/",
            "curl --data-binary",
            "http://localhost/api/upload",
            "rewatch ingest snapshot",
            "make demo",
        ):
            assert way in text
        assert "make demo" in (await client.get("/cameras")).text
    async with Client(FakeSource(cameras=day.cameras)) as client:
        assert "3 cameras known" in (await client.get("/")).text
        assert "No events fit this filter" in (await client.get("/?level=high")).text


async def test_a_label_is_given_by_a_form_and_shown(client: Client, day: showcase.Day) -> None:
    event = the(day, "driveway")
    answer = await client.post(f"/events/{event.event_id}/labels", data={"verdict": "true_alarm", "note": " a <b> "})
    assert answer.status_code == 303
    assert answer.headers["location"] == f"/events/{event.event_id}?given=true_alarm#label"
    text = (await client.get(answer.headers["location"])).text
    assert "true alarm</span> noted" in text
    assert "a &lt;b&gt;" in text
    assert client.source.given[0].note == "a <b>"
    for wrong in ({"verdict": "boring"}, {}, {"verdict": "true_alarm", "note": "x" * 2001}):
        assert (await client.post(f"/events/{event.event_id}/labels", data=wrong)).status_code == 422
    assert (await client.post("/events/none/labels", data={"verdict": "true_alarm"})).status_code == 404
    elsewhere = {"origin": "http://evil.example"}
    answer = await client.post(f"/events/{event.event_id}/labels", data={"verdict": "true_alarm"}, headers=elsewhere)
    assert answer.status_code == 403
    assert len(client.source.given) == 1


async def test_a_label_that_clickhouse_does_not_show_yet_is_said_to_be_on_the_log(
    client: Client, day: showcase.Day
) -> None:
    text = (await client.get(f"/events/{the(day, 'driveway').event_id}?given=false_alarm")).text
    assert "is on the log; ClickHouse shows it in a moment" in text


async def test_a_missed_incident_that_is_none_is_refused_and_what_was_typed_stays(client: Client) -> None:
    for fields, said in (
        ({"from": "", "until": "10:00"}, "from when until when"),
        ({"from": "10:00", "until": "10:00"}, "the same time"),
        ({"from": "25:00", "until": "26:00"}, "from when until when"),
    ):
        answer = await client.post("/cameras/driveway/missed", data={"day": "2026-07-01", "note": "<kept>", **fields})
        assert answer.status_code == 422
        assert said in answer.text
        assert "&lt;kept&gt;" in answer.text
    assert client.source.given == []
    assert (await client.post("/cameras/nowhere/missed", data={})).status_code == 404


async def test_what_is_not_there_and_what_is_away_are_pages_that_help(client: Client) -> None:
    answer = await client.get("/events/none")
    assert (answer.status_code, "there is no event none" in answer.text) == (404, True)
    answer = await client.get("/cameras/cellar")
    assert (answer.status_code, "known: front-door, driveway, back-yard" in answer.text) == (404, True)
    client.source.away = UnavailableError("store", "no answer from ClickHouse (clickhouse.url)")
    for address in ("/", "/cameras", "/cameras/driveway", "/events/x"):
        answer = await client.get(address)
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        assert "no answer from ClickHouse (clickhouse.url)" in answer.text
        assert "rewatch doctor" in answer.text
    # What is away is what this page is for.
    assert (await client.get("/pipeline")).status_code == 200


async def test_the_pipeline_names_toys_problems_and_the_way_to_dead_letters(client: Client) -> None:
    text = (await client.get("/pipeline")).text
    assert text.count('class="toy"') == 2
    assert "rewatch dlq ls" in text
    assert "loading its model since 12 s" in text
    assert re.search(r"waits on</span> <bdi>llm", text)
    real = showcase.health().model_copy(update={"detector": "detector", "analyst": "", "toys": (), "dead_letters": ()})
    client.source.set_health(real)
    text = (await client.get("/pipeline")).text
    assert "toy" not in text
    assert "none seen yet" in text
    assert "everything that came in could be processed" in text


async def test_the_frame_asked_for_is_shown_else_the_cover(client: Client, day: showcase.Day) -> None:
    event = the(day, "back-yard")

    async def shown(query: str) -> list[str | None]:
        page = Outline((await client.get(f"/events/{event.event_id}{query}")).text)
        return [attrs["data-n"] for attrs in page.all("figure") if "hidden" not in attrs]

    cover = next(str(frame.n) for frame in event.frame_views if frame.image == event.cover)
    assert await shown("") == await shown("?frame=99") == await shown("?frame=²") == [cover]
    assert await shown("?frame=1") == ["1"]
    assert await shown("?frame=2") == ["2"]


async def test_frames_that_are_not_kept_any_more_leave_a_place(day: showcase.Day) -> None:
    event = the(day, "back-yard")
    gone = {"image": None, "width": None, "height": None, "captured_at": None, "arrived_at": None, "position": ""}
    frames = tuple(frame.model_copy(update=gone) for frame in event.frame_views)
    for kept in (frames, ()):
        changed = event.model_copy(update={"frame_views": kept, "cover": None})
        async with Client(FakeSource(cameras=day.cameras, events=[changed])) as client:
            answer = await client.get(f"/events/{event.event_id}")
            assert answer.status_code == 200
            assert "not kept any more" in answer.text
            assert "no picture kept" in (await client.get("/")).text


async def test_names_are_enough_for_lists_and_days(client: Client, day: showcase.Day) -> None:
    async def cards() -> None:
        raise AssertionError("that is much work, and nothing of it is shown")

    client.source.cameras = cards  # type: ignore[method-assign]
    event = the(day, "driveway")
    span = {"day": "2026-07-01", "from": "10:00", "until": "10:05"}
    for address in ("/", "/?level=critical", f"/events/{event.event_id}", "/cameras/driveway"):
        assert (await client.get(address)).status_code == 200
    assert (await client.post("/cameras/driveway/missed", data=span)).status_code == 303


async def test_an_empty_day_leads_to_the_last_one_with_frames(day: showcase.Day) -> None:
    """What was played in arrived today, and was taken long ago."""
    taken_at = datetime(2026, 3, 29, 23, 30, tzinfo=UTC)  # in Berlin it is the 30th
    played = [
        camera.model_copy(update={"last_frame_at": NOW, "last_taken_at": taken_at, "time_zone": "Europe/Berlin"})
        for camera in day.cameras
    ]
    async with Client(FakeSource(cameras=played)) as client:
        text = (await client.get("/cameras/driveway")).text
        assert '<a href="/cameras/driveway?day=2026-03-30">Monday 30 March 2026</a>' in text
        assert "?day=2026-03-30" not in (await client.get("/cameras/driveway?day=2026-03-30")).text


async def test_events_lead_to_their_neighbours_on_the_same_camera(day: showcase.Day) -> None:
    event = the(day, "driveway")
    three = [
        event.model_copy(update={"event_id": f"driveway:{n:032x}:live", "started_at": NOW - timedelta(days=ago)})
        for n, ago in enumerate((40, 10, 9))
    ]
    other = the(day, "back-yard")
    async with Client(FakeSource(cameras=day.cameras, events=[*three, other])) as client:
        page = Outline((await client.get(f"/events/{three[1].event_id}")).text)
        links = {attrs["id"]: attrs["href"] for attrs in page.all("a") if "id" in attrs}
        assert links == {"older": f"/events/{three[0].event_id}", "newer": f"/events/{three[2].event_id}"}
        page = Outline((await client.get(f"/events/{three[2].event_id}")).text)
        assert [attrs["id"] for attrs in page.all("a") if "id" in attrs] == ["older"]


async def test_signing_in_leads_back_and_never_elsewhere(client: Client) -> None:
    answer = await client.get("/login?next=/cameras%3Fx=1")
    assert 'value="/cameras?x=1"' in answer.text
    for target in ("https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)"):
        page = Outline((await client.get("/login", params={"next": target})).text)
        assert [attrs["value"] for attrs in page.all("input") if attrs["name"] == "next"] == ["/"]
    answer = await client.get("/login?wrong")
    assert (answer.status_code, "not the key" in answer.text) == (401, True)


async def test_static_files_are_named_by_their_content_and_kept(client: Client) -> None:
    page = Outline((await client.get("/")).text)
    for address in (page.all("script")[0]["src"], page.all("link")[-1]["href"]):
        assert address is not None
        answer = await client.get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert "?v=" in address


def _frame(*boxes: Box, width: int | None = 200, height: int | None = 100) -> FrameView:
    return FrameView.model_validate(
        dict.fromkeys(("image", "captured_at", "arrived_at"))
        | dict.fromkeys(("frame_id", "sha256", "source", "source_name", "position", "detector", "detector_digest"), "")
        | {"n": 1, "at": NOW, "matters": True, "width": width, "height": height, "boxes": boxes}
    )


def test_boxes_are_drawn_within_their_frame_and_those_that_matter_on_top() -> None:
    sure = Box(label="person", score=0.91, x=-20, y=50, width=70, height=90, matters=True)
    other = Box(label="cat", score=0.2, x=150, y=0, width=40, height=20, matters=False)
    outside = Box(label="car", score=0.3, x=300, y=0, width=40, height=20, matters=True)
    drawn = list(drawing.boxes(_frame(sure, outside, other)))
    assert [one.text for one in drawn] == ["cat 0.20", "person 0.91"]
    cat, person = drawn
    assert (person.x, person.y, person.width, person.height) == ("0.000%", "50.000%", "25.000%", "50.000%")
    # At the right edge the pill hangs from the right, at the upper edge it lies inside.
    assert (cat.pill_at, cat.pill_x, cat.pill_y) == ("95.000%", -cat.pill_width, 0.0)
    assert (person.pill_at, person.pill_x, person.pill_y < 0) == ("0.000%", 0.0, True)
    assert list(drawing.boxes(_frame(sure, width=None))) == []


async def test_a_days_drawing_stands_where_its_hours_are(client: Client, day: showcase.Day) -> None:
    event = the(day, "back-yard")
    local = words.local_date(event.started_at, showcase.ZONE)
    since = datetime.combine(local, datetime.min.time(), words.zone(showcase.ZONE)).astimezone(UTC)
    timeline = await client.source.timeline("back-yard", since, since + timedelta(days=1))
    drawn = drawing.timeline(timeline, since + timedelta(hours=12))
    [mark] = drawn.marks["high"]
    assert mark.x == f"{100 * (event.started_at - since) / timedelta(days=1):.3f}%"
    assert drawn.now == "50.000%"
    assert max(bar.height for bar in drawn.bars) == drawing.BARS_PX
    assert all(0 <= float(bar.x[:-1]) < 100 for bar in drawn.bars)
    assert [tick.text for tick in drawn.ticks] == ["00", "03", "06", "09", "12", "15", "18", "21"]
    assert drawing.timeline(timeline, since + timedelta(days=3)).now is None

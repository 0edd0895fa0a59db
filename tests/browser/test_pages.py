"""The gateway's pages as people meet them: live, by keyboard, on a phone, without JavaScript, read aloud."""

import re
import time
from datetime import timedelta

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from processors.gateway.fakes import FakeSource
from processors.gateway.models import EventDetail
from processors.gateway.settings import GatewaySettings
from streams.errors import UnavailableError
from tests.browser import showcase
from tests.browser.conftest import PATIENCE_MS
from tests.browser.site import Site, again

expect.set_options(timeout=PATIENCE_MS)

AWAY = UnavailableError("store", "no answer from ClickHouse at http://127.0.0.1:8123 (clickhouse.url)")


def the(day: showcase.Day, story: str) -> EventDetail:
    return next(event for event in day.events if event.summary == showcase.SAID[story].summary)


def paths(day: showcase.Day) -> list[str]:
    """Every page, and the ways they can look."""
    night = the(day, "two people at the back by night")
    return [
        "/",
        "/?level=medium&span=7d&camera=back-yard",
        "/?camera=front-door&level=critical&span=1h",
        f"/events/{night.event_id}",
        "/cameras",
        f"/cameras/{night.camera_id}?day={night.started_at.date()}",
        "/pipeline",
        "/login?wrong",
    ]


def until(page: Page, expression: str) -> None:
    """Wait until an expression holds. Playwright's own way makes code of text in the page, which the policy refuses."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def live(page: Page, site: Site) -> None:
    """Open the first page and wait until it is live."""
    page.goto(site.url)
    expect(page.locator("#live")).to_have_attribute("data-state", "live")
    # The stream was answered; the source knows of its reader a moment later.
    until(page, "performance.getEntriesByType('resource').some((entry) => entry.initiatorType === 'fetch')")


def test_an_event_appears_without_a_reload_and_once(site: Site, day: showcase.Day, visit) -> None:
    visitor = visit()
    page = visitor.page
    live(page, site)
    page.evaluate("window.same = true")
    cards = page.locator("[data-event]")
    before = cards.count()
    new = again(the(day, "visitor loiters at the door by night"), 1)
    site.add(new)
    expect(cards).to_have_count(before + 1)
    expect(cards.first).to_have_attribute("data-event", new.event_id)
    expect(cards.first).to_contain_text("critical")
    expect(page.locator("#announce")).to_contain_text("New event: Front door, 88 critical")
    for number in range(2, 5):
        site.add(again(day.events[number], number))
    expect(cards).to_have_count(before + 4)
    ids = [card.get_attribute("data-event") for card in cards.all()]
    assert len(ids) == len(set(ids))
    assert page.evaluate("window.same") is True
    assert visitor.errors == []
    assert visitor.refused() == []


def test_who_has_scrolled_or_filtered_is_told_and_not_interrupted(site: Site, day: showcase.Day, visit) -> None:
    page = visit(height=500).page
    page.goto(f"{site.url}/?level=high")
    expect(page.locator("#live")).to_have_attribute("data-state", "live")
    button = page.locator("#live button")
    before = page.locator("[data-event]").count()
    quiet, loud = the(day, "cat at noon"), the(day, "two people at the back by night")
    site.add(again(loud, 1))
    expect(button).to_have_text("Show 1 new")
    site.add(again(quiet, 2))  # does not fit the filter
    site.add(again(loud, 3))
    expect(button).to_have_text("Show 2 new")
    expect(page.locator("[data-event]")).to_have_count(before)
    button.click()
    expect(page.locator("[data-event]")).to_have_count(before + 2)
    expect(button).to_be_hidden()

    live(page, site)
    before = page.locator("[data-event]").count()
    page.mouse.wheel(0, 600)
    until(page, "scrollY > 200")
    site.add(again(quiet, 4))
    expect(button).to_have_text("Show 1 new")
    expect(page.locator("[data-event]")).to_have_count(before)
    page.mouse.wheel(0, -5000)
    expect(page.locator("[data-event]")).to_have_count(before + 1)


def test_a_broken_connection_is_shown_and_mended_and_nothing_is_doubled(day: showcase.Day, visit) -> None:
    visitor = visit()
    page = visitor.page
    with Site(showcase.source(day)) as site:
        live(page, site)
        port = int(site.url.rsplit(":", 1)[1])
    expect(page.locator("#live")).to_have_attribute("data-state", "reconnecting")
    came_meanwhile = again(day.events[0], 1)
    with Site(showcase.source(day._replace(events=[*day.events, came_meanwhile])), port=port) as site:
        expect(page.locator("#live")).to_have_attribute("data-state", "live", timeout=15_000)
        expect(page.locator("[data-event]")).to_have_count(len(day.events) + 1)
        site.add(again(day.events[1], 2))
        expect(page.locator("[data-event]")).to_have_count(len(day.events) + 2)
        ids = [card.get_attribute("data-event") for card in page.locator("[data-event]").all()]
        assert len(ids) == len(set(ids))


def test_filters_are_addresses(site: Site, visit) -> None:
    page = visit().page
    page.goto(site.url)
    page.get_by_label("Camera").select_option("back-yard")
    page.get_by_label("Level").select_option("medium")
    page.get_by_role("button", name="Filter").click()
    expect(page).to_have_url(re.compile(r"camera=back-yard&level=medium"))
    assert page.locator("[data-event]").count() == 2
    expect(page.get_by_label("Camera")).to_have_value("back-yard")
    page.get_by_role("link", name="Clear").click()
    assert page.locator("[data-event]").count() == 10


def test_a_label_goes_to_the_log_and_is_shown(site: Site, day: showcase.Day, visit) -> None:
    page = visit().page
    event = the(day, "unknown car by night")
    page.goto(f"{site.url}/events/{event.event_id}")
    page.get_by_text("Add a note").click()
    page.get_by_label("Note").fill("the neighbour, t and f")  # keys stay letters where something is typed
    page.get_by_role("button", name="False alarm").click()
    expect(page.locator(".given")).to_contain_text("false alarm")
    expect(page.locator(".labels")).to_contain_text("the neighbour, t and f")
    [given] = site.source.given[-1:]
    assert (given.verdict, given.event_id, given.note) == ("false_alarm", event.event_id, "the neighbour, t and f")
    page.goto(site.url)
    expect(page.locator(f'[data-event="{event.event_id}"]')).to_contain_text("false alarm")


def test_a_missed_incident_is_noted_on_the_cameras_clock(site: Site, visit) -> None:
    page = visit().page
    page.goto(f"{site.url}/cameras/driveway?day=2026-07-01")
    page.get_by_label("From").fill("23:50")
    page.get_by_label("Until").fill("00:10")
    page.get_by_label("What happened").fill("someone at the gate")
    page.get_by_role("button", name="Note the missed incident").click()
    expect(page.locator(".given")).to_contain_text("missed")
    expect(page.locator(".labels")).to_contain_text("someone at the gate")
    [given] = site.source.given[-1:]
    assert given.started_at is not None
    assert given.started_at.isoformat() == "2026-07-01T21:50:00+00:00"  # summer time
    assert given.ended_at == given.started_at + timedelta(minutes=20)


def test_everything_can_be_done_from_the_keyboard(site: Site, day: showcase.Day, visit) -> None:
    visitor = visit()
    page = visitor.page
    page.goto(site.url)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    links = page.locator("[data-event] .open")
    page.keyboard.press("j")
    expect(links.nth(0)).to_be_focused()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    expect(links.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("/events/"))

    night = the(day, "two people at the back by night")
    page.goto(f"{site.url}/events/{night.event_id}?frame=1")
    shown = page.locator("#stage figure:visible")
    expect(shown).to_have_attribute("data-n", "1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(shown).to_have_attribute("data-n", "2")
    expect(page.locator("#strip [aria-current]")).to_have_attribute("data-n", "2")
    page.keyboard.press("b")
    expect(page.get_by_label("none")).to_be_checked()
    expect(shown.locator(".boxes")).to_be_hidden()
    page.keyboard.press("p")
    expect(page.locator("#play")).to_have_text(re.compile("Pause"))
    expect(shown).to_have_attribute("data-n", "4")
    expect(page.locator("#play")).to_have_text(re.compile("Play"))
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("t")  # not while the keys are shown
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.keyboard.press("f")
    expect(page.locator(".given")).to_contain_text("false alarm")
    assert site.source.given[-1].verdict == "false_alarm"
    page.wait_for_load_state()  # the answer is a page of its own, whose keys work once its script has run
    # The day is the last 24 hours: whether the camera has an older event depends on when this runs.
    own = [event.started_at for event in day.events if event.camera_id == night.camera_id]
    page.keyboard.press("k" if night.started_at == min(own) else "j")
    expect(page).not_to_have_url(re.compile("given="))
    expect(page.locator("h1")).not_to_contain_text("Two people")
    assert visitor.errors == []


def test_a_swipe_turns_the_frames(site: Site, day: showcase.Day, visit) -> None:
    page = visit(width=360, height=780, has_touch=True, is_mobile=True).page
    page.goto(f"{site.url}/events/{the(day, 'cat at noon').event_id}?frame=2")
    swipe = """([from, to]) => {
      const stage = document.querySelector("#stage");
      const at = (x) => new Touch({identifier: 1, target: stage, clientX: x, clientY: 300});
      stage.dispatchEvent(new TouchEvent("touchstart", {touches: [at(from)], changedTouches: [at(from)]}));
      stage.dispatchEvent(new TouchEvent("touchend", {touches: [], changedTouches: [at(to)]}));
    }"""
    page.evaluate(swipe, [300, 100])
    expect(page.locator("#stage figure:visible")).to_have_attribute("data-n", "3")
    page.evaluate(swipe, [100, 300])
    page.evaluate(swipe, [100, 120])  # a tap that trembled
    expect(page.locator("#stage figure:visible")).to_have_attribute("data-n", "2")


# What a thumb must hit. Links inside sentences and lists of words are as small as their words (WCAG 2.5.8's exception);
# the marks of a timeline are repeated in the list below it; a radio button's target is its label.
_TARGETS = """() => [...document.querySelectorAll("a, button, input, select, textarea, summary")]
  .filter((element) => element.checkVisibility({visibilityProperty: true}) && element.type !== "hidden")
  .filter((element) => !element.closest("p, li > a, .event-mark, .skip, .labels") || element.matches(".button"))
  .map((element) => [element, element.matches(".open") ? element.closest("article, li") : element])
  .map(([element, target]) => [element.outerHTML.slice(0, 90), target.getBoundingClientRect()])
  .filter(([, box]) => box.width < 44 || box.height < 44)
  .map(([html, box]) => `${Math.round(box.width)}x${Math.round(box.height)} ${html}`)"""


def test_a_phone_shows_everything_without_scrolling_sideways_and_thumbs_hit(
    site: Site, bare: Site, day: showcase.Day, visit
) -> None:
    page = visit(width=360, height=780, has_touch=True, is_mobile=True).page
    bare.source.away = None
    for address in (*(site.url + path for path in paths(day)), bare.url, f"{bare.url}/events/none"):
        page.goto(address)
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1] == 360, address
        assert page.evaluate(_TARGETS) == [], address


def test_no_page_logs_an_error_or_is_refused_anything(site: Site, bare: Site, day: showcase.Day, visit) -> None:
    visitor = visit()
    for address in (*(site.url + path for path in paths(day)), bare.url):
        visitor.page.goto(address)
        visitor.page.wait_for_load_state("load")
        if "wrong" in address:
            visitor.errors.clear()  # the 401 itself
        assert visitor.errors == [], address
        assert visitor.refused() == [], address


def test_nothing_that_cameras_or_models_write_runs(day: showcase.Day, visit) -> None:
    event = showcase.hostile(the(day, "parcel delivered"))
    bad = " ".join(showcase.HOSTILE)
    cameras = [camera.model_copy(update={"name": bad}) for camera in day.cameras]
    source = FakeSource(cameras=cameras, events=[event], images=day.images, frames=day.frames, health=showcase.health())
    visitor = visit()
    page = visitor.page
    with Site(source) as site:
        for path in (
            "/",
            "/?camera=front-door",
            f"/events/{event.event_id}",
            "/cameras",
            f"/cameras/{event.camera_id}?day={event.started_at.date()}",
        ):
            page.goto(site.url + path)
            assert page.locator("body").inner_text().count("<script>window.hit=1</script>") > 0, path
            assert page.evaluate("window.hit") is None, path
            assert page.evaluate("document.querySelectorAll('main script, main [onerror], main [onload]').length") == 0
            # The policy has nothing to refuse: escaping alone is enough.
            assert visitor.refused() == [], path
        # The same by the live way, and from labels.
        page.goto(f"{site.url}/events/{event.event_id}")
        page.get_by_text("Add a note").click()
        page.get_by_label("Note").fill(bad)
        page.get_by_label("Your name").fill(bad[:90])
        page.get_by_role("button", name="True alarm").click()
        expect(page.locator(".labels")).to_contain_text("window.hit=1")
        live(page, site)
        site.add(again(event, 1))
        expect(page.locator("[data-event]")).to_have_count(2)
        assert page.evaluate("window.hit") is None
        assert visitor.refused() == []
    assert visitor.errors == []


def test_the_policy_would_stop_what_escaping_missed(site: Site, visit) -> None:
    page = visit().page
    page.goto(site.url)
    page.evaluate(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">')"
    )
    until(page, "window.refused.length > 0")
    assert page.evaluate("window.hit") is None


def test_without_javascript_everything_but_liveness_is_there(site: Site, day: showcase.Day, visit) -> None:
    page = visit(java_script_enabled=False).page
    page.goto(site.url)
    expect(page.locator("#live")).to_be_hidden()
    page.get_by_label("Level").select_option("critical")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("[data-event]")).to_have_count(1)
    page.locator("[data-event] .open").click()
    expect(page.locator("h1")).to_contain_text("One person stands")
    first = page.locator("#stage figure:visible").get_attribute("data-n")
    page.locator("#stage figure:visible .turn-back").click()
    expect(page.locator("#stage figure:visible")).to_have_attribute("data-n", str(int(first or 0) - 1))
    page.locator("#strip a").last.click()
    expect(page.locator("#stage figure:visible")).to_have_attribute("data-n", "4")
    page.get_by_label("none").check(force=True)
    expect(page.locator("#stage figure:visible .boxes")).to_be_hidden()
    page.get_by_text("What it was asked").click()
    expect(page.get_by_text("You judge the risk")).to_be_visible()
    page.get_by_role("button", name="True alarm").click()
    expect(page.locator(".given")).to_contain_text("true alarm")
    page.goto(f"{site.url}/cameras/back-yard")
    page.get_by_role("link", name="Day before").click()
    expect(page).to_have_url(re.compile("day="))


# Between the schemes only colours differ.
@pytest.mark.parametrize(("scheme", "rules"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})])
def test_axe_finds_nothing(day: showcase.Day, site: Site, bare: Site, visit, *, scheme: str, rules: dict) -> None:
    page = visit(color_scheme=scheme).page
    bare.source.away = AWAY
    addresses = [*(site.url + path for path in paths(day) if "span=" not in path), bare.url, f"{site.url}/events/none"]
    for address in addresses:
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        found = Axe().run(page, options={"resultTypes": ["violations"], **rules})
        assert found.violations_count == 0, f"{address}\n{found.generate_report()}"
    page.goto(site.url)
    page.keyboard.press("?")
    assert Axe().run(page, context="#keys").violations_count == 0


def test_the_pipeline_keeps_itself_fresh(site: Site, visit) -> None:
    page = visit().page
    page.clock.install()
    page.goto(f"{site.url}/pipeline")
    expect(page.locator(".banner")).to_contain_text("waiting")
    page.evaluate("window.same = true")
    site.source.set_health(showcase.health(status="ok"))
    page.clock.run_for(6_000)
    expect(page.locator(".banner")).to_contain_text("All is well")
    assert page.evaluate("window.same") is True


def test_a_page_that_was_away_comes_back_by_itself(bare: Site, visit) -> None:
    page = visit().page
    page.clock.install()
    bare.source.away = AWAY
    page.goto(bare.url)
    expect(page.locator("main")).to_contain_text("clickhouse.url")
    bare.source.away = None
    page.clock.run_for(6_000)
    expect(page.locator("h1")).to_have_text("Latest events")


def test_signing_in_and_out(day: showcase.Day, visit) -> None:
    settings = GatewaySettings.model_validate({"api_key": "open sesame"})
    visitor = visit()
    page = visitor.page
    with Site(showcase.source(day), settings) as site:
        page.goto(f"{site.url}/cameras")
        expect(page.locator("h1")).to_have_text("Sign in")
        page.get_by_label("Key", exact=True).fill("simsalabim")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("not the key")
        page.get_by_label("Key", exact=True).fill("open sesame")
        page.get_by_role("button", name="Sign in").click()
        expect(page).to_have_url(f"{site.url}/cameras")
        expect(page.locator(".camera-card")).to_have_count(3)
        page.get_by_role("button", name="Sign out").click()
        expect(page.locator("h1")).to_have_text("Sign in")

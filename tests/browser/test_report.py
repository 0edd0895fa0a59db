"""The report as people meet it: on a phone, without JavaScript, in the dark, read aloud, on paper, and under attack."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from msgspec.structs import replace
from playwright.sync_api import Page, expect

from processors.replay.comparison import Regrouping
from processors.replay.report import Report, render
from tests.browser import rewatched
from tests.browser.conftest import PATIENCE_MS
from tests.browser.showcase import HOSTILE

expect.set_options(timeout=PATIENCE_MS)

Written = Callable[..., str]


@pytest.fixture(scope="session")
def fortnight() -> Report:
    """Frames are rendered once."""
    return rewatched.made(days=6)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a report where the browser finds it: a file alone, as it is mailed and kept."""

    def write(report: Report, **options: int) -> str:
        path = tmp_path / "report.html"
        path.write_text(render(report, **options), encoding="utf-8")
        return path.as_uri()

    return write


def with_all(report: Report) -> Report:
    """The report with each of its lists filled."""
    paired = report.comparison.pairing
    first, second, third = (pair.a for pair in paired.pairs[:3])
    paired = replace(
        paired,
        split=(Regrouping(a=(first,), b=(second, third)),),
        merged=(Regrouping(a=(first, second), b=(third,)),),
        appeared=(first,),
        vanished=(second, third),
    )
    gone = next(iter(report.pictures))
    pictures = {
        **report.pictures,
        gone: replace(report.pictures[gone], jpeg=b"", missing="No picture of this frame: its bytes are gone."),
    }
    return replace(report, comparison=replace(report.comparison, pairing=paired), pictures=pictures)


def open_all(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")


def test_in_ten_seconds_one_knows_what_changed_and_whether_it_counts(
    fortnight: Report, written: Written, visit
) -> None:
    page = visit(height=900).page
    page.goto(written(fortnight))
    found = fortnight.comparison
    for what in (
        page.get_by_role("heading", level=1),
        page.get_by_text("This is more than noise."),
        page.get_by_text("alarms would not have been raised"),
        page.get_by_text("missed: labelled a true alarm"),
        page.get_by_text("saved: labelled a false alarm"),
    ):
        expect(what).to_be_in_viewport()
    expect(page.get_by_role("heading", level=1)).to_have_text(
        f"{len(found.flips)} of {found.compared} windows changed their level."
    )
    expect(page.locator(".flip").first).to_contain_text("labelled true alarm")


def test_it_asks_the_network_for_nothing_and_is_refused_nothing(fortnight: Report, written: Written, visit) -> None:
    visitor = visit()
    asked: list[str] = []
    visitor.page.on("request", lambda request: asked.append(request.url))
    address = written(with_all(fortnight))
    visitor.page.goto(address)
    open_all(visitor.page)
    visitor.page.wait_for_load_state("networkidle")
    assert [url[:300] for url in asked if not url.startswith("data:")] == [address]
    assert visitor.errors == []
    assert visitor.refused() == []


def test_nothing_that_cameras_models_or_people_write_runs(fortnight: Report, written: Written, visit) -> None:
    visitor = visit()
    page = visitor.page
    page.goto(written(rewatched.hostile(fortnight)))
    open_all(page)
    assert page.locator("body").inner_text().count("<script>window.hit=1</script>") > 100
    assert page.evaluate("window.hit") is None
    # Nobody made an element of it: not a script, not a handler, not a picture from elsewhere.
    assert page.evaluate("document.querySelectorAll('script, iframe, object, [onload], [onerror]').length") == 0
    sources = page.evaluate(
        "[...document.querySelectorAll('[src], [href]')].map((e) => e.src ?? e.getAttribute('href'))"
    )
    assert {source[:5] for source in sources if not source.startswith("#")} <= {"data:"}
    # The policy has nothing to refuse: escaping alone is enough.
    assert visitor.refused() == []
    assert visitor.errors == []
    assert "window.hit" in page.title()
    assert all(len(text) > 3 for text in HOSTILE)


def test_the_policy_would_stop_what_escaping_missed(fortnight: Report, written: Written, visit) -> None:
    page = visit().page
    page.goto(written(fortnight))
    page.evaluate(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">')"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.refused.length") > 0
    assert page.evaluate("window.hit") is None


def test_it_needs_no_javascript(fortnight: Report, written: Written, visit) -> None:
    page = visit(java_script_enabled=False).page
    page.goto(written(with_all(fortnight)))
    expect(page.locator(".flip").nth(1).locator("img")).to_be_visible()
    plan = page.get_by_text('"kind": "change"')
    expect(plan).to_be_hidden()
    page.get_by_text("The plan, whole").first.click()
    expect(plan).to_be_visible()
    page.get_by_role("link", name="Made from").click()
    expect(page.get_by_role("heading", name="What this is made from")).to_be_in_viewport()


def test_boxes_lie_on_their_pictures_and_gone_ones_say_so(fortnight: Report, written: Written, visit) -> None:
    page = visit().page
    report = with_all(fortnight)
    page.goto(written(report))
    expect(page.locator(".flip").first).to_contain_text("No picture of this frame: its bytes are gone.")
    expect(page.locator(".flip").first.locator("img")).to_have_count(0)
    off = page.evaluate("""() => [...document.querySelectorAll(".picture")].map((picture) => {
      const image = picture.querySelector("img"), boxes = picture.querySelector(".boxes");
      const a = image.getBoundingClientRect(), b = boxes.getBoundingClientRect();
      return [image.complete && image.naturalWidth === +image.getAttribute("width"),
        Math.max(...["x", "y", "width", "height"].map((side) => Math.abs(a[side] - b[side])))];
    })""")
    assert len(off) == len(report.pictures) - 1
    assert all(decoded and apart < 1 for decoded, apart in off)
    first = fortnight.pictures[fortnight.comparison.flips[1].pair.a.event_id]
    outline = page.locator(".flip").nth(1).locator(".boxes .outline").last.bounding_box()
    image = page.locator(".flip").nth(1).locator("img").bounding_box()
    surest = max(first.boxes, key=lambda box: box.score)
    assert outline is not None
    assert image is not None
    assert outline["x"] - image["x"] == pytest.approx(surest.x * image["width"], abs=3)
    assert outline["height"] == pytest.approx(surest.height * image["height"], abs=6)


@pytest.mark.parametrize("width", [360, 390, 768])
def test_a_phone_shows_one_column_and_nothing_scrolls_sideways(
    fortnight: Report, written: Written, visit, *, width: int
) -> None:
    page = visit(width=width, height=780, has_touch=True, is_mobile=True).page
    for report in (with_all(fortnight), rewatched.hostile(fortnight)):
        page.goto(written(report, pictured=12))
        open_all(page)
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1] == width
        # Nor does anything stick out of what cuts it off.
        out = page.evaluate(
            "(width) => [...document.querySelectorAll('main *:not(pre, svg *)')].filter((element) => {"
            " const box = element.getBoundingClientRect(); return box.width > 1 && box.right > width + 1; })"
            ".map((element) => element.outerHTML.slice(0, 120))",
            width,
        )
        assert out == []
    if width < 640:
        sides = page.locator(".flip").nth(1).locator(".side")
        boxes = [side.bounding_box() or {} for side in sides.all()]
        assert boxes[0]["x"] == boxes[1]["x"]
        assert boxes[0]["y"] < boxes[1]["y"]


def test_both_verdicts_stand_side_by_side_where_there_is_room(fortnight: Report, written: Written, visit) -> None:
    page = visit().page
    page.goto(written(fortnight))
    before, after = (side.bounding_box() or {} for side in page.locator(".flip").first.locator(".side").all())
    assert before["y"] == after["y"]
    assert before["x"] < after["x"]


# Between the schemes only colours differ.
@pytest.mark.parametrize(("scheme", "rules"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})])
def test_axe_finds_nothing(fortnight: Report, written: Written, visit, *, scheme: str, rules: dict) -> None:
    page = visit(color_scheme=scheme).page
    report = with_all(fortnight)
    bare = rewatched.made(days=1, baseline=False, labels=False)
    strict = rewatched.hostile(fortnight)
    for one in (report, bare, strict):
        page.goto(written(one, pictured=6))
        open_all(page)
        found = Axe().run(page, options={"resultTypes": ["violations"], **rules})
        assert found.violations_count == 0, found.generate_report()


def test_everything_can_be_reached_from_the_keyboard(fortnight: Report, written: Written, visit) -> None:
    page = visit().page
    page.goto(written(with_all(fortnight)))
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    closed = page.get_by_text("The plan, whole").first
    closed.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text('"kind": "change"')).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("pre").first).to_be_focused()  # it scrolls: the arrow keys must reach it


def test_every_drawing_says_in_words_what_it_shows(fortnight: Report, written: Written, visit) -> None:
    page = visit().page
    page.goto(written(fortnight))
    drawings = page.get_by_role("img").and_(page.locator("svg"))
    names = [drawing.get_attribute("aria-label") or "" for drawing in drawings.all()]
    assert len(names) >= 8
    assert all(re.search(r"\d", name) for name in names)


def test_on_paper_it_is_dark_on_white_and_without_links(fortnight: Report, written: Written, visit) -> None:
    page = visit(color_scheme="dark").page
    page.goto(written(fortnight))
    page.emulate_media(media="print", color_scheme="dark")
    expect(page.get_by_role("navigation")).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(20, 32, 34)"
    assert len(page.pdf(width="210mm", height="297mm")) > 20_000

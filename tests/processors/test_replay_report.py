"""The report of a comparison: what it claims, what it draws, what it leaves out, and that nothing makes it fail."""

import base64
import hashlib
import io
import random
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree as ET

import msgspec
import pytest
from msgspec.structs import replace
from PIL import Image

from infra.config import Settings
from processors.analyze.answers import risk_level
from processors.replay import charts, statistics
from processors.replay.compare import compare
from processors.replay.comparison import (
    LEVELS,
    Comparison,
    Coverage,
    Difference,
    Ineligible,
    Noise,
    Pair,
    Pairing,
    Regrouping,
    Side,
    Strict,
    Verdict,
)
from processors.replay.conclusion import chance, conclude, percent
from processors.replay.gathering import differences, gather
from processors.replay.pictures import MOST_PX, Moment, telling, thumbnail
from processors.replay.plan import Bound, Change, Plan, Unit
from processors.replay.report import LISTED, PICTURED, Part, Picture, PromptChange, Report, SeenBox, drawn, render
from processors.replay.statistics import GivenLabel
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas import ids, prompts
from schemas.records import Context, Frame, Record, Replay, ReplayEvent, ReplayUnit, RiskEvent
from schemas.records import SeenBox as SeenBoxRecord
from streams import codec
from streams.claims import ClaimStore
from streams.errors import UnavailableError, UnprocessableError
from tests import examples
from tests.processors import gateway_kit as kit

pytest_plugins = ["tests.clickhouse_kit"]

AT = 1_773_400_000_000


def verdict(n: int, score: int, run: str = "live", **changes: Any) -> Verdict:
    made = Verdict(
        event_id=f"yard:{n:032x}:{run}",
        batch_id=f"yard:{n:032x}",
        camera_id="yard",
        started_at=AT + 60_000 * n,
        ended_at=AT + 60_000 * n + 9_000,
        frame_ids=(f"yard:{n}",),
        risk_score=score,
        risk_level=risk_level(score),
        summary=f"Window {n} is a {score}",
        completion_digest=f"{n} {score}",
    )
    return replace(made, **changes)


def comparison(
    scores: list[tuple[int, int]],
    *,
    labels: dict[int, str] | None = None,
    noise: Noise | None = None,
    **changes: Any,
) -> Comparison:
    """Windows by their scores on both sides; `labels` by the number of the window."""
    pairs = tuple(Pair(a=verdict(n, a), b=verdict(n, b, "r1")) for n, (a, b) in enumerate(scores))
    paired = changes.pop("pairing", Pairing(pairs=pairs))
    given = [
        GivenLabel(
            label_id=str(n),
            camera_id="yard",
            started_at=pairs[n].a.started_at,
            ended_at=pairs[n].a.ended_at,
            verdict=said,  # type: ignore[arg-type]
            event_id=pairs[n].a.event_id,
            frame_ids=pairs[n].a.frame_ids,
            labelled_at=AT,
        )
        for n, said in (labels or {}).items()
    ]
    made = statistics.compared(
        paired,
        given,
        noise,
        a=Side(id="live", name="live", verdicts=len(scores), alarms=sum(a >= 60 for a, _ in scores)),
        b=Side(id="r1", name="stricter", kind="change", verdicts=len(scores), alarms=sum(b >= 60 for _, b in scores)),
        coverage=Coverage(planned=len(scores), units=len(scores), judged=len(scores), complete=True),
    )
    return replace(made, **changes)


def baseline(flips: int = 2, compared: int = 100, band: float = 6, **changes: Any) -> Noise:
    made = Noise(
        replay_id="r0", name="again", compared=compared, flips=flips, identical=80, floor=flips / compared, band=band
    )
    return replace(made, **changes)


def page(found: Comparison, **parts: Any) -> str:
    return render(Report(comparison=found, made_at=AT, **parts))


def text(html: str) -> str:
    """What a person reads, spaces made one."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []
            self.hidden = 0

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.hidden += tag in {"style", "title"}
            if tag in {"li", "p", "dd", "dt"}:
                self.found.append(" ")

        def handle_endtag(self, tag: str) -> None:
            self.hidden -= tag in {"style", "title"}

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                self.found.append(data)

    reader = Reader()
    reader.feed(html)
    return re.sub(r"\s+", " ", "".join(reader.found))


MANY = [(70, 20)] * 30 + [(20, 20)] * 170

# --- what it claims --------------------------------------------------------------------------------------------------


def test_more_flips_than_the_noise_makes_are_called_more_than_noise() -> None:
    said = conclude(comparison(MANY, noise=baseline()))
    assert said.headline == "30 of 200 windows changed their level."
    assert (said.tone, said.verdict) == ("more", "This is more than noise.")
    assert "15.0 % of the windows changed here, 2.0 % did (2 of 100)" in said.because
    assert "Each of the changes moved its score by more than the noise does (6 points)." in said.because


def test_as_many_flips_as_the_noise_makes_are_never_called_more() -> None:
    few = [(70, 20)] * 6 + [(20, 20)] * 194
    assert conclude(comparison(few, noise=baseline())).verdict == "This cannot be told from noise."
    assert conclude(comparison(few, noise=baseline(flips=8))).verdict == "This is no more than noise."
    # Significantly fewer is not more, either.
    assert conclude(comparison(few, noise=baseline(flips=60))).tone == "noise"


def test_without_a_baseline_nothing_is_said_of_noise() -> None:
    said = conclude(comparison(MANY))
    assert said.tone == "unknown"
    assert said.verdict == "Whether this is more than noise is not known."
    assert "No baseline" in said.because


def test_a_baseline_is_called_the_noise_itself() -> None:
    said = conclude(comparison(MANY, noise=baseline(itself=True)))
    assert said.verdict.startswith("This is the noise itself")


def test_changes_within_the_noise_are_named_even_where_the_whole_is_more() -> None:
    said = conclude(comparison([*MANY, (61, 58), (58, 61)], noise=baseline()))
    assert said.tone == "more"
    assert "Yet 2 changes of them moved the score by no more than the noise does" in said.because


def test_alarms_gone_and_new_are_told_apart_by_what_people_said() -> None:
    scores = [(70, 20)] * 4 + [(20, 90)] * 3 + [(50, 10), (70, 70)]
    labels = {0: "true_alarm", 1: "false_alarm", 2: "missed", 4: "false_alarm", 8: "true_alarm"}
    said = conclude(comparison(scores, labels=labels, noise=baseline()))
    assert said.gone._asdict() == {"of_true": 2, "of_false": 1, "unlabelled": 1, "in_noise": 0, "of_windows": 0}
    assert said.new._asdict() == {"of_true": 0, "of_false": 1, "unlabelled": 2, "in_noise": 0, "of_windows": 0}
    assert said.doubts == ("Nobody labelled 3 of the alarms that changed: of those it is not known who is right.",)
    shown = text(page(comparison(scores, labels=labels, noise=baseline())))
    assert "4 alarms would not have been raised 2 missed: labelled a true alarm 1 saved: labelled a false" in shown
    assert "3 new alarms would have been raised 1 for nothing: labelled a false alarm 2 not labelled" in shown


def test_without_labels_nothing_is_called_better_or_worse() -> None:
    found = comparison(MANY, noise=baseline())
    assert any("better or worse is not known" in doubt for doubt in conclude(found).doubts)
    shown = text(page(found))
    assert "saved" not in shown
    assert "missed" not in shown


def test_alarms_that_went_with_their_windows_are_counted() -> None:
    paired = Pairing(
        pairs=(Pair(a=verdict(0, 20), b=verdict(0, 20, "r1")),),
        split=(Regrouping(a=(verdict(1, 90),), b=(verdict(2, 10, "r1"), verdict(3, 10, "r1"))),),
        appeared=(verdict(4, 70, "r1"), verdict(5, 5, "r1")),
        vanished=(verdict(6, 99), verdict(7, 1)),
    )
    found = comparison([], pairing=paired, noise=baseline())
    said = conclude(found)
    assert (said.gone.of_windows, said.gone.all, said.new.of_windows) == (2, 2, 1)
    shown = text(page(found))
    assert "2 alarms would not have been raised 2 with windows that only one side has" in shown
    assert "Split (1): one window before, several after" in shown
    assert "Vanished (2)" in shown
    assert "Appeared (2)" in shown


@pytest.mark.parametrize(
    ("scores", "headline"),
    [
        ([], "Nothing could be compared: the two sides have no window in common."),
        ([(20, 20)], "All of 1 window got the same answer, byte for byte."),
        ([(20, 21)] * 2, "None of 2 windows changed its level."),
        ([(20, 90), (1, 1)], "1 of 2 windows changed its level."),
    ],
)
def test_the_headline_fits_few_and_none(scores: list[tuple[int, int]], headline: str) -> None:
    found = comparison(scores, noise=baseline() if scores else None)
    assert conclude(found).headline == headline
    assert headline in text(page(found))


def test_a_strict_check_says_whether_all_came_back() -> None:
    def said(**strict: Any) -> tuple[str, str]:
        made = conclude(comparison([(20, 20)] * 3, strict=Strict(**strict)))
        return made.tone, made.verdict

    assert said(eligible=3, identical=3, calls=3) == ("exact", "Reproduced: all of 3 answers came back byte for byte.")
    assert said(eligible=3, identical=2)[0] == "failed"
    assert said(eligible=0, identical=0) == ("failed", "The strict check failed: there was nothing to check.")
    weights = said(eligible=3, identical=3, models=(("a" * 64, "b" * 64),))
    assert weights == ("failed", "The strict check failed: other weights answered than those on record.")
    different = Difference(event_id="yard:1:live", field="raw_completion", position=12, a='{"a": 1', b='{"a": 2')
    left = Ineligible(reason="slots is 2", count=4, examples=("yard:9:live",))
    strict = Strict(eligible=3, identical=2, differences=(different,), ineligible=(left,))
    shown = text(page(comparison([(20, 20)] * 3, strict=strict)))
    assert "yard:1:live, raw completion, byte 12" in shown


def test_what_is_not_done_or_failed_is_said_first() -> None:
    coverage = Coverage(planned=500, units=330, judged=320, failed=1)
    doubts = conclude(comparison(MANY, coverage=coverage, notes=("A note.",), noise=baseline())).doubts
    assert doubts[:2] == (
        "The replay is not done: 320 of 500 windows judged so far.",
        "1 window could not be judged, and is missing here.",
    )
    assert doubts[-1] == "A note."


@pytest.mark.parametrize(
    ("p_value", "words"),
    [(0.94, "9 in 10"), (0.3, "3 in 10"), (0.04, "4 in 100"), (0.003, "3 in 1,000"), (2e-7, "less than 1 in 10,000")],
)
def test_a_p_value_has_words(p_value: float, words: str) -> None:
    assert chance(p_value) == words


def test_small_shares_keep_their_digits() -> None:
    assert [percent(share) for share in (0, 0.004, 0.25, 1)] == ["0.0 %", "0.40 %", "25.0 %", "100.0 %"]


# --- what it draws ---------------------------------------------------------------------------------------------------


def elements(drawing: str, name: str, kind: str = "") -> list[ET.Element]:
    found = ET.fromstring(drawing).iter(name)
    return [element for element in found if kind in element.get("class", "")]


def test_levels_of_drawings_are_those_of_verdicts() -> None:
    assert [charts.level_of(score) for score in range(101)] == [risk_level(score) for score in range(101)]
    assert charts.LEVELS == LEVELS


def test_scores_are_drawn_where_they_are_and_marked_by_their_way() -> None:
    drawing = charts.scores({(0, 0): 1, (20, 90): 4, (90, 20): 1}, noise=5)
    [up] = elements(drawing, "path", "way-raised")
    assert up.findtext("title") == "20 → 90: 4 windows"
    [down] = elements(drawing, "path", "way-lowered")
    [same] = elements(drawing, "circle", "way-same")
    assert (float(same.get("cx", 0)), float(same.get("cy", 0))) == (40, 314)
    tops = [float(element.get("d", "")[1:].split("L")[0].split()[1]) for element in (up, down)]
    assert tops[0] < tops[1]
    assert ET.fromstring(drawing).get("aria-label", "").startswith("Scores before and after of 6 windows: 4 rose, 1")
    assert len(elements(drawing, "path", "corridor")) == 1


def test_a_hundred_thousand_windows_are_no_more_marks_than_a_screen_shows() -> None:
    chosen = random.Random(1)
    pairs: dict[tuple[int, int], int] = {}
    for _ in range(100_000):
        at = chosen.randint(0, 100), chosen.randint(0, 100)
        pairs[at] = pairs.get(at, 0) + 1
    drawing = charts.scores(pairs)
    assert len(drawing) < 150_000
    assert "100,000 windows" in drawing


def test_bars_hold_every_score_once() -> None:
    drawing = charts.spread([0, 4, 5, 29, 30, 99, 100], [100])
    bars = [(bar.findtext("title"), bar.get("class")) for bar in elements(drawing, "rect")]
    assert bars == [
        ("0 to 4, before: 2 windows", "fill-low side-before"),
        ("5 to 9, before: 1 window", "fill-low side-before"),
        ("25 to 29, before: 1 window", "fill-low side-before"),
        ("30 to 34, before: 1 window", "fill-medium side-before"),
        ("95 to 100, before: 2 windows", "fill-critical side-before"),
        ("95 to 100, after: 1 window", "fill-critical side-after"),
    ]


def test_drawings_of_nothing_are_drawings() -> None:
    for drawing in (
        charts.scores({}),
        charts.spread([], []),
        charts.moved([], "camera"),
        charts.moved([charts.Moved("none", 0, 0, 0)], "camera"),
        charts.hours([charts.Moved(str(n), 0, 0, 0) for n in range(24)]),
        charts.shares([], "x"),
        charts.shares([charts.Share("x", 0, 0, 0, "0 %")], "x"),
    ):
        assert ET.fromstring(drawing).get("role") == "img"
        assert "nan" not in drawing
        assert "inf" not in drawing


def test_names_in_drawings_are_escaped() -> None:
    bad = '"><script>alert(1)</script>'
    drawing = charts.moved([charts.Moved(bad, 3, 1, 2)], "camera")
    assert "<script" not in drawing
    assert ET.fromstring(drawing).get("aria-label") == f"Changed levels by camera: {bad} 3 of 3"


def test_lost_alarms_are_in_the_bars_of_their_camera() -> None:
    shown = page(comparison([(70, 20), (20, 70), (40, 20), (20, 20)], noise=baseline()))
    assert ">2↑ 2↓ of 4<" not in shown  # three of the four changed
    assert ">1↑ 2↓ of 4<" in shown


# --- boxes and pictures ----------------------------------------------------------------------------------------------


def moment(n: int, *boxes: tuple[str, float, bool], matters: bool = True) -> Moment:
    made = tuple(
        {"label": label, "score": score, "x": 0, "y": 0, "width": 10, "height": 10, "stationary": still}
        for label, score, still in boxes
    )
    return Moment(f"yard:{n}", AT + n, 320, 180, matters, made)


def test_the_surest_box_that_is_news_chooses_the_frame() -> None:
    frames = [
        moment(0, ("person", 0.6, False)),
        moment(1, ("person", 0.99, True)),  # parked
        moment(2, ("person", 0.9, False), ("cat", 0.95, False)),
        moment(3, ("cat", 0.98, False)),  # not what the window is about
        moment(4, ("person", 0.97, False), matters=False),
    ]
    assert telling(frames, ("person",)) == (2, frames[2])
    assert telling(frames, ())[0] == 3
    assert telling([moment(0, matters=False), moment(1)], ()) == (1, moment(1))
    assert telling([], ()) == (0, None)


def jpeg(width: int = 640, height: int = 360, *, noise: bool = False) -> bytes:
    image = Image.new("RGB", (width, height), (90, 120, 40))
    if noise:
        image = Image.frombytes("RGB", (width, height), random.Random(5).randbytes(3 * width * height))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return out.getvalue()


@pytest.mark.parametrize("size", [(640, 360), (2560, 1440), (200, 100), (360, 1280)])
def test_a_thumbnail_is_small_and_keeps_its_shape(size: tuple[int, int]) -> None:
    small, width, height = thumbnail(jpeg(*size))
    assert max(width, height) <= MOST_PX
    assert abs(width / height - size[0] / size[1]) < 0.02
    assert Image.open(io.BytesIO(small)).size == (width, height)


def test_a_thumbnail_of_noise_is_bounded_too() -> None:
    small, _, _ = thumbnail(jpeg(640, 640, noise=True))
    assert len(small) < 40_000


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff nothing", jpeg()[:900], b"\x89PNG\r\n\x1a\n" + b"0" * 64])
def test_what_is_no_whole_jpeg_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(UnprocessableError, match="cannot be decoded"):
        thumbnail(data)


def test_boxes_are_shares_of_the_picture_and_stay_inside() -> None:
    boxes = (
        SeenBox(label="person", score=0.9, x=-0.1, y=0.5, width=0.3, height=0.2),
        SeenBox(label="car", score=0.5, x=0.8, y=0.01, width=0.5, height=0.3),
        SeenBox(label="gone", score=0.7, x=1.2, y=0, width=0.1, height=0.1),
    )
    right, left = drawn(Picture(boxes=boxes))
    assert (right.text, right.x, right.width, right.pill_at) == ("car 0.50", "80.00%", "20.00%", "100.00%")
    assert right.pill_x < 0  # it hangs to the left of the box's right edge,
    assert right.pill_y == 0  # and inside, as there is no room above
    assert (left.text, left.x, left.width, left.pill_y) == ("person 0.90", "0.00%", "20.00%", -16)


def test_a_frame_without_bytes_shows_why_in_its_place() -> None:
    found = comparison([(90, 20), (91, 20)], noise=baseline())
    gone = Picture(missing="No picture of this frame: its bytes are not kept any more.")
    shown = page(found, pictures={found.flips[0].pair.a.event_id: gone})
    assert "its bytes are not kept any more." in text(shown)
    assert "no frame of this window was looked for" in text(shown)
    assert "<img" not in shown


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompts_difference_marks_lines_and_the_words_in_them() -> None:
    parts = differences(prompts.default(), prompts.deliveries_strict_nights())
    assert [part.file for part in parts] == ["system.txt"]
    assert [sign for sign, _ in parts[0].lines] == ["@", "-", "+"]
    change = PromptChange(before="default", after="strict", windows=200, parts=parts)
    shown = page(comparison(MANY), prompts=(change,))
    assert re.search(r"<ins[^>]*>You judge.*<b> Deliveries are expected. Be stricter at night.</b></ins>", shown)
    assert "<del" in shown


def test_a_difference_without_end_is_cut_and_says_so() -> None:
    lines = tuple(("+" if n % 2 else "-", f"line {n} " + "x" * 500) for n in range(2_000))
    change = PromptChange(before="a", after="b", windows=1, parts=(Part(file="user.txt", lines=lines),))
    shown = page(comparison(MANY), prompts=(change,))
    assert len(shown) < 600_000
    assert re.search(r"1,7\d\d more lines", shown)


# --- how long it gets ------------------------------------------------------------------------------------------------


def noisy(found: Comparison) -> dict[str, Picture]:
    small, width, height = thumbnail(jpeg(640, 640, noise=True))
    boxes = tuple(SeenBox(label="person", score=0.5, x=n / 20, y=0.2, width=0.2, height=0.2) for n in range(12))
    picture = Picture(jpeg=small, width=width, height=height, boxes=boxes)
    return {flip.pair.a.event_id: picture for flip in found.flips}


def listed(html: str) -> tuple[int, int, int]:
    """Flips shown whole, flips in the table, and those that are only counted."""
    rows = html.partition('<table class="listed" role="table">')[2].partition("</table>")[0].count("<tr") - 1
    more = re.search(r"([\d,]+) more windows? changed", html)
    return html.count('<article class="box flip"'), max(0, rows), int(more[1].replace(",", "")) if more else 0


def test_500_flips_with_pictures_of_noise_stay_below_five_megabytes() -> None:
    found = comparison([(70, 20)] * 500, noise=baseline())
    html = page(found, pictures=noisy(found))
    assert len(html.encode()) < 5_000_000
    shown, rows, more = listed(html)
    assert (shown, rows, more) == (PICTURED, 400, 0)


def test_every_flip_is_shown_listed_or_counted() -> None:
    found = comparison([(70, 20)] * 1_200 + [(20, 20)] * 800, noise=baseline())
    shown, rows, more = listed(page(found))
    assert (shown, rows, more) == (PICTURED, LISTED, 1_200 - PICTURED - LISTED)
    assert "rewatch replay diff live stricter --json" in page(found)


def test_where_it_would_be_too_long_fewer_are_shown_whole() -> None:
    found = comparison([(70, 20)] * 150, noise=baseline())
    report = Report(comparison=found, made_at=AT, pictures=noisy(found))
    html = render(report, most_bytes=900_000)
    assert len(html.encode()) <= 900_000
    shown, rows, more = listed(html)
    assert 0 < shown < PICTURED
    assert shown + rows + more == 150


def test_texts_that_ran_away_are_cut_and_say_so() -> None:
    long = "word " * 200_000
    pairs = tuple(
        Pair(
            a=verdict(n, 90, summary=long, reasoning=long, camera_name=long, recommended_action=long),
            b=verdict(n, 10, "r1", summary=long, reasoning=long, camera_name=long),
        )
        for n in range(120)
    )
    found = comparison([], pairing=Pairing(pairs=pairs, vanished=tuple(pair.a for pair in pairs)), noise=baseline())
    side = replace(found.b, name=long, change=long, prompt_names={"d": long}, model_names={"m": long})
    html = page(replace(found, b=side, notes=(long,)))
    assert len(html.encode()) < 2_000_000
    assert "letters more)" in html


# --- what it lets nobody do ------------------------------------------------------------------------------------------


def test_its_policy_allows_its_own_style_and_pictures_inside_it_alone() -> None:
    html = page(comparison(MANY))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    [style] = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    digest = re.search(r"style-src 'sha256-([^']*)'", policy)
    assert digest is not None
    assert digest[1] == base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert not re.search(r"(?:src|href|action|srcset)=\"(?!#|data:)", html)
    assert "<script" not in html
    assert "style=" not in html


def test_names_without_a_zone_are_in_utc() -> None:
    found = comparison([(90, 10)], noise=baseline())
    pair = Pair(a=replace(found.flips[0].pair.a, time_zone="../etc/passwd"), b=found.flips[0].pair.b)
    flip = msgspec.structs.replace(found.flips[0], pair=pair)
    assert "13 Mar 2026, 11:06:40 UTC" in text(page(replace(found, flips=(flip,))))


# --- what it is gathered from ----------------------------------------------------------------------------------------

DEFAULT, STRICTER = prompts.default(), prompts.deliveries_strict_nights()


def judged_again(records: list[Record], score: int) -> ReplayEvent:
    """What the replay said of a window."""
    context, event = records[-2], records[-1]
    assert isinstance(context, Context)
    assert isinstance(event, RiskEvent)
    name = ids.event_id(event.batch_id, "r1")
    again = replace(
        event,
        event_id=name,
        run="r1",
        risk_score=score,
        risk_level=risk_level(score),
        prompt_digest=STRICTER.digest,
        reasoning="Deliveries are expected.",
        risk_factors=("daytime",),
        raw_completion=f'{{"risk_score": {score}}}',
        conditions={"slots": "2", "seed": "7"},
        judged_at=AT + 7_000,
    )
    unit_id = str(Unit("r1", event.batch_id))
    return ReplayEvent(
        replay_id="r1", unit_id=unit_id, event_id=name, camera_id=event.camera_id, reused=False, event=again
    )


def unit(context: Context, **changes: Any) -> ReplayUnit:
    made = ReplayUnit(
        unit_id=str(Unit("r1", context.batch_id)),
        replay_id="r1",
        camera_id=context.camera_id,
        kind="judge",
        payload=codec.encode("contexts", context)[0],
        created_at=AT,
        prompt_digest=STRICTER.digest,
    )
    return replace(made, **changes)


def step(plan: Plan, state: str = "done", detail: str = "", at: int = AT) -> Replay:
    return Replay(replay_id="r1", name="stricter", state=state, plan=plan.encode(), updated_at=at, detail=detail)


def best_frame(records: list[Record], **changes: Any) -> list[Record]:
    """The window with its surest frame's record changed; the picture of the report is that one."""
    frames = [n for n, record in enumerate(records) if isinstance(record, Frame)]
    made = list(records)
    made[frames[1]] = replace(made[frames[1]], **changes)
    return made


def upto(of: list[Record]) -> tuple[Bound, ...]:
    return tuple(Bound(topic="contexts", epoch=kit.EPOCH, partition=p, offset=len(of)) for p in range(4))


@pytest.fixture
async def queries(database: ClickHouseSettings) -> AsyncIterator[Queries]:
    made = Queries(database)
    yield made
    await made.aclose()


async def put(database: ClickHouseSettings, records: list[Record]) -> None:
    await kit.store(cast("Settings", SimpleNamespace(clickhouse=database)), records)


@pytest.mark.real
async def test_a_report_is_gathered_from_what_is_kept_and_names_what_is_not(
    database: ClickHouseSettings, queries: Queries, ask: Any, tmp_path: Path
) -> None:
    claims = ClaimStore(str(tmp_path / "images"))
    stored = jpeg(1280, 720)
    claim = await claims.put(stored)
    garbage = b"\xff\xd8\xff no picture"
    windows = [kit.window("door", AT + 600_000 * n) for n in range(8)]
    windows[1] = best_frame(windows[1], image=None, claim=claim, sha256=hashlib.sha256(stored).hexdigest())
    windows[2] = best_frame(windows[2], image=None, claim=f"sha256:{'e' * 64}", sha256="e" * 64)
    windows[3] = best_frame(windows[3], image=garbage, sha256=hashlib.sha256(garbage).hexdigest())
    gone = next(record for n, record in enumerate(windows[4]) if n == 2)
    windows[4] = [record for record in windows[4] if record is not gone]
    windows[5] = best_frame(windows[5], image=garbage)  # under the hash of another
    failed = cast("Context", windows[6][-2])
    records = [record for window in windows for record in window]
    plan = Plan(kind="change", change=Change(prompt=STRICTER.digest), windows=8, upto=upto(records))
    again = [judged_again(window, 12) for window in windows[:6]]
    letter = replace(
        examples.dead_letter,
        origin="replay_units:e1:0:6",
        stage="replay",
        key=unit(failed).unit_id.encode(),
        message="three answers were no JSON",
    )
    await put(
        database,
        [
            *records,
            kit.camera("door"),
            *(unit(cast("Context", window[-2])) for window in windows[:7]),
            *again,
            letter,
            step(plan, "running"),
            step(plan, "done", "6 judged, 1 failed", at=AT + 60_000),
            STRICTER.to_record(AT),
        ],
    )

    found = await compare(queries, "live", "stricter")
    report = await gather(queries, claims, found, made_at=AT, time_zone="Europe/Berlin", version="1.2.3")

    assert len(found.flips) == 6
    pictures = [report.pictures[kit.event_id(window)] for window in windows[:6]]
    assert [bool(picture.jpeg) for picture in pictures] == [True, True, False, False, False, False]
    assert {(picture.n, picture.of) for picture in pictures} == {(2, 3)}
    assert [box.label for box in pictures[0].boxes] == ["person"]  # neither the bird nor what stood still
    assert pictures[0].boxes[0].x == pytest.approx(10 / 320)
    assert (pictures[1].width, pictures[1].height) == (320, 180)
    for picture, why in zip(
        pictures[2:],
        (
            "not in the image store any more",
            "cannot be decoded",
            "record of this frame is not kept",
            "not those that its hash names",
        ),
        strict=True,
    ):
        assert why in picture.missing
    assert report.told[kit.event_id(windows[0])].risk_factors == ("night", "loitering")
    assert report.told[again[0].event_id].reasoning == "Deliveries are expected."
    [change] = report.prompts
    assert (change.windows, change.before) == (6, f"default ({DEFAULT.digest[:12]})")
    assert [part.file for part in change.parts] == ["system.txt"]
    [life] = report.lives
    assert (life.state, life.detail, life.calls, life.reused) == ("done", "6 judged, 1 failed", 6, 0)
    assert (life.planned_at, life.first_at) == (AT, AT + 7_000)
    assert life.conditions == {"seed": "7", "slots": "2"}
    assert [(left.what, left.count, left.why, left.names) for left in report.left_out] == [
        ("windows of stricter that could not be judged", 1, "three answers were no JSON", (failed.batch_id,)),
        ("windows that stricter did not judge", 1, "6 judged, 1 failed", (cast("Context", windows[7][-2]).batch_id,)),
    ]
    shown = text(render(report))
    assert "Changed: prompt deliveries-strict-nights, in place of" in shown
    assert "14 Mar" not in shown
    assert "6 of 6 windows changed their level." in shown

    # What the log has lost since, too.
    ask.command("ALTER TABLE log DELETE WHERE topic = 'frames' SETTINGS mutations_sync = 1")
    later = await gather(queries, claims, found, made_at=AT)
    assert "its bytes are not kept any more" in later.pictures[kit.event_id(windows[0])].missing
    assert later.pictures[kit.event_id(windows[1])].jpeg


@pytest.mark.real
async def test_of_a_replay_that_cut_new_windows_the_picture_shows_what_it_saw(
    database: ClickHouseSettings, queries: Queries, tmp_path: Path
) -> None:
    window = kit.window("door", AT)
    context = cast("Context", window[-2])
    # The other detector is sure of the car in the last frame, and sees nobody.
    frames = tuple(
        replace(frame, boxes=(SeenBoxRecord(**kit.CAR | {"score": 0.5 + n / 10}, stationary=False),))
        for n, frame in enumerate(context.batch.frames)
    )
    seen = replace(context, batch=replace(context.batch, frames=frames))
    plan = Plan(kind="change", change=Change(detector="rtdetr_v2_r101vd"), windows=1)
    camera = kit.camera("door")
    camera = replace(camera, window=replace(camera.window, open_on=("person", "car")))
    await put(database, [*window, camera, unit(seen), judged_again(window, 12), step(plan)])

    found = await compare(queries, "live", "stricter")
    report = await gather(queries, ClaimStore(str(tmp_path)), found, made_at=AT)

    [picture] = report.pictures.values()
    assert (picture.n, picture.seen_by, [box.label for box in picture.boxes]) == (3, "stricter", ["car"])


@pytest.mark.real
async def test_an_image_store_that_is_away_leaves_its_pictures_out_alone(
    database: ClickHouseSettings, queries: Queries
) -> None:
    window = best_frame(kit.window("door", AT), image=None, claim=f"sha256:{'e' * 64}", sha256="e" * 64)
    plan = Plan(kind="change", change=Change(prompt=STRICTER.digest), windows=1)
    await put(database, [*window, kit.camera("door"), judged_again(window, 12), step(plan)])

    class Away(ClaimStore):
        async def get(self, claim: str, sha256: str) -> bytes:
            raise UnavailableError("images", "cannot read s3://pictures (images): no route")

    found = await compare(queries, "live", "stricter")
    report = await gather(queries, Away("s3://pictures"), found, made_at=AT)
    [picture] = report.pictures.values()
    assert picture.missing == "No picture of this frame: the image store could not be reached."

"""The gateway's source on the real ClickHouse engine and the real broker: what is shown is what was stored."""

import asyncio
import base64
import hashlib
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from infra.config import Settings
from processors.gateway.models import NewLabel, Step
from processors.gateway.ports import InvalidError, NotFoundError
from processors.gateway.reads import Reads
from processors.gateway.source import StoredSource
from processors.store.queries import Queries
from schemas import ids, records
from schemas.records import Label as LabelRecord
from streams import codec
from streams.claims import ClaimStore
from streams.delivery import FencedProducer
from streams.errors import UnavailableError, UncertainError
from streams.kafka import Kafka
from streams.liveness import Liveness
from streams.topics import partition_of
from tests.conftest import PARTITIONS
from tests.processors import gateway_kit as kit
from tests.processors.gateway_kit import AT, EPOCH, camera, event_id, moment, window

pytestmark = pytest.mark.real

HOUR = 3_600_000
LONG_AGO, FAR_OFF = datetime.fromisoformat("0001-01-01T00:00"), datetime.fromisoformat("9999-12-31T23:59")


@pytest.fixture
def mine(settings: Settings) -> Settings:
    return kit.own_database(settings)


@pytest.fixture
async def source(mine: Settings):
    async with kit.source_of(mine) as made:
        yield made


async def test_pages_follow_one_another_without_a_hole_or_a_double(mine: Settings, source: StoredSource) -> None:
    # Five at the very same time: the id decides between them.
    windows = [window(f"cam-{n}", AT) for n in range(5)] + [window("cam-0", AT + n * HOUR) for n in range(1, 4)]
    await kit.store(mine, [record for made in windows for record in made])
    seen: list[str] = []
    before = None
    while True:
        page = await source.events(before=before, limit=3)
        seen += [event.event_id for event in page.events]
        before = page.next
        if before is None:
            break
        assert len(page.events) == 3
    assert sorted(seen) == sorted(event_id(made) for made in windows)
    whole = await source.events(limit=50)
    assert [event.event_id for event in whole.events] == seen
    assert whole.next is None
    starts = [event.started_at for event in whole.events]
    assert starts == sorted(starts, reverse=True)


async def test_events_are_narrowed(mine: Settings, source: StoredSource) -> None:
    scores = {"low": 12, "medium": 45, "high": 72, "critical": 97}
    made = {level: window("front", AT + n * HOUR, score=scores[level]) for n, level in enumerate(scores)}
    await kit.store(mine, [record for records in made.values() for record in records] + window("back", AT))

    async def found(**narrowed) -> set[str]:
        return {event.event_id for event in (await source.events(**narrowed)).events}

    front = {level: event_id(records) for level, records in made.items()}
    assert await found(camera="front") == set(front.values())
    assert await found(camera="front", level="high") == {front["high"], front["critical"]}
    assert await found(camera="front", since=moment(AT + HOUR), until=moment(AT + 3 * HOUR)) == {
        front["medium"],
        front["high"],
    }
    assert await found(camera="nobody") == set()


@pytest.mark.parametrize("before", ["x", "WzEsMl0", "bnVsbA", "!", base64.b64encode(b"[[" * 3000).decode(), "W10"])
async def test_a_cursor_that_was_not_given_out_is_refused(source: StoredSource, before: str) -> None:
    with pytest.raises(InvalidError, match="given out"):
        await source.events(before=before)


async def test_a_summary_has_names_and_the_surest_frame_that_is_news(mine: Settings, source: StoredSource) -> None:
    # The car is surer, but nobody opens windows for cars here.
    await kit.store(mine, [camera("front"), *window("front", AT)])
    [event] = (await source.events()).events
    surest = hashlib.sha256(kit.image("front", AT, 1)).hexdigest()
    assert event.cover == f"/api/images/front/{surest}.jpg"
    assert (event.camera_name, event.time_zone, event.frames) == ("Front", "Europe/Berlin", 3)
    assert (event.started_at, event.ended_at) == (moment(AT), moment(AT + 2000))
    assert event.label is None


async def test_what_the_sink_has_not_brought_yet_is_shown_once_it_is_there(
    mine: Settings, source: StoredSource
) -> None:
    made = window("front", AT)
    await kit.store(mine, made[-1:])
    [event] = (await source.events()).events
    assert (event.cover, event.camera_name) == (None, "front")
    detail = await source.event(event.event_id)
    assert [frame.image for frame in detail.frame_views] == [None] * 3
    await kit.store(mine, made[:-1])
    [event] = (await source.events()).events
    assert event.cover is not None
    assert event.camera_name == "Front"


async def test_an_event_is_shown_whole(mine: Settings, source: StoredSource) -> None:
    made = window("front", AT)
    later = camera("front", at=AT + HOUR)
    later = msgspec.structs.replace(later, window=msgspec.structs.replace(kit.WINDOW, open_on=("bird",)))
    prompt = kit.PROMPT.to_record(AT)
    await kit.store(mine, [camera("front"), later, prompt, *made])
    event = await source.event(event_id(made))
    assert event.prompt_name == "default"
    assert event.parameters == {"temperature": 0}
    assert [section.name for section in event.context] == ["zones"]
    assert [frame.n for frame in event.frame_views] == [1, 2, 3]
    first = event.frame_views[0]
    assert (first.at, first.width, first.height, first.source_name) == (moment(AT), 320, 240, "0.jpg")
    # News by the settings that the window was made with, not by those of today; what stood still is none.
    assert [(box.label, box.matters) for box in first.boxes] == [
        ("person", True),
        ("car", False),
        ("person", False),
        ("bird", False),
    ]


async def test_the_lineage_leads_from_the_verdict_to_each_frames_bytes(mine: Settings, source: StoredSource) -> None:
    made = window("front", AT)
    await kit.store(mine, made)
    steps: list[Step] = []
    todo = [(await source.event(event_id(made))).lineage]
    while todo:
        steps.append(todo.pop(0))
        todo += steps[-1].made_from
    assert [step.topic for step in steps] == [
        "risk_events",
        "contexts",
        "batches",
        *["detections"] * 3,
        *["frames"] * 3,
    ]
    partition = partition_of("front", PARTITIONS)
    assert steps[0].position == f"risk_events-{partition}@0 {EPOCH[:4]}"
    frames = [record for record in made if isinstance(record, records.Frame)]
    assert [step.facts["sha256"] for step in steps[-3:]] == [frame.sha256 for frame in frames]
    assert [step.position for step in steps[-3:]] == [f"frames-{partition}@{n} {EPOCH[:4]}" for n in range(3)]
    assert steps[5].title == "detections 3 (late)"


async def test_events_have_their_neighbours_on_their_camera(mine: Settings, source: StoredSource) -> None:
    # Two at the very same time: the id decides between them, as in lists.
    same = sorted((window("front", AT, frames=n) for n in (2, 3)), key=event_id)
    road = [window("front", AT - 40 * 24 * HOUR), *same, window("front", AT + 90 * 24 * HOUR)]
    await kit.store(mine, [*window("back", AT), *(record for made in road for record in made)])
    ids_ = [event_id(made) for made in road]
    for name, wanted in zip(ids_, zip([None, *ids_], [*ids_[1:], None], strict=False), strict=True):
        beside = await source.beside(await source.event(name))
        assert tuple(near and near.event_id for near in beside) == wanted


async def test_an_event_is_found_by_the_beginning_of_its_id(mine: Settings, source: StoredSource) -> None:
    one, other = window("front", AT), window("front", AT + HOUR)
    await kit.store(mine, one + other)
    name = event_id(one)
    assert (await source.event(name[:14])).event_id == name
    with pytest.raises(NotFoundError, match="beginning of several"):
        await source.event("front:")
    with pytest.raises(NotFoundError, match=f"near it: {name}"):
        await source.event(name.replace("live", "life"))
    for odd in ("", "'", "\\", "%", "front:\x00", "ü" * 300, "{id:String}"):
        with pytest.raises(NotFoundError):
            await source.event(odd + "?")


async def test_images_come_from_their_record_or_from_the_image_store(mine: Settings, source: StoredSource) -> None:
    large = b"\xff\xd8" + bytes(70_000)
    claim = await ClaimStore(mine.images_root).put(large)
    sha = claim.removeprefix("sha256:")
    await kit.store(mine, window("front", AT, claim=sha))
    assert await source.image("front", sha) == large
    inline = kit.image("front", AT, 1)
    assert await source.image("front", hashlib.sha256(inline).hexdigest()) == inline


async def test_an_image_is_shown_of_the_camera_that_took_it_alone(mine: Settings, source: StoredSource) -> None:
    stranger = await ClaimStore(mine.images_root).put(b"not a frame of anybody")
    await kit.store(mine, window("front", AT) + window("back", AT))
    sha = hashlib.sha256(kit.image("front", AT, 0)).hexdigest()
    for name, wanted in (("back", sha), ("front", stranger.removeprefix("sha256:")), ("fron", sha)):
        with pytest.raises(NotFoundError, match="has no frame"):
            await source.image(name, wanted)


async def test_an_image_that_is_not_kept_any_more_is_not_there(mine: Settings, source: StoredSource) -> None:
    await kit.store(mine, window("front", AT, claim="0" * 64))
    with pytest.raises(NotFoundError, match="not kept any more"):
        await source.image("front", "0" * 64)


async def test_cameras_are_those_that_were_set_and_those_that_sent(mine: Settings, source: StoredSource) -> None:
    now = int(datetime.now(UTC).timestamp() * 1000)
    await kit.store(mine, [camera("quiet"), *window("front", now - 10_000), *window("back", now - 10 * HOUR)])
    cards = {card.camera_id: card for card in await source.cameras()}
    assert [card.name for card in await source.cameras()] == ["back", "front", "Quiet"]
    assert (cards["quiet"].last_frame_at, cards["quiet"].silent) == (None, True)
    assert (cards["front"].frames_24h, cards["front"].events_24h, cards["front"].top_level_24h) == (3, 1, "high")
    assert not cards["front"].silent
    assert cards["back"].silent
    newest = hashlib.sha256(kit.image("front", now - 10_000, 2)).hexdigest()
    assert cards["front"].last_image == f"/api/images/front/{newest}.jpg"
    assert cards["front"].last_frame_at == moment(now - 8_000 + 50)


async def test_names_are_those_of_the_same_cameras(mine: Settings, source: StoredSource) -> None:
    await kit.store(mine, [camera("quiet"), camera("front"), *window("front", AT), *window("back", AT)])
    names = await source.camera_names()
    assert [(n.camera_id, n.name, n.time_zone) for n in names] == [
        ("back", "back", "UTC"),
        ("front", "Front", "Europe/Berlin"),
        ("quiet", "Quiet", "Europe/Berlin"),
    ]
    assert [card.camera_id for card in await source.cameras()] == ["back", "front", "quiet"]


async def test_what_was_played_in_was_taken_when_it_was_taken(mine: Settings, source: StoredSource) -> None:
    now = int(datetime.now(UTC).timestamp() * 1000)
    old, older = (msgspec.structs.replace(window("front", AT - n * HOUR)[0], arrived_at=now) for n in (0, 1))
    ahead = msgspec.structs.replace(window("back", AT)[0], captured_at=AT, arrived_at=AT - HOUR)
    await kit.store(mine, [old, older, ahead])
    cards = {card.camera_id: card for card in await source.cameras()}
    assert (cards["front"].last_frame_at, cards["front"].last_taken_at) == (moment(now), moment(AT))
    assert cards["back"].last_taken_at == moment(AT - HOUR)  # its clock runs ahead


async def test_cards_do_not_read_every_frame(mine: Settings) -> None:
    await kit.store(mine, window("front", AT))
    asked: list[str] = []

    class Listening(Queries):
        async def rows(self, query: str, **parameters):
            asked.append(query)
            return await super().rows(query, **parameters)

    async with aclosing(Listening(mine.clickhouse)) as queries:
        reads = Reads(queries)
        await asyncio.gather(
            reads.newest_frames(), reads.newest_frames("front"), reads.camera_names(), queries.models()
        )
        for query in [query for query in asked if "frames" in query or "detections" in query]:
            plan = "\n".join(row["explain"] for row in await queries.rows(f"EXPLAIN {query}", camera=""))
            assert "ReadFromMergeTree (newest)" in plan, query
            assert ".frames)" not in plan, query
            assert ".detections)" not in plan, query


async def test_cards_are_right_when_rows_came_twice_and_were_folded(mine: Settings, source: StoredSource) -> None:
    now = int(datetime.now(UTC).timestamp() * 1000)
    made = window("front", now - 10_000)
    await kit.store(mine, made)
    before = await source.cameras()
    await kit.store(mine, made, epoch="f" * 8)  # on the log again: the same ids
    assert [card.frames_24h for card in await source.cameras()] == [3]
    async with aclosing(Queries(mine.clickhouse)) as queries:
        await queries.rows("OPTIMIZE TABLE frames FINAL")
        [row] = await queries.rows("SELECT count() AS frames FROM frames")
    assert row["frames"] == 3
    assert await source.cameras() == before


async def test_a_camera_that_sends_once_an_hour_is_not_silent_after_two(mine: Settings, source: StoredSource) -> None:
    now = int(datetime.now(UTC).timestamp() * 1000)
    frames = [window("slow", now - n * HOUR, frames=1)[0] for n in range(2, 8)]
    await kit.store(mine, frames)
    [card] = await source.cameras()
    assert not card.silent


async def test_a_day_has_its_hours_events_and_gaps(mine: Settings, source: StoredSource) -> None:
    windows = [window("front", AT + minute * 60_000, frames=2) for minute in (0, 2, 4, 30, 70)]
    await kit.store(mine, [camera("front"), *(record for made in windows for record in made)])
    day = await source.timeline("front", moment(AT - HOUR), moment(AT + 3 * HOUR))
    assert [hour.hour for hour in day.hours] == [moment(AT + n * HOUR) for n in (-1, 0, 1, 2)]
    assert [(hour.frames, hour.windows, hour.events) for hour in day.hours] == [
        (0, 0, 0),
        (8, 4, 4),
        (2, 1, 1),
        (0, 0, 0),
    ]
    # At or above the camera's threshold of 0.5: the bird is not counted.
    assert day.hours[1].detections == {"person": 16, "car": 8}
    assert [hour.top_level for hour in day.hours] == [None, "high", "high", None]
    assert [event.event_id for event in day.events] == [event_id(made) for made in reversed(windows)]
    minutes = [((g.started_at - moment(AT)).total_seconds() / 60, g.ended_at) for g in day.gaps]
    # The camera's time began with its first frame, so the hour before is none.
    assert [round(start) for start, _ in minutes] == [4, 30, 70]
    assert minutes[-1][1] == moment(AT + 3 * HOUR)
    assert day.gaps[0].ended_at == moment(AT + 30 * 60_000)


async def test_a_gap_reaches_into_the_span_and_lasts_until_now(mine: Settings, source: StoredSource) -> None:
    now = datetime.now(UTC)
    await kit.store(mine, window("front", int(now.timestamp() * 1000) - 10 * HOUR))
    since = now - timedelta(hours=2)
    day = await source.timeline("front", since, now + timedelta(hours=1))
    [gap] = day.gaps
    assert (gap.started_at, gap.ended_at) == (since, None)


async def test_spans_that_are_none_are_refused(mine: Settings, source: StoredSource) -> None:
    await kit.store(mine, [camera("front")])
    for since, until in (
        (moment(AT), moment(AT)),
        (moment(AT), moment(AT - 1)),
        (moment(AT), moment(AT) + timedelta(days=32)),
        (LONG_AGO, FAR_OFF),
        (datetime(1, 1, 1, tzinfo=UTC), datetime(1, 1, 2, tzinfo=UTC)),
    ):
        with pytest.raises(InvalidError):
            await source.timeline("front", since, until)
    with pytest.raises(NotFoundError, match="there are front"):
        await source.timeline("fron", moment(AT), moment(AT + HOUR))


async def labels_on_the_log(settings: Settings, camera_id: str) -> list[LabelRecord]:
    kafka = Kafka(settings.kafka)
    tp = kit.partition("labels", partition_of(camera_id, PARTITIONS))
    found = [codec.decode(record, LabelRecord) for record in await kafka.read([tp])]
    return [label for label in found if label.camera_id == camera_id]


async def test_a_label_is_on_the_log_once_and_seen_at_once(mine: Settings, source: StoredSource) -> None:
    name = f"cam-{ids.digest(mine.clickhouse.database)[:8]}"
    made = window(name, AT)
    await kit.store(mine, made)
    assert (await source.events()).events[0].label is None
    given = await source.label(NewLabel(verdict="false_alarm", event_id=event_id(made), note="the post"))
    [written] = await labels_on_the_log(mine, name)
    assert (written.label_id, written.verdict, written.note) == (given.label_id, "false_alarm", "the post")
    assert (written.started_at, written.ended_at, written.event_id) == (AT, AT + 2000, event_id(made))
    # The sink has not stored it: whoever gave it sees it all the same, everywhere.
    assert (await source.events()).events[0].label == "false_alarm"
    assert [label.label_id for label in (await source.event(event_id(made))).labels] == [given.label_id]
    day = await source.timeline(name, moment(AT - HOUR), moment(AT + HOUR))
    assert [label.label_id for label in day.labels] == [given.label_id]
    await kit.store(mine, [written])
    assert [label.label_id for label in (await source.event(event_id(made))).labels] == [given.label_id]
    # Pressed twice it is one; another verdict is another, and the newest counts.
    again = await source.label(NewLabel(verdict="false_alarm", event_id=event_id(made), note="the post"))
    assert again == given
    await source.label(NewLabel(verdict="true_alarm", event_id=event_id(made)))
    assert (await source.events()).events[0].label == "true_alarm"
    assert len(await labels_on_the_log(mine, name)) == 2


@pytest.mark.parametrize("committed", [True, False])
async def test_a_label_whose_fate_was_unknown_is_on_the_log_once(
    mine: Settings, source: StoredSource, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    name = f"cam-{ids.digest(mine.clickhouse.database)[:8]}"
    await kit.store(mine, made := window(name, AT))
    tries = 0

    class Unsure(FencedProducer):
        async def transact(self, emits, **options):
            nonlocal tries
            tries += 1
            if tries > 1:
                return await super().transact(emits, **options)
            if committed:
                await super().transact(emits, **options)
            raise UncertainError("no answer")

    monkeypatch.setattr("streams.labels.FencedProducer", Unsure)
    given = await source.label(NewLabel(verdict="true_alarm", event_id=event_id(made)))
    assert [label.label_id for label in await labels_on_the_log(mine, name)] == [given.label_id]
    assert tries == (1 if committed else 2)


async def test_labels_given_at_once_are_all_there(mine: Settings, source: StoredSource) -> None:
    name = f"cam-{ids.digest(mine.clickhouse.database)[:8]}"
    windows = [window(name, AT + n * HOUR) for n in range(4)]
    await kit.store(mine, [record for made in windows for record in made])
    async with kit.source_of(mine) as other:  # a second gateway of the same installation
        await asyncio.gather(
            *(
                gateway.label(NewLabel(verdict="true_alarm", event_id=event_id(made), author=author))
                for made in windows
                for gateway, author in ((source, "one"), (other, "two"))
            )
        )
    written = await labels_on_the_log(mine, name)
    assert len(written) == len({label.label_id for label in written}) == 8


async def test_a_missed_alarm_is_a_span_of_a_camera(mine: Settings, source: StoredSource) -> None:
    name = f"cam-{ids.digest(mine.clickhouse.database)[:8]}"
    made = window(name, AT)
    await kit.store(mine, made)
    span = {"camera_id": name, "started_at": moment(AT), "ended_at": moment(AT + 1500)}
    given = await source.label(NewLabel(verdict="missed", **span))
    assert (given.event_id, given.started_at) == (None, moment(AT))
    # It covers more than half of that event's time, so it is shown with it.
    assert [label.label_id for label in (await source.event(event_id(made))).labels] == [given.label_id]
    assert (await source.events()).events[0].label is None


@pytest.mark.parametrize(
    "new",
    [
        NewLabel(verdict="true_alarm"),
        NewLabel(verdict="missed", event_id="front:x:live"),
        NewLabel(verdict="missed", camera_id="front"),
        NewLabel(verdict="true_alarm", camera_id="front", started_at=moment(AT), ended_at=moment(AT)),
        NewLabel(verdict="true_alarm", event_id="front:x:live", camera_id="front"),
        NewLabel(verdict="missed", camera_id="front", started_at=moment(AT), ended_at=moment(AT - 1)),
        NewLabel(verdict="missed", camera_id="front", started_at=LONG_AGO, ended_at=FAR_OFF),
    ],
)
async def test_a_label_that_names_no_span_is_refused(mine: Settings, source: StoredSource, new: NewLabel) -> None:
    await kit.store(mine, [camera("front")])
    with pytest.raises(InvalidError):
        await source.label(new)


async def test_a_label_on_nothing_is_refused(mine: Settings, source: StoredSource) -> None:
    await kit.store(mine, [camera("front")])
    with pytest.raises(NotFoundError):
        await source.label(NewLabel(verdict="true_alarm", event_id="front:none:live"))
    with pytest.raises(NotFoundError):
        await source.label(NewLabel(verdict="missed", camera_id="back", started_at=moment(AT), ended_at=moment(AT)))


async def test_health_tells_of_log_and_store_at_once(mine: Settings, source: StoredSource) -> None:
    await kit.store(mine, window("front", AT))
    health = await source.health()
    assert health.problems == ()
    topics = {topic.topic: topic for topic in health.topics}
    assert topics["frames"].in_clickhouse == 3
    assert topics["frames"].records is not None
    assert (health.detector, health.analyst) == ("rtdetr", "nemotron-demo")
    stages = {stage.stage: stage for stage in health.stages}
    assert stages["detect"].latency_p50_ms == 50.0
    assert stages["analyze"].latency_p50_ms == 2950.0
    assert await source.health() is health  # not older than two seconds


async def test_models_are_toys_by_their_weights_whatever_their_names(mine: Settings) -> None:
    records = window("front", AT)
    await kit.store(mine, records)
    # The verdict's own, not the detector's.
    async with kit.source_of(mine, toys={records[-1].model_digest}) as source:
        assert (await source.health()).toys == ("analyst",)
        assert (await source.event(event_id(records))).toy
    async with kit.source_of(mine, toys={"0" * 64}) as source:
        assert (await source.health()).toys == ()
        assert not (await source.event(event_id(records))).toy


async def test_a_stage_that_should_be_at_work_here_and_is_not_is_a_problem(mine: Settings) -> None:
    status = Path(mine.data_dir) / "status" / "detect.json"
    alive = Liveness("detect")
    alive.write(status)
    await kit.store(mine, [camera("front")])
    async with kit.source_of(mine, expected=lambda: {"detect": "detect.log", "sink": "sink.log"}) as source:
        health = await source.health()
    status.unlink()
    assert [problem.service for problem in health.problems] == ["sink"]
    assert "sink.log" in health.problems[0].message
    assert health.status == "degraded"


async def test_health_names_what_is_away_and_the_fix(mine: Settings) -> None:
    nobody = mine.model_copy(
        update={
            "clickhouse": mine.clickhouse.model_copy(update={"url": "http://127.0.0.1:9"}),
            "kafka": mine.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9"}),
        }
    )
    async with kit.source_of(nobody) as source:
        health = await source.health()
        assert health.status == "degraded"
        told = {problem.service: problem.message for problem in health.problems}
        assert "kafka.bootstrap_servers" in told["broker"]
        assert "clickhouse.url" in told["clickhouse"]
        with pytest.raises(UnavailableError, match=r"clickhouse\.url"):
            await source.events()


async def test_without_tables_everything_says_what_makes_them(mine: Settings, source: StoredSource) -> None:
    with pytest.raises(UnavailableError, match="rewatch migrate"):
        await source.events()
    assert "rewatch migrate" in (await source.health()).problems[0].message


async def test_a_label_without_a_broker_is_refused_as_not_there(mine: Settings) -> None:
    await kit.store(mine, made := window("front", AT))
    nobody = mine.model_copy(update={"kafka": mine.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9"})})
    async with kit.source_of(nobody) as source:
        with pytest.raises(UnavailableError, match=r"kafka\.bootstrap_servers"):
            await source.label(NewLabel(verdict="true_alarm", event_id=event_id(made)))
        assert (await source.events()).events[0].label is None

"""A replay of a history that only ClickHouse has: a broker that knows nothing of it, and a past that was not kept well.

Two lives of its topics, more partitions than there are now, a camera renamed and one removed, records of every version
of every schema, bytes that were damaged before and after they were stored, prompts that no broker remembers, images in
their records and in the store. What is there is judged; what is not is named.
"""

import asyncio
import hashlib
import io
import json
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from anyio.from_thread import start_blocking_portal
from PIL import Image

from infra.config import Settings
from infra.installation import Installation
from infra.replays import office
from processors.replay import desk
from processors.sink.stage import SinkStage
from processors.sink.store import ClickHouseStore
from processors.store.queries import Queries, Row
from schemas import ids, prompts
from schemas.prompts import PromptVersion
from schemas.records import Camera, Context, Frame, Record, RiskEvent
from streams import codec
from streams.claims import ClaimStore
from streams.kafka import Kafka
from streams.messages import Incoming, Tick
from streams.stages import Range
from streams.topics import STORED
from tests import examples
from tests.e2e.installation import settings_for
from tests.infra.cli_kit import answer
from tests.processors.batch_kit import T0, box, seen
from tests.processors.cut_kit import Past
from tests.schemas import recorded

pytestmark = [pytest.mark.real, pytest.mark.chaos]

FIRST, SECOND = "11aa11aa", "22bb22bb"
"""Two lives of the topics; the broker that runs knows neither."""

FRONT, YARD, HALL = "cam-1", "cam-2", "cam-3"
FRONT_AT, YARD_AT, HALL_AT = 1, 9, 6
"""Their partitions then. The broker that runs has four."""

AT = examples.AT


def picture(camera: str, number: int, n: int) -> bytes:
    """A frame of a window, JPEG: each of another colour."""
    red, green, blue = hashlib.sha256(f"{camera} {number} {n}".encode()).digest()[:3]
    out = io.BytesIO()
    Image.new("RGB", (640, 360), (red, green, blue)).save(out, "JPEG")
    return out.getvalue()


def shot(context: Context, number: int, n: int, *, claimed: bool) -> Frame:
    """The record of a window's frame, its image inside or in the store."""
    data = picture(context.camera_id, number, n)
    sha256 = hashlib.sha256(data).hexdigest()
    return msgspec.structs.replace(
        examples.frame,
        frame_id=context.batch.frames[n].frame_id,
        camera_id=context.camera_id,
        sha256=sha256,
        size=len(data),
        captured_at=context.batch.frames[n].event_at,
        arrived_at=context.batch.frames[n].event_at + 500,
        image=None if claimed else data,
        claim=f"sha256:{sha256}" if claimed else None,
    )


def window(camera: str, number: int, name: str) -> Context:
    """A window of a person and a car; each number is another time."""
    at = AT + number * 600_000
    [frame] = examples.batch.frames
    frames = tuple(
        msgspec.structs.replace(
            frame,
            frame_id=ids.frame_id(camera, hashlib.sha256(picture(camera, number, n)).hexdigest(), at + n * 1000),
            event_at=at + n * 1000,
            offset=n,
        )
        for n in range(3)
    )
    batch = msgspec.structs.replace(
        examples.batch,
        batch_id=ids.batch_id(camera, [one.frame_id for one in frames]),
        camera_id=camera,
        started_at=at,
        ended_at=at + 2000,
        frames=frames,
    )
    return msgspec.structs.replace(
        examples.context, batch_id=batch.batch_id, camera_id=camera, batch=batch, camera_name=name, sections=()
    )


def event(context: Context, prompt_digest: str) -> RiskEvent:
    """What live work said of it then, by a model whose weights nobody could read."""
    return msgspec.structs.replace(
        examples.risk_event,
        event_id=ids.event_id(context.batch_id),
        batch_id=context.batch_id,
        camera_id=context.camera_id,
        started_at=context.batch.started_at,
        ended_at=context.batch.ended_at,
        frame_ids=tuple(frame.frame_id for frame in context.batch.frames),
        prompt_digest=prompt_digest,
        model_digest="",
        judged_at=context.batch.ended_at + 3000,
    )


def camera(camera_id: str, name: str, at: int) -> Camera:
    return msgspec.structs.replace(examples.camera, camera_id=camera_id, name=name, updated_at=at)


def forgotten_prompt() -> PromptVersion:
    """A version that nobody has but ClickHouse."""
    texts = prompts.default().to_files()
    texts["system.txt"] += "\nA version of long ago."
    return PromptVersion.from_texts(texts, "long-ago")


PLAIN, LONG_AGO = prompts.default(), forgotten_prompt()
GHOST = "9" * 32
"""A version that is nowhere any more."""

SHARPER = 0.7
"""A threshold that leaves some of what was seen out."""


def in_the_hall(life: str, start: int, *, threshold: float) -> Past:
    """What the detector saw in one life of its topic, and the windows that this threshold makes of it.

    A person is there for ten seconds, seen more surely with each; a record is torn; another comes later.
    """
    hall = camera(HALL, "Hall", T0 - 1000)
    hall = msgspec.structs.replace(hall, window=msgspec.structs.replace(hall.window, threshold=threshold))
    items = [seen(start + n, T0 + (start + n) * 1000, box(90 * n, score=0.5 + n / 40), camera=HALL) for n in range(10)]
    torn = Incoming("detections", "", 0, 0, HALL.encode(), b"\x00torn", ())
    late = seen(start + 60, T0 + (start + 60) * 1000, box(score=0.85), camera=HALL)
    end = Tick(T0 + (start + 100) * 1000, HALL)
    return Past([*items[:5], torn, *items[5:], late, end], lambda *_: hall, epoch=life, partition=HALL_AT)


# Numbers are times: those of the second life are later, but for the one that was recorded in both.
GOOD, ODD, ROTTEN = (window(FRONT, n, "Front") for n in (0, 1, 3))
UNJUDGED = window(YARD, 2, "Yard")
RENAMED, LOST = (window(FRONT, n, "Gate") for n in (5, 6))
OLDEST = examples.context
"""Of the version of the schema that the recorded bytes are of."""


class Site(NamedTuple):
    """Where it is."""

    settings: Settings

    def do(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: str) -> None:
        """Have it done there."""
        asyncio.run(work(self.settings, *arguments))

    def rows(self, query: str, **parameters: Any) -> list[Row]:
        """Of ClickHouse."""

        async def ask() -> list[Row]:
            store = Queries(self.settings.clickhouse)
            try:
                return await store.rows(query, **parameters)
            finally:
                await store.aclose()

        return asyncio.run(ask())


def put(topic: str, life: str, partition: int, offset: int, record: Record | bytes) -> Incoming:
    """A record as the sink was given it; bytes are those of a camera whose record was torn."""
    if isinstance(record, bytes):
        return Incoming(topic, life, partition, offset, FRONT.encode(), record, ())
    made = codec.emit(topic, record)
    return Incoming(topic, life, partition, offset, made.key, made.value, made.headers)


def history() -> list[Incoming]:
    """Everything that the sink was given, in the order in which it came."""
    torn = codec.encode("contexts", window(FRONT, 2, "Front"))[0][:-9]
    version = LONG_AGO.to_record(AT, "of long ago")
    first = [
        put("cameras", FIRST, 0, 0, camera(FRONT, "Front", AT - 1000)),
        put("cameras", FIRST, 0, 1, camera(YARD, "Yard", AT - 1000)),
        put("cameras", FIRST, 0, 2, camera(FRONT, "Gate", AT + 4 * 600_000)),
        put("cameras", FIRST, 0, 3, camera(HALL, "Hall", T0 - 1000)),
        put("prompts", FIRST, 0, 0, version),
        put("contexts", FIRST, FRONT_AT, 0, GOOD),
        put("contexts", FIRST, FRONT_AT, 1, ODD),
        put("contexts", FIRST, FRONT_AT, 2, torn),
        put("contexts", FIRST, FRONT_AT, 7, ROTTEN),
        put("contexts", FIRST, YARD_AT, 0, UNJUDGED),
        put("risk_events", FIRST, FRONT_AT, 0, event(GOOD, PLAIN.digest)),
        put("risk_events", FIRST, FRONT_AT, 1, event(ODD, LONG_AGO.digest)),
        put("risk_events", FIRST, FRONT_AT, 7, event(ROTTEN, PLAIN.digest)),
    ]
    second = [
        # The topics were made anew: the same offsets again, and a window that was made again.
        put("contexts", SECOND, FRONT_AT, 0, RENAMED),
        put("contexts", SECOND, FRONT_AT, 1, LOST),
        put("contexts", SECOND, FRONT_AT, 2, ODD),
        put("risk_events", SECOND, FRONT_AT, 0, event(RENAMED, GHOST)),
        put("risk_events", SECOND, FRONT_AT, 1, event(LOST, PLAIN.digest)),
    ]
    # Images inside their records, in the store, and in a store that has lost them.
    kept = [(GOOD, 0, False), (ODD, 1, True), (RENAMED, 5, True)]
    shots = [shot(context, number, n, claimed=claimed) for context, number, claimed in kept for n in range(3)]
    first += [put("frames", FIRST, FRONT_AT, offset, record) for offset, record in enumerate(shots)]
    # Of the hall only what the detector saw is left.
    first += in_the_hall(FIRST, 0, threshold=SHARPER).log
    second += in_the_hall(SECOND, 1000, threshold=SHARPER).log
    old = [
        recorded.load(topic, version).incoming._replace(offset=version)
        for topic, version in recorded.versions()
        if topic in STORED
    ]
    return first + second + old


async def keep(settings: Settings, records: Sequence[Incoming]) -> None:
    """In ClickHouse, as the sink puts them there; then damage some of it."""
    store = ClickHouseStore(settings.clickhouse)
    await store.migrate()
    sink = SinkStage(store)
    for topic, life, partition in dict.fromkeys((r.topic, r.epoch, r.partition) for r in records):
        part = [r for r in records if (r.topic, r.epoch, r.partition) == (topic, life, partition)]
        await sink.insert(Range(topic, life, partition, part[0].offset, part[-1].offset), part)
    client = await store.connection.client()
    # Both were well when they were stored, and have their rows.
    await client.command(
        "INSERT INTO log (topic, epoch, partition, offset, key, value) "
        f"VALUES ('contexts', '{FIRST}', {FRONT_AT}, 7, '{FRONT}', 'rotten')"
    )
    await client.command(f"DELETE FROM log WHERE topic = 'contexts' AND epoch = '{SECOND}' AND offset = 1")
    await store.close()
    for n in range(3):
        await ClaimStore(settings.images_root).put(picture(FRONT, 1, n))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A new broker, and a ClickHouse that has been there for long."""
    with pytest.MonkeyPatch.context() as environment:
        directory: Path = tmp_path_factory.mktemp("past")
        settings = settings_for(directory, environment)
        installation = Installation(settings, only=("sink", "replay"))
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(installation):
            portal.call(keep, settings, history())
            yield Site(settings)


NAMED = {
    ids.origin("contexts", FIRST, FRONT_AT, 2): "not a record of contexts",
    ROTTEN.batch_id: "not in Confluent's framing",
    LOST.batch_id: "not in ClickHouse any more",
}
"""What cannot be read, and a part of why."""


def says(told: dict[str, str], expected: dict[str, str]) -> None:
    assert told.keys() == expected.keys()
    assert {name: why for name, why in told.items() if expected[name] not in why} == {}


def test_a_plan_counts_what_is_there_and_names_what_cannot_be_read(site: Site) -> None:
    plan = answer("replay", "plan", "--prompt", "default")
    assert (plan["windows"], plan["left_out"]) == (5, 3)
    says(plan["why_left_out"], NAMED)
    only = answer("replay", "plan", "--prompt", "default", "--camera", YARD)
    assert (only["windows"], only["why_left_out"]) == (1, {})


def test_a_run_judges_what_is_there_and_names_what_cannot_be_read(site: Site) -> None:
    told = answer("replay", "run", "--prompt", "default", "--name", "again", "--baseline", "0")
    assert (told["state"], told["judged"], told["failed"], told["left_out"]) == ("done", 5, 0, 3)
    says(told["why_left_out"], NAMED)
    rows = site.rows(
        "SELECT batch_id, rendered_prompt FROM replay_events FINAL WHERE replay_id = {replay:String}",
        replay=told["replay_id"],
    )
    asked = {row["batch_id"]: json.loads(row["rendered_prompt"])[-1]["content"] for row in rows}
    assert asked.keys() == {context.batch_id for context in (GOOD, ODD, UNJUDGED, RENAMED, OLDEST)}
    # A camera is told of by the name that it had then.
    names = {name: asked[one.batch_id] for name, one in {"front": GOOD, "gate": RENAMED, "yard": UNJUDGED}.items()}
    assert [name for name, text in names.items() if f"camera: {name}" not in text] == []


def test_without_a_change_each_window_gets_the_prompt_of_then_also_one_that_only_clickhouse_remembers(
    site: Site,
) -> None:
    told = answer("replay", "run", "--name", "noise")
    assert (told["state"], told["judged"], told["failed"]) == ("done", 2, 0)
    says(
        told["why_left_out"],
        NAMED
        | {
            UNJUDGED.batch_id: "no live verdict to repeat",
            RENAMED.batch_id: f"{GHOST} is not in `prompts`",
            OLDEST.batch_id: "",
        },
    )
    rows = site.rows(
        "SELECT batch_id, prompt_digest FROM replay_events FINAL WHERE replay_id = {replay:String}",
        replay=told["replay_id"],
    )
    assert {row["batch_id"]: row["prompt_digest"] for row in rows} == {
        GOOD.batch_id: PLAIN.digest,
        ODD.batch_id: LONG_AGO.digest,
    }


def test_what_was_said_of_such_a_history_can_be_compared_and_shown_with_the_pictures_that_are_left(
    site: Site, tmp_path: Path
) -> None:
    told = answer("replay", "diff", "live", "again")
    assert (told["compared"], told["flips"], told["noise"]["name"]) == (4, 4, "noise")
    answer("replay", "report", "again", "--out", str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "its bytes are not in the image store any more" in page
    assert "it cannot be decoded" in page  # what was recorded of it never was a picture


def test_new_windows_are_cut_from_both_lives_of_what_the_detector_saw(site: Site) -> None:
    pasts = [in_the_hall(FIRST, 0, threshold=SHARPER), in_the_hall(SECOND, 1000, threshold=SHARPER)]
    told = answer(
        *("replay", "run", "--threshold", str(SHARPER), "--camera", HALL),
        *("--prompt", "default", "--name", "sharper", "--baseline", "0"),
    )
    expected = {window.batch_id for past in pasts for window in past.windows}
    assert len(expected) == 4
    assert (told["state"], told["judged"], told["failed"]) == ("done", 4, 0)
    says(told["why_left_out"], {past.log[5].origin: "not a record of detections" for past in pasts})
    rows = site.rows(
        "SELECT batch_id, rendered_prompt FROM replay_events FINAL WHERE replay_id = {replay:String}",
        replay=told["replay_id"],
    )
    assert {row["batch_id"] for row in rows} == expected
    assert all("camera: hall" in row["rendered_prompt"] for row in rows)


def test_what_the_broker_has_forgotten_of_a_replay_is_not_judged_again(site: Site) -> None:
    told = answer("replay", "run", "--prompt", "deliveries-strict-nights", "--name", "kept", "--baseline", "0")
    assert told["judged"] == 5
    # It was stopped before the last verdict; then the log's time was up.
    site.do(_forget)
    site.do(_unsay, told["replay_id"], GOOD.batch_id)
    again = answer("replay", "resume", "kept")
    assert (again["state"], again["judged"], again["failed"]) == ("done", 5, 0)
    rows = site.rows(
        "SELECT batch_id, count() AS times FROM replay_events WHERE replay_id = {replay:String} GROUP BY batch_id",
        replay=told["replay_id"],
    )
    assert {row["batch_id"]: row["times"] for row in rows} == dict.fromkeys(
        (context.batch_id for context in (GOOD, ODD, UNJUDGED, RENAMED, OLDEST)), 1
    )
    # A worker that stood just before the marker of its last transaction finds a gap there; nothing was in it.
    assert site.rows("SELECT origin FROM dead_letters WHERE stage = 'replay' AND kind != 'gap'") == []


async def _forget(settings: Settings) -> None:
    """What retention does to the topics of replays."""
    kafka = Kafka(settings.kafka)
    tps = [TopicPartition(topic, p) for topic in desk.TOPICS for p in range(settings.kafka.partitions)]
    ends = {tp: RecordsToDelete(before_offset=end) for tp, (_, end) in (await kafka.bounds(tps)).items()}
    async with kafka.admin() as admin:
        await admin.delete_records(ends)


async def _unsay(settings: Settings, replay: str, batch: str) -> None:
    """As if the verdict had never come, and the replay had been paused."""
    store = ClickHouseStore(settings.clickhouse)
    client = await store.connection.client()
    await client.command(f"DELETE FROM replay_events WHERE replay_id = '{replay}' AND batch_id = '{batch}'")
    await store.close()
    async with office(settings) as found:
        await found.say(found.find(replay), "paused", "by a test")

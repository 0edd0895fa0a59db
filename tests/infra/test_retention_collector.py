"""The collector on the real ClickHouse engine: what goes, what stays, and every instant at which it can be killed."""

import asyncio
import secrets
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import pytest_asyncio

from infra.retention.collector import Collector, NotNowError, Store
from infra.retention.settings import RetentionSettings
from processors.replay.plan import Scope
from processors.sink.store import ClickHouseStore
from processors.store.audit import _reach
from processors.store.queries import Queries
from processors.store.settings import ClickHouseSettings
from schemas import ids
from streams import codec
from streams.claims import ClaimStore
from streams.topics import STORED
from tests import examples
from tests.processors.audit_kit import CAMERAS, History, detections_of, found, frame_of, letter_of

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real

GC_TABLES = ("forgotten", "forgotten_images", "gc_passes")


@pytest.fixture(scope="module")
def migrated(clickhouse_url):
    """One database for all tests here: to migrate one takes longer than any of them."""
    made = ClickHouseSettings(url=clickhouse_url, database=f"t_{secrets.token_hex(6)}")

    async def main():
        store = ClickHouseStore(made)
        await store.migrate()
        await store.close()

    asyncio.run(main())
    return made


@pytest.fixture
def database(migrated, reading):
    reader = reading(migrated)
    for table in ("log", "sink_progress", *GC_TABLES, *STORED):
        reader.command(f"TRUNCATE TABLE {table}")
    return migrated


@pytest_asyncio.fixture
async def queries(database):
    made = Queries(database)
    yield made
    await made.aclose()


class FakeLog:
    """The log as a `History` says it is."""

    def __init__(self, history, positions=None):
        self.look, _ = history.look(positions)
        self.holds = {}
        self.scopes = []
        self.running = []
        self.claims = set()
        self.behind = False

    async def settled(self, told):
        if self.behind:
            raise NotNowError("the sink is behind")
        reach = {stage: _reach(self.look, positions) for stage, positions in self.look.positions.items()}
        return {
            topic: reach[stage][topic]
            for topic, stage in (
                ("frames", "detect"),
                ("detections", "batch"),
                ("batches", "enrich"),
                ("contexts", "analyze"),
            )
        }

    async def held(self):
        return dict(self.holds)

    async def replays(self):
        return self.scopes, self.running

    async def unstored(self):
        return set(self.claims)


class Killed(BaseException):
    """The process is gone."""


class Mortal(Store):
    """A store whose user is killed at the nth change, before or after it was made."""

    def __init__(self, connection, at=None, *, after=False):
        super().__init__(connection)
        self.at = at
        self.after = after
        self.changes = 0
        self.ahead = timedelta(0)

    async def now(self):
        return await super().now() + self.ahead

    async def _change(self, work):
        self.changes += 1
        if self.changes == self.at and not self.after:
            raise Killed
        await work
        if self.changes == self.at:
            raise Killed

    async def command(self, statement):
        work = super().command(statement)
        try:
            await self._change(work)
        finally:
            work.close()

    async def insert(self, *args):
        work = super().insert(*args)
        try:
            await self._change(work)
        finally:
            work.close()


def collector(store, log, tmp_path, *, days=400, at=None, after=False, told=lambda _: None, mortal=None, **keep):
    mortal = mortal or Mortal(store.connection, at, after=after)
    mortal.ahead = timedelta(days=days)
    return Collector(
        mortal,
        log,
        ClaimStore(str(tmp_path / "images")),
        RetentionSettings(**keep),
        owner="here",
        clock=lambda: datetime.now(UTC) + timedelta(days=days),
        told=told,
    )


def relevel(history, partition, level):
    """The verdict on the window of a partition says another level."""
    [event] = history.of("risk_events", partition)
    record = msgspec.structs.replace(codec.decode(event, type(examples.risk_event)), risk_level=level)
    made = codec.emit("risk_events", record)
    history.records["risk_events"][history.records["risk_events"].index(event)] = event._replace(value=made.value)


def quiet(history, partition, n, **frame):
    """A frame in which nothing was seen, and what was seen in it."""
    camera = CAMERAS[partition]
    record = history.add("frames", partition, msgspec.structs.replace(frame_of(camera, n), **frame))
    seen = history.add("detections", partition, msgspec.structs.replace(detections_of(camera, n), boxes=()), record)
    return record, seen


def there(ask):
    """What is in `log`, by topic and partition; ticks apart. Typed tables must have the same positions."""
    for topic in STORED:
        typed = set(ask.rows(f"SELECT epoch, partition, offset FROM {topic} FINAL"))
        logged = set(ask.rows(f"SELECT epoch, partition, offset FROM log FINAL WHERE topic = '{topic}' AND NOT tick"))
        assert typed <= logged, topic
        assert not [one for one in logged - typed if topic not in {"frames", "contexts"}], topic
    return {
        (topic, partition, tick): n
        for topic, partition, tick, n in ask.rows(
            "SELECT topic, partition, tick, count() FROM log FINAL GROUP BY ALL ORDER BY ALL"
        )
    }


def all_of(partition, frames=6):
    """What a `History` has of a partition."""
    return {
        ("frames", partition, False): frames,
        ("frames", partition, True): 1,
        ("detections", partition, False): frames,
        ("detections", partition, True): 1,
        ("batches", partition, False): 1,
        ("contexts", partition, False): 1,
        ("risk_events", partition, False): 1,
    }


def ticks_of(partition):
    return {(topic, partition, True): 1 for topic in ("frames", "detections")}


async def test_nothing_goes_that_nobody_said_may_go(store, ask, tmp_path):
    history = History()
    await history.keep(store)
    report = await collector(store, FakeLog(history), tmp_path, days=100_000).run()
    assert (report.records, report.passes, report.windows) == (0, 0, {})
    assert there(ask) == all_of(0) | all_of(1)


async def test_a_window_goes_as_a_whole_by_its_level_and_the_audit_knows(store, queries, ask, tmp_path):
    history = History()
    relevel(history, 0, "low")
    # Said of the windows: an alert and a replay's verdict each, and a dead letter about one of their frames.
    for partition in (0, 1):
        [event] = history.of("risk_events", partition)
        verdict = codec.decode(event, type(examples.risk_event))
        again = msgspec.structs.replace(verdict, run="r1", event_id=ids.event_id(verdict.batch_id, "r1"))
        history.add(
            "alerts",
            partition,
            msgspec.structs.replace(
                examples.RECORDS["alerts"],
                event_id=verdict.event_id,
                camera_id=verdict.camera_id,
                alert_id=f"a{partition}",
            ),
        )
        history.add(
            "replay_events",
            partition,
            msgspec.structs.replace(
                examples.RECORDS["replay_events"],
                event=again,
                event_id=again.event_id,
                camera_id=again.camera_id,
                replay_id="r1",
                unit_id=f"r1:{again.batch_id}",
            ),
        )
        history.add(
            "replay_units",
            partition,
            msgspec.structs.replace(
                examples.RECORDS["replay_units"],
                replay_id="r1",
                unit_id=f"r1:{again.batch_id}",
                camera_id=again.camera_id,
                kind="judge",
            ),
        )
        history.add("dead_letters", partition, letter_of(history.of("frames", partition)[0], "replay"))
    await history.keep(store)
    said = {(topic, 1, False): 1 for topic in ("alerts", "replay_events", "replay_units", "dead_letters")}
    log = FakeLog(history)
    assert (await collector(store, log, tmp_path, days=29, low="30d").run()).records == 0
    would = await collector(store, log, tmp_path, low="30d", medium="500d").plan()
    assert would.windows == {"low": 1}
    assert not ask.rows("SELECT * FROM forgotten"), "a dry run writes nothing"
    assert not ask.rows("SELECT * FROM gc_passes")
    report = await collector(store, log, tmp_path, low="30d", medium="500d").run()
    counts = {one.topic: one.records for one in report.taken}
    assert counts == {one.topic: one.records for one in would.taken}
    assert counts == {"frames": 6, "detections": 6} | dict.fromkeys(
        ("batches", "contexts", "risk_events", "alerts", "replay_events", "replay_units", "dead_letters"), 1
    )
    assert all(one.size for one in would.taken)
    assert there(ask) == ticks_of(0) | all_of(1) | said
    audit = await history.audited(queries)
    assert found(audit) == set()
    assert audit.forgotten == 19
    assert (await collector(store, log, tmp_path, low="30d", medium="500d").run()).records == 0, "run twice"
    # What is lost besides is still found.
    ask.command(f"DELETE FROM log WHERE topic = 'risk_events' AND epoch = '{history.epoch}' AND partition = 1")
    assert "missing_in_clickhouse" in (await history.audited(queries)).counts


async def test_what_is_held_stays_whole_until_it_is_released(store, queries, ask, tmp_path):
    history = History()
    await history.keep(store)
    [event] = history.of("risk_events", 0)
    verdict = codec.decode(event, type(examples.risk_event))
    log = FakeLog(history)
    log.holds = {verdict.event_id: verdict.batch_id}
    keep = {"low": "1d", "medium": "1d", "high": "1d", "critical": "1d", "quiet": "1d", "replays": "1d"}
    report = await collector(store, log, tmp_path, **keep).run()
    assert report.held == 1
    kept = {what: n for what, n in all_of(0).items() if not what[2]}
    assert there(ask) == kept
    assert found(await history.audited(queries)) == set()
    log.holds = {}
    await collector(store, log, tmp_path, **keep).run()
    assert there(ask) == {}
    assert found(await history.audited(queries)) == set()


async def test_a_hold_that_comes_between_the_marks_and_the_deleting_is_seen(store, ask, tmp_path):
    history = History()
    await history.keep(store)
    verdicts = [codec.decode(history.of("risk_events", p)[0], type(examples.risk_event)) for p in (0, 1)]
    log = FakeLog(history)

    def told(what):
        if what.startswith("marking"):
            log.holds = {verdicts[0].event_id: verdicts[0].batch_id}

    report = await collector(store, log, tmp_path, low="1d", medium="1d", high="1d", told=told).run()
    assert there(ask) == all_of(0) | ticks_of(1)
    assert report.passes == 1
    taken_back = set(ask.rows("SELECT partition FROM forgotten FINAL"))
    assert taken_back == {(1,)}, "nothing that is there is called forgotten"


async def test_frames_of_no_window_go_but_for_those_on_their_way_or_replayed(store, queries, ask, tmp_path):
    history = History()
    old = [quiet(history, 0, n) for n in (100, 101)]
    beyond = quiet(history, 0, 102)  # detect has passed it, batch has not
    ahead = history.add("frames", 0, frame_of("gate", 103))  # nor has detect this one
    await history.keep(store)
    positions = {
        ("detect", "frames", 0): ahead.offset,
        ("batch", "detections", 0): beyond[1].offset,
    }
    log = FakeLog(history, positions)
    log.scopes = [Scope(cameras=("gate",), since=examples.AT, until=examples.AT + 1000)]
    report = await collector(store, log, tmp_path, quiet="7d").run()
    assert report.records == 0, "a replay that has not ended may read them"
    log.scopes = [Scope(cameras=("yard",))]
    report = await collector(store, log, tmp_path, quiet="7d").run()
    assert {(one.topic, one.records) for one in report.taken} == {("frames", 2), ("detections", 2)}
    gone = {(r.topic, r.offset) for pair in old for r in pair}
    assert set(ask.rows("SELECT topic, offset FROM forgotten FINAL")) == gone
    assert found(await history.audited(queries, positions)) == set()
    # Ticks stay as long as any replay runs: it may cut windows by them.
    log.scopes = []
    report = await collector(store, log, tmp_path, quiet="7d").run()
    assert {(one.topic, one.records) for one in report.taken} == {("frames", 2), ("detections", 2)}
    assert found(await history.audited(queries, positions)) == set()
    assert {what: n for what, n in there(ask).items() if what[1] == 1} == {
        what: n for what, n in all_of(1).items() if not what[2]
    }


async def test_all_records_of_a_frame_go_also_those_sent_again_or_redriven(store, queries, ask, tmp_path):
    history = History()
    first, seen = quiet(history, 0, 100)
    again = history.add("frames", 0, frame_of("gate", 100))
    history.add("detections", 0, msgspec.structs.replace(detections_of("gate", 100), boxes=()), again)
    # One that could not be read when it came first, and was redriven.
    broken = history.add("frames", 0, frame_of("gate", 101))
    history.records["frames"][-1] = broken = broken._replace(value=b"\0\0\0\0\1garbage")
    letter = history.add("dead_letters", 0, letter_of(broken, "detect"), broken)
    redriven = history.add("frames", 0, frame_of("gate", 101), redrive=broken.origin)
    history.add(
        "detections", 0, msgspec.structs.replace(detections_of("gate", 101), boxes=()), redriven, redrive=broken.origin
    )
    history.add(
        "dead_letter_status",
        0,
        msgspec.structs.replace(
            examples.dead_letter_status, origin=broken.origin, status="resolved", by="detect", record=redriven.origin
        ),
    )
    await history.keep(store)
    ask.command("OPTIMIZE TABLE frames FINAL")
    ask.command("OPTIMIZE TABLE detections FINAL")
    before = await history.audited(queries)
    await collector(store, FakeLog(history), tmp_path, quiet="7d").run()
    gone = set(ask.rows("SELECT topic, offset FROM forgotten FINAL WHERE partition = 0"))
    assert gone >= {(r.topic, r.offset) for r in (first, seen, again, broken, letter, redriven)}
    assert ask.value("SELECT count() FROM log WHERE topic IN ('frames', 'detections') AND partition = 0") == 12
    after = await history.audited(queries)
    assert after.counts.items() <= before.counts.items(), "nothing is wrong that was not before"


async def test_images_go_to_the_trash_and_then_for_good_unless_something_claims_them(store, ask, tmp_path):
    history = History()
    claims = ClaimStore(str(tmp_path / "images"))
    names = ("alone", "shared", "on its way", "in a letter")
    claim = {name: await claims.put(name.encode()) for name in names}
    sha = {name: claim[name].removeprefix("sha256:") for name in names}
    for n, name in enumerate(names):
        quiet(history, 0, 100 + n, claim=claim[name], image=None, sha256=sha[name])
    # The same picture in a frame that stays: one of a window.
    kept = history.of("frames", 1)[0]
    record = msgspec.structs.replace(codec.decode(kept, type(examples.RECORDS["frames"])), claim=claim["shared"])
    history.records["frames"][history.records["frames"].index(kept)] = kept._replace(
        value=codec.emit("frames", record).value
    )
    other = codec.emit("frames", msgspec.structs.replace(frame_of("yard", 9), claim=claim["in a letter"]))
    history.add("dead_letters", 1, msgspec.structs.replace(examples.dead_letter, value=other.value, kind="rejected"))
    await history.keep(store)
    log = FakeLog(history)
    log.claims = {sha["on its way"]}
    report = await collector(store, log, tmp_path, days=10, quiet="7d", trash="1y").run()
    assert (report.images, report.images_size, report.purged) == (1, len("alone"), 0)
    trash = tmp_path / "images" / ".trash"
    assert [path.name for path in trash.rglob("*") if path.is_file()] == [sha["alone"]]
    assert await claims.get(claim["alone"], sha["alone"]) == b"alone", "still found, for whoever is about to claim it"
    log.claims |= {sha["alone"]}
    report = await collector(store, log, tmp_path, days=10, quiet="7d", trash="2d").run()
    assert (report.put_back, report.purged) == (1, 0)
    assert await claims.trash(sha["alone"]) == len("alone")
    log.claims = set()
    would = await collector(store, log, tmp_path, days=10, quiet="7d", trash="2d").plan()
    report = await collector(store, log, tmp_path, days=10, quiet="7d", trash="2d").run()
    assert (report.purged, report.purged_size) == (would.purged, would.purged_size) == (1, len("alone"))
    assert not [path for path in trash.rglob("*") if path.is_file()]
    for name in names[1:]:
        assert await claims.get(claim[name], sha[name]) == name.encode()
    assert not ask.rows("SELECT * FROM forgotten_images")


# A pass changes something 22 times with these settings: it is named (1), marks (2 to 12), is called marked (13) and
# deleting (14), deletes from five tables (15 to 19) and from log (20), and ends (21, 22).
@pytest.mark.parametrize("instant", [(4, False), (13, True), (16, False), (20, True)])
async def test_killed_at_any_instant_it_is_finished_by_the_next_run(store, queries, ask, tmp_path, instant):
    at, after = instant
    history = History()
    relevel(history, 0, "low")
    await history.keep(store)
    log = FakeLog(history)
    mortal = Mortal(store.connection, at, after=after)
    with pytest.raises(Killed):
        await collector(store, log, tmp_path, mortal=mortal, low="1d").run()
    assert found(await history.audited(queries)) == set(), "what is half gone is not lost"
    deleting = ask.value("SELECT count() FROM gc_passes FINAL WHERE state = 'deleting'")
    report = await collector(store, log, tmp_path, low="1d").run()
    assert report.finished == deleting
    assert report.records == 15
    assert there(ask) == ticks_of(0) | all_of(1)
    assert found(await history.audited(queries)) == set()
    assert ask.rows("SELECT DISTINCT state FROM gc_passes FINAL") == [("done",)]
    assert ask.value("SELECT count() FROM forgotten FINAL") == 15


async def test_nothing_is_deleted_while_that_cannot_be_told_or_another_is_at_work(store, ask, tmp_path):
    history = History()
    await history.keep(store)
    log = FakeLog(history)
    log.behind = True
    with pytest.raises(NotNowError, match="sink is behind"):
        await collector(store, log, tmp_path, low="1d", medium="1d", high="1d").run()
    log.behind = False
    now = datetime.now(UTC) + timedelta(days=400)
    names = ["pass", "owner", "started_at", "state", "records", "images", "at"]
    await Store(store.connection).insert("gc_passes", names, [["p1", "elsewhere", now, "marking", 0, 0, now]])
    with pytest.raises(NotNowError, match="elsewhere"):
        await collector(store, log, tmp_path, low="1d", medium="1d", high="1d").run()
    assert there(ask) == all_of(0) | all_of(1)
    # An hour later it is taken for dead, and its marks are taken back.
    later = now - timedelta(hours=1, minutes=1)
    await Store(store.connection).insert("gc_passes", names, [["p1", "elsewhere", later, "marking", 0, 0, now]])
    report = await collector(store, log, tmp_path, low="1d", medium="1d", high="1d").run()
    assert report.passes == 1
    assert there(ask) == ticks_of(0) | ticks_of(1)


async def test_a_replay_or_a_hold_on_what_replays_said_that_comes_behind_the_marks_is_seen(store, ask, tmp_path):
    history = History()
    [event] = history.of("risk_events", 0)
    verdict = codec.decode(event, type(examples.risk_event))
    again = msgspec.structs.replace(verdict, run="r1", event_id=ids.event_id(verdict.batch_id, "r1"))
    history.add(
        "replay_events",
        0,
        msgspec.structs.replace(
            examples.RECORDS["replay_events"], event=again, event_id=again.event_id, camera_id=again.camera_id
        ),
    )
    await history.keep(store)
    log = FakeLog(history)

    def replayed(what):
        if what.startswith("marking"):
            log.scopes, log.running = [Scope()], ["r1"]

    await collector(store, log, tmp_path, low="1d", medium="1d", high="1d", told=replayed).run()
    assert there(ask).items() >= all_of(0).items()
    log.scopes, log.running = [], []

    def held(what):
        if what.startswith("marking"):
            log.holds = {verdict.event_id: verdict.batch_id}

    await collector(store, log, tmp_path, replays="1d", told=held).run()
    assert ask.value("SELECT count() FROM replay_events") == 1


async def test_a_pass_that_is_held_or_anothers_is_not_finished_and_a_clock_decides_nothing(store, ask, tmp_path):
    history = History()
    await history.keep(store)
    [event] = history.of("risk_events", 0)
    verdict = codec.decode(event, type(examples.risk_event))
    log = FakeLog(history)
    log.holds = {verdict.event_id: verdict.batch_id}
    names = ["pass", "owner", "started_at", "state", "records", "images", "at"]
    marks = ["topic", "epoch", "partition", "offset", "pass", "why"]
    now = datetime.now(UTC)
    plain = Store(store.connection)
    await plain.insert("forgotten", marks, [["risk_events", event.epoch, 0, event.offset, "p1", "low"]])
    await plain.insert("gc_passes", names, [["p1", "elsewhere", now, "deleting", 0, 0, now]])
    assert (await collector(store, log, tmp_path).run()).finished == 0
    await plain.insert("gc_passes", names, [["p1", "here", now, "deleting", 0, 0, now]])
    earlier = now - timedelta(seconds=2)
    await plain.insert("gc_passes", names, [["p1", "here", now, "marked", 0, 0, now + timedelta(seconds=2)]])
    await plain.insert("gc_passes", names, [["p1", "here", now, "deleting", 0, 0, earlier]])
    with pytest.raises(NotNowError, match="is held"):
        await collector(store, log, tmp_path).run()
    assert there(ask) == all_of(0) | all_of(1)
    wrong = collector(store, log, tmp_path, low="1d")
    wrong._clock = lambda: datetime.now(UTC)
    with pytest.raises(NotNowError, match="clocks differ"):
        await wrong.run()

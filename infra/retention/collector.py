"""`rewatch gc`: takes what is past its time out of ClickHouse and the image store, pass by pass.

A pass marks, then looks whether anything is held, then deletes. What it is going to delete is written down first
(`forgotten`), so whoever is killed at any instant is finished by the next run, and the audit can tell what retention
took from what was lost. The look at the holds comes behind the marks, and `rewatch hold` looks at the marks behind its
hold: one of the two sees the other, so an event that was said to be held is never deleted.

Images go in two steps of their own: out of sight of nobody into the store's `.trash`, and a while later for good, if
nothing claims them then.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

import structlog

from infra.retention import questions
from infra.retention.questions import Rules
from infra.retention.settings import LEVELS, RetentionSettings, span
from processors.replay.plan import Scope
from processors.store.audit_sql import LIMITS, Reach
from processors.store.connection import Connection
from streams.claims import ClaimStore

log = structlog.get_logger(__name__)

WINDOWS = 10_000
"""Windows that one pass takes: with their frames some 200,000 records, whose positions are 20 MB of memory."""
RECORDS = 500_000
"""Quiet frames, ticks and other records of one kind that one pass takes at most: 50 MB of positions a kind."""

# A pass of another machine that has been marking for so long was killed: marking takes seconds.
_MARKING = timedelta(hours=1)

# Clocks that are kept differ by less; one that is further off is wrong, and nobody can tell which.
_APART = timedelta(minutes=1)

# Deleted rows are masked at once, and their bytes go when ClickHouse merges. To have them gone sooner costs writing the
# parts anew: done where a tenth of a table is masked, so that each byte is written again ten times in its life at most.
_MASKED = 0.1

MARKING, MARKED, DELETING, DONE = "marking", "marked", "deleting", "done"


class NotNowError(Exception):
    """Nothing can be deleted safely now; the message says why, and what to do."""


class Log(Protocol):
    """What the collector has to know of the log."""

    async def settled(self, told: Callable[[str], None]) -> Mapping[str, Reach]:
        """How far the readers of `frames`, `detections`, `batches` and `contexts` had come when it was asked.

        Whatever they had made by then is in ClickHouse when this returns.

        Raises:
            NotNowError: ClickHouse does not catch up with the log.
        """

    async def held(self) -> Mapping[str, str]:
        """Batch ids of the events that are held, by event id.

        Raises:
            NotNowError: it cannot be told for sure.
        """

    async def replays(self) -> tuple[list[Scope], list[str]]:
        """What replays that have not ended may read, and their ids.

        Raises:
            NotNowError: it cannot be told for sure.
        """

    async def unstored(self) -> set[str]:
        """SHA-256 (hex) of the bytes that records claim which ClickHouse may not have yet.

        Raises:
            NotNowError: there are too many to tell.
        """


class Taken(NamedTuple):
    """Records of one class and topic."""

    why: str
    topic: str
    records: int
    size: int
    """Bytes of their values; of those that are gone it is not known any more (0)."""


@dataclass
class Report:
    """What went, or would go."""

    taken: list[Taken] = field(default_factory=list)
    windows: dict[str, int] = field(default_factory=dict)
    """Windows by class."""
    images: int = 0
    """Images that went to the trash, or would."""
    images_size: int = 0
    """Their bytes."""
    purged: int = 0
    """Images that were deleted for good."""
    purged_size: int = 0
    """Their bytes."""
    put_back: int = 0
    """Images in the trash that something claims again."""
    held: int = 0
    """Events that are held."""
    replays: int = 0
    """Replays that have not ended."""
    passes: int = 0
    finished: int = 0
    """Passes of earlier runs, which were killed, that were finished now."""

    @property
    def records(self) -> int:
        """Records in all."""
        return sum(one.records for one in self.taken)

    def add(self, found: Iterable[Taken]) -> None:
        """Count more."""
        for one in found:
            same = next((n for n, t in enumerate(self.taken) if (t.why, t.topic) == (one.why, one.topic)), None)
            if same is None:
                self.taken.append(one)
            else:
                was = self.taken[same]
                self.taken[same] = was._replace(records=was.records + one.records, size=was.size + one.size)


class Store:
    """ClickHouse as the collector asks it. Its methods raise `UnavailableError`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def rows(self, query: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows of a query."""
        with self._connection.naming():
            found = await (await self._connection.client()).query(query, parameters=parameters)
        return [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]

    async def now(self) -> datetime:
        """ClickHouse's clock: what `inserted_at` is measured by."""
        [row] = await self.rows("SELECT toUnixTimestamp64Milli(now64(3)) AS ms")
        return datetime.fromtimestamp(row["ms"] / 1000, UTC)

    async def command(self, statement: str) -> None:
        """Change something."""
        with self._connection.naming():
            await (await self._connection.client()).command(statement)

    async def insert(self, table: str, names: list[str], rows: list[list[Any]]) -> None:
        """Insert rows; the answer comes when they are on disk."""
        with self._connection.naming():
            client = await self._connection.client()
            await client.insert(table, rows, column_names=names, settings={"async_insert": 0})


class _Pass(NamedTuple):
    """One round of marking and deleting."""

    name: str
    began: datetime


class Collector:
    """One run of the collector.

    Args:
        store: ClickHouse; deleting takes its time, so give it a read timeout of minutes.
        log: the log.
        claims: the image store.
        settings: how long things are kept.
        owner: names this installation's collector on this machine; whoever uses it holds a lock, so that no two of
            one name run at once.
        clock: wall time.
        told: is given what is done now.
    """

    def __init__(
        self,
        store: Store,
        log_: Log,
        claims: ClaimStore,
        settings: RetentionSettings,
        *,
        owner: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        told: Callable[[str], None] = lambda _: None,
        windows: int = WINDOWS,
        records: int = RECORDS,
    ) -> None:
        self._store = store
        self._log = log_
        self._claims = claims
        self._settings = settings
        self._owner = owner
        self._clock = clock
        self._told = told
        self._windows = windows
        self._records = records
        self._others: dict[str, list[dict[str, Any]]] = {}
        self._redriven: set[str] | None = None

    async def plan(self) -> Report:
        """What would go now; nothing is changed.

        Raises:
            NotNowError: it cannot be told for sure.
            UnavailableError: ClickHouse is away.
        """
        report = Report()
        rules = await self._rules(report)
        self._told("counting")
        due, quiet = questions.windows(rules), questions.quiet(rules)
        report.windows = {
            row["why"]: row["n"]
            for row in await self._store.rows(f"SELECT why, count() AS n FROM ({due}) GROUP BY why {LIMITS}")  # noqa: S608 (ours)
        }
        frames = f"{questions.frames_of(due)} UNION ALL {quiet}"
        wanted = {topic: questions.of_windows(topic, due) for topic in questions.OF_WINDOWS}
        wanted |= {topic: questions.of_frames(topic, frames) for topic in ("frames", "detections")}
        wanted["replay_units"] = " UNION ALL ".join(
            (questions.of_windows("replay_units", due), questions.of_frames("replay_units", frames))
        )
        for topic in ("replay_events", "replay_units"):
            wanted[topic] += f" UNION ALL {questions.of_replays(rules, topic)}"
        for topic in ("frames", "detections"):
            wanted[topic] += f" UNION ALL {questions.ticks(rules, topic)}"
        wanted["gpu_metrics"] = questions.readings(rules)
        about = " UNION ALL ".join(
            f"SELECT '{topic}' AS topic, epoch, `partition`, `offset`, why FROM ({wanted[topic]})"  # noqa: S608 (ours)
            for topic in ("frames", "detections", "batches", "contexts")
        )
        wanted["dead_letters"] = f"{questions.not_taken(rules)} UNION ALL {questions.letters_of(about)}"
        for topic, positions in wanted.items():
            self._told(f"counting {topic}")
            rows = await self._store.rows(
                "SELECT p.why AS why, count() AS n, sum(length(l.value)) AS size "  # noqa: S608 (ours)
                f"FROM (SELECT epoch, `partition`, `offset`, value FROM log WHERE topic = '{topic}') AS l "
                f"INNER JOIN (SELECT epoch, `partition`, `offset`, any(why) AS why FROM ({positions}) "
                "GROUP BY epoch, `partition`, `offset`) AS p ON p.epoch = l.epoch AND p.`partition` = l.`partition` "
                f"AND p.`offset` = l.`offset` GROUP BY why {LIMITS}"
            )
            report.add(Taken(row["why"], topic, row["n"], row["size"] or 0) for row in rows)
        [images] = await self._store.rows(
            "SELECT uniqExact(f.sha256) AS n FROM frames AS f "  # noqa: S608 (ours)
            f"INNER JOIN (SELECT DISTINCT camera_id, frame_id FROM ({frames})) AS w "
            f"ON w.camera_id = f.camera_id AND w.frame_id = f.frame_id WHERE f.claim IS NOT NULL {LIMITS}"
        )
        report.images = images["n"]
        old = await self._claims.trashed(self._trash_before())
        report.purged, report.purged_size = len(old), sum(one.size for one in old)
        return report

    async def run(self) -> Report:
        """Delete what is past its time. Killed at any instant, it is finished by the next run.

        Raises:
            NotNowError: nothing can be deleted safely now, or any more; what went before stays gone.
            UnavailableError: ClickHouse or the image store is away.
        """
        report = Report()
        await self._resume(report)
        rules = await self._rules(report)
        while rules.before and (pass_ := await self._mark(rules)) is not None:
            if (other := await self._unconfirmed(pass_, rules)) is not None:
                rules = other
                continue
            await self._delete(pass_, report)
        await self._purge(report)
        await self._compact()
        return report

    async def _rules(self, report: Report) -> Rules:
        """What goes now, and what stays."""
        self._told("looking at the log")
        now = await self._now()
        before = {name: _ms(now - keep) for name, keep in self._settings.kept.items()}
        settled = await self._log.settled(self._told)
        held = await self._log.held()
        scopes, replays = await self._log.replays()
        report.held, report.replays = len(held), len(replays)
        return Rules(before, settled, await self._not_yet_stored(held), scopes, replays)

    async def _not_yet_stored(self, held: Mapping[str, str]) -> list[str]:
        """Batch ids of those held that ClickHouse does not call held: few, so that a query can name them."""
        there = {row["batch_id"] for row in await self._store.rows("SELECT batch_id FROM held")}
        return sorted(set(held.values()) - there)

    async def _resume(self, report: Report) -> None:
        """Finish what runs before this one left, or take its marks back where nothing was deleted yet."""
        now = await self._now()
        for row in await self._store.rows("SELECT * FROM gc_passes FINAL WHERE state != {done:String}", done=DONE):
            pass_ = _Pass(row["pass"], row["started_at"])
            if row["state"] in {MARKING, MARKED}:
                if row["owner"] != self._owner and now - pass_.began < _MARKING:
                    raise NotNowError(
                        f"another collector ({row['owner']}) is at work since {pass_.began:%H:%M} UTC; one that was "
                        "killed is taken for dead an hour after it began"
                    )
                await self._discard(pass_)
            elif row["owner"] != self._owner:
                log.warning("left to its owner", gc_pass=pass_.name, owner=row["owner"])
            else:
                held = await self._held_in(pass_)
                if held:
                    raise NotNowError(
                        f"pass {pass_.name} of a run that was killed has marked what is held ({min(held)}): "
                        "nothing is deleted; see `rewatch hold ls`"
                    )
                log.info("finishing", gc_pass=pass_.name)
                await self._delete(pass_, report)
                report.finished += 1

    async def _mark(self, rules: Rules) -> "_Pass | None":
        """Write down what one pass is to delete; None where there is nothing."""
        now = self._clock()
        pass_ = _Pass(f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}", now)
        self._told(f"marking ({pass_.name})")
        await self._state(pass_, MARKING)
        frames = await self._mark_windows(pass_, rules)
        if "quiet" in rules.before:
            await self._write(pass_, "frames", questions.of_frames("frames", questions.quiet(rules, self._records)))
        frames.append(questions.marked_frames(pass_.name))
        for topic in ("detections", "replay_units"):
            await self._write(pass_, topic, questions.of_frames(topic, " UNION ALL ".join(frames)))
        for topic in ("replay_events", "replay_units"):
            await self._write(pass_, topic, questions.of_replays(rules, topic, self._records))
        for topic in ("frames", "detections"):
            await self._write(pass_, topic, questions.ticks(rules, topic, self._records))
        await self._write(pass_, "gpu_metrics", questions.readings(rules, self._records))
        await self._mark_others(pass_)
        await self._write(pass_, "dead_letters", questions.not_taken(rules, self._records))
        await self._write(pass_, "dead_letters", questions.letters_of(questions.marked(pass_.name)))
        await self._store.command(questions.mark_images(pass_.name))
        if not await self._marked(pass_):
            await self._discard(pass_)
            return None
        await self._state(pass_, MARKED)
        return pass_

    async def _mark_windows(self, pass_: "_Pass", rules: Rules) -> list[str]:
        """Mark windows with all that is theirs alone; what selects their frames, where there may be any."""
        if not rules.before.keys() & {*LEVELS, "unjudged"}:
            return []
        due = questions.windows(rules, self._windows)
        await self._write(pass_, "batches", questions.of_windows("batches", due))
        of = questions.marked_windows(pass_.name)
        for topic in (*questions.OF_WINDOWS, "replay_units"):
            if topic != "batches":
                await self._write(pass_, topic, questions.of_windows(topic, of))
        frames = questions.frames_of(of)
        await self._write(pass_, "frames", questions.of_frames("frames", frames))
        return [frames]

    async def _write(self, pass_: "_Pass", topic: str, positions: str) -> None:
        if positions != questions.NOTHING:
            await self._store.command(questions.mark(topic, pass_.name, positions))

    async def _mark_others(self, pass_: "_Pass") -> None:
        """Other records of what is marked: sent again by a camera, or redriven."""
        if self._redriven is None:
            self._redriven = {row["topic"] for row in await self._store.rows(questions.REDRIVEN)}
        for topic in {one.topic for one in await self._marked(pass_)}:
            if topic in self._redriven:
                statement = questions.mark(topic, pass_.name, questions.redriven(topic, pass_.name))
                await self._store.command(statement)
            if topic not in questions.NAMES:
                continue
            if topic not in self._others:
                self._others[topic] = await self._store.rows(questions.repeated(topic))
            if not self._others[topic]:
                continue
            name = questions.NAMES[topic]
            marked = await self._store.rows(
                f"SELECT t.{name} AS id, any(m.why) AS why FROM {topic} AS t "  # noqa: S608 (our names)
                f"INNER JOIN ({questions.marked(pass_.name, topic)}) AS m ON m.epoch = t.epoch "
                "AND m.`partition` = t.`partition` AND m.`offset` = t.`offset` GROUP BY id"
            )
            why = {row["id"]: row["why"] for row in marked}
            rows = [
                [topic, row["epoch"], row["partition"], row["offset"], pass_.name, why[row["id"]]]
                for row in self._others[topic]
                if row["id"] in why
            ]
            if rows:
                await self._store.insert("forgotten", ["topic", "epoch", "partition", "offset", "pass", "why"], rows)

    async def _now(self) -> datetime:
        """ClickHouse's time, by which ages count.

        Raises:
            NotNowError: this machine's clock says something else.
        """
        theirs, ours = await self._store.now(), self._clock()
        if abs(theirs - ours) > _APART:
            raise NotNowError(
                f"clocks differ: ClickHouse has {theirs:%Y-%m-%d %H:%M:%S} UTC, this machine {ours:%Y-%m-%d %H:%M:%S}: "
                "nothing is deleted until they agree within a minute"
            )
        return theirs

    async def _held_in(self, pass_: "_Pass") -> set[str]:
        """Batch ids of what a pass has marked and somebody holds."""
        held = await self._log.held()
        marked = await self._store.rows(f"SELECT DISTINCT batch_id FROM ({questions.marked_batches(pass_.name)})")  # noqa: S608 (ours)
        return {row["batch_id"] for row in marked} & set(held.values())

    async def _unconfirmed(self, pass_: "_Pass", rules: Rules) -> Rules | None:
        """None where what is marked may go; else the marks are taken back, and these rules are the newer ones.

        Holds and replays are asked for behind the marks: see the module's first lines.

        Raises:
            NotNowError: another collector took the pass for dead.
        """
        held = await self._held_in(pass_)
        scopes, replays = await self._log.replays()
        if held or any(one not in rules.scopes for one in scopes) or not set(replays) <= set(rules.replays):
            log.info("held or replayed meanwhile", gc_pass=pass_.name)
            await self._discard(pass_)
            waiting = await self._not_yet_stored(await self._log.held())
            return rules._replace(held=waiting, scopes=scopes, replays=replays)
        own = await self._store.rows(
            "SELECT pass FROM gc_passes FINAL WHERE pass = {p:String} AND owner = {o:String} AND state = {s:String}",
            p=pass_.name,
            o=self._owner,
            s=MARKED,
        )
        if not own:
            raise NotNowError(f"another collector took pass {pass_.name} for dead: run `rewatch gc` again")
        return None

    async def _delete(self, pass_: "_Pass", report: Report) -> None:
        """Delete what a pass has marked. Each step can be repeated."""
        marked = await self._marked(pass_)
        count = sum(one.records for one in marked)
        await self._state(pass_, DELETING, records=count)
        topics = {one.topic for one in marked}
        for table in (name for name in questions.IN_ORDER if name in topics):
            self._told(f"deleting from {table}")
            await self._store.command(questions.delete(table, pass_.name))
        self._told("deleting from log")
        await self._store.command(questions.delete_log(pass_.name))
        images, size = await self._trash(pass_)
        await self._store.command(questions.discard("forgotten_images", pass_.name))
        await self._state(pass_, DONE, records=count, images=images)
        report.add(marked)
        report.images += images
        report.images_size += size
        report.passes += 1
        log.info("deleted", gc_pass=pass_.name, records=count, images=images)

    async def _trash(self, pass_: "_Pass") -> tuple[int, int]:
        """Move what nothing claims any more to the trash; how many images, and their bytes."""
        marked = await self._store.rows(
            "SELECT DISTINCT sha256 FROM forgotten_images WHERE pass = {p:String}", p=pass_.name
        )
        if not marked:
            return 0, 0
        self._told("images")
        claimed = await self._claimed()
        count = size = 0
        for row in marked:
            if row["sha256"] not in claimed and (moved := await self._claims.trash(row["sha256"])) is not None:
                count += 1
                size += moved
        return count, size

    async def _purge(self, report: Report) -> None:
        """Delete for good what has lain in the trash long enough, and put back what is claimed again."""
        old = await self._claims.trashed(self._trash_before())
        if not old:
            return
        self._told("emptying the trash")
        mark = f"trash-{secrets.token_hex(4)}"
        await self._store.insert("forgotten_images", ["sha256", "pass"], [[one.sha256, mark] for one in old])
        claimed = await self._claimed()
        for one in old:
            if one.sha256 in claimed:
                await self._claims.put_back(one.sha256)
                report.put_back += 1
            else:
                await self._claims.purge(one.sha256)
                report.purged += 1
                report.purged_size += one.size
        await self._store.command(questions.discard("forgotten_images", mark))

    async def _claimed(self) -> set[str]:
        """Of the images written down in `forgotten_images` those that a record claims."""
        # The log before ClickHouse: what the sink brings from the one to the other meanwhile is seen twice, not missed.
        unstored = await self._log.unstored()
        return unstored | {row["sha256"] for row in await self._store.rows(questions.claimed())}

    async def _compact(self) -> None:
        """Have the bytes of deleted rows gone from disk, where they are many."""
        for table in ("log", *questions.IN_ORDER):
            [parts] = await self._store.rows(
                "SELECT sum(rows) AS n, max(has_lightweight_delete) AS masked FROM system.parts "
                "WHERE active AND database = currentDatabase() AND table = {table:String}",
                table=table,
            )
            if not parts["masked"]:
                continue
            [there] = await self._store.rows(f"SELECT count() AS n FROM {table}")  # noqa: S608 (our name)
            if parts["n"] - there["n"] >= _MASKED * parts["n"]:
                self._told(f"writing {table} anew without what is deleted")
                await self._store.command(f"ALTER TABLE {table} APPLY DELETED MASK SETTINGS mutations_sync = 2")

    async def _marked(self, pass_: "_Pass") -> list[Taken]:
        """What a pass has marked."""
        rows = await self._store.rows(
            "SELECT toString(why) AS why, toString(topic) AS topic, count() AS n FROM forgotten FINAL "
            "WHERE pass = {p:String} GROUP BY why, topic ORDER BY why, topic",
            p=pass_.name,
        )
        return [Taken(row["why"], row["topic"], row["n"], 0) for row in rows]

    async def _discard(self, pass_: "_Pass") -> None:
        """As if a pass that has deleted nothing had never been: first its marks, then its name."""
        for table in ("forgotten", "forgotten_images", "gc_passes"):
            await self._store.command(questions.discard(table, pass_.name))

    async def _state(self, pass_: "_Pass", state: str, *, records: int = 0, images: int = 0) -> None:
        await self._store.insert(
            "gc_passes",
            ["pass", "owner", "started_at", "state", "records", "images", "at"],
            [[pass_.name, self._owner, pass_.began, state, records, images, self._clock()]],
        )

    def _trash_before(self) -> datetime:
        return self._clock() - span(self._settings.trash)


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)

# ruff: noqa: S608 (as in audit_sql)
"""The accounting: is every accepted frame, and everything made of it, there exactly once? Asked of ClickHouse, by ids.

ClickHouse keeps each record of each topic with what it was made from (`log.source`), so the road can be walked from
row to row. Where everybody stands is read from the log first, and only then the tables: what is missing there is
either on its way, at a stage that has not come so far, or lost. Positions alone are compared with offsets; nothing
is ever concluded from how many offsets lie between two.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from aiokafka import TopicPartition

from processors.store import audit_sql as sql
from processors.store.audit_sql import Bounds, Gap, Reach
from processors.store.queries import Queries, Row
from schemas import ids
from schemas.records import WindowSettings
from streams.kafka import Kafka
from streams.survey import Memory, Position, Survey, survey
from streams.topics import STORED


class Step(NamedTuple):
    """One stage that makes one result of each record."""

    stage: str
    source: str
    result: str


STEPS = (
    Step("detect", "frames", "detections"),
    Step("enrich", "batches", "contexts"),
    Step("analyze", "contexts", "risk_events"),
)

LOST = frozenset({"lost", "missing_row", "missing_in_log", "missing_in_clickhouse"})
"""Kinds of violations that say: something is gone."""
DOUBLED = frozenset({"doubled", "doubled_row", "frame_in_two_batches"})
"""Kinds that say: something is there more than once."""
EVERYTHING = Bounds()
UNEXPLAINED = "unexplained_dead_letter"
REPEATED = "repeated"
"""No violation: a camera sent the same image again, later than ingest remembers."""

_LETTERS = """
    SELECT
        toString(l.stage) AS stage, toString(l.kind) AS kind,
        if(s.status = '', 'open', toString(s.status)) AS status, uniqExact(l.origin) AS count
    FROM dead_letters AS l FINAL
    LEFT JOIN
    (
        SELECT origin, if(countIf(status = 'resolved') > 0, 'resolved', argMax(status, (at, offset))) AS status
        FROM dead_letter_status FINAL GROUP BY origin
    ) AS s ON s.origin = l.origin
    WHERE {bounds} GROUP BY stage, kind, status ORDER BY stage, kind, status
"""


@dataclass(frozen=True)
class Violation:
    """Something that must not be."""

    kind: str
    id: str
    """The record by its origin (topic:epoch:partition:offset), or what it is called: a frame, window or event."""
    detail: str


@dataclass(frozen=True)
class Report:
    """What the audit found."""

    accepted: int
    """Frames that ingest accepted, within the bounds; redriven ones count once."""
    counts: Mapping[str, int]
    """Violations by kind, those too that are not named."""
    violations: Sequence[Violation]
    """The first of each kind."""
    in_flight: Mapping[str, int]
    """Records that each stage has before it, ticks and open windows' frames too; of the whole system."""
    dead_letters: Sequence[Row] = ()
    """`stage`, `kind`, `status` and `count` of those within the bounds."""
    repeated: int = 0
    """Records that a camera sent again, later than ingest remembers: no violation."""
    unread: tuple[str, ...] = ()
    """Topics too long to be compared with the log itself; the sink's own notes and what was made of them served."""
    notes: tuple[str, ...] = ()
    """What could not be asked, and why."""
    forgotten: int = 0
    """Records that retention took (`rewatch gc`), of the whole system: what is missing of those is not lost."""
    took_s: float = field(default=0.0, compare=False)

    @property
    def lost(self) -> int:
        """Violations that say something is gone."""
        return sum(self.counts.get(kind, 0) for kind in LOST)

    @property
    def duplicates(self) -> int:
        """Violations that say something is there more than once."""
        return sum(self.counts.get(kind, 0) for kind in DOUBLED)

    @property
    def unexplained_dead_letters(self) -> int:
        """Dead letters that do not say why, or name what is not there."""
        return self.counts.get(UNEXPLAINED, 0)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong. Something may still be in flight."""
        return not self.counts


async def audit(
    queries: Queries,
    kafka: Kafka,
    windows: WindowSettings | None = None,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    camera: str | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Report:
    """Account for everything, or for what came within the bounds.

    It reads, with two cores and a gigabyte of memory at most, and can be asked of a live system at any time.

    Args:
        queries: ClickHouse. Over millions of rows a question takes seconds: give it a read timeout of minutes.
        kafka: the log.
        windows: the default window settings; without them nobody asks whether what matters is in a batch.
        since: only what ClickHouse took from then on.
        until: only what it took before.
        camera: only of this camera.
        told: is given what is asked now.

    Raises:
        UnavailableError: ClickHouse is away.
        KafkaError, TimeoutError or OSError: the broker is away.
    """
    began = time.monotonic()
    told("the log")
    memory: Memory = {}
    # Positions first, ends after them, tables last: whatever a stage had made by its position is in sight.
    look = await survey(kafka, memory=memory)
    report = await account(queries, look, memory, windows, Bounds(_ms(since), _ms(until), camera), told=told)
    return replace(report, took_s=time.monotonic() - began)


async def account(
    queries: Queries,
    look: Survey,
    memory: Memory,
    windows: WindowSettings | None = None,
    bounds: Bounds = EVERYTHING,
    *,
    told: Callable[[str], None] = lambda _: None,
) -> Report:
    """As `audit`, given what was seen of the log before."""
    asking = _Asking(queries, bounds, told)
    await asking.whole(look, memory, windows)
    accepted = await queries.rows(
        "SELECT count() AS n FROM log FINAL WHERE topic = 'frames' AND NOT tick "
        f"AND NOT arrayExists(h -> h.1 = 'redrive', headers) AND {bounds.of_log()} {sql.LIMITS}"
    )
    letters = await queries.rows(_LETTERS.format(bounds=bounds.of_table().replace("inserted_at", "l.inserted_at")))
    [forgotten] = await queries.rows("SELECT count() AS n FROM forgotten FINAL")
    repeated = asking.counts.pop(REPEATED, 0)
    return Report(
        accepted=accepted[0]["n"],
        counts=dict(asking.counts),
        violations=[violation for violation in asking.found if violation.kind != REPEATED],
        in_flight=in_flight(look),
        dead_letters=letters,
        repeated=repeated,
        unread=tuple(asking.unread),
        notes=tuple(asking.notes),
        forgotten=forgotten["n"],
    )


def in_flight(look: Survey) -> dict[str, int]:
    """Records that each stage has before it, ticks and the frames of open windows too."""
    return {stage: sum(p.behind.records for p in positions) for stage, positions in look.positions.items()}


class _Asking:
    """The questions of one audit, one after another: live work comes first."""

    def __init__(self, queries: Queries, bounds: Bounds, told: Callable[[str], None]) -> None:
        self._queries = queries
        self._bounds = bounds
        self._told = told
        self.counts: dict[str, int] = {}
        self.found: list[Violation] = []
        self.unread: list[str] = []
        self.notes: list[str] = []

    async def whole(self, look: Survey, memory: Memory, windows: WindowSettings | None) -> None:
        """Ask everything."""
        bounds = self._bounds
        reach = {stage: _reach(look, positions) for stage, positions in look.positions.items()}
        kept = reach["sink"]
        held = _held(look, memory)
        gaps = await self._gaps()
        there = await self._there()
        redriven = "dead_letter_status" in there
        if bounds.whole:
            await self._against_the_log(look, memory, kept, gaps, there)
            told = [topic for topic in STORED if topic in self.unread]
            await self._ask("the sink's notes", sql.ranges(bounds, told))
        gaps += await self._before()
        for topic in STORED:
            if topic in there and (bounds.camera is None or topic in sql.BY_CAMERA):
                await self._kept(topic)
        await self._steps(reach, held, gaps, redriven=redriven)
        await self._ask("windows", sql.batch_frames(bounds, kept.get("detections", Reach())))
        await self._ask("windows", sql.batch_order(bounds))
        if windows is not None:
            both = {p: held["batches"].get(p, 0) + held["dead_letters"].get(p, 0) for p in held["batches"]}
            await self._matters(windows, reach["batch"].get("detections", Reach()), both, gaps)
        await self._ask("names", sql.names(bounds))
        for result, source in (("contexts", "batches"), ("risk_events", "contexts")):
            if not sum(held[source].values()):
                await self._ask(f"what {result} tell of", sql.strangers(result, source, bounds))
        if "dead_letters" in there:
            await self._ask("dead letters", sql.letters(bounds, {topic: kept.get(topic, Reach()) for topic in STORED}))

    async def _steps(
        self,
        reach: Mapping[str, Mapping[str, Reach]],
        held: Mapping[str, Mapping[int, int]],
        gaps: Sequence[Gap],
        *,
        redriven: bool,
    ) -> None:
        """What each stage made of what it read."""
        bounds = self._bounds
        for stage, source, result in STEPS:
            both = {p: held[result].get(p, 0) + held["dead_letters"].get(p, 0) for p in held[result]}
            query = sql.links(
                stage,
                source,
                result,
                bounds=bounds,
                done=reach[stage].get(source, Reach()),
                kept=reach["sink"].get(source, Reach()),
                held=both,
                gaps=gaps,
                redriven=redriven,
            )
            made = f"what {stage} made"
            if not bounds.whole or await self._differ(made, sql.links_differ(source, result)):
                await self._ask(made, query)
            await self._ask(f"the order of {result}", sql.sources(source, result, bounds))
            if redriven:
                await self._ask(
                    f"redrives of {stage}", sql.resolved(stage, source, result, bounds, sum(held[result].values()))
                )

    async def _ask(self, what: str, query: str) -> dict[str, int]:
        """Ask, and remember what is wrong."""
        self._told(what)
        counts = {}
        for row in await self._queries.rows(query):
            counts[row["kind"]] = row["n"]
            self._note(row["kind"], row["n"], [Violation(row["kind"], *map(_text, one)) for one in row["found"]])
        return counts

    def _note(self, kind: str, count: int, found: Sequence[Violation]) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.found += found

    async def _differ(self, what: str, query: str) -> bool:
        """Whether two sides have to be compared one by one."""
        self._told(what)
        return bool((await self._queries.rows(query))[0]["n"])

    async def _kept(self, topic: str) -> None:
        """Rows and records of one topic; those that seem to be missing are looked for under their ids."""
        if self._bounds.whole and not await self._differ(f"table {topic}", sql.kept_differs(topic)):
            return
        before = len(self.found)
        counts = await self._ask(f"table {topic}", sql.kept(topic, self._bounds))
        missing = counts.get("missing_row", 0)
        if not missing or topic not in sql.FIRST_FIELD:
            return
        self.found[before:] = [one for one in self.found[before:] if one.kind != "missing_row"]
        self.counts["missing_row"] -= missing
        if not self.counts["missing_row"]:
            del self.counts["missing_row"]
        await self._ask(f"table {topic}", sql.repeated(topic, self._bounds))

    async def _there(self) -> set[str]:
        """Topics that `log` or their table has anything of."""
        rows = await self._queries.rows(
            "SELECT DISTINCT toString(topic) AS name FROM log UNION ALL "
            "SELECT name FROM system.tables WHERE database = currentDatabase() AND total_rows > 0"
        )
        return {row["name"] for row in rows}

    async def _gaps(self) -> list[Gap]:
        """What stages could not read."""
        return [
            Gap(**row) for row in await self._queries.rows("SELECT stage, topic, epoch, partition, lo, hi FROM gaps")
        ]

    async def _before(self) -> list[Gap]:
        """What lay on the log before ClickHouse was there: what was made of it may be, though the records are not."""
        first = await self._queries.rows(
            "SELECT topic, epoch, partition, min(offset) AS first FROM log GROUP BY ALL HAVING first > 0"
        )
        return [Gap("sink", row["topic"], row["epoch"], row["partition"], 0, row["first"] - 1) for row in first]

    async def _against_the_log(
        self, look: Survey, memory: Memory, kept: Mapping[str, Reach], gaps: Sequence[Gap], there: set[str]
    ) -> None:
        """What was read of the log is in ClickHouse up to where the sink stands; and nothing else."""
        for topic in STORED:
            if topic not in look.metas:
                continue
            epoch, parts = look.metas[topic].epoch, range(look.metas[topic].partitions)
            on_it = any(memory[TopicPartition(topic, part), epoch].offsets for part in parts)
            if not on_it and topic not in there:
                continue
            self._told(f"{topic} on the log")
            rows = await self._queries.rows(
                "SELECT partition, arraySort(groupUniqArrayIf(offset, NOT taken)) AS offsets, "
                "groupUniqArrayIf(offset, taken) AS forgotten FROM "
                "(SELECT topic, epoch, partition, offset, 0 AS taken FROM log "
                "UNION ALL SELECT topic, epoch, partition, offset, 1 FROM forgotten) "
                "WHERE topic = {topic:String} AND epoch = {epoch:String} AND offset >= {since:Int64} "
                "GROUP BY partition",
                topic=topic,
                epoch=epoch,
                since=min(memory[TopicPartition(topic, part), epoch].since for part in parts),
            )
            kept_there = {row["partition"]: row["offsets"] for row in rows}
            forgotten = {row["partition"]: set(row["forgotten"]) for row in rows}
            for position in look.positions["sink"]:
                if position.partition.topic != topic:
                    continue
                seen, number = memory[position.partition, epoch], position.partition.partition
                if seen.since > position.start and topic not in self.unread:
                    self.unread.append(topic)
                upto = min(seen.upto, kept[topic].at[number])
                on_log = set(seen.offsets[: bisect_left(seen.offsets, upto)])
                stored = {offset for offset in kept_there.get(number, ()) if seen.since <= offset < seen.upto}
                gone = on_log - stored - forgotten.get(number, set())
                lost = [o for o in sorted(gone) if not _told_of(gaps, topic, epoch, number, o)]
                for kind, offsets, detail in (
                    ("missing_in_clickhouse", lost, "it is on the log, the sink has passed it, and `log` has it not"),
                    (
                        "not_on_log",
                        sorted(stored - set(seen.offsets)),
                        "`log` has it, and no reader of the log sees it",
                    ),
                ):
                    if offsets:
                        named = [ids.origin(topic, epoch, number, offset) for offset in offsets[: sql.SHOWN]]
                        self._note(kind, len(offsets), [Violation(kind, name, detail) for name in named])

    async def _matters(
        self, default: WindowSettings, done: Reach, held: Mapping[int, int], gaps: Sequence[Gap]
    ) -> None:
        """Whether what matters is in a batch: by the settings that are known, for the cameras that had no others."""
        own: dict[str, list[WindowSettings]] = {}
        for row in await self._queries.rows(
            "SELECT DISTINCT camera_id, window_open_on, window_threshold, window_idle_ms, window_max_ms, "
            "window_max_frames, window_fast_label, window_fast_score, window_fast_cooldown_ms, window_stationary_iou "
            "FROM cameras FINAL"
        ):
            values = {name.removeprefix("window_"): value for name, value in row.items() if name != "camera_id"}
            own.setdefault(row["camera_id"], []).append(
                msgspec.convert(values | {"open_on": tuple(values["open_on"])}, WindowSettings)
            )
        strange = await self._strangers({camera: [default, *settings] for camera, settings in own.items()}, default)
        for camera in strange:
            self.notes.append(
                f"{camera} had windows by settings that nobody knows any more: not asked whether what matters is in one"
            )
        thinned = {
            (row["epoch"], row["partition"]): row["last"]
            for row in await self._queries.rows(
                "SELECT toString(epoch) AS epoch, partition, max(offset) AS last FROM forgotten "
                "WHERE topic = 'detections' GROUP BY epoch, partition"
            )
        }
        groups: list[tuple[str | None, list[WindowSettings]]] = [(None, [default])]
        changed = {camera: settings for camera, settings in own.items() if set(settings) != {default}}
        groups += [(camera, [default, *settings]) for camera, settings in changed.items() if camera not in strange]
        for one, settings in groups:
            if self._bounds.camera is None or one in {None, self._bounds.camera}:
                query = sql.unbatched(
                    settings,
                    camera=one,
                    others={*changed, *strange},
                    bounds=self._bounds,
                    done=done,
                    held=held,
                    gaps=gaps,
                    thinned=thinned,
                )
                await self._ask("what matters", query)

    async def _strangers(self, own: Mapping[str, Sequence[WindowSettings]], default: WindowSettings) -> set[str]:
        """Cameras with windows by settings that are neither theirs nor the default."""
        rows = await self._queries.rows("SELECT DISTINCT camera_id, settings_digest FROM batches")
        return {
            row["camera_id"]
            for row in rows
            if row["settings_digest"] not in {_digest(one) for one in own.get(row["camera_id"], (default,))}
        }


def _digest(settings: WindowSettings) -> str:
    return ids.json_digest(msgspec.to_builtins(settings))


def _reach(look: Survey, positions: Sequence[Position]) -> dict[str, Reach]:
    """How far a stage has come, by topic."""
    at: dict[str, dict[int, int]] = {}
    for p in positions:
        at.setdefault(p.partition.topic, {})[p.partition.partition] = max(p.start, p.committed or p.start)
    return {topic: Reach(look.metas[topic].epoch, offsets) for topic, offsets in at.items()}


def _held(look: Survey, memory: Memory) -> dict[str, dict[int, int]]:
    """Records that the sink has before it, by topic and partition; without ticks, where those were seen."""
    held: dict[str, dict[int, int]] = {topic: {} for topic in STORED}
    for p in look.positions["sink"]:
        topic, number = p.partition
        seen = memory[p.partition, look.metas[topic].epoch]
        at = max(p.start, p.committed or p.start)
        ticks = len(seen.ticks) - bisect_left(seen.ticks, at) if p.behind.exact else 0
        held[topic][number] = p.behind.records - ticks
    return held


def _told_of(gaps: Sequence[Gap], topic: str, epoch: str, partition: int, offset: int) -> bool:
    return any(
        (gap.stage, *gap[1:4]) == ("sink", topic, epoch, partition) and gap.lo <= offset <= gap.hi for gap in gaps
    )


def _ms(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp() * 1000)


def _text(value: Any) -> str:
    """Whoever writes ids may put anything there."""
    return value if isinstance(value, str) else bytes(value).decode(errors="backslashreplace")

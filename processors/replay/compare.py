"""Reads two sides of a stretch of history from ClickHouse, and compares them.

A side is `live`, or a replay by its id or name. A replay that judged recorded windows is compared on the windows that
it has judged so far. One that cut new windows is compared with all live windows of its cameras and time, so that those
which vanished can be told.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from processors.replay import statistics
from processors.replay.comparison import (
    Comparison,
    Coverage,
    Noise,
    Pairing,
    Side,
    Strict,
    Verdict,
)
from processors.replay.pairs import pairing
from processors.replay.plan import Bound, offsets
from processors.replay.sides import Known, SideError, described, find, replays
from processors.replay.statistics import GivenLabel
from processors.replay.strict import Eligible, Texts, eligible, strict
from processors.replay.verdicts import MEMBERS, Verdicts
from processors.store.queries import Queries, Row
from processors.store.times import FIRST_MS, LAST_MS
from schemas.ids import LIVE

# Ids go into the URL: 100 of them, percent-encoded, are 8 KB of the 64 KB that servers take.
_CHUNK = 100

# Differences that a person looks at; all are counted.
_SHOWN = 20

_LABELS = """
    SELECT label_id, camera_id, toUnixTimestamp64Milli(started_at) AS began, toUnixTimestamp64Milli(ended_at) AS over,
        verdict, event_id, toUnixTimestamp64Milli(labelled_at) AS given, chance
    FROM labels FINAL
    WHERE verdict IN ('true_alarm', 'false_alarm', 'missed')
    AND ended_at >= fromUnixTimestamp64Milli({since:Int64}) AND started_at <= fromUnixTimestamp64Milli({until:Int64})
"""
_LABELLED_FRAMES = """
    SELECT event_id, frame_ids FROM {table:Identifier} FINAL
    WHERE event_id IN
    (
        SELECT assumeNotNull(event_id) FROM labels WHERE event_id IS NOT NULL
        AND ended_at >= fromUnixTimestamp64Milli({since:Int64})
        AND started_at <= fromUnixTimestamp64Milli({until:Int64})
    )
"""
_PROGRESS = """
    SELECT count() AS units, countIf(dead) AS failed FROM
    (
        SELECT unit_id, concat('replay_units:', epoch, ':', toString(`partition`), ':', toString(`offset`))
            IN (SELECT origin FROM dead_letters WHERE stage = 'replay')
            AND unit_id NOT IN (SELECT unit_id FROM replay_events WHERE replay_id = {replay:String}) AS dead
        FROM replay_units FINAL WHERE replay_id = {replay:String} AND kind = 'judge'
    )
"""
_BASELINES = f"""
    SELECT replay_id FROM
    (
        SELECT replay_id, max(judged_at) AS newest, uniqExact(batch_id) AS windows,
            uniqExactIf(batch_id, (camera_id, batch_id) IN ({MEMBERS})) AS common
        FROM replay_events WHERE replay_id IN {{among:Array(String)}} GROUP BY replay_id
    )
    WHERE 2 * common >= windows ORDER BY newest DESC LIMIT 1
"""  # noqa: S608 (constants)
_TEXTS = """
    SELECT event_id, rendered_prompt, raw_completion FROM {table:Identifier} FINAL
    WHERE camera_id IN {cameras:Array(String)} AND event_id IN {ids:Array(String)}
"""
_PROMPT_NAMES = "SELECT digest, argMax(name, created_at) AS name FROM prompts WHERE kind = 'version' GROUP BY digest"
_LAST_FRAMES = """
    SELECT frame_id, epoch, `partition`, `offset` FROM frames FINAL
    PREWHERE camera_id IN {cameras:Array(String)} AND frame_id IN {ids:Array(String)}
"""


async def compare(store: Queries, side_a: str, side_b: str, *, strictly: bool = False) -> Comparison:
    """Compare two sides.

    Args:
        store: ClickHouse.
        side_a: `live`, or a replay's id or name.
        side_b: the same; the figures say how it differs from A.
        strictly: compare byte for byte what must be equal. A strict replay of the same prompt is compared so unasked.

    Raises:
        SideError: there is no such side, or both are the same.
        UnavailableError: ClickHouse is away.
    """
    known = await replays(store)
    a, b = find(side_a, known), find(side_b, known)
    if a == b:
        raise SideError(f"both sides are {side_a}: name two, such as `live` and a replay")
    return await _Comparing(store, known, a, b, strictly=strictly).run()


class _Comparing:
    """One comparison under way."""

    def __init__(
        self, store: Queries, known: Mapping[str, Known], a: Known | None, b: Known | None, *, strictly: bool
    ) -> None:
        self._store = store
        self._known = known
        self._a = a
        self._b = b
        self._replays = [side for side in (b, a) if side is not None]
        """The replays among the sides; B first: the figures are about it."""
        self._strictly = strictly or all(side.reproduces for side in self._replays)
        self._verdicts = Verdicts(store, self._replays, strictly=self._strictly)
        self._notes: list[str] = []

    async def run(self) -> Comparison:
        await self._verdicts.load()
        of_a, of_b = await asyncio.gather(self._verdicts.of(self._a), self._verdicts.of(self._b))
        whole = pairing(of_a, of_b)
        paired, unreached = await self._within(whole)
        labels, noise, coverage, names = await asyncio.gather(
            self._labels(paired),
            self._noise(paired),
            self._coverage(unreached),
            self._store.rows(_PROMPT_NAMES),
        )
        checked = await self._strict(paired) if self._strictly else None
        side_a, side_b = statistics.sides(paired)
        prompt_names = {row["digest"]: row["name"] for row in names if row["name"]}
        self._note(coverage)
        return statistics.compared(
            paired,
            labels,
            noise,
            a=_side(self._a, side_a, prompt_names),
            b=_side(self._b, side_b, prompt_names),
            coverage=coverage,
            strict=checked,
            notes=tuple(self._notes),
        )

    # --- what belongs to it ---

    async def _within(self, paired: Pairing) -> tuple[Pairing, int]:
        """Without windows of one side which the other did not come to; and how many those are."""
        vanished = await self._met(paired.vanished, self._a, self._b)
        appeared = await self._met(paired.appeared, self._b, self._a)
        unreached = len(paired.vanished) + len(paired.appeared) - len(vanished) - len(appeared)
        return msgspec.structs.replace(paired, vanished=vanished, appeared=appeared), unreached

    async def _met(self, verdicts: tuple[Verdict, ...], mine: Known | None, other: Known | None) -> tuple[Verdict, ...]:
        """Those windows of my side that the other side could have had, and has not."""
        if other is None or not verdicts:
            return verdicts
        if not other.whole or not (other.cuts or (mine is not None and mine.cuts)):
            return ()
        scope = other.scope
        inside = [
            verdict
            for verdict in verdicts
            if (not scope.cameras or verdict.camera_id in scope.cameras)
            and (scope.since is None or verdict.started_at >= scope.since)
            and (scope.until is None or verdict.started_at < scope.until)
        ]
        bounds = other.plan.upto if other.plan is not None else ()
        if mine is not None or not bounds:
            return tuple(inside)
        topic = other.change.entry
        places = self._verdicts.closed if topic == "detections" else await self._last_frames(inside)
        limits = _limits(bounds, topic)
        return tuple(v for v in inside if not limits or _below(places.get(v.batch_id), limits))

    async def _last_frames(self, verdicts: Sequence[Verdict]) -> dict[str, tuple[str, int, int]]:
        """Where on `frames` the last frame of each window lies, by batch id."""
        last = {verdict.frame_ids[-1]: verdict for verdict in verdicts if verdict.frame_ids}
        rows = await self._by_ids(_LAST_FRAMES, {frame_id: verdict.camera_id for frame_id, verdict in last.items()})
        return {last[row["frame_id"]].batch_id: (row["epoch"], row["partition"], row["offset"]) for row in rows}

    async def _coverage(self, unreached: int) -> Coverage:
        side = self._replays[0]
        [progress], [results] = await asyncio.gather(
            self._store.rows(_PROGRESS, replay=side.replay_id),
            self._store.rows(
                "SELECT count() AS judged FROM replay_events FINAL WHERE replay_id = {replay:String}",
                replay=side.replay_id,
            ),
        )
        return Coverage(
            planned=side.plan.windows if side.plan is not None else 0,
            units=progress["units"],
            judged=results["judged"],
            failed=progress["failed"],
            complete=side.state == "done",
            unreached=unreached,
        )

    def _note(self, coverage: Coverage) -> None:
        for side in self._replays:
            if side.plan is None:
                self._notes.append(f"The plan of {side.name} cannot be read: it is taken for one of recorded windows.")
        if coverage.unreached:
            self._notes.append(
                f"{coverage.unreached:,} windows of one side are left out: the other did not come to them, so nobody "
                "knows what it would say."
            )
        if coverage.failed and any(side.cuts for side in self._replays):
            self._notes.append("Windows that could not be judged may be among those that vanished.")

    # --- labels ---

    async def _labels(self, paired: Pairing) -> list[GivenLabel]:
        side_a, side_b = statistics.sides(paired)
        verdicts = [*side_a, *side_b]
        since, until = self._reach(verdicts)
        if not verdicts or since > until:
            return []
        span = {"since": since, "until": until}
        rows, live, again = await asyncio.gather(
            self._store.rows(_LABELS, **span),
            self._store.rows(_LABELLED_FRAMES, table="risk_events", **span),
            self._store.rows(_LABELLED_FRAMES, table="replay_events", **span),
        )
        frames = {row["event_id"]: tuple(row["frame_ids"]) for row in (*again, *live)}
        labels = [
            GivenLabel(
                label_id=row["label_id"],
                camera_id=row["camera_id"],
                started_at=row["began"],
                ended_at=row["over"],
                verdict=row["verdict"],
                event_id=row["event_id"],
                frame_ids=frames.get(row["event_id"] or "", ()),
                labelled_at=row["given"],
                chance=row["chance"],
            )
            for row in rows
        ]
        wanted = [
            bool(places) or self._could_see(label)
            for label, places in zip(labels, statistics.applied(labels, verdicts), strict=True)
        ]
        left_out = sum(label.verdict == "missed" and not want for label, want in zip(labels, wanted, strict=True))
        if left_out and not all(side.whole for side in self._replays):
            self._notes.append(
                f"{left_out:,} labels of something missed lie where no compared window is; as the replay looked at a "
                "choice of windows, or is not done, they are left out."
            )
        return [label for label, want in zip(labels, wanted, strict=True) if want]

    def _reach(self, verdicts: Sequence[Verdict]) -> tuple[int, int]:
        """The span in which labels count: the scope's, and where that is open, from the first window to the last."""
        first = min((verdict.started_at for verdict in verdicts), default=0)
        last = max((verdict.ended_at for verdict in verdicts), default=-1)
        if not all(side.whole for side in self._replays):
            return first, last
        sinces = [side.scope.since for side in self._replays if side.scope.since is not None]
        untils = [side.scope.until for side in self._replays if side.scope.until is not None]
        return (
            max(min(first, *sinces) if sinces else first, FIRST_MS),
            min(max(last, *untils) if untils else last, LAST_MS),
        )

    def _could_see(self, label: GivenLabel) -> bool:
        """Whether something missed, where there is no window, lies where every side looked at everything."""
        return label.verdict == "missed" and all(
            side.whole
            and (not side.scope.cameras or label.camera_id in side.scope.cameras)
            and (side.scope.since is None or label.ended_at >= side.scope.since)
            and (side.scope.until is None or label.started_at < side.scope.until)
            for side in self._replays
        )

    # --- noise ---

    async def _noise(self, paired: Pairing) -> Noise | None:
        mine = self._replays[0]
        if len(self._replays) == 1 and mine.measures_noise and paired.pairs:
            return statistics.noise(paired.pairs, mine.replay_id, mine.name, itself=True)
        baseline = await self._baseline()
        if baseline is None:
            return None
        live, again = await asyncio.gather(self._verdicts.live_of(baseline), self._verdicts.of(baseline))
        if baseline.state != "done":
            self._notes.append(
                f"The baseline {baseline.name} is {baseline.state}: the noise is what it measured so far."
            )
        return statistics.noise(pairing(live, again).pairs, baseline.replay_id, baseline.name)

    async def _baseline(self) -> Known | None:
        """The one that was run for a side, or is a side; else the newest over windows that are compared."""
        named = [self._known.get(side.plan.baseline) for side in self._replays if side.plan is not None]
        sides = [side for side in self._replays if side.plan is not None and side.plan.kind == "baseline"]
        for one in (*named, *sides):
            if one is not None and await self._has_results(one):
                return one
        among = [
            one.replay_id
            for one in self._known.values()
            if one.plan is not None and one.plan.kind == "baseline" and one.state == "done"
        ]
        if not among:
            return None
        rows = await self._store.rows(_BASELINES, among=among, **self._verdicts.members)
        return self._known[rows[0]["replay_id"]] if rows else None

    async def _has_results(self, one: Known) -> bool:
        return bool(
            await self._store.rows(
                "SELECT 1 AS one FROM replay_events WHERE replay_id = {replay:String} LIMIT 1", replay=one.replay_id
            )
        )

    # --- strict ---

    async def _strict(self, paired: Pairing) -> Strict:
        found = eligible(paired.pairs)
        return strict(found, await self._texts(found), sum(not pair.b.reused for pair in paired.pairs))

    async def _texts(self, found: Eligible) -> dict[str, tuple[Texts, Texts]]:
        shown = found.different[:_SHOWN]
        of_a, of_b = await asyncio.gather(
            self._texts_of(self._a, [pair.a for pair in shown]), self._texts_of(self._b, [pair.b for pair in shown])
        )
        return {
            pair.a.event_id: (of_a[pair.a.event_id], of_b[pair.b.event_id])
            for pair in shown
            if pair.a.event_id in of_a and pair.b.event_id in of_b
        }

    async def _texts_of(self, side: Known | None, verdicts: Iterable[Verdict]) -> dict[str, Texts]:
        rows = await self._by_ids(
            _TEXTS,
            {verdict.event_id: verdict.camera_id for verdict in verdicts},
            table="risk_events" if side is None else "replay_events",
        )
        return {row["event_id"]: Texts(row["rendered_prompt"], row["raw_completion"]) for row in rows}

    async def _by_ids(self, query: str, ids: Mapping[str, str], **parameters: Any) -> list[Row]:
        """The rows of a query that takes `cameras` and `ids`, some at a time; ids are mapped to their cameras."""
        wanted = list(ids)
        found: list[Row] = []
        for at in range(0, len(wanted), _CHUNK):
            chunk = wanted[at : at + _CHUNK]
            cameras = sorted({ids[one] for one in chunk})
            found += await self._store.rows(query, cameras=cameras, ids=chunk, **parameters)
        return found


def _side(known: Known | None, verdicts: Sequence[Verdict], prompt_names: Mapping[str, str]) -> Side:
    prompts = Counter(verdict.prompt_digest for verdict in verdicts)
    models = Counter(verdict.model_digest for verdict in verdicts)
    plan = known.plan if known is not None else None
    return Side(
        id=LIVE if known is None else known.replay_id,
        name=LIVE if known is None else known.name,
        kind="" if plan is None else plan.kind,
        mode="" if plan is None else plan.mode,
        state="" if known is None else known.state,
        change="" if plan is None else described(plan.change, prompt_names),
        verdicts=len(verdicts),
        alarms=sum(verdict.alarm for verdict in verdicts),
        reused=sum(verdict.reused for verdict in verdicts),
        tokens=sum(verdict.tokens for verdict in verdicts if not verdict.reused),
        prompts=dict(prompts.most_common()),
        models=dict(models.most_common()),
        prompt_names={digest: prompt_names[digest] for digest in prompts if digest in prompt_names},
        model_names={verdict.model_digest: verdict.model for verdict in verdicts},
    )


def _limits(bounds: Iterable[Bound], topic: str) -> dict[tuple[str, int], int]:
    return {(bound.epoch, bound.partition): bound.offset for bound in offsets(tuple(bounds), topic)}


def _below(place: tuple[str, int, int] | None, limits: Mapping[tuple[str, int], int]) -> bool:
    """Whether a record lay on the log when the replay was planned; one that cannot be found did."""
    return place is None or place[2] < limits.get(place[:2], 0)

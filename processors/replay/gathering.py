"""Gathers what a report shows beside the figures: reasons, pictures, prompts, the replays' lives, what was left out."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from processors.replay.comparison import Comparison, Side, Verdict
from processors.replay.history import RecordedWindows
from processors.replay.pictures import Recut, pictures
from processors.replay.plan import Plan, PlanError
from processors.replay.report import PICTURED, LeftOut, Life, Part, PromptChange, Report, Told
from processors.store.queries import Queries
from schemas import prompts
from schemas.ids import LIVE
from schemas.prompts import PromptError, PromptVersion
from streams.claims import ClaimStore

# Ids go into the URL: 100 of them, percent-encoded, are 8 KB of the 64 KB that servers take.
_CHUNK = 100
# Changes of prompts that are shown, those on the most windows first: each camera may have its own.
_CHANGES = 3
# Names of what was left out, and reasons that are told apart.
_NAMED, _WHYS = 40, 8

_TOLD = """
    SELECT event_id, reasoning, risk_factors FROM {table:Identifier} FINAL
    PREWHERE camera_id IN {cameras:Array(String)} AND event_id IN {ids:Array(String)}
"""
_VERSIONS = """
    SELECT digest, name, template, output_schema, parameters FROM prompts
    WHERE kind = 'version' AND digest IN {digests:Array(String)} ORDER BY created_at DESC LIMIT 1 BY digest
"""
_STEPS = """
    SELECT name, state, detail, plan, updated_at, min(updated_at) OVER () AS planned_at
    FROM replays FINAL WHERE replay_id = {replay:String} ORDER BY updated_at DESC, offset DESC LIMIT 1
"""
_WORK = """
    SELECT countIf(NOT reused) AS calls, countIf(reused) AS taken,
        minOrNullIf(judged_at, NOT reused) AS first_at, maxOrNullIf(judged_at, NOT reused) AS last_at
    FROM replay_events FINAL WHERE replay_id = {replay:String}
"""
_CONDITIONS = """
    SELECT name, arraySort(groupUniqArray(5)(value)) AS values FROM replay_events FINAL
    ARRAY JOIN mapKeys(conditions) AS name, mapValues(conditions) AS value
    WHERE replay_id = {replay:String} AND NOT reused GROUP BY name ORDER BY name LIMIT 40
"""
_FAILED = """
    SELECT unit, any(message) AS message FROM
    (
        SELECT if(startsWith(origin, {prefix:String}), origin, ifNull(key, '')) AS unit, message FROM dead_letters FINAL
        WHERE stage = 'replay'
    )
    WHERE startsWith(unit, {prefix:String})
    AND unit NOT IN (SELECT unit_id FROM replay_events WHERE replay_id = {replay:String})
    GROUP BY unit ORDER BY unit LIMIT 1000
"""
_DONE = """
    SELECT batch_id FROM replay_events WHERE replay_id = {replay:String}
    UNION DISTINCT SELECT substring(unit_id, length(replay_id) + 2) FROM replay_units WHERE replay_id = {replay:String}
"""


async def gather(
    store: Queries, claims: ClaimStore, found: Comparison, *, made_at: int, time_zone: str = "UTC", version: str = ""
) -> Report:
    """The report of a comparison.

    Args:
        store: ClickHouse.
        claims: the image store.
        found: what is reported.
        made_at: now, milliseconds since the Unix epoch.
        time_zone: IANA zone of whoever reads it.
        version: of the product.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    replays = {side.id: role for side, role in ((found.a, "Side A"), (found.b, "Side B")) if side.id != LIVE}
    if found.noise is not None:
        replays.setdefault(found.noise.replay_id, "Noise")
    pairs = [flip.pair for flip in found.flips[:PICTURED]]
    lives = [life for replay, role in replays.items() if (life := await _life(store, replay, role)) is not None]
    told = await _told(store, found.a, [pair.a for pair in pairs])
    return Report(
        comparison=found,
        told=told | await _told(store, found.b, [pair.b for pair in pairs]),
        pictures=await pictures(store, claims, pairs, _recut(found, lives)),
        prompts=tuple(await _changes(store, found)),
        lives=tuple(lives),
        left_out=tuple(await _left_out(store, found)),
        made_at=made_at,
        time_zone=time_zone,
        version=version,
    )


def differences(before: PromptVersion, after: PromptVersion) -> tuple[Part, ...]:
    """What differs between two versions, file by file, with three lines around it."""
    old, new = before.to_files(), after.to_files()
    parts = []
    for file, text in old.items():
        lines = list(difflib.unified_diff(text.splitlines(), new[file].splitlines(), lineterm=""))[2:]
        if lines:
            parts.append(Part(file=file, lines=tuple((line[:1] or " ", _line(line)) for line in lines)))
    return tuple(parts)


def _line(line: str) -> str:
    """A line of a difference without its mark; a place (`@@ -1,4 +1,5 @@`) in words."""
    if not line.startswith("@@"):
        return line[1:]
    return f"from line {line.split('+')[1].split(',', maxsplit=1)[0].split(maxsplit=1)[0]} on"


async def _told(store: Queries, side: Side, verdicts: Sequence[Verdict]) -> dict[str, Told]:
    cameras = {verdict.event_id: verdict.camera_id for verdict in verdicts}
    wanted = list(cameras)
    found: dict[str, Told] = {}
    for at in range(0, len(wanted), _CHUNK):
        chunk = wanted[at : at + _CHUNK]
        rows = await store.rows(
            _TOLD,
            table="risk_events" if side.id == LIVE else "replay_events",
            cameras=sorted({cameras[event] for event in chunk}),
            ids=chunk,
        )
        found |= {
            row["event_id"]: Told(reasoning=row["reasoning"], risk_factors=tuple(row["risk_factors"])) for row in rows
        }
    return found


async def _changes(store: Queries, found: Comparison) -> list[PromptChange]:
    """The prompts that judged the same windows on both sides, those on the most windows first."""
    counts = Counter((pair.a.prompt_digest, pair.b.prompt_digest) for pair in found.pairing.pairs)
    other = [(both, count) for both, count in counts.most_common() if both[0] != both[1]][:_CHANGES]
    digests = sorted({digest for both, _ in other for digest in both})
    if not digests:
        return []
    versions = await _versions(store, digests)
    names = {**found.a.prompt_names, **found.b.prompt_names}
    return [_change(before, after, count, versions, names) for (before, after), count in other]


def _change(
    before: str, after: str, count: int, versions: Mapping[str, PromptVersion | str], names: Mapping[str, str]
) -> PromptChange:
    def title(digest: str) -> str:
        version = versions[digest]
        name = names.get(digest) or (version.name if isinstance(version, PromptVersion) else "")
        return f"{name} ({digest[:12]})" if name else digest[:12]

    old, new = versions[before], versions[after]
    parts: tuple[Part, ...] = ()
    missing = ""
    if isinstance(old, PromptVersion) and isinstance(new, PromptVersion):
        parts = differences(old, new)
    else:
        missing = next(text for text in (old, new) if isinstance(text, str))
    return PromptChange(before=title(before), after=title(after), windows=count, parts=parts, missing=missing)


async def _versions(store: Queries, digests: Sequence[str]) -> dict[str, PromptVersion | str]:
    """Prompt versions by digest, or why one cannot be shown."""
    found: dict[str, PromptVersion | str] = dict.fromkeys(digests, "its text is not in ClickHouse")
    found |= {version.digest: version for version in prompts.shipped().values() if version.digest in found}
    for row in await store.rows(_VERSIONS, digests=list(digests)):
        try:
            found[row["digest"]] = PromptVersion(
                template=row["template"],
                output_schema=row["output_schema"],
                parameters=row["parameters"],
                name=row["name"],
            )
        except PromptError as error:
            found[row["digest"]] = f"its text cannot be read: {error}"
    return found


async def _life(store: Queries, replay_id: str, role: str) -> Life | None:
    steps = await store.rows(_STEPS, replay=replay_id)
    if not steps:
        return None
    [work] = await store.rows(_WORK, replay=replay_id)
    conditions = await store.rows(_CONDITIONS, replay=replay_id)
    step = steps[0]
    return Life(
        replay_id=replay_id,
        name=step["name"] or replay_id,
        role=role,
        state=step["state"],
        detail=step["detail"],
        plan=step["plan"],
        planned_at=_ms(step["planned_at"]),
        updated_at=_ms(step["updated_at"]),
        first_at=_ms(work["first_at"]),
        last_at=_ms(work["last_at"]),
        calls=work["calls"],
        reused=work["taken"],
        conditions={row["name"]: ", ".join(row["values"]) for row in conditions},
    )


def _recut(found: Comparison, lives: Iterable[Life]) -> Recut | None:
    """The side that made windows of its own, B's before A's."""
    for side, of_a in ((found.b, False), (found.a, True)):
        life = next((one for one in lives if one.replay_id == side.id), None)
        plan = _plan(life)
        if plan is not None and plan.change.entry != "contexts":
            return Recut(side.id, side.name, of_a)
    return None


def _plan(life: Life | None) -> Plan | None:
    try:
        return Plan.decode(life.plan) if life is not None else None
    except PlanError:
        return None


async def _left_out(store: Queries, found: Comparison) -> list[LeftOut]:
    """What is not in the comparison: failed units, windows never given out, what cannot be checked strictly."""
    left: list[LeftOut] = []
    for side in (found.b, found.a):
        if side.id == LIVE:
            continue
        left += await _failed(store, side)
        left += await _not_given(store, side)
    if found.coverage.unreached:
        left.append(
            LeftOut(
                what="windows of one side",
                count=found.coverage.unreached,
                why="the other side did not come to them: it looked at a choice, or is not done",
            )
        )
    if found.strict is not None:
        left += [
            LeftOut(what="events not checked strictly", count=one.count, why=one.reason, names=one.examples)
            for one in found.strict.ineligible
        ]
    return left


async def _failed(store: Queries, side: Side) -> list[LeftOut]:
    rows = await store.rows(_FAILED, replay=side.id, prefix=f"{side.id}:")
    whys: dict[str, list[str]] = {}
    for row in rows:
        whys.setdefault(row["message"], []).append(row["unit"].removeprefix(f"{side.id}:"))
    ordered = sorted(whys.items(), key=lambda one: -len(one[1]))
    if len(ordered) > _WHYS:
        rest = [name for _, names in ordered[_WHYS:] for name in names]
        ordered = [*ordered[:_WHYS], ("for other reasons; `rewatch dlq ls` says which", rest)]
    return [
        LeftOut(
            what=f"windows of {side.name} that could not be judged",
            count=len(names),
            why=why,
            names=tuple(names[:_NAMED]),
        )
        for why, names in ordered
    ]


async def _not_given(store: Queries, side: Side) -> list[LeftOut]:
    """Windows of the plan's scope that were never given out, and records that nobody could read."""
    rows = await store.rows(_STEPS, replay=side.id)
    try:
        plan = Plan.decode(rows[0]["plan"]) if rows else None
    except PlanError as error:
        return [LeftOut(what=f"plan of {side.name}", count=1, why=str(error))]
    if plan is None or plan.kind == "shadow" or plan.change.entry != "contexts":
        return []
    windows = RecordedWindows(store, plan.scope, plan.upto)
    try:
        batches = await windows.batches()
    except PlanError as error:
        return [LeftOut(what=f"scope of {side.name}", count=1, why=str(error))]
    done = {row["batch_id"] for row in await store.rows(_DONE, replay=side.id)}
    missing = [batch for batch in batches if batch not in done]
    left = []
    if missing:
        why = (
            rows[0]["detail"] or "they cannot be read, or nothing says which prompt judged them"
            if side.state == "done"
            else f"the replay is {side.state}, and did not come to them"
        )
        left.append(
            LeftOut(
                what=f"windows that {side.name} did not judge",
                count=len(missing),
                why=why,
                names=tuple(missing[:_NAMED]),
            )
        )
    skipped = windows.skipped
    if skipped.count:
        left.append(
            LeftOut(
                what="records that nobody can read",
                count=skipped.count,
                why="; ".join(sorted(set(skipped.named.values()))[:3]),
                names=tuple(list(skipped.named)[:_NAMED]),
            )
        )
    return left


def _ms(at: datetime | Any) -> int | None:
    return None if at is None else round(at.timestamp() * 1000)

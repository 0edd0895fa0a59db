"""Replays on a running log: found by name, planned over what was recorded, run by a planner, seen to their end."""

import asyncio
import difflib
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

import msgspec
import psutil
import structlog
from aiokafka import TopicPartition

from infra import remembered, replaying, topology
from infra.config import Settings
from processors.analyze.judge import parameters_of
from processors.analyze.port import Server
from processors.analyze.settings import SLOTS
from processors.replay import desk, history
from processors.replay.cut import Cut
from processors.replay.desk import ControlStates, KafkaLog, Log
from processors.replay.history import MadeWindows, RecordedWindows, Timeline, Windows
from processors.replay.ledger import AWAY
from processors.replay.plan import Bound, Llm, Plan, PlanError, State, replay_id
from processors.replay.planner import Planner, Ports, Progress
from processors.replay.sorting import Judging, Sorter, Ways
from processors.store.queries import Queries, Row
from schemas.prompts import PromptVersion
from schemas.records import Replay, TopicMeta
from streams.admin import ensure_topics
from streams.claims import ClaimStore
from streams.control import Cameras, ControlTable
from streams.errors import FencedError, UncertainError
from streams.kafka import Kafka
from streams.prompts import Known, Prompts
from streams.topics import partition_of

log = structlog.get_logger(__name__)

_SETTLE_S = 120.0
"""How long the end waits for ClickHouse to have what the log has: the sink takes a second, more on a busy machine."""

_LOOK_S = 0.3

_SHORTEST = 4
"""Characters of an id that name a replay, if they are those of one alone."""

_HISTORY = {"contexts": ("contexts",), "detections": ("detections", "contexts"), "frames": ("detections", "contexts")}
"""What a replay reads, by where it enters. Cut windows get what enrichers said of the same recorded ones, too."""

_LISTED = """
    SELECT r.replay_id AS replay_id, r.name AS name, r.state AS state, r.plan AS plan, r.detail AS detail,
        r.began AS began, r.newest AS updated_at, e.judged AS judged, e.reused AS reused, e.tokens AS tokens,
        e.llm_ms AS llm_ms, d.failed AS failed
    FROM
    (
        SELECT replay_id, argMax(name, (updated_at, offset)) AS name, argMax(state, (updated_at, offset)) AS state,
            argMax(plan, (updated_at, offset)) AS plan, argMax(detail, (updated_at, offset)) AS detail,
            min(updated_at) AS began, max(updated_at) AS newest
        FROM replays FINAL GROUP BY replay_id
    ) AS r
    LEFT JOIN
    (
        SELECT replay_id, countIf(NOT t.reused) AS judged, countIf(t.reused) AS reused,
            sumIf(t.prompt_tokens + t.completion_tokens, NOT t.reused) AS tokens,
            sumIf(t.inference_ms, NOT t.reused) AS llm_ms
        FROM replay_events AS t FINAL GROUP BY replay_id
    ) AS e ON e.replay_id = r.replay_id
    LEFT JOIN
    (
        SELECT splitByChar(':', ifNull(key, ''))[1] AS replay_id, uniqExact(key) AS failed
        FROM dead_letters FINAL WHERE stage = 'replay' AND kind = 'error'
        AND key NOT IN (SELECT unit_id FROM replay_events)
        GROUP BY replay_id
    ) AS d ON d.replay_id = r.replay_id
    ORDER BY began DESC
"""
_FINISHED = """
    SELECT batch_id, reused, prompt_tokens + completion_tokens AS tokens FROM replay_events FINAL
    WHERE replay_id = {replay:String}
"""
_STORED = """
    SELECT (SELECT uniqExact(unit_id) FROM replay_events WHERE replay_id = {replay:String}) AS results,
        (SELECT argMax(state, (updated_at, offset)) FROM replays WHERE replay_id = {replay:String}) AS state
"""
_FRAMES = """
    SELECT count() AS frames FROM detections
    WHERE (empty({cameras:Array(String)}) OR camera_id IN {cameras:Array(String)})
    AND least(ifNull(captured_at, arrived_at), arrived_at) >= fromUnixTimestamp64Milli({since:Int64})
    AND least(ifNull(captured_at, arrived_at), arrived_at) < fromUnixTimestamp64Milli({until:Int64})
"""
_IDENTICAL = """
    SELECT count() AS compared,
        countIf(r.raw_completion = e.raw_completion AND r.rendered_prompt = e.rendered_prompt) AS identical
    FROM
    (SELECT camera_id, batch_id, raw_completion, rendered_prompt FROM replay_events FINAL
        WHERE replay_id = {replay:String} AND NOT reused) AS r
    INNER JOIN
    (SELECT camera_id, batch_id, raw_completion, rendered_prompt FROM risk_events FINAL WHERE run = 'live') AS e
    ON e.camera_id = r.camera_id AND e.batch_id = r.batch_id
"""
_FAILED = """
    SELECT key, message, origin FROM dead_letters FINAL
    WHERE stage = 'replay' AND kind = 'error' AND startsWith(ifNull(key, ''), {prefix:String})
    AND key NOT IN (SELECT unit_id FROM replay_events WHERE replay_id = {replay:String})
    ORDER BY failed_at LIMIT 100
"""
_LACKED = """
    SELECT count() AS failed FROM dead_letters FINAL
    WHERE stage = 'replay' AND kind = 'error' AND startsWith(ifNull(key, ''), {prefix:String})
    AND position(message, {away:String}) > 0
    AND key NOT IN (SELECT unit_id FROM replay_events WHERE replay_id = {replay:String})
"""
_PROCESS = re.compile(r"process (?P<pid>\d{1,9}) on (?P<host>\S+) \(")
"""How a planner calls itself."""


class UnknownReplayError(LookupError):
    """No replay, or several, go by this name; the message says which are near."""


class Made(NamedTuple):
    """A replay."""

    replay_id: str
    name: str
    plan: Plan


class Weighed(NamedTuple):
    """What a plan holds, window by window."""

    windows: int
    reused: int
    """Windows whose verdict is there already."""
    left_out: int
    why: dict[str, str]
    """Of some that are left out, by name."""


class Office:
    """Where replays are planned and run: the log, ClickHouse, and what is known of prompts, cameras and replays."""

    def __init__(
        self,
        settings: Settings,
        kafka: Kafka,
        store: Queries,
        *,
        prompts: Prompts,
        cameras: Cameras,
        table: ControlTable[Replay],
        metas: dict[str, TopicMeta],
    ) -> None:
        self.settings = settings
        self.kafka = kafka
        self.store = store
        self.prompts = prompts
        self.table = table
        self._cameras = cameras
        self._metas = metas
        self._timeline: Timeline | None = None
        self._forgotten: dict[str, Known] = {}

    def find(self, text: str) -> Made:
        """The replay of this name (the newest, if several had it), id, or beginning of an id.

        Raises:
            UnknownReplayError: there is none, or a beginning is that of several.
            PlanError: its plan cannot be read. Others' plans need not be.
        """
        steps = [step for step in self.table.all().values() if not _is_shadow(step.plan)]
        found = choose(text, [(step.replay_id, step.name, step.updated_at) for step in steps])
        step = self.table.all()[found]
        return Made(step.replay_id, step.name, plan_of(step.name, step.plan))

    def state(self, replay: str) -> State:
        """Where a replay is."""
        step = self.table.get(replay)
        return step.state if step is not None else "planned"  # type: ignore[return-value]

    def name(self, wanted: str, otherwise: str) -> str:
        """A name for a new replay that no other has: the wanted one, or one made of `otherwise`.

        Raises:
            PlanError: the wanted one is another's.
        """
        taken = {step.name for step in self.table.all().values()} | {"live", *self.table.all()}
        if wanted in taken:
            raise PlanError(f"--name {wanted}: another replay has it, or the word means something else; choose another")
        if wanted:
            return wanted
        numbered = (f"{otherwise}-{n}" for n in range(2, len(taken) + 3))
        return next(name for name in (otherwise, *numbered) if name not in taken)

    async def drawn(self, plan: Plan) -> Plan:
        """The plan, bounded by what ClickHouse has now.

        Raises:
            UnavailableError: ClickHouse is away.
        """
        upto = await history.ends(self.store, *_HISTORY[plan.change.entry])
        frames = 0
        if plan.change.entry != "contexts":
            since, until = history.span(plan.scope)
            [row] = await self.store.rows(_FRAMES, cameras=list(plan.scope.cameras), since=since, until=until)
            frames = row["frames"]
        return msgspec.structs.replace(plan, upto=upto, frames=frames)

    async def make(self, name: str, plan: Plan) -> Made:
        """Write a new replay down, as planned; from here on it can be resumed."""
        made = Made(replay_id(f"{name}/{secrets.token_hex(4)}", int(time.time() * 1000)), name, plan)
        made = made._replace(plan=msgspec.structs.replace(plan, since=await self._since()))
        await self._states(made).say("planned", "")
        return made

    async def say(self, made: Made, state: State, why: str) -> None:
        """Write the next step of its life down."""
        await self._states(made).say(state, why)

    def windows(self, plan: Plan) -> Windows:
        """The plan's windows; of a plan with another detector those that the recorded detections would make."""
        if plan.change.entry == "contexts":
            return RecordedWindows(self.store, plan.scope, plan.upto)
        return MadeWindows(self.store, Cut(self.store, plan, self.settings.windows.record()))

    def judging(self, plan: Plan, server: Server) -> Judging:
        """What will judge the plan's windows."""
        settings = self.settings
        told = {} if plan.change.llm is not None else topology.conditions(settings)
        conditions = {
            "seed": str(settings.llm.seed),
            "server_build": server.build,
            "context_size": str(server.context_size),
            **told,
        }

        def parameters(prompt: PromptVersion) -> dict[str, Any]:
            return parameters_of(settings.llm, prompt)

        return Judging(server.model, server.model_digest, conditions, parameters)

    async def sorter(self, plan: Plan, judging: Judging, *, judges: bool = False) -> Sorter:
        """What tells the windows to be judged from the others; `judges`: they are going to be."""
        if self._timeline is None:
            self._timeline = await Timeline.read(self.store)
            self._forgotten = await remembered.versions(self.store, self.prompts.versions())
        versions = self.prompts.versions

        def prompt(digest: str) -> PromptVersion | None:
            known = versions().get(digest) or self._forgotten.get(digest)
            return known.version if known is not None else None

        async def said(wanted: Any) -> Any:
            return await history.said(self.store, wanted)

        return Sorter(plan, judging, Ways(prompt, self._timeline.at, said, self._put_back if judges else _not_judged))

    async def _put_back(self, digests: Collection[str]) -> None:
        """Put those of these prompt versions on the log that it has forgotten: workers look them up there."""
        gone = [self._forgotten[digest] for digest in digests if digest in self._forgotten]
        try:
            await remembered.put_back(self.prompts, gone)
        except FencedError as error:  # by writers of other prompts: nobody took the replay over
            raise UncertainError(str(error)) from error
        for known in gone:
            del self._forgotten[known.version.digest]  # the log has it

    async def weigh(self, plan: Plan, judging: Judging) -> Weighed:
        """Go through the plan's windows as a planner would, and count.

        Raises:
            PlanError: ClickHouse does not take its condition, or the change cannot be made.
            OtherWeightsError: it is strict, and other weights judge here.
            UnavailableError: ClickHouse is away.
        """
        windows, sorter = self.windows(plan), await self.sorter(plan, judging)
        judge = reuse = 0
        async for page in windows.pages(lambda _: False):
            found = await sorter.sort(page)
            judge += len(found.judge)
            reuse += len(found.reuse)
        skipped = (sorter.skipped, windows.skipped)
        why = {name: why for skips in skipped for name, why in skips.named.items()}
        return Weighed(judge + reuse, reuse, sum(skips.count for skips in skipped), why)

    async def planner(
        self, made: Made, *, workers: int, show: Callable[[Progress], None], stop: asyncio.Event
    ) -> tuple[Planner, Sorter, Windows]:
        """The planner of a replay, whose LLM answers.

        Raises:
            UnavailableError: it does not, or ClickHouse is away.
        """
        server = await replaying.server(self.settings, made.plan.change.llm)
        log: Log = KafkaLog(self.kafka, made.replay_id, made.plan.since, lambda topic: self._metas[topic].epoch)
        windows = self.windows(made.plan)
        if made.plan.change.entry == "frames":
            log, windows = self._looking_again(made, log)
        sorter = await self.sorter(made.plan, self.judging(made.plan, server), judges=True)
        urls = 1 if made.plan.change.llm is not None else len(self.settings.llm.urls)
        slots = (server.slots or self.settings.llm.slots or SLOTS) * urls
        who = f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(3)})"  # `has_ended` reads it
        ports = Ports(
            log=log,
            states=self._states(made),
            windows=windows,
            sorter=sorter,
            partition=self._partition,
            finished=lambda: self._finished(made.replay_id),
        )
        at_once = max(1, round(made.plan.share * slots)) * max(1, workers)
        planner = Planner(made.replay_id, made.plan, ports, slots=at_once, who=who, show=show, stop=stop)
        return planner, sorter, windows

    def _looking_again(self, made: Made, log: Log) -> tuple[Log, Windows]:
        """The log and the windows of a replay with another detector."""
        from processors.detect.stage import DetectStage  # noqa: PLC0415 - Pillow and numpy, which nothing else here needs
        from processors.replay.redetect import Redetection, RemadeLog, RemadeWindows  # noqa: PLC0415

        settings, default = self.settings, self.settings.windows.record()
        detector = settings.detector.model_copy(update={"model_path": made.plan.change.detector, "url": None})

        async def open_stage() -> DetectStage:
            other = settings.model_copy(update={"detector": detector})
            model = await asyncio.to_thread(topology.detector, other)
            return DetectStage(model, ClaimStore(settings.images_root), detector)

        kept = RemadeLog(log, made.replay_id)
        redetection = Redetection(self.store, made.plan, default, open_stage, replay_id=made.replay_id)
        return kept, RemadeWindows(self.store, made.plan, default, redetection, kept)

    async def settle(self, replay: str, results: int, *, within_s: float = _SETTLE_S) -> bool:
        """Wait until ClickHouse has the replay's results and its state; whether it has, in bounded time."""
        deadline = time.monotonic() + within_s
        state = self.state(replay)
        while time.monotonic() < deadline:
            [row] = await self.store.rows(_STORED, replay=replay)
            if row["results"] >= results and row["state"] == state:
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def identical(self, replay: str) -> tuple[int, int]:
        """Of a strict replay's verdicts: how many there are to compare, and how many are the recorded ones' equals."""
        [row] = await self.store.rows(_IDENTICAL, replay=replay)
        return row["compared"], row["identical"]

    async def lacked_llm(self, replay: str) -> bool:
        """Whether units of the replay failed because its LLM was away: resumed, it makes them again."""
        [row] = await self.store.rows(_LACKED, replay=replay, prefix=f"{replay}:", away=AWAY)
        return bool(row["failed"])

    async def _finished(self, replay: str) -> list[tuple[str, bool, int]]:
        rows = await self.store.rows(_FINISHED, replay=replay)
        return [(row["batch_id"], row["reused"], row["tokens"]) for row in rows]

    async def _since(self) -> tuple[Bound, ...]:
        """Where the topics of replays end now."""
        tps = [TopicPartition(topic, p) for topic in desk.TOPICS for p in range(self.kafka.settings.partitions)]
        bounds = await self.kafka.bounds(tps)
        return tuple(
            Bound(topic=tp.topic, epoch=self._metas[tp.topic].epoch, partition=tp.partition, offset=end)
            for tp, (_, end) in bounds.items()
        )

    def _partition(self, camera_id: str) -> int:
        """Where the camera lives now; of one that is gone, where one of its name would."""
        camera = self._cameras.get(camera_id)
        pin = camera.partition if camera is not None else None
        return partition_of(camera_id, self.kafka.settings.partitions, pin)

    def _states(self, made: Made) -> ControlStates:
        return ControlStates(self.table, made.replay_id, made.name, made.plan)


async def _not_judged(_: Collection[str]) -> None:
    """Only a plan: nothing is written."""


@asynccontextmanager
async def office(settings: Settings) -> AsyncIterator[Office]:
    """An office on the log and ClickHouse of the settings, which must answer.

    Raises:
        KafkaError, TimeoutError or OSError: the broker is away.
    """
    kafka = Kafka(settings.kafka)
    metas = await ensure_topics(kafka)
    prompts, cameras, table = Prompts(kafka), topology.cameras(settings, kafka), ControlTable(kafka, "replays", Replay)
    await asyncio.gather(prompts.table.load(), cameras.table.load(), table.load())
    async with aclosing(Queries(settings.clickhouse)) as store, table.following():
        yield Office(settings, kafka, store, prompts=prompts, cameras=cameras, table=table, metas=metas)


async def listed(store: Queries) -> list[Row]:
    """Every replay with its state and counts, the newest first, shadows left out; `plan` is read.

    `gone` says whether it seems to run, but its planner ended. One whose plan cannot be read is left out, and said.
    """
    rows = []
    for row in await store.rows(_LISTED):
        try:
            plan = plan_of(row["name"], row["plan"])
        except PlanError as error:
            log.warning("replay left out", replay=row["replay_id"], why=str(error))
        else:
            rows += [_read(row, plan)] if plan.kind != "shadow" else []
    return rows


async def one(store: Queries, text: str) -> Row:
    """One replay as `listed` has it, by its name, its id or the beginning of one.

    Raises:
        UnknownReplayError: as `choose`.
        PlanError: its plan cannot be read. Others' plans need not be.
    """
    rows = {row["replay_id"]: row for row in await store.rows(_LISTED) if not _is_shadow(row["plan"])}
    row = rows[choose(text, [(row["replay_id"], row["name"], row["began"]) for row in rows.values()])]
    return _read(row, plan_of(row["name"], row["plan"]))


def _read(row: Row, plan: Plan) -> Row:
    return row | {"plan": plan, "gone": row["state"] == "running" and has_ended(row["detail"])}


def plan_of(name: str, text: str) -> Plan:
    """The plan of the replay of this name.

    Raises:
        PlanError: it cannot be read.
    """
    try:
        return Plan.decode(text)
    except PlanError as error:
        raise PlanError(
            f"the plan of {name} cannot be read: a newer version wrote it, or it is broken: {error}"
        ) from error


def _is_shadow(text: str) -> bool:
    """Whether a plan is a shadow's, as far as it can be read."""
    try:
        return Plan.decode(text).kind == "shadow"
    except PlanError:
        return False


async def failures(store: Queries, replay: str) -> list[Row]:
    """Its units that could not be judged: `key`, `message`, and `origin`, which `rewatch dlq` takes."""
    return await store.rows(_FAILED, replay=replay, prefix=f"{replay}:")


def choose(text: str, known: Sequence[tuple[str, str, Any]]) -> str:
    """The id that a text means, of id, name and time of each: a name (the newest's), an id, the beginning of one.

    Raises:
        UnknownReplayError: none, or a beginning is that of several.
    """
    ordered = sorted(known, key=lambda one: one[2], reverse=True)
    named = [replay for replay, name, _ in ordered if text in {name, replay}]
    if named:
        return named[0]
    begins = [replay for replay, _, _ in ordered if replay.startswith(text)]
    if len(begins) == 1 and len(text) >= _SHORTEST:
        return begins[0]
    if len(begins) > 1 and len(text) >= _SHORTEST:
        raise UnknownReplayError(f"{text} is the beginning of several replays; say more of it: {', '.join(begins[:5])}")
    names = [name for _, name, _ in ordered]
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.4) or names[:5]
    others = f"; there are, among others: {', '.join(near)}" if near else ""
    raise UnknownReplayError(f"there is no replay {text!r}{others}; `rewatch replay ls` lists them")


def has_ended(who: str) -> bool:
    """Whether a planner that calls itself so was a process of this machine that is gone; False where nobody knows."""
    found = _PROCESS.match(who)
    return found is not None and found["host"] == socket.gethostname() and not psutil.pid_exists(int(found["pid"]))


def with_llm(made: Made, llm: Llm | None) -> Made:
    """The replay with its LLM at another address."""
    change = msgspec.structs.replace(made.plan.change, llm=llm)
    return made._replace(plan=msgspec.structs.replace(made.plan, change=change))

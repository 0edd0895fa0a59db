"""replay as a map stage: units of replays judged again, and live windows judged by shadows, into `replay_events`.

It runs beside analyze and shares its judge, and so its gate: live work comes before shadows, shadows before replays.
Whatever it says goes to `replay_events`, which nothing that notifies or alerts reads.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import structlog
from aiokafka.errors import KafkaError
from structlog.contextvars import bound_contextvars

from processors.analyze.endpoints import Caller
from processors.analyze.gate import Priority
from processors.analyze.judge import Judge
from processors.replay.ledger import AWAY
from processors.replay.metrics import ReplayMetrics
from processors.replay.plan import Llm, Plan, PlanError, Unit, event_of, offsets
from schemas import ids, prompts
from schemas.prompts import PromptVersion
from schemas.records import Context, DeadLetter, Replay, ReplayUnit, RiskEvent
from streams import codec
from streams.errors import UnavailableError, UnprocessableError
from streams.messages import SOURCE, Emit, Incoming
from streams.turns import Turns

log = structlog.get_logger(__name__)

UNITS, WINDOWS = "replay_units", "contexts"

_PATIENCE_S = 20.0
"""How long to wait for a slot before the stage says that it waits on live windows, which is no stall: half of what
a worker that says nothing is given."""

_KEPT = 1000
"""Verdicts of a shadow kept while another's server is away; more would be of partitions that went to other members."""


_AWAY_S = 60.0
"""How long units wait for a plan's own LLM while its replay runs. One that died is back in seconds as a rule; behind
those of one that is not, the units of other replays in the same partition must not stand."""


class Look(NamedTuple):
    """How the stage looks things up."""

    replays: Callable[[], Mapping[str, Replay]]
    """The latest record of every replay, by its id."""
    prompt: Callable[[str], PromptVersion | None]
    """The prompt version of a digest."""
    load: Callable[[], Awaitable[None]]
    """Reads what was written of both until now."""


class Judges:
    """The shared judge, and one of its own for each other LLM that a plan names, made when it is needed."""

    def __init__(self, shared: Judge, make: Callable[[Llm], Judge]) -> None:
        self._shared = shared
        self._make = make
        self._made: dict[Llm, Judge] = {}

    def of(self, llm: Llm | None) -> Judge:
        """The judge that asks this LLM; without one that of live windows."""
        if llm is None:
            return self._shared
        if llm not in self._made:
            self._made[llm] = self._make(llm)
        return self._made[llm]

    def slots(self, llm: Llm | None) -> int:
        """How many requests go to this LLM at once, as far as known; at least one."""
        judge = self._shared if llm is None else self._made.get(llm)
        return max(1, judge.gate.slots) if judge is not None else 1

    async def close(self) -> None:
        """Let go of every server."""
        await asyncio.gather(*(judge.close() for judge in (self._shared, *self._made.values())))


class ReplayStage:
    """A unit in, its event out; a live window in, an event for each shadow that covers it."""

    name = "replay"
    inputs: tuple[str, ...] = (UNITS, WINDOWS)
    outputs: tuple[str, ...] = ("replay_events",)
    beside: tuple[str, ...] = (WINDOWS,)
    """They are analyze's: what is redriven there it has to judge again, and nobody else."""

    def __init__(
        self, judges: Judges, look: Look, *, deadline_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        """`deadline_s`: what the LLM has for one window; `clock`: wall time, seconds since the Unix epoch."""
        self._judges = judges
        self._look = look
        self._clock = clock
        self._plans: dict[str, tuple[str, Plan]] = {}
        self._kept: OrderedDict[tuple[str, str], Emit] = OrderedDict()
        self._turns: dict[str, Turns] = {}
        self._queued = 0
        self._away: dict[Llm, tuple[float, float]] = {}
        """Plans' own LLMs that are away: since when, and when that was seen last; seconds, monotonic."""
        self.metrics = ReplayMetrics()
        # As analyze's: three attempts and their canaries, besides those of others before them.
        self.patience_s = 2 * 3 * deadline_s

    @property
    def concurrency(self) -> int:
        """Windows in hand at once."""
        return sum(map(self.at_once, self.inputs))

    def at_once(self, topic: str) -> int:
        """How many of a topic: as many live windows as there are slots; units by the shares of the replays that run.

        A replay whose planner died seems to run, so this bounds none of them: each has its own share (`_turn`). Units
        that wait for their turn there do not count, or those of one replay would keep another's out.
        """
        slots = self._judges.slots(None)
        if topic == WINDOWS:
            return slots
        held: dict[Llm | None, int] = {}
        for _, plan in self._running():
            if plan.kind != "shadow":
                llm = plan.change.llm
                held[llm] = held.get(llm, 0) + self._share(plan)
        return max(1, sum(min(count, self._judges.slots(llm)) for llm, count in held.items())) + self._queued

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        """What a re-run says of the record's window: an event for a unit, or one for each shadow of a live window."""
        return await (self._unit(record) if record.topic == UNITS else self._shadowed(record))

    async def close(self) -> None:
        """Let go of the servers."""
        await self._judges.close()

    async def _unit(self, record: Incoming) -> Sequence[Emit]:
        """The unit's event; nothing where its replay was cancelled, or where it is not for a judge."""
        unit = codec.decode(record, ReplayUnit)
        if unit.kind == "detect":
            return []
        plan = await self._plan_of(unit)
        if self._cancelled(unit.replay_id):
            return []
        context = codec.decode_bytes(WINDOWS, unit.payload, None, Context)
        if unit.unit_id != str(Unit(unit.replay_id, context.batch_id)):
            raise UnprocessableError(f"unit {unit.unit_id} holds window {context.batch_id}", camera_id=unit.camera_id)
        llm = plan.change.llm
        async with self._turn(unit.replay_id):
            try:
                event = await self._judge(
                    plan, unit.replay_id, context, unit.prompt_digest, key=record.origin, priority=Priority.REPLAY
                )
            except UnavailableError as error:
                if llm is not None and error.waiting_on == "llm" and await self._lost(unit.replay_id, llm):
                    raise UnprocessableError(self._lost_text(unit, llm, error), camera_id=unit.camera_id) from error
                raise
        if llm is not None:
            self._away.pop(llm, None)
        if self._cancelled(unit.replay_id):  # meanwhile
            return []
        return [_emit(unit.replay_id, event)]

    @asynccontextmanager
    async def _turn(self, replay_id: str) -> AsyncIterator[None]:
        """Be one of the units that the replay's share lets be judged at once.

        Raises:
            UnavailableError: others of it, which came first, have not been judged for long. It is no stall.
        """
        turns = self._turns.get(replay_id)
        if turns is None:
            turns = self._turns[replay_id] = Turns(lambda: self._share(self._plans[replay_id][1]))
        self._queued += 1
        try:
            # A third of the patience: the rest is for a slot and the LLM.
            async with asyncio.timeout(self.patience_s / 3):
                await turns.acquire(replay_id)
        except TimeoutError as error:
            raise UnavailableError("live", "units that come first have the whole share of their replay") from error
        finally:
            self._queued -= 1
        try:
            yield
        finally:
            turns.release()

    def _share(self, plan: Plan) -> int:
        """How many of the replay's units are judged at once."""
        return max(1, round(plan.share * self._judges.slots(plan.change.llm)))

    async def _lost(self, replay_id: str, llm: Llm) -> bool:
        """Whether the replay's own LLM, which is away, has been so for too long, or nobody serves it any more."""
        now = time.monotonic()
        since, seen = self._away.get(llm, (now, now))
        if now - seen > _AWAY_S:  # nobody has asked since: it may have been there
            since = now
        self._away[llm] = since, now
        if now - since >= _AWAY_S:
            return True
        if self._is_under_way(replay_id):
            return False
        await self._load()  # it may have been resumed just now
        return not self._is_under_way(replay_id)

    def _is_under_way(self, replay_id: str) -> bool:
        record = self._look.replays().get(replay_id)
        return record is not None and record.state in {"planned", "running"}

    def _lost_text(self, unit: ReplayUnit, llm: Llm, error: UnavailableError) -> str:
        name = self._look.replays()[unit.replay_id].name
        fix = (
            f"`rewatch replay resume {name}` serves it again and judges what failed; an address of one machine alone "
            "(127.0.0.1) is no use to a worker on another"
            if llm.model_path
            else f"start that server, then `rewatch replay resume {name}` judges what failed"
        )
        return f"{llm.url}{AWAY}{name}, is away: {error}. {fix}"

    async def _shadowed(self, record: Incoming) -> Sequence[Emit]:
        """An event, or what is known of the failure, for each shadow that covers the window.

        A shadow that fails costs the others nothing, and analyze's dead letters are not touched: what failed is named
        by its unit, not by the window's place on the log. Where one's server is away all wait, and keep what they have.
        """
        running = [(name, plan) for name, plan in self._running() if plan.kind == "shadow" and _since(plan, record)]
        if not running:
            return []
        try:
            context = codec.decode(record, Context)
        except codec.DecodeError:
            return []  # analyze makes the dead letter of it
        covering = [(name, plan) for name, plan in running if covers(plan, context)]
        said = await asyncio.gather(
            *(self._shadow(name, plan, context, record.origin) for name, plan in covering), return_exceptions=True
        )
        for one in said:
            if isinstance(one, BaseException):
                raise one
        for name, _ in covering:
            self._kept.pop((record.origin, name), None)
        return [one for one in said if isinstance(one, Emit)]

    async def _shadow(self, name: str, plan: Plan, context: Context, origin: str) -> Emit:
        """What one shadow says of a window: once, as long as this process remembers it.

        Raises:
            UnavailableError: its server is away.
        """
        kept = self._kept.get((origin, name))
        if kept is not None:
            return kept
        try:
            event = await self._judge(
                plan, name, context, plan.change.prompt, key=f"{origin}/{name}", priority=Priority.SHADOW
            )
            made = _emit(name, event)
        except UnavailableError:
            raise
        except Exception as error:  # noqa: BLE001 (an unforeseen one may be this shadow's alone, too)
            made = self._letter(name, context, error)
        self._kept[origin, name] = made
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return made

    async def _judge(
        self, plan: Plan, name: str, context: Context, prompt_digest: str, *, key: str, priority: Priority
    ) -> RiskEvent:
        """The window's event in the run of that name."""
        prompt = await self._prompt(prompt_digest)
        named = {"batch": context.batch_id, "camera": context.camera_id, "replay": name}
        with bound_contextvars(**named):
            judge = self._judges.of(plan.change.llm)
            try:
                event = await judge.judge(context, prompt, key=key, run=name, priority=priority, patience_s=_PATIENCE_S)
            except UnavailableError as error:
                # Live windows wait for whoever can mend a prompt. Here it would hold up other replays.
                caller = Caller(priority, _PATIENCE_S)
                why = await judge.blames(prompt, prompts.default(), caller) if error.waiting_on == "llm" else None
                if why is None:
                    raise
                raise UnprocessableError(why, camera_id=context.camera_id) from error
            self.metrics.judged(plan.kind, event)
            log.info("judged again", risk_level=event.risk_level, score=event.risk_score, model=event.model)
        return event

    async def _plan_of(self, unit: ReplayUnit) -> Plan:
        """The plan of the unit's replay. It is on the log before its units: who does not find it has not read on.

        Raises:
            UnprocessableError: there is none, or it cannot be read.
        """
        if unit.replay_id not in self._look.replays():
            await self._load()
        record = self._look.replays().get(unit.replay_id)
        if record is None:
            raise UnprocessableError(f"there is no replay {unit.replay_id}", camera_id=unit.camera_id)
        try:
            return self._plan(record)
        except PlanError as error:
            raise UnprocessableError(f"replay {unit.replay_id}: {error}", camera_id=unit.camera_id) from error

    async def _prompt(self, digest: str) -> PromptVersion:
        """The version of this digest. It is on the log before whoever names it.

        Raises:
            UnprocessableError: there is none that can be used.
        """
        prompt = self._look.prompt(digest)
        if prompt is None:
            await self._load()
            prompt = self._look.prompt(digest)
        if prompt is None:
            raise UnprocessableError(f"there is no prompt version {digest!r}, or none that can be used")
        return prompt

    async def _load(self) -> None:
        try:
            await self._look.load()
        except (KafkaError, TimeoutError, OSError) as error:
            raise UnavailableError("broker", f"replays and prompts cannot be read: {error!r}") from error

    def _cancelled(self, replay_id: str) -> bool:
        record = self._look.replays().get(replay_id)
        return record is not None and record.state == "cancelled"

    def _running(self) -> Iterator[tuple[str, Plan]]:
        """Replays and shadows that run; a record that cannot be read is passed over: its own units say so."""
        for name, record in self._look.replays().items():
            if record.state == "running":
                try:
                    yield name, self._plan(record)
                except PlanError:
                    continue

    def _plan(self, record: Replay) -> Plan:
        """The record's plan; each text is read once.

        Raises:
            PlanError: it is none.
        """
        text, plan = self._plans.get(record.replay_id, ("", None))
        if plan is None or text != record.plan:
            plan = Plan.decode(record.plan)
            self._plans[record.replay_id] = (record.plan, plan)
        return plan

    def _letter(self, name: str, context: Context, error: Exception) -> Emit:
        """What is known of a window that a shadow could not judge."""
        log.warning("shadow failed", replay=name, batch=context.batch_id, why=str(error))
        known = error if isinstance(error, UnprocessableError) else None
        letter = DeadLetter(
            origin=str(Unit(name, context.batch_id)),
            camera_id=context.camera_id,
            stage=self.name,
            kind=known.kind if known is not None else "error",
            error=type(error.__cause__ or error).__name__,
            message=f"shadow {name}: {error}"[:4000],
            attempt=1,
            headers={},
            detail=known.detail if known is not None else "",
            failed_at=int(self._clock() * 1000),
        )
        made = codec.emit("dead_letters", letter)
        # Were it said to be made from the window's record, that one would seem to be analyze's failure.
        return made._replace(headers=(*made.headers, (SOURCE, letter.origin.encode())))


def covers(plan: Plan, context: Context) -> bool:
    """Whether a shadow judges this window: of its cameras, and within its share by the hash of the batch id.

    Every shadow of one share takes the same windows, so that what they say can be compared.
    """
    cameras = plan.scope.cameras
    if cameras and context.camera_id not in cameras:
        return False
    return int(ids.digest("shadow", context.batch_id)[:8], 16) < plan.share * 2**32


def _since(plan: Plan, record: Incoming) -> bool:
    """Whether the record came after the shadow had begun. A later life of the topic did, whole."""
    return all(
        record.offset >= bound.offset
        for bound in offsets(plan.since, record.topic)
        if (bound.epoch, bound.partition) == (record.epoch, record.partition)
    )


def _emit(name: str, event: RiskEvent) -> Emit:
    return codec.emit("replay_events", event_of(name, event, reused=False))

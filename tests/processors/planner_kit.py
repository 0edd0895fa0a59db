"""A replay in memory: its windows, its log with workers, its life; and planners that can be killed at any step."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from processors.analyze.core import risk_event
from processors.replay.history import Live, Said, Skips, Window
from processors.replay.plan import Change, Plan, State
from processors.replay.planner import Planner, Ports
from processors.replay.sorting import Judging, Sorter, Ways
from schemas import prompts
from schemas.prompts import PromptVersion
from schemas.records import Context, DeadLetter, Replay, ReplayEvent, ReplayUnit, RiskEvent
from streams import codec
from streams.errors import FencedError, UncertainError
from streams.messages import Emit, Incoming
from tests.processors.analyze_samples import EVENING, context, seen

REPLAY = "r0123456789a"
DEFAULT = prompts.default()
OTHER = prompts.deliveries_strict_nights()
CAMERAS = ("driveway", "front-door", "yard")
WEIGHTS = "c" * 64
CONDITIONS = {
    "slots": "1",
    "prompt_cache": "off",
    "seed": "0",
    "server_build": "b1",
    "threads": "1",
    "gpu_layers": "-1",
    "context_size": "4096",
}


class KilledError(BaseException):
    """The process ended here."""


def sent(_: PromptVersion) -> dict[str, object]:
    return {"seed": 0}


def live_of(one: Context, **changed: Any) -> Live:
    """What live work said of a window, under the default prompt and strict conditions."""
    made = Live(
        event_id=f"{one.batch_id}:live",
        prompt_digest=DEFAULT.digest,
        verdict_digest=judging().verdict(DEFAULT),
        model="analyst",
        model_digest=WEIGHTS,
        parameters='{"seed": 0}',
        conditions=CONDITIONS,
        score=50,
        level="medium",
        summary="somebody",
    )
    return made._replace(**changed)


def judging(**changed: Any) -> Judging:
    return Judging("analyst", WEIGHTS, CONDITIONS, sent)._replace(**changed)


def windows_of(count: int) -> list[Window]:
    """So many windows of three cameras, judged live."""
    made = [
        context((seen("person", x=float(n)),), camera=CAMERAS[n % 3], started_at=EVENING + 60_000 * n)
        for n in range(count)
    ]
    # Ids come from frames, which the sample names by place: each window has its own.
    named = [
        msgspec.structs.replace(
            one,
            batch_id=f"{one.camera_id}:{n:032x}",
            batch=msgspec.structs.replace(one.batch, batch_id=f"{one.camera_id}:{n:032x}"),
        )
        for n, one in enumerate(made)
    ]
    return [Window(one, live_of(one)) for one in named]


def verdict(one: Context, run: str, prompt: PromptVersion = DEFAULT, **changed: Any) -> RiskEvent:
    """A verdict on a window, as a worker makes it."""
    from processors.analyze.answers import Verdict
    from processors.analyze.core import Answered, Rendered

    said = Verdict(reasoning="why", risk_factors=(), entities=(), summary="s", recommended_action="none", risk_score=40)
    answered = Answered(
        rendered=Rendered((), ()),
        raw="{}",
        repaired=False,
        model="analyst",
        model_digest=WEIGHTS,
        parameters=sent(prompt),
        conditions=CONDITIONS,
        prompt_tokens=80,
        completion_tokens=20,
        cached_tokens=0,
        queued_ms=0.0,
        inference_ms=500.0,
    )
    return msgspec.structs.replace(risk_event(one, prompt, said, answered, judged_at=EVENING, run=run), **changed)


class Slow:
    """Each look at the clock is half a second later: two windows take a second or more."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


class Source:
    """Windows in pages of three, as history gives them."""

    def __init__(self, windows: Sequence[Window], counted: bool = True) -> None:
        self.skipped = Skips()
        self._windows = windows
        self._counted = counted

    async def count(self) -> int | None:
        return len(self._windows) if self._counted else None

    async def pages(self, known: Callable[[str], bool]) -> AsyncIterator[list[Window]]:
        left = [window for window in self._windows if not known(window.context.batch_id)]
        for n in range(0, len(left), 3):
            yield left[n : n + 3]


class World:
    """What outlives planners: the log, the workers behind it, the steps of replays. `step` is told each thing done."""

    def __init__(self) -> None:
        self.records: list[Incoming] = []
        self.steps: list[Replay] = []
        self.owner: object = None
        self.worker = True
        self.fails: Callable[[str], bool] = lambda _: False
        self.says = "nothing usable came back"
        self.hidden: list[Callable[[], None]] = []
        """Steps of others that are on the log, and read by `load` only."""
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while the outcome of an append is unknown."""
        self.most_waiting = 0
        self.forgotten: list[tuple[str, bool, int]] | None = None
        """What ClickHouse has where the log has forgotten everything."""
        self._judged: set[tuple[str, int]] = set()
        self._offsets = itertools.count()

    def put(self, emits: Sequence[Emit]) -> None:
        for emit in emits:
            self.records.append(
                Incoming(emit.topic, "e", emit.partition or 0, next(self._offsets), emit.key, emit.value, emit.headers)
            )
        units, done = len(self.of("replay_units")), len(self.events) + len(self.of("dead_letters"))
        self.most_waiting = max(self.most_waiting, units - done)

    def work(self, most: int = 2) -> None:
        """Judge some units that nobody judged yet."""
        todo = [one for one in self.of("replay_units") if (one.key.decode(), one.attempts) not in self._judged][:most]
        for record in todo:
            unit = codec.decode(record, ReplayUnit)
            self._judged.add((unit.unit_id, record.attempts))
            one = codec.decode_bytes("contexts", unit.payload, None, Context)
            prompt = next(p for p in (DEFAULT, OTHER) if p.digest == unit.prompt_digest)
            if self.fails(one.batch_id):
                found = letter(unit.unit_id, one.camera_id)
                origin = record.redriven or record.origin
                found = msgspec.structs.replace(
                    found, origin=origin, message=self.says, attempt=record.attempts + 1, value=record.value
                )
                self.put([codec.emit("dead_letters", found)])
            else:
                self.put([codec.emit("replay_events", replay_event(verdict(one, unit.replay_id, prompt)))])

    def of(self, topic: str) -> list[Incoming]:
        return [record for record in self.records if record.topic == topic]

    @property
    def units(self) -> list[str]:
        return [record.key.decode() for record in self.of("replay_units")]

    @property
    def events(self) -> list[ReplayEvent]:
        return [codec.decode(record, ReplayEvent) for record in self.of("replay_events")]

    @property
    def letters(self) -> list[DeadLetter]:
        return [codec.decode(record, DeadLetter) for record in self.of("dead_letters")]

    def say(self, state: State, detail: str = "", plan: Plan | None = None) -> None:
        text = (plan or Plan(kind="change")).encode()
        self.steps.append(
            Replay(replay_id=REPLAY, name="n", state=state, plan=text, updated_at=len(self.steps), detail=detail)
        )


def replay_event(event: RiskEvent, *, reused: bool = False) -> ReplayEvent:
    return ReplayEvent(
        replay_id=event.run,
        unit_id=f"{event.run}:{event.batch_id}",
        event_id=event.event_id,
        camera_id=event.camera_id,
        reused=reused,
        event=event,
    )


def letter(unit_id: str, camera: str, stage: str = "replay") -> DeadLetter:
    return DeadLetter(
        origin=f"replay_units:e:0:{abs(hash(unit_id)) % 1000}",
        camera_id=camera,
        stage=stage,
        kind="error",
        error="UnprocessableError",
        message="nothing usable came back",
        attempt=1,
        key=unit_id.encode(),
        value=b"x",
        claim=None,
        headers={},
        detail="",
        failed_at=EVENING,
    )


class Desk:
    """One planner's hold on the world: its log and its steps. `die`: at which step, counted from 0, it is killed."""

    def __init__(self, world: World, die: int | None = None) -> None:
        self.world = world
        self.forgotten = world.forgotten is not None
        self.uncertain = 0
        """So many appends whose outcome is unknown: every other one was done."""
        self._die = die
        self._steps = 0
        self._read = 0
        self._end = 0

    def _step(self) -> None:
        if self._steps == self._die:
            raise KilledError
        self._steps += 1

    async def open(self) -> None:
        self._step()
        self.world.owner = self
        self._read = 0
        self._end = len(self.world.records)

    async def history(self) -> AsyncIterator[list[Incoming]]:
        while self._read < self._end:
            self._step()
            found = self.world.records[self._read : min(self._read + 4, self._end)]
            self._read += len(found)
            yield found

    async def news(self, wait_s: float) -> list[Incoming]:
        self._step()
        await asyncio.sleep(0)
        if self.world.worker:
            self.world.work()
        found = self.world.records[self._read :]
        self._read = len(self.world.records)
        return found

    async def append(self, emits: Sequence[Emit]) -> None:
        self._step()
        if self.world.owner is not self:
            raise FencedError("another one")
        if self.uncertain:
            self.uncertain -= 1
            self.world.meanwhile()
            if self.uncertain % 2:
                self.world.put(emits)
            raise UncertainError("who knows")
        self.world.put(emits)
        self._step()

    async def close(self) -> None: ...

    def latest(self) -> Replay | None:
        return self.world.steps[-1] if self.world.steps else None

    async def load(self) -> None:
        for say in self.world.hidden:
            say()
        self.world.hidden.clear()

    async def say(self, state: State, detail: str) -> None:
        self._step()
        self.world.say(state, detail)
        self._step()


def ways(said: Mapping[str, Said] | None = None) -> Ways:
    """Look-ups that know the two versions of the product, and these recorded verdicts."""

    async def recorded(wanted: Mapping[str, str]) -> dict[str, Said]:
        return {
            batch: one
            for batch, one in (said or {}).items()
            if one.event.verdict_digest == wanted.get(batch) and batch in wanted
        }

    return Ways({p.digest: p for p in (DEFAULT, OTHER)}.get, lambda *_: "", recorded)


def planner(
    world: World,
    windows: Sequence[Window],
    plan: Plan | None = None,
    *,
    die: int | None = None,
    who: str = "a",
    said: Mapping[str, Said] | None = None,
    desk: Desk | None = None,
    **options: Any,
) -> Planner:
    """A planner of these windows."""
    plan = plan or Plan(kind="change", change=Change(prompt=OTHER.digest))
    desk = desk or Desk(world, die)

    async def finished() -> list[tuple[str, bool, int]]:
        return list(world.forgotten or [])

    ports = Ports(
        log=desk,
        states=desk,
        windows=options.pop("source", None) or Source(windows),
        sorter=Sorter(plan, options.pop("judging", judging()), ways(said)),
        partition=CAMERAS.index,
        finished=finished,
    )
    return Planner(
        REPLAY, plan, ports, slots=options.pop("slots", 1), who=who, clock=options.pop("clock", Slow()), **options
    )

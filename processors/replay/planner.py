"""The planner of a replay: what makes its units, a few ahead of their results, until each window has one.

It keeps nothing. Whoever takes a replay over first fences the one before, then reads on the log which units and
results there are, and appends what is missing; the windows are a function of the recorded history. So a planner
that is killed at any instant costs nothing and doubles nothing. Who judges the units is another matter (`stage`).
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import structlog
from aiokafka.errors import KafkaError

from processors.replay.desk import Log, States
from processors.replay.history import Window, Windows, unit_of
from processors.replay.ledger import Ledger, Letter
from processors.replay.plan import Plan, State
from processors.replay.sorting import OtherWeightsError, Sorter, Todo, repeated
from schemas.records import Record, ReplayUnit
from streams import codec
from streams.errors import FencedError, UnavailableError, UncertainError
from streams.messages import Emit
from streams.redrives import again

log = structlog.get_logger(__name__)

AHEAD_S = 5.0
"""Work that lies ready for the workers. A transaction takes 40 ms and a page of windows 20 ms, so one second would do;
five ride out a planner that is started again. What is ahead of a pause is still judged: it must not be minutes."""

_QUIET_S = 0.25
"""How long a look for results waits where there is none."""

_RATE_S = 20.0
"""Over how long the rate is measured: some tens of results at one a second."""

_PATIENCE_S = 120.0
"""How long it tries to go on while the broker or ClickHouse does not answer: a restart of either takes seconds."""

_AGAIN_S = 1.0
"""Between two tries."""

_CLAIM_S = 5.0
"""What another planner has, once it fenced this one, to say that it goes on: it does so at once, which takes a second,
more on a busy machine. Where nobody said so, the coordinator had ended a transaction that took too long: a laptop
slept, or the process was stopped."""

_LAST_WORD_S = 10.0
"""How long the word that it failed may take: what made it fail may be the broker."""


class EndedError(Exception):
    """The replay ended otherwise than by being done; the message says why, and `state` what it is now."""

    def __init__(self, message: str, state: State | None = None) -> None:
        super().__init__(message)
        self.state = state


class TakenOverError(EndedError):
    """Another planner goes on with this replay."""


class Progress(NamedTuple):
    """How far a replay is."""

    total: int | None
    """Windows, those left out not counted; None where it is not known yet."""
    judged: int
    reused: int
    failed: int
    skipped: int
    waiting: int
    """Units without a result yet."""
    tokens: int
    """Of prompts and answers, without those reused."""
    rate: float
    """Windows judged a second, lately."""
    quiet_s: float
    """For how long no result has come, though units wait for one."""

    @property
    def done(self) -> int:
        """Windows that need nothing more."""
        return self.judged + self.reused + self.failed

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at this rate; None where it cannot be told."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0, self.total - self.done) / self.rate


class Ports(NamedTuple):
    """What a planner works with."""

    log: Log
    states: States
    windows: Windows
    sorter: Sorter
    partition: Callable[[str], int]
    """Where a camera lives."""
    finished: Callable[[], Awaitable[Sequence[tuple[str, bool, int]]]]
    """Batch id, whether it was reused, and tokens of each result in ClickHouse: asked where the log has forgotten."""


class Planner:
    """One planner of one replay, for one run.

    Args:
        replay_id: the replay.
        plan: what is to be done.
        ports: what it works with.
        slots: how many units the workers judge at once, as far as known.
        who: names this planner among those of the same replay, for people.
        show: is told how far it is, a few times a second.
        stop: set, it pauses the replay in order.
        clock: seconds, monotonic.
        wall: milliseconds since the Unix epoch.
    """

    def __init__(
        self,
        replay_id: str,
        plan: Plan,
        ports: Ports,
        *,
        slots: int,
        who: str,
        show: Callable[[Progress], None] = lambda _: None,
        stop: asyncio.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._id = replay_id
        self._plan = plan
        self._ports = ports
        self._slots = slots
        self._who = who
        self._show = show
        self._stop = stop or asyncio.Event()
        self._clock = clock
        self._wall = wall
        self.ledger = Ledger(replay_id)
        self._counted: int | None = None
        self._held = False
        """Whether the log was this planner's once: others of before can do nothing any more."""
        self._claimed = False
        self._fenced = False
        """Whether its hold on the log ended, and nobody knows yet by whom."""
        self._again: dict[str, Letter] | None = None
        self._todo: deque[Todo] = deque()
        self._came: deque[tuple[float, int]] = deque()
        self._last = clock()

    async def run(self) -> Progress:
        """See the replay through; returns when every window has a result.

        Raises:
            TakenOverError: another planner goes on with it.
            EndedError: it is paused, cancelled or failed.
            PlanError: the plan cannot be followed.
            KafkaError, TimeoutError, OSError, UncertainError or UnavailableError: broker or ClickHouse stayed away.

        Whatever it raises but the first two, the replay is `failed` by it, as far as that can still be said.
        """
        try:
            return await self._go_on()
        except EndedError:
            raise
        except Exception as error:
            await self._fail(str(error) or type(error).__name__)
            raise

    async def _go_on(self) -> Progress:
        """Again and again, while the broker or ClickHouse comes and goes."""
        away_since: float | None = None
        while True:
            before = len(self.ledger)
            try:
                return await self._attempt()
            except FencedError:
                if not self._claimed:
                    raise TakenOverError("another planner took it over") from None
                self._fenced = True
            except OtherWeightsError as error:
                await self._ports.states.say("failed", str(error))
                raise EndedError(str(error), "failed") from None
            except (UncertainError, KafkaError, TimeoutError, OSError, UnavailableError) as error:
                now = self._clock()
                if away_since is None or len(self.ledger) > before:
                    away_since = now
                if now - away_since > _PATIENCE_S:
                    raise
                log.warning("beginning anew", replay=self._id, why=str(error) or type(error).__name__)
                await asyncio.sleep(_AGAIN_S)
            finally:
                await self._ports.log.close()

    def progress(self) -> Progress:
        """How far it is."""
        now, ledger = self._clock(), self.ledger
        while self._came and now - self._came[0][0] > _RATE_S:
            self._came.popleft()
        since = max(now - self._came[0][0], 1.0) if self._came else 1.0
        skipped = self._ports.sorter.skipped.count + self._ports.windows.skipped.count
        return Progress(
            # Without a count it is what the plan found, where those left out do not count already.
            total=self._plan.windows or None if self._counted is None else max(0, self._counted - skipped),
            judged=len(ledger.judged),
            reused=len(ledger.reused),
            failed=len(ledger.failed),
            skipped=skipped,
            waiting=len(ledger.waiting),
            tokens=ledger.tokens,
            rate=sum(count for _, count in self._came) / since,
            quiet_s=now - self._last if ledger.waiting else 0.0,
        )

    async def _attempt(self) -> Progress:
        """Fence, say that it runs, learn what there is, and do the rest."""
        ports = self._ports
        self._todo.clear()
        if self._claimed:  # while it was away somebody may have asked for something else: not to be fenced again
            await self._look_about()
        await ports.log.open()
        self._held = True
        await self._claim()
        await self._learn()
        self._retry()
        self._counted = await ports.windows.count()
        self._last = self._clock()
        pages = ports.windows.pages(self.ledger.known)
        more = True
        while more or self._todo or self.ledger.waiting:
            await self._obey()
            room = self._ahead() - len(self.ledger.waiting)
            if more and len(self._todo) < room:
                page = await anext(pages, None)
                more = page is not None
                await self._take_up(page or [])
            elif self._todo and room > 0 and not self._spent(len(self.ledger.waiting)):
                await self._hand_out(room)
            elif not await self._hear():
                await self._check_tokens()
            self._show(self.progress())
        await self._obey()
        told = self.progress()
        parts = [f"{told.judged} judged", f"{told.reused} reused", f"{told.failed} failed", f"{told.skipped} left out"]
        await ports.states.say("done", ", ".join(parts))
        return told._replace(total=told.done)

    async def _learn(self) -> None:
        """What there is of this replay: from the log, and what the log has forgotten from ClickHouse."""
        ledger = Ledger(self._id)
        async for records in self._ports.log.history():
            for record in records:
                ledger.take(record)
        if self._ports.log.forgotten:
            ledger.remember(await self._ports.finished())
        self.ledger = ledger

    async def _look_about(self) -> None:
        """Before it takes the log again: whether it is still this planner's to do.

        Raises:
            TakenOverError or EndedError: it is not.
        """
        if self._fenced:
            await asyncio.sleep(_CLAIM_S)
            await self._ports.states.load()
        await self._obey()
        latest = self._ports.states.latest()
        if self._fenced and (latest is None or latest.state != "running"):
            raise TakenOverError("another planner took it over")
        self._fenced = False

    def _retry(self) -> None:
        """Units that failed because their LLM was away are made again: who resumes a replay saw to it that it is back.

        Those that had failed so when this run began: what fails by it again stays so until the next one.
        """
        if self._again is None:
            self._again = dict(self.ledger.away)
        for batch_id, letter in self._again.items():
            if self.ledger.away.get(batch_id) == letter:
                self.ledger.forget(batch_id)

    async def _claim(self) -> None:
        """Say who goes on with it; a planner that finds another's name there has been taken over."""
        latest = self._ports.states.latest()
        if latest is not None and latest.state == "cancelled":
            raise EndedError(latest.detail or "it was cancelled", "cancelled")
        await self._ports.states.say("running", self._who)
        self._claimed = True

    async def _obey(self) -> None:
        """Whether somebody asked for something else.

        Raises:
            TakenOverError or EndedError: somebody did.
        """
        latest = self._ports.states.latest()
        if latest is not None and latest.state == "running" and latest.detail != self._who:
            raise TakenOverError(f"it is run by {latest.detail} now")
        if latest is not None and latest.state == "paused":
            raise EndedError(latest.detail, "paused")
        if latest is not None and latest.state == "cancelled":
            raise EndedError(latest.detail, "cancelled")
        if self._stop.is_set():
            await self._pause("stopped by Ctrl-C")

    async def _fail(self, why: str) -> None:
        """Say that the replay failed, as far as it can still be said, and is this planner's to say."""
        latest = self._ports.states.latest()
        others = self._claimed and latest is not None and latest.detail != self._who
        if not self._held or others or (latest is not None and latest.state not in {"planned", "running", "failed"}):
            return
        try:
            async with asyncio.timeout(_LAST_WORD_S):
                await self._ports.states.say("failed", why)
        except (UncertainError, KafkaError, TimeoutError, OSError) as error:
            log.warning("not said that it failed", replay=self._id, why=str(error) or type(error).__name__)

    async def _pause(self, why: str) -> None:
        await self._ports.states.say("paused", why)
        raise EndedError(why, "paused")

    async def _take_up(self, page: Sequence[Window]) -> None:
        """Sort a page; what was said already is repeated at once, and costs the workers nothing."""
        fresh = {one.context.batch_id: one for one in page if not self.ledger.known(one.context.batch_id)}
        found = await self._ports.sorter.sort(list(fresh.values()))
        if found.reuse:
            events = [repeated(self._id, said) for said in found.reuse]
            await self._ports.log.append([self._emit("replay_events", event, event.camera_id) for event in events])
            self.ledger.reused.update(event.event.batch_id for event in events)
        self._todo.extend(found.judge)

    async def _hand_out(self, room: int) -> None:
        """Append units, as many as there is room for."""
        taken = [self._todo.popleft() for _ in range(min(room, len(self._todo)))]
        fresh = {todo[0].context.batch_id: todo for todo in taken if not self.ledger.known(todo[0].context.batch_id)}
        if not fresh:
            return  # two pages had the same windows
        units = [unit_of(self._id, window.context, prompt.digest, self._wall()) for window, prompt in fresh.values()]
        if not self.ledger.waiting:
            self._last = self._clock()
        await self._ports.log.append([self._emit("replay_units", unit, unit.camera_id) for unit in units])
        self.ledger.expect(fresh)

    def _emit(self, topic: str, record: Record, camera_id: str) -> Emit:
        emit = codec.emit(topic, record, self._ports.partition(camera_id))
        if not isinstance(record, ReplayUnit) or not self._again:
            return emit
        letter = self._again.get(record.unit_id.partition(":")[2])
        if letter is None:
            return emit
        # As a redrive of its dead letter: the stage gives one result to both, whoever asked, and how often.
        marked, _ = again(
            letter.place,
            letter.attempt,
            key=emit.key,
            value=emit.value,
            headers=emit.headers,
            by=self._id,
            at=self._wall(),
        )
        return marked

    async def _hear(self) -> bool:
        """Take what has come; whether results were among it."""
        results = sum([self.ledger.take(record) for record in await self._ports.log.news(_QUIET_S)])
        if results:
            self._last = self._clock()
            self._came.append((self._last, results))
        return bool(results)

    def _ahead(self) -> int:
        """Units that may be without a result."""
        return max(2 * self._slots + 2, math.ceil(self.progress().rate * AHEAD_S))

    def _spent(self, expected: int) -> bool:
        """Whether the tokens will be spent when so many more units have been judged."""
        most = self._plan.max_tokens
        judged = len(self.ledger.judged)
        mean = self.ledger.tokens / judged if judged else 0.0
        return most is not None and self.ledger.tokens + expected * mean >= most

    async def _check_tokens(self) -> None:
        """Pause where the tokens are spent and work is left."""
        if self._todo and not self.ledger.waiting and self._spent(0):
            await self._pause(
                f"{self.ledger.tokens} tokens are spent, {self._plan.max_tokens} are allowed (--max-tokens); "
                "`rewatch replay resume` takes another limit"
            )

"""The LLM servers that may judge: which answer, which judge the canary, and when the others are asked again.

A server is set aside, for every prompt while it is away, and for one prompt while it does not judge that prompt's
canary. Work goes on with the others. Beside it the one that is set aside is asked again, after a second, then
less often; it comes back when it answers, and judges the canary that it failed. One that says who it is and refuses
work comes back by a canary too. With no other left, whoever has work asks those that are away at once, and waits for
the first that is well; a canary that failed has its pause also then, for it costs what a window costs.

A canary is work of whoever waits for it, the most urgent of them: that of a replay gives way to live windows, until
a live one waits for it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import structlog

from processors.analyze.gate import Gate, Priority, Urgency
from processors.analyze.port import Llm, Server
from schemas.prompts import PromptVersion
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

_RETRY_S = (1.0, 30.0)
"""The first and the longest pause before one that is set aside is asked again: a restart takes seconds, a model of
30 GB minutes to load."""

_DOUBLINGS = 8
"""More make no longer pause (it is bounded), and a thousand no number."""


class Canary(NamedTuple):
    """How the last canary of a prompt went on one server."""

    began: int
    failure: str | None
    took_s: float


class Caller(NamedTuple):
    """Who needs a server."""

    priority: Priority = Priority.LIVE
    patience_s: float | None = None
    """How long to wait for a slot; None: without limit."""


LIVE = Caller()


class Pause:
    """When what failed is tried again: after a second, and each time it fails again later."""

    def __init__(self) -> None:
        self.failures = 0
        self.until = 0.0

    def longer(self, now: float) -> None:
        """It failed. What failed beside it, or was asked before its time, is the same failure."""
        if now >= self.until:
            first, longest = _RETRY_S
            self.until = now + min(longest, first * 2 ** min(self.failures, _DOUBLINGS))
            self.failures += 1


class Endpoint:
    """One server, as the judge knows it."""

    def __init__(self, llm: Llm) -> None:
        self.llm = llm
        self.name = llm.name
        self.away: str | None = "not asked yet"
        """Why it takes no work; None while it does."""
        self.doubt: str | None = None
        """What it refused work with; it has more once a canary was good."""
        self.canaries: dict[str, Canary] = {}
        """The last one of each prompt, by digest."""
        self.lock = asyncio.Lock()
        """One canary at a time."""
        self.waits: list[Priority] = []
        """Whose work waits for a canary here, of any prompt."""
        self.urgency: Urgency | None = None
        """How urgent the canary is that is being judged."""
        self.checks: dict[str, asyncio.Task[UnavailableError | None]] = {}
        self.pause = Pause()
        """Before it is asked again while it is away."""
        self.pauses: dict[str, Pause] = {}
        """Before the canary of a prompt is judged again while it fails, by digest."""

    def fault(self, prompt: PromptVersion) -> str | None:
        """Why it does not judge with this prompt; None where it does."""
        canary = self.canaries.get(prompt.digest)
        return self.away or self.doubt or (canary.failure if canary is not None else None)

    def due(self, prompt: PromptVersion, now: float) -> bool:
        """Whether it is time to find out if it judges with this prompt again."""
        pause = self.pause if self.away is not None else self.pauses.get(prompt.digest)
        return pause is None or now >= pause.until


class JudgeCanary(Protocol):
    """Judges the stored window on a server: why that failed, or None, and how long it took, seconds."""

    async def __call__(
        self, endpoint: Endpoint, prompt: PromptVersion, urgency: Urgency, patience_s: float | None
    ) -> tuple[str | None, float]:
        """Judge it.

        Raises:
            UnavailableError: work that comes first (`live`) has had every slot for `patience_s`.
        """


class Endpoints:
    """All servers, and the gate to them."""

    def __init__(
        self,
        llms: Sequence[Llm],
        slots: Callable[[int], int],
        canary: JudgeCanary,
        clock: Callable[[], float],
        *,
        live_alone: bool = False,
    ) -> None:
        self._slots = slots
        self._canary = canary
        self._clock = clock
        self._counter = 0
        self.all = [Endpoint(llm) for llm in llms]
        self.gate = Gate(clock, live_alone=live_alone)
        for endpoint in self.all:
            self.gate.expect(endpoint.name, slots(0))

    def tick(self) -> int:
        """The next number: what was counted later began later."""
        self._counter += 1
        return self._counter

    def named(self, name: str) -> Endpoint:
        """The endpoint of this name."""
        return next(endpoint for endpoint in self.all if endpoint.name == name)

    async def server(self, endpoint: Endpoint) -> Server:
        """Who answers there; its slots are open then.

        Raises:
            UnavailableError: it is away, and set aside.
        """
        try:
            server = await endpoint.llm.server()
        except UnavailableError as error:
            self.set_aside(endpoint, error)
            raise
        endpoint.away = None
        self.gate.open(endpoint.name, self._slots(server.slots))
        return server

    def set_aside(self, endpoint: Endpoint, error: UnavailableError) -> None:
        """It is away: no more work goes there until it answers again."""
        if endpoint.away is None:
            log.warning("llm set aside", endpoint=endpoint.name, why=str(error))
        endpoint.away = str(error)
        endpoint.pause.longer(self._clock())
        endpoint.pauses.clear()  # who comes back may be another than who failed
        self.gate.close(endpoint.name)

    def refused(self, endpoint: Endpoint, error: UnavailableError) -> None:
        """An attempt found it away. What it says of itself is not enough then: it may answer that, and no request."""
        if endpoint.away is None:  # else whoever asked it has set it aside
            endpoint.doubt = str(error)
            self.set_aside(endpoint, error)

    def well(self, prompt: PromptVersion) -> list[Endpoint]:
        """The endpoints that judge with this prompt, as far as known."""
        return [endpoint for endpoint in self.all if endpoint.fault(prompt) is None]

    async def find(self, prompt: PromptVersion, caller: Caller = LIVE) -> list[Endpoint]:
        """The endpoints that judge with this prompt; while there are none, all that are away are asked.

        Raises:
            UnavailableError: none does, or it is not known as work that comes first (`live`) has every slot.
        """
        well = self.well(prompt)
        ill = [endpoint for endpoint in self.all if endpoint not in well]
        now = self._clock()
        asked = {
            self._check(one, prompt, caller)
            for one in ill
            if one.due(prompt, now) or (not well and one.away is not None)
        }
        behind: UnavailableError | None = None
        while asked and not well:
            done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                behind = task.result() or behind  # whatever it raises is a mistake of ours
            well = self.well(prompt)
        if not well:
            raise behind or UnavailableError("llm", "; ".join(str(endpoint.fault(prompt)) for endpoint in ill))
        return well

    async def prove(self, endpoint: Endpoint, prompt: PromptVersion, since: int, caller: Caller = LIVE) -> None:
        """Return once a canary that began there after `since` was good. Who asks at the same time shares one.

        Raises:
            UnavailableError: it failed, or did and has its pause; the endpoint is set aside for this prompt. Or work
                that comes first (`live`) has every slot.
        """
        asked = self.tick()
        with self._waiting(endpoint, caller.priority):
            async with endpoint.lock:
                last = endpoint.canaries.get(prompt.digest)
                if last is None or (
                    last.began <= since
                    if last.failure is None
                    else last.began <= asked and self._may_ask(endpoint, prompt)
                ):
                    last = endpoint.canaries[prompt.digest] = await self._judge(endpoint, prompt, caller.patience_s)
        if last.failure is not None:
            raise UnavailableError("llm", last.failure)

    async def close(self) -> None:
        """Let go of everything."""
        tasks = [task for endpoint in self.all for task in endpoint.checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.all:
            await endpoint.llm.close()

    def _check(
        self, endpoint: Endpoint, prompt: PromptVersion, caller: Caller
    ) -> "asyncio.Task[UnavailableError | None]":
        """The task that finds out whether it is well again; who asks at the same time shares it.

        It gives what kept it from finding out; None where it knows now.
        """
        if prompt.digest not in endpoint.checks:
            task = asyncio.create_task(self._ask(endpoint, prompt, caller))
            endpoint.checks[prompt.digest] = task
            task.add_done_callback(lambda _: endpoint.checks.pop(prompt.digest, None))
        task = endpoint.checks[prompt.digest]
        waiting = contextlib.ExitStack()
        waiting.enter_context(self._waiting(endpoint, caller.priority))
        task.add_done_callback(lambda _: waiting.close())
        return task

    async def _ask(self, endpoint: Endpoint, prompt: PromptVersion, caller: Caller) -> UnavailableError | None:
        try:
            await self.server(endpoint)
            if endpoint.fault(prompt) is not None:
                await self.prove(endpoint, prompt, self.tick(), caller)
        except UnavailableError as error:  # where it is away or fails, it says so of itself
            return error if error.waiting_on == "live" else None
        if endpoint.pause.failures:
            log.info("llm is back", endpoint=endpoint.name)
        endpoint.pause = Pause()
        return None

    @contextlib.contextmanager
    def _waiting(self, endpoint: Endpoint, priority: Priority) -> Iterator[None]:
        """While work of this priority waits for a canary there: none is judged as less urgent work.

        That counts also for another prompt's, as there is one at a time.
        """
        endpoint.waits.append(priority)
        if endpoint.urgency is not None:
            self.gate.hasten(endpoint.urgency, priority)
        try:
            yield
        finally:
            endpoint.waits.remove(priority)

    def _may_ask(self, endpoint: Endpoint, prompt: PromptVersion) -> bool:
        """Whether a canary that failed may be judged again. One that is away is asked first who it is: cheap."""
        return endpoint.away is not None or endpoint.due(prompt, self._clock())

    async def _judge(self, endpoint: Endpoint, prompt: PromptVersion, patience_s: float | None) -> Canary:
        """Have a canary judged."""
        began = self.tick()
        endpoint.urgency = Urgency(min(endpoint.waits))
        try:
            failure, took_s = await self._canary(endpoint, prompt, endpoint.urgency, patience_s)
        finally:
            endpoint.urgency = None
        if failure is None:
            endpoint.doubt = None
            endpoint.pauses.pop(prompt.digest, None)
            return Canary(began, None, took_s)
        if endpoint.away is None:  # else it is asked again as one that is away
            endpoint.pauses.setdefault(prompt.digest, Pause()).longer(self._clock())
        name = prompt.name or prompt.digest
        said = f"{endpoint.name} (llm.url) does not judge the canary with prompt {name}: {failure}"
        return Canary(began, said, took_s)

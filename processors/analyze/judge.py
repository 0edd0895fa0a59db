"""Judging one window: a slot, a deadline, one repair, and whose fault it is when nothing usable comes back.

An item is blamed only for an attempt that was followed by a good canary on the same server: a fixed window, judged
with the same prompt, schema, limits and deadline. After a failed attempt an item is tried again elsewhere if it can
be, and with a server to itself, so that one that dies or hangs then was killed by nobody else.

A server whose canary fails is set aside (`endpoints`), and not the item: it goes on with another server, and what it
failed in is neither held against it nor forgotten. When that server is well again, it counts: or an item that kills
every server it meets would go round for ever, each time while the last one is being restarted. For the same reason
it never goes back to a server where its failure is not proven yet, and so has an attempt more at most for each server.
With none left to try it waits for their canaries. While no server judges the canary, everything waits.

A failure says something about the item under one prompt only: under another version it begins anew.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import structlog

from processors.analyze import answers, core
from processors.analyze.answers import UnusableError, Verdict
from processors.analyze.core import Answered, Rendered
from processors.analyze.endpoints import LIVE, Caller, Endpoint, Endpoints
from processors.analyze.fitting import Count, budget, fit
from processors.analyze.gate import BusyError, ClosedError, Held, Priority, Urgency
from processors.analyze.metrics import AnalyzeMetrics
from processors.analyze.port import AttemptError, Completion, Llm
from processors.analyze.settings import SLOTS, LlmSettings
from schemas import ids
from schemas.prompts import Message, PromptError, PromptVersion
from schemas.records import Batch, BatchFrame, Context, RiskEvent, SeenBox
from streams.errors import UnavailableError, UnprocessableError

log = structlog.get_logger(__name__)

ATTEMPTS = 3
"""How often an item may kill, hang or fail a server that is well otherwise. Twice can be chance: a restart, a spike."""

_FINAL = frozenset({"unusable", "refused", "prompt"})
"""What the same request again would end in as well: an answer that its repair did not mend, a 4xx, a template."""

_AGAIN = 1 / 20
"""Which share of its deadline an item has again after it hung. Others' results may wait for its own, so the deadline
covers all of its attempts: the first has what these leave. One that was hung by chance needs what a window needs."""

_CANARIES = 5
"""Where a twentieth of the deadline is too short for that, it has so many times what the canary has just taken."""

_SPIKE_S = 0.2
"""Nor is it less than the scheduler may take on a busy machine."""

_CASES = 10_000
"""Items remembered that failed and have no result yet. Those in hand are a few dozen; others went to other members."""

_RAW_CHARS = 32_000
"""How much of what came back a dead letter keeps of each attempt: three of them fit a record beside the original."""

_REPAIR_CHARS = 4_000
"""How much of an unusable answer is sent back for repair: more teaches nothing, and the context has an end."""

CANARY = Context(
    batch_id="canary",
    camera_id="canary",
    batch=Batch(
        batch_id="canary",
        camera_id="canary",
        started_at=1_767_265_200_000,  # 2026-01-01 11:00 UTC
        ended_at=1_767_265_204_000,
        frames=tuple(
            BatchFrame(
                frame_id=f"canary:{index}",
                offset=index,
                event_at=1_767_265_200_000 + 1000 * index,
                width=640,
                height=360,
                matters=True,
                late=False,
                boxes=(
                    SeenBox(
                        label="person", score=0.9, x=200 + 30 * index, y=120, width=60, height=160, stationary=False
                    ),
                ),
            )
            for index in range(5)
        ),
        closed_by="idle",
        closed_at_offset=5,
        partition=0,
        epoch="canary",
        settings_digest="",
    ),
    camera_name="front-door",
    time_zone="UTC",
    sections=(),
)
"""A stored window that any working analyst can judge: somebody passes a front door at noon."""


def parameters_of(settings: LlmSettings, prompt: PromptVersion) -> dict[str, Any]:
    """What a request is sent with besides its chat: by these, among others, a verdict's digest names what judged it."""
    return {
        "seed": settings.seed,
        "max_tokens": settings.max_completion_tokens,
        **({} if settings.prompt_cache else {"cache_prompt": False}),
        **prompt.sampling,
    }


class Failure(NamedTuple):
    """One attempt that gave nothing usable."""

    kind: str
    message: str
    raw: str
    endpoint: Endpoint
    at: int
    """When it was known, as `Endpoints.tick` counts: only a canary that began later speaks about it."""


@dataclass
class _Case:
    """What is held against one item under one prompt."""

    blamed: list[Failure] = field(default_factory=list)
    pending: list[Failure] = field(default_factory=list)
    """Not proven yet: the server's canary has not been good since. One a server at most."""

    def open_to(self, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Those of them where it may be tried: where it has not failed, else where each failure is proven."""
        pending = [failure.endpoint for failure in self.pending]
        blamed = [failure.endpoint for failure in self.blamed]
        proven = [endpoint for endpoint in endpoints if endpoint not in pending]
        return [endpoint for endpoint in proven if endpoint not in blamed] or proven

    @property
    def closed(self) -> bool:
        """Whether it has had its chances."""
        return len(self.blamed) >= ATTEMPTS or any(failure.kind in _FINAL for failure in self.blamed)


class _AttemptFailedError(Exception):
    def __init__(self, endpoint: Endpoint, kind: str, message: str, raw: str = "") -> None:
        super().__init__(message)
        self.endpoint = endpoint
        self.kind = kind
        self.raw = raw


class Judge:
    """Turns contexts into risk events by one LLM server or more.

    `clock` gives seconds, monotonic; `wall` milliseconds since the Unix epoch.
    """

    def __init__(
        self,
        llms: Sequence[Llm],
        settings: LlmSettings,
        *,
        conditions: Mapping[str, str] | None = None,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings = settings
        self._conditions = dict(conditions or {})
        self._wall = wall
        self._clock = clock
        self._endpoints = Endpoints(llms, self._slots, self._canary, clock, live_alone=bool(settings.live_alone))
        self.gate = self._endpoints.gate
        self.metrics = AnalyzeMetrics(self._endpoints)
        self._cases: OrderedDict[tuple[str, str], _Case] = OrderedDict()
        self._holders = 1

    def share(self) -> "Judge":
        """For one more who uses it and closes it: the last one's `close` lets go of the servers."""
        self._holders += 1
        return self

    async def judge(
        self,
        context: Context,
        prompt: PromptVersion,
        *,
        key: str,
        run: str = ids.LIVE,
        priority: Priority = Priority.LIVE,
        patience_s: float | None = None,
    ) -> RiskEvent:
        """The window's event. `key` names the item across calls: what was tried in vain is counted under it.

        Of priority `REPLAY`, an attempt, or a canary that nobody else waits for, may be cancelled for live work: it
        begins anew when there is a slot, with its whole deadline, and that is held against nobody. `patience_s`: how
        long to wait for a slot before saying so.

        Raises:
            UnprocessableError: it was given its chances while the server was well; `detail` says what is known.
            UnavailableError: the server is away, or does not even judge the canary: with several servers, all of them;
                or work that comes first (`live`) has had every slot for `patience_s`.
        """
        try:
            core.variables(context)
        except ValueError as error:
            raise UnprocessableError(str(error), camera_id=context.camera_id) from error
        name, caller = (key, prompt.digest), Caller(priority, patience_s)
        case = self._cases.get(name) or _Case()
        while True:
            await self._settle(case, prompt, caller)
            if case.closed:
                self._cases.pop(name, None)
                raise self._give_up(case, context, prompt)
            # This asks servers that are not known yet, before the slot: reading 30 GB of weights for their digest takes
            # a minute, once, and no item's time.
            well = await self._endpoints.find(prompt, caller)
            try:
                verdict, answered = await self.gate.run(
                    partial(self._attempt, context, prompt, case),
                    among=[endpoint.name for endpoint in case.open_to(well)],
                    priority=priority,
                    alone=bool(case.blamed),
                    prefix=prompt.digest,
                    patience_s=patience_s,
                )
            except ClosedError:
                continue
            except BusyError as error:
                raise _behind(error) from error
            except UnavailableError:
                if not self._endpoints.well(prompt):
                    raise
            except _AttemptFailedError as error:
                failure = Failure(
                    error.kind, str(error), error.raw[:_RAW_CHARS], error.endpoint, self._endpoints.tick()
                )
                case.pending.append(failure)
                self._remember(name, case)
                self.metrics.failures.add(error.kind)
                log.warning(
                    "attempt failed",
                    item=key,
                    kind=error.kind,
                    error=str(error),
                    endpoint=error.endpoint.name,
                    blamed=len(case.blamed),
                )
            else:
                self._cases.pop(name, None)
                return core.risk_event(
                    context,
                    prompt,
                    verdict,
                    answered,
                    judged_at=self._wall(),
                    run=run,
                )

    async def blames(self, prompt: PromptVersion, other: PromptVersion, caller: Caller = LIVE) -> str | None:
        """Why a version is at fault, and not the servers, when they do not judge with it; None where that is not shown.

        It is blamed as an item is: where servers that answer have failed its canary `ATTEMPTS` times, and were good
        with another version's afterwards.
        """
        blamed = None
        for endpoint in self._endpoints.all:
            canary, pause = endpoint.canaries.get(prompt.digest), endpoint.pauses.get(prompt.digest)
            if endpoint.away is not None:
                continue
            if canary is None or canary.failure is None or pause is None or pause.failures < ATTEMPTS:
                return None
            try:
                await self._endpoints.prove(endpoint, other, canary.began, caller)
            except UnavailableError:
                return None
            blamed = canary.failure
        return blamed

    async def close(self) -> None:
        """Let go of the servers, once everyone has who uses it."""
        self._holders -= 1
        if not self._holders:
            await self._endpoints.close()

    async def _settle(self, case: _Case, prompt: PromptVersion, caller: Caller) -> None:
        """Blame the item for what it failed in, where the server's canary is good.

        Raises:
            UnavailableError: it is not, or had no slot, and there is no other server to try.
        """
        unproven: UnavailableError | None = None
        for failure in tuple(case.pending):  # each: one that stays away must not keep the others from being proven
            try:
                await self._endpoints.prove(failure.endpoint, prompt, failure.at, caller)
            except UnavailableError as error:
                unproven = error
            else:
                case.pending.remove(failure)
                case.blamed.append(failure)
        if unproven is not None and not case.closed and not case.open_to(await self._endpoints.find(prompt, caller)):
            raise unproven

    async def _attempt(
        self, context: Context, prompt: PromptVersion, case: _Case, held: Held
    ) -> tuple[Verdict, Answered]:
        """One attempt within its time, on the server whose slot is held."""
        endpoint = self._endpoints.named(held.place)
        limit_s = self._limit_s(case, prompt, endpoint)
        heard: list[str] = []
        try:
            async with asyncio.timeout(limit_s):
                verdict, answered = await self._ask(endpoint, context, prompt, heard)
        except UnavailableError as error:
            self._endpoints.refused(endpoint, error)
            raise
        except TimeoutError as error:
            text = f"no answer within {limit_s:.3g} s (llm.deadline_s covers all attempts)"
            raise _AttemptFailedError(endpoint, "hung", text, "".join(heard)) from error
        except AttemptError as error:
            raw = "\n".join(filter(None, ("".join(heard), error.raw)))
            raise _AttemptFailedError(endpoint, error.kind, str(error), raw) from error
        except (PromptError, ValueError) as error:
            kind = "unusable" if heard else "prompt"
            raise _AttemptFailedError(endpoint, kind, str(error), "".join(heard)) from error
        except Exception as error:
            # A mistake of ours, or what nobody foresaw: the canary tells whether this window brings it about.
            log.exception("attempt failed unforeseen", endpoint=endpoint.name)
            raise _AttemptFailedError(endpoint, "error", repr(error), "".join(heard)) from error
        return verdict, answered._replace(queued_ms=held.queued_ms)

    def _limit_s(self, case: _Case, prompt: PromptVersion, endpoint: Endpoint) -> float:
        """How long the item's next attempt may take."""
        deadline_s = self._settings.deadline_s
        first = deadline_s * (1 - (ATTEMPTS - 1) * _AGAIN)
        if all(failure.kind != "hung" for failure in case.blamed):
            return first
        canary = endpoint.canaries.get(prompt.digest)  # none yet where it hung elsewhere
        needs_s = _CANARIES * canary.took_s if canary is not None else first
        return min(first, max(deadline_s * _AGAIN, needs_s, _SPIKE_S))

    async def _ask(
        self, endpoint: Endpoint, context: Context, prompt: PromptVersion, heard: list[str]
    ) -> tuple[Verdict, Answered]:
        """Ask, and once for a repair. `heard` gathers what the model said."""
        llm = endpoint.llm
        server = await self._endpoints.server(endpoint)
        parameters = parameters_of(self._settings, prompt)
        most = budget(server.context_size, self._settings, prompt)
        count = partial(llm.count_tokens, parameters=parameters)
        rendered = await fit(context, prompt, most, count)
        completion = await llm.complete(rendered.messages, prompt.schema, parameters, heard.append)
        heard.append("")  # an empty answer is one
        spent = completion.inference_ms
        repaired = False
        try:
            verdict, forgiven = answers.parse(completion.text, prompt, cut_off=completion.cut_off)
        except UnusableError as error:
            log.info("repair", error=str(error))
            messages = await self._repair(count, rendered, prompt, completion, error=str(error), most=most)
            heard.append("\n")
            completion = await llm.complete(messages, prompt.schema, parameters, heard.append)
            rendered = rendered._replace(messages=messages)
            spent += completion.inference_ms
            verdict, forgiven = answers.parse(completion.text, prompt, cut_off=completion.cut_off)
            repaired = True
        for what in forgiven:
            self.metrics.forgiven.add(what)
        return verdict, Answered(
            rendered=rendered,
            raw=completion.text,
            repaired=repaired,
            model=server.model,
            model_digest=server.model_digest,
            parameters=parameters,
            conditions={
                "endpoint": endpoint.name,
                "slots": str(server.slots or self._slots(0)),
                "context_size": str(server.context_size),
                "prompt_cache": "on" if parameters.get("cache_prompt", True) else "off",
                "seed": str(parameters["seed"]),
                "server_build": server.build,
                **self._conditions,
            },
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            cached_tokens=completion.cached_tokens,
            queued_ms=0.0,
            inference_ms=spent,
        )

    async def _repair(
        self, count: Count, rendered: Rendered, prompt: PromptVersion, completion: Completion, *, error: str, most: int
    ) -> tuple[Message, ...]:
        """The answer sent back with what is wrong with it; as much of it as the context has room for."""
        kept = completion.text[:_REPAIR_CHARS]
        while True:
            messages = prompt.repair(rendered.messages, kept, error)
            if core.token_bound(messages) <= most or await count(messages) <= most:
                return messages
            if not kept:
                raise UnusableError(f"{error} (and the context has no room for a repair)")
            kept = kept[: len(kept) // 2]

    async def _canary(
        self, endpoint: Endpoint, prompt: PromptVersion, urgency: Urgency, patience_s: float | None
    ) -> tuple[str | None, float]:
        """Judge the stored window there; why it failed, or None, and how long it took, seconds.

        Raises:
            UnavailableError: work that comes first (`live`) has had every slot for `patience_s`.
        """

        async def judge(held: Held) -> float:
            since = self._clock()
            await self._attempt(CANARY, prompt, _Case(), held)
            return self._clock() - since

        try:
            await self._endpoints.server(endpoint)
            took_s = await self.gate.run(
                judge, among=[endpoint.name], priority=urgency, prefix=prompt.digest, patience_s=patience_s
            )
        except BusyError as error:
            raise _behind(error) from error
        except (_AttemptFailedError, UnavailableError, ClosedError) as error:
            log.warning("canary failed", endpoint=endpoint.name, prompt=prompt.digest, error=str(error))
            return str(error), 0.0
        return None, took_s

    def _slots(self, told: int) -> int:
        """Requests at once to a server that tells of so many slots; 0: it tells nothing."""
        most = self._settings.slots
        return min(told, most) if told and most else told or most or SLOTS

    def _remember(self, name: tuple[str, str], case: _Case) -> None:
        self._cases[name] = case
        self._cases.move_to_end(name)
        while len(self._cases) > _CASES:
            self._cases.popitem(last=False)

    def _give_up(self, case: _Case, context: Context, prompt: PromptVersion) -> UnprocessableError:
        last = case.blamed[-1]
        try:
            asked = core.chat_json(next(core.renderings(context, prompt)).messages)[:_RAW_CHARS]
        except (PromptError, ValueError):
            asked = ""
        return UnprocessableError(
            f"{last.kind}: {last.message}",
            camera_id=context.camera_id,
            detail=json.dumps(
                {
                    "batch_id": context.batch_id,
                    "attempts": [
                        {"kind": f.kind, "message": f.message, "endpoint": f.endpoint.name, "raw": f.raw}
                        for f in case.blamed
                    ],
                    "prompt_digest": prompt.digest,
                    "rendered_prompt": asked,
                },
                ensure_ascii=False,
            ),
        )


def _behind(error: BusyError) -> UnavailableError:
    return UnavailableError("live", f"windows that come first have every slot: {error}")

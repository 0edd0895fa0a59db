"""Judging one window: a slot, a deadline, one repair, and whose fault it is when nothing usable comes back.

An item is blamed only for an attempt that was followed by a good canary: a fixed window, judged with the same
prompt, schema, limits and deadline. While the canary fails, everything waits. After a failed attempt an item is
tried again alone, so that a server that dies or hangs then was killed by nobody else.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from processors.analyze import core
from processors.analyze.core import Answered, Rendered, UnusableError, Verdict
from processors.analyze.gate import SlotGate
from processors.analyze.llm import AttemptError, Completion, Llm
from processors.analyze.metrics import AnalyzeMetrics
from processors.analyze.settings import LlmSettings
from schemas import ids
from schemas.prompts import PromptError, PromptVersion
from schemas.records import Batch, BatchFrame, Context, RiskEvent, SeenBox
from streams.errors import UnavailableError, UnprocessableError

log = structlog.get_logger(__name__)

ATTEMPTS = 3
"""How often an item may kill, hang or fail a server that is well otherwise. Twice can be chance: a restart, a spike."""

_FINAL = frozenset({"unusable", "refused", "prompt"})
"""What the same request again would end in as well: an answer that its repair did not mend, a 4xx, a template."""

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


class Failure(NamedTuple):
    """One attempt that gave nothing usable."""

    kind: str
    message: str
    raw: str
    at: int
    """When it was known, on the judge's own counter: only a canary that began later speaks about it."""


@dataclass
class _Case:
    """What is held against one item."""

    blamed: list[Failure] = field(default_factory=list)
    pending: Failure | None = None

    @property
    def closed(self) -> bool:
        """Whether it has had its chances."""
        return len(self.blamed) >= ATTEMPTS or any(failure.kind in _FINAL for failure in self.blamed)


class _Canary(NamedTuple):
    """How the last canary of a prompt went."""

    began: int
    failure: str | None


class _AttemptFailedError(Exception):
    def __init__(self, kind: str, message: str, raw: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.raw = raw


class Judge:
    """Turns contexts into risk events by an LLM. `clock` gives seconds, monotonic; `wall` ms since the epoch."""

    def __init__(
        self,
        llm: Llm,
        settings: LlmSettings,
        *,
        conditions: Mapping[str, str] | None = None,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._llm = llm
        self._settings = settings
        self._conditions = dict(conditions or {})
        self._wall = wall
        self.gate = SlotGate(settings.slots, clock)
        self.metrics = AnalyzeMetrics(self.gate)
        self._cases: OrderedDict[str, _Case] = OrderedDict()
        self._counter = 0
        self._canaries: dict[str, _Canary] = {}
        self._canary_lock = asyncio.Lock()

    async def judge(self, context: Context, prompt: PromptVersion, *, key: str, run: str = ids.LIVE) -> RiskEvent:
        """The window's event. `key` names the item across calls: what was tried in vain is counted under it.

        Raises:
            UnprocessableError: it was given its chances while the server was well; `detail` says what is known.
            UnavailableError: the server is away, or does not even judge the canary.
        """
        try:
            core.variables(context)
        except ValueError as error:
            raise UnprocessableError(str(error), camera_id=context.camera_id) from error
        case = self._cases.get(key) or _Case()
        while True:
            if case.pending is not None:
                await self._prove(prompt, since=case.pending.at)
                case.blamed.append(case.pending)
                case.pending = None
            elif prompt.digest in self._canaries and self._canaries[prompt.digest].failure is not None:
                await self._prove(prompt, since=self._tick())
            if case.closed:
                self._cases.pop(key, None)
                raise self._give_up(case, context, prompt)
            # Before the slot: reading 30 GB of weights for their digest takes a minute, once, and no item's time.
            await self._llm.server()
            try:
                async with self.gate.hold(alone=bool(case.blamed)) as queued_ms:
                    verdict, answered = await self._attempt(context, prompt)
            except _AttemptFailedError as error:
                case.pending = Failure(error.kind, str(error), error.raw[:_RAW_CHARS], self._tick())
                self._remember(key, case)
                self.metrics.failures.add(error.kind)
                log.warning("attempt failed", item=key, kind=error.kind, error=str(error), blamed=len(case.blamed))
            else:
                self._cases.pop(key, None)
                return core.risk_event(
                    context,
                    prompt,
                    verdict,
                    answered._replace(queued_ms=queued_ms),
                    judged_at=self._wall(),
                    run=run,
                )

    async def _attempt(self, context: Context, prompt: PromptVersion) -> tuple[Verdict, Answered]:
        """One attempt within the deadline. Called with a slot in hand."""
        raw: list[str] = []
        try:
            async with asyncio.timeout(self._settings.deadline_s):
                return await self._ask(context, prompt, raw)
        except TimeoutError as error:
            text = f"no answer within {self._settings.deadline_s:g} s (llm.deadline_s)"
            raise _AttemptFailedError("hung", text, "\n".join(raw)) from error
        except AttemptError as error:
            raise _AttemptFailedError(error.kind, str(error), "\n".join([*raw, error.raw])) from error
        except (PromptError, ValueError) as error:
            raise _AttemptFailedError("unusable" if raw else "prompt", str(error), "\n".join(raw)) from error

    async def _ask(self, context: Context, prompt: PromptVersion, raw: list[str]) -> tuple[Verdict, Answered]:
        server = await self._llm.server()
        parameters = {
            "seed": self._settings.seed,
            "max_tokens": self._settings.max_completion_tokens,
            **({} if self._settings.prompt_cache else {"cache_prompt": False}),
            **prompt.sampling,
        }
        budget = server.context_size - int(parameters["max_tokens"])
        rendered = await self._render(context, prompt, budget)
        completion = await self._llm.complete(rendered.messages, prompt.schema, parameters)
        raw.append(completion.text)
        spent = completion.inference_ms
        repaired = False
        try:
            verdict = core.parse(completion.text, prompt, cut_off=completion.cut_off)
        except UnusableError as error:
            log.info("repair", error=str(error))
            rendered, completion = await self._repair(
                rendered, prompt, completion, error=str(error), budget=budget, parameters=parameters
            )
            raw.append(completion.text)
            spent += completion.inference_ms
            verdict = core.parse(completion.text, prompt, cut_off=completion.cut_off)
            repaired = True
        return verdict, Answered(
            rendered=rendered,
            raw=completion.text,
            repaired=repaired,
            model=server.model,
            model_digest=server.model_digest,
            parameters=parameters,
            conditions={
                "slots": str(server.slots or self._settings.slots),
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

    async def _render(self, context: Context, prompt: PromptVersion, budget: int) -> Rendered:
        size = 0
        for rendered in core.renderings(context, prompt):
            # A token holds a byte at least: most windows fit by that bound alone, and the server need not count.
            if core.token_bound(rendered.messages) <= budget:
                return rendered
            size = await self._llm.count_tokens(rendered.messages)
            if size <= budget:
                return rendered
        raise PromptError(
            f"the prompt has {size} tokens without any section, and {budget} are left of the context beside the "
            f"answer: raise llm.context_size, or lower llm.max_completion_tokens",
        )

    async def _repair(
        self,
        rendered: Rendered,
        prompt: PromptVersion,
        completion: Completion,
        *,
        error: str,
        budget: int,
        parameters: Mapping[str, Any],
    ) -> tuple[Rendered, Completion]:
        """Send the answer back with what is wrong with it; as much of it as the context has room for."""
        kept = completion.text[:_REPAIR_CHARS]
        while True:
            messages = prompt.repair(rendered.messages, kept, error)
            if core.token_bound(messages) <= budget or await self._llm.count_tokens(messages) <= budget:
                break
            if not kept:
                raise UnusableError(f"{error} (and the context has no room for a repair)")
            kept = kept[: len(kept) // 2]
        again = await self._llm.complete(messages, prompt.schema, parameters)
        return rendered._replace(messages=messages), again

    async def _prove(self, prompt: PromptVersion, since: int) -> None:
        """Return once a canary that began after `since` was good. Who asks at the same time shares one.

        Raises:
            UnavailableError: it failed.
        """
        asked = self._tick()
        async with self._canary_lock:
            last = self._canaries.get(prompt.digest)
            if last is None or last.began <= (since if last.failure is None else asked):
                began = self._tick()
                last = _Canary(began, await self._canary(prompt))
                self._canaries[prompt.digest] = last
        if last.failure is not None:
            raise UnavailableError(
                "llm",
                f"{self._settings.url} (llm.url) does not judge the canary with prompt {prompt.name or prompt.digest}: "
                f"{last.failure}",
            )

    async def _canary(self, prompt: PromptVersion) -> str | None:
        """Judge the stored window; why it failed, or None."""
        try:
            async with self.gate.hold():
                await self._attempt(CANARY, prompt)
        except (_AttemptFailedError, UnavailableError) as error:
            log.warning("canary failed", prompt=prompt.digest, error=str(error))
            return str(error)
        return None

    def _remember(self, key: str, case: _Case) -> None:
        self._cases[key] = case
        self._cases.move_to_end(key)
        while len(self._cases) > _CASES:
            self._cases.popitem(last=False)

    def _tick(self) -> int:
        self._counter += 1
        return self._counter

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
                    "attempts": [{"kind": f.kind, "message": f.message, "raw": f.raw} for f in case.blamed],
                    "prompt_digest": prompt.digest,
                    "rendered_prompt": asked,
                },
                ensure_ascii=False,
            ),
        )

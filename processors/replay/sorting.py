"""What becomes of each window of a replay: left out and why, said already, or to be judged, and by which prompt."""

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from processors.analyze.core import variables
from processors.replay.history import Live, Said, Skips, Window
from processors.replay.plan import Plan, event_of
from schemas import ids
from schemas.prompts import PromptVersion
from schemas.records import Context, ReplayEvent

STRICT: Mapping[str, str] = {"slots": "1", "prompt_cache": "off"}
"""Conditions under which the same question has the same answer."""

SAME = ("seed", "server_build", "threads", "gpu_layers", "context_size")
"""Conditions that must be those of the recorded verdict for it to be repeated byte for byte."""


class OtherWeightsError(Exception):
    """A strict replay would be judged by other weights than those that are to repeat themselves."""


class Judging(NamedTuple):
    """What will judge, as far as it can be told beforehand."""

    model: str = ""
    model_digest: str = ""
    """SHA-256 of the weights; empty where it cannot be read."""
    conditions: Mapping[str, str] = {}
    parameters: Callable[[PromptVersion], Mapping[str, object]] = lambda _: {}
    """What a request under a prompt is sent with."""

    def verdict(self, prompt: PromptVersion) -> str:
        """Digest of what judges under this prompt; empty where it cannot be told."""
        weights = self.model_digest or (f"model:{self.model}" if self.model else "")
        if not weights:
            return ""
        return ids.verdict_digest(prompt.template, prompt.output_schema, self.parameters(prompt), weights)


async def _nothing(_: Collection[str]) -> None:
    """They are where workers look."""


class Ways(NamedTuple):
    """How windows are looked up."""

    prompt: Callable[[str], PromptVersion | None]
    """A version by its digest."""
    prompt_of_time: Callable[[str, int], str]
    """Digest of the version that judged a camera at an event time."""
    said: Callable[[Mapping[str, str]], Awaitable[Mapping[str, Said]]]
    """Recorded verdicts by batch id, of these batch ids under these verdict digests."""
    ready: Callable[[Collection[str]], Awaitable[None]] = _nothing
    """Sees to it that workers find the versions of these digests: windows are about to be judged by them."""


Todo = tuple[Window, PromptVersion]
"""A window to be judged, and by which prompt."""


class Sorted(NamedTuple):
    """A page of windows, sorted."""

    judge: list[Todo]
    reuse: list[Said]
    """The same window was told of in the same words, and judged by the same."""


class Sorter:
    """Sorts the windows of one plan; `skipped` is what it left out."""

    def __init__(self, plan: Plan, judging: Judging, ways: Ways) -> None:
        self._plan = plan
        self._judging = judging
        self._ways = ways
        self.skipped = Skips()

    async def sort(self, page: Sequence[Window]) -> Sorted:
        """Sort a page; the prompts of what is to be judged are where workers find them.

        Raises:
            OtherWeightsError: the replay is strict, and what judges here is not what judged then.
            UnavailableError: ClickHouse is away.
        """
        found = await self._sorted(page)
        await self._ways.ready({prompt.digest for _, prompt in found.judge})
        return found

    async def _sorted(self, page: Sequence[Window]) -> Sorted:
        todo: list[Todo] = []
        for window in page:
            prompt = self._prompt(window)
            if prompt is not None:
                todo.append((window, prompt))
        if not todo or self._plan.mode == "strict" or self._plan.kind != "change":
            return Sorted(todo, [])
        wanted = {window.context.batch_id: self._judging.verdict(prompt) for window, prompt in todo}
        found = await self._ways.said({batch: digest for batch, digest in wanted.items() if digest})
        judge, reuse = [], []
        for window, prompt in todo:
            one = found.get(window.context.batch_id)
            if one is not None and same(one.context, window.context):
                reuse.append(one)
            else:
                judge.append((window, prompt))
        return Sorted(judge, reuse)

    def _prompt(self, window: Window) -> PromptVersion | None:
        """The prompt that a window is to be judged by; None where it is left out."""
        context, live = window.context, window.live
        digest = self._plan.change.prompt or (live.prompt_digest if live is not None else "")
        digest = digest or self._ways.prompt_of_time(context.camera_id, context.batch.started_at)
        prompt = self._ways.prompt(digest)
        why = self._unequal(live, prompt)
        if why is None and prompt is None:
            why = f"its prompt version {digest} is not in `prompts`" if digest else "no prompt ever judged its camera"
        if why is not None:
            self.skipped.add(context.batch_id, why)
            return None
        return prompt

    def _unequal(self, live: Live | None, prompt: PromptVersion | None) -> str | None:
        """Why what live work said of a window cannot be asked for again; None where it can, or need not."""
        if self._plan.kind != "baseline" and self._plan.mode != "strict":
            return None
        if live is None:
            return "no live verdict to repeat"
        mine = self._judging
        if self._plan.mode == "strict":
            return self._not_strict(live, prompt)
        if live.model_digest and mine.model_digest and live.model_digest != mine.model_digest:
            return f"judged by other weights: {live.model}, SHA-256 {live.model_digest[:12]}"
        return None

    def _not_strict(self, live: Live, prompt: PromptVersion | None) -> str | None:
        mine = self._judging
        then = live.conditions
        wrong = [f"{name} {then.get(name, 'unknown')}" for name, value in STRICT.items() if then.get(name) != value]
        if wrong:
            return f"not recorded under strict conditions: {', '.join(wrong)}"
        if live.model_digest != mine.model_digest:
            raise OtherWeightsError(
                f"the weights are not those that judged {live.event_id}: SHA-256 {mine.model_digest or 'unknown'} "
                f"here, {live.model_digest or 'unknown'} then. Set llm.model_path to that file, or replay with "
                "--mode fast"
            )
        other = [
            f"{name} {then.get(name, 'unknown')}, {mine.conditions.get(name, 'unknown')} now"
            for name in SAME
            if then.get(name) != mine.conditions.get(name)
        ]
        if prompt is not None and prompt.digest == live.prompt_digest:
            now = json.dumps(mine.parameters(prompt), sort_keys=True)
            other += [f"parameters {live.parameters}, {now} now"] if live.parameters != now else []
        return f"recorded under other conditions: {'; '.join(other)}" if other else None


def same(recorded: Context, now: Context) -> bool:
    """Whether a prompt would be told the same of both."""
    try:
        return variables(recorded) == variables(now)
    except ValueError:
        return False


def repeated(replay_id: str, said: Said) -> ReplayEvent:
    """A recorded verdict as this replay's."""
    event = msgspec.structs.replace(said.event, event_id=ids.event_id(said.event.batch_id, replay_id), run=replay_id)
    return event_of(replay_id, event, reused=True)

"""Which sides there are to compare: `live`, and every replay by its id or name."""

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from processors.replay.plan import Change, Plan, PlanError, Scope
from processors.store.queries import Queries, Row
from schemas.ids import LIVE

# Fewer characters of an id than this are no name.
_LEAST_ID = 4

# The newest life of the topic, and in it the log's order, count.
_REPLAYS = """
    SELECT replay_id, name, state, plan FROM
    (
        SELECT *, min(inserted_at) OVER (PARTITION BY epoch) AS life FROM replays FINAL
    )
    ORDER BY life DESC, `offset` DESC LIMIT 1 BY replay_id
"""


class SideError(ValueError):
    """There is no such side, or no two; the message names what there is."""


class Known(NamedTuple):
    """A replay as its newest record has it."""

    replay_id: str
    name: str
    state: str
    plan: Plan | None
    """None: its plan cannot be read."""

    @property
    def scope(self) -> Scope:
        """Which part of the history."""
        return self.plan.scope if self.plan is not None else Scope()

    @property
    def change(self) -> Change:
        """What is different."""
        return self.plan.change if self.plan is not None else Change()

    @property
    def cuts(self) -> bool:
        """Whether it makes windows of its own."""
        return self.change.entry != "contexts"

    @property
    def whole(self) -> bool:
        """Whether it made all windows of its cameras and time: it is done, and looked at no choice of them."""
        return (
            self.plan is not None
            and self.plan.kind != "shadow"
            and self.state == "done"
            and self.scope.sample is None
            and not self.scope.where.strip()
        )

    @property
    def reproduces(self) -> bool:
        """Whether it must say the same byte for byte: strict, and of the same windows under the same prompt."""
        return self.plan is not None and self.plan.mode == "strict" and not self.cuts and not self.change.prompt

    @property
    def measures_noise(self) -> bool:
        """Whether it asks the same again."""
        return self.plan is not None and (self.plan.kind == "baseline" or self.plan.change == Change())


async def replays(store: Queries) -> dict[str, Known]:
    """Every replay and shadow, by id.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    return {row["replay_id"]: _known(row) for row in await store.rows(_REPLAYS)}


def find(text: str, known: Mapping[str, Known]) -> Known | None:
    """The replay of that id, name, or beginning of an id; None for `live`.

    Raises:
        SideError: there is none, or several; the message lists what is near.
    """
    if text == LIVE:
        return None
    if text in known:
        return known[text]
    named = [one for one in known.values() if one.name == text]
    begun = [one for one in known.values() if len(text) >= _LEAST_ID and one.replay_id.startswith(text)]
    found = named or begun
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{one.replay_id} ({one.state})" for one in found)
        raise SideError(f"several replays are called {text}; name one by its id: {listed}")
    words = {name: one for one in known.values() for name in (one.replay_id, one.name) if name}
    near = [words[word] for word in difflib.get_close_matches(text, [LIVE, *words], n=5, cutoff=0.5) if word != LIVE]
    listed = ", ".join(f"{one.name} ({one.replay_id})" for one in dict.fromkeys(near or list(known.values())[:5]))
    raise SideError(
        f"there is no replay {text}; "
        + (f"there is live, and near it: {listed}" if listed else "none was run yet: `rewatch replay run`")
    )


def described(change: Change, prompt_names: Mapping[str, str] | None = None) -> str:
    """What a replay changes, in words."""
    prompt = change.prompt
    names = prompt_names or {}
    llm = change.llm
    parts = [
        f"prompt {names.get(prompt) or prompt[:12]}" if prompt else "",
        f"LLM {llm.model or llm.model_path.rpartition('/')[2] or llm.url}" if llm is not None else "",
        f"threshold {change.threshold:g}" if change.threshold is not None else "",
        f"idle {change.idle_ms / 1000:g} s" if change.idle_ms is not None else "",
        f"max {change.max_ms / 1000:g} s" if change.max_ms is not None else "",
        f"detector {change.detector}" if change.detector else "",
    ]
    return ", ".join(filter(None, parts)) or "nothing: the same again"


def _known(row: Row) -> Known:
    try:
        plan: Plan | None = Plan.decode(row["plan"])
    except PlanError:
        plan = None
    return Known(row["replay_id"], row["name"] or row["replay_id"], row["state"], plan)

"""Strict comparison: which pairs must be the same byte for byte, why the others need not, and what differs. Pure.

llama.cpp gives one completion for one prompt only with a single slot, without the prompt cache, with the same seed,
weights, build, threads and layers on the GPU: with 8 slots the same prompt had 5 to 8 different ones.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from processors.replay.comparison import Difference, Ineligible, Pair, Strict, Verdict

_MUST: Mapping[str, tuple[str, str]] = {
    "slots": ("1", "{} slots"),
    "prompt_cache": ("off", "the prompt cache {}"),
}
"""Conditions of their making that both verdicts must have, and how another value is told."""

_SAME = ("seed", "server_build", "threads", "gpu_layers", "context_size")
"""Conditions in which both must agree."""

# Ids of events that show where to look.
_EXAMPLES = 5

# Bytes shown before and behind the first one that differs.
_AROUND = 30


class Texts(NamedTuple):
    """What one verdict was asked and what came back."""

    rendered_prompt: str
    raw_completion: str


class Eligible(NamedTuple):
    """What can be compared strictly, and what cannot."""

    same: tuple[Pair, ...]
    """Equal, byte for byte."""
    different: tuple[Pair, ...]
    ineligible: tuple[Ineligible, ...]
    """By count, the most first."""
    models: tuple[tuple[str, str], ...]
    """Model digests that differ within a pair, each two once."""


def eligible(pairs: Sequence[Pair]) -> Eligible:
    """Tell pairs that must be equal from those that need not be."""
    same: list[Pair] = []
    different: list[Pair] = []
    others: dict[str, list[str]] = defaultdict(list)
    models: set[tuple[str, str]] = set()
    for pair in pairs:
        if pair.a.model_digest and pair.b.model_digest and pair.a.model_digest != pair.b.model_digest:
            models.add((pair.a.model_digest, pair.b.model_digest))
        why = reason(pair)
        if why is not None:
            others[why].append(pair.a.event_id)
        elif pair.identical and pair.a.rendered_digest == pair.b.rendered_digest:
            same.append(pair)
        else:
            different.append(pair)
    ineligible = [
        Ineligible(reason=why, count=len(event_ids), examples=tuple(event_ids[:_EXAMPLES]))
        for why, event_ids in sorted(others.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return Eligible(tuple(same), tuple(different), tuple(ineligible), tuple(sorted(models)))


def reason(pair: Pair) -> str | None:
    """Why the two verdicts need not be equal; None: they must be. Another model is no excuse."""
    a, b = pair.a, pair.b
    found = _loose(a, "recorded with") or _loose(b, "judged again with")
    if found is None and b.reused:
        found = "taken from what was recorded: no call was made"
    if found is None and not (a.model_digest and b.model_digest):
        found = "its weights could not be read (llm.model_path), so nobody knows whether they are the same"
    if found is None and a.prompt_digest != b.prompt_digest:
        found = f"another prompt version: {a.prompt_digest[:12]}, then {b.prompt_digest[:12]}"
    for name in _SAME if found is None else ():
        before, after = (verdict.conditions.get(name, "unknown") for verdict in (a, b))
        if before != after:
            return f"another {name}: {before}, then {after}"
    if found is None and _json(a.parameters) != _json(b.parameters):
        found = f"other sampling parameters: {a.parameters}, then {b.parameters}"
    return found


def strict(found: Eligible, texts: Mapping[str, tuple[Texts, Texts]], calls: int) -> Strict:
    """The result.

    Args:
        found: the pairs, told apart.
        texts: by event id of side A what both sides were asked and answered, of as many that differ as are to be shown.
        calls: verdicts of side B that come from a call.
    """
    differences = [
        difference
        for pair in found.different
        if pair.a.event_id in texts
        for difference in [_difference(pair.a.event_id, *texts[pair.a.event_id])]
        if difference is not None
    ]
    return Strict(
        eligible=len(found.same) + len(found.different),
        identical=len(found.same),
        differences=tuple(differences),
        ineligible=found.ineligible,
        models=found.models,
        calls=calls,
    )


def first_difference(a: bytes, b: bytes) -> int | None:
    """The place of the first byte that differs; where one ends before, its length; None: they are the same."""
    if a == b:
        return None
    shorter = min(len(a), len(b))
    # By halves: equal beginnings are compared at once, not byte by byte.
    low, high = 0, shorter
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _loose(verdict: Verdict, how: str) -> str | None:
    for name, (must, told) in _MUST.items():
        value = verdict.conditions.get(name)
        if value is None:
            return f"{how} unknown {name}"
        if value != must:
            return f"{how} {told.format(value)}"
    return None if "seed" in verdict.conditions else f"{how} an unknown seed"


def _difference(event_id: str, a: Texts, b: Texts) -> Difference | None:
    """The prompt comes first: of another question another answer is no wonder."""
    for field in Texts._fields:
        of_a, of_b = getattr(a, field).encode(), getattr(b, field).encode()
        at = first_difference(of_a, of_b)
        if at is not None:
            around = slice(max(at - _AROUND, 0), at + _AROUND)
            shown = (text[around].decode(errors="replace") for text in (of_a, of_b))
            return Difference(event_id=event_id, field=field, position=at, **dict(zip("ab", shown, strict=True)))
    return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

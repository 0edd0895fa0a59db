"""Which fault begins when, and for how long: a pure function of the count and the seed.

Faults may overlap, except on the same resource: a process that is stopped cannot be killed at its own instant, and
the broker cannot be pulled off the wall while it is away.
"""

import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

STAGES = ("detect", "batch", "enrich", "analyze", "sink")
"""What has an input partition, and so a group to be a member of."""

PROCESSES = ("ingest", *STAGES, "gateway")

# 100 faults in 40 minutes, with three for the start, the drain and the audit: 22 s each, less for what a fault is put
# off because its resource is busy.
GAP_S = 19.0
"""Seconds between two beginnings, on average."""

LONGEST_S = 60.0
"""The longest that anything is away."""

REST_S = 6.0
"""Between two faults of one resource: what is killed while it starts shows less than what is killed at work."""


class Kind(NamedTuple):
    """One kind of fault."""

    name: str
    what: str
    """For `--list`."""
    targets: tuple[str, ...]
    """The resources that it may hit; one of them is drawn."""
    seconds: tuple[float, float] = (0.0, 0.0)
    """How long it lasts, least and most; 0 is an instant."""
    weight: int = 2


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(Kind(f"kill-{name}", f"SIGKILL of {name}", (name,)) for name in PROCESSES),
        Kind("stop", "SIGSTOP beyond the session timeout, then SIGCONT", PROCESSES, (12, 18), 3),
        Kind("zombie", "the same, while another worker takes the partitions over", STAGES, (12, 18), 3),
        Kind("late-produce", "SIGKILL; produce requests on their way arrive when the successor is at work",
             ("ingest", *STAGES), (14, 14), 3),
        Kind("kill-broker", "SIGKILL of the broker", ("kafka",)),
        Kind("broker-away", "the broker is down, or cut off, for a minute", ("kafka",), (45, 60), 1),
        Kind("broker-hangs", "SIGSTOP of the broker, then SIGCONT", ("kafka",), (5, 20), 1),
        Kind("power-cut", "SIGKILL of the broker, and a torn append on the end of its segments", ("kafka",)),
        Kind("kill-clickhouse", "SIGKILL of the ClickHouse process", ("clickhouse",)),
        Kind("clickhouse-hangs", "SIGSTOP of the ClickHouse process, then SIGCONT", ("clickhouse",), (10, 30), 1),
        Kind("kill-llama", "SIGKILL of llama-server", ("llama",)),
        Kind("llm-errors", "the LLM answers 500 to everything", ("llama",), (10, 30)),
        Kind("llm-one-item", "the LLM answers 500 to one window, always", ("llama",)),
        Kind("llm-hangs", "the LLM answers nothing", ("llama",), (25, 45)),
        Kind("llm-garbage", "the LLM answers something that is no completion", ("llama",), (10, 30)),
        Kind("llm-cut-off", "the LLM's answers break off in the middle", ("llama",), (10, 30)),
        Kind("scale-detect", "another worker of detect joins, and leaves", ("detect-more",), (10, 25)),
        Kind("scale-analyze", "another worker of analyze joins, and leaves", ("analyze-more",), (10, 25)),
    )
}  # fmt: skip


class Planned(NamedTuple):
    """One fault of a campaign."""

    number: int
    kind: str
    target: str
    at_s: float
    """Seconds from the beginning of the load."""
    length_s: float
    seed: int
    """What is drawn while it happens is drawn from this."""


def plan(
    n: int, seed: int, *, only: Collection[str] = (), gap_s: float = GAP_S, longest_s: float = LONGEST_S
) -> list[Planned]:
    """`n` faults in the order of their beginning. The same arguments make the same plan.

    Each kind comes once before any comes by its weight, as far as `n` goes; and of what a kind may hit everything comes
    once before anything comes again.

    Raises:
        KeyError: `only` names no kind.
    """
    rng = random.Random(f"{seed}/{n}/{sorted(only)}")
    kinds = [KINDS[name] for name in sorted(only)] or list(KINDS.values())
    chosen = rng.sample(kinds, min(n, len(kinds)))
    chosen += rng.choices(kinds, [kind.weight for kind in kinds], k=n - len(chosen))
    rng.shuffle(chosen)
    free: dict[str, float] = {}
    hits: Counter[tuple[str, str]] = Counter()
    found = []
    at = 0.0
    for kind in chosen:
        at += rng.uniform(0.2, 1.8) * gap_s
        # Of two that this kind hit least the one longest at peace: else a long fault's resource is put off too far.
        drawn = rng.sample(kind.targets, len(kind.targets))
        least = sorted(drawn, key=lambda name: hits[kind.name, name])
        fewest = hits[kind.name, least[0]]
        target = min(
            [name for name in least[:2] if hits[kind.name, name] == fewest], key=lambda name: free.get(name, 0.0)
        )
        hits[kind.name, target] += 1
        length = min(rng.uniform(*kind.seconds), longest_s)
        begins = max(at, free.get(target, 0.0))
        free[target] = begins + length + REST_S
        found.append(Planned(0, kind.name, target, round(begins, 3), round(length, 3), rng.randrange(2**31)))
    found.sort(key=lambda fault: fault.at_s)
    return [fault._replace(number=number) for number, fault in enumerate(found, 1)]


def ends_s(faults: Sequence[Planned]) -> float:
    """When the last of them is over, seconds from the beginning of the load."""
    return max((fault.at_s + fault.length_s for fault in faults), default=0.0)

"""Which window of one side belongs to which of the other. Pure.

Windows of equal batch id hold the same frames: they are a pair. The others are each drawn to the window of the other
side that they share the most frames with, within their camera, as a share of the frames in either (Jaccard's index).
What so hangs together is a pair where it is one and one, a split where it is one and several, a merger where it is
several and one. A window that shares no frame with one of the other side appeared, or vanished.

The time taken grows with the number of frames: only windows that hold the same frame are looked at together.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from processors.replay.comparison import Pair, Pairing, Regrouping, Verdict


def pairing(side_a: Iterable[Verdict], side_b: Iterable[Verdict]) -> Pairing:
    """Every verdict of both sides in exactly one place, whatever order they come in.

    With the sides swapped it is the same, swapped.
    """
    alike, rest_a, rest_b = _by_batch(sorted(side_a, key=_when), sorted(side_b, key=_when))
    pairs = [Pair(a=a, b=b) for a, b in alike]
    split: list[Regrouping] = []
    merged: list[Regrouping] = []
    regrouped: list[Regrouping] = []
    appeared: list[Verdict] = []
    vanished: list[Verdict] = []
    for of_a, of_b in _groups(rest_a, rest_b):
        match of_a, of_b:
            case [a], [b]:
                pairs.append(Pair(a=a, b=b, share=_share(a, b)))
            case [], [b]:
                appeared.append(b)
            case [a], []:
                vanished.append(a)
            case _:
                into = split if len(of_a) == 1 else merged if len(of_b) == 1 else regrouped
                into.append(Regrouping(a=tuple(of_a), b=tuple(of_b)))
    return Pairing(
        pairs=tuple(sorted(pairs, key=lambda pair: (_when(pair.a), _when(pair.b)))),
        split=tuple(sorted(split, key=_first)),
        merged=tuple(sorted(merged, key=_first)),
        regrouped=tuple(sorted(regrouped, key=_first)),
        appeared=tuple(appeared),
        vanished=tuple(vanished),
    )


def _when(verdict: Verdict) -> tuple[int, str, str, str]:
    """In order of time; what a side said twice of one window still has an order of its own."""
    return verdict.started_at, verdict.camera_id, verdict.batch_id, verdict.event_id


def _first(group: Regrouping) -> tuple[int, str, str, str]:
    return min(map(_when, (*group.a, *group.b)))


def _by_batch(
    side_a: Sequence[Verdict], side_b: Sequence[Verdict]
) -> tuple[list[tuple[Verdict, Verdict]], list[Verdict], list[Verdict]]:
    """Those of equal batch id, and the others of both sides."""
    waiting: dict[str, list[Verdict]] = defaultdict(list)
    for b in side_b:
        waiting[b.batch_id].append(b)
    alike: list[tuple[Verdict, Verdict]] = []
    rest_a: list[Verdict] = []
    for a in side_a:
        if waiting.get(a.batch_id):
            alike.append((a, waiting[a.batch_id].pop(0)))
        else:
            rest_a.append(a)
    rest_b = sorted((b for left in waiting.values() for b in left), key=_when)
    return alike, rest_a, rest_b


def _groups(side_a: Sequence[Verdict], side_b: Sequence[Verdict]) -> Iterable[tuple[list[Verdict], list[Verdict]]]:
    """Windows that hang together, each with the one that draws it most, by side; alone where nothing draws it."""
    nodes = [*side_a, *side_b]
    leader = list(range(len(nodes)))

    def lead(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for index, drawn in _drawn(side_a, side_b).items():
        one, other = sorted((lead(index), lead(drawn)))
        leader[other] = one
    groups: dict[int, tuple[list[Verdict], list[Verdict]]] = {}
    for index, node in enumerate(nodes):
        groups.setdefault(lead(index), ([], []))[index >= len(side_a)].append(node)
    return groups.values()


def _drawn(side_a: Sequence[Verdict], side_b: Sequence[Verdict]) -> dict[int, int]:
    """To which window of the other side each is drawn, if to any; those of B are numbered behind those of A."""
    holding: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, b in enumerate(side_b, len(side_a)):
        for frame_id in set(b.frame_ids):
            holding[b.camera_id, frame_id].append(index)
    # The share, the frames shared, and whom: of two that draw alike the later one counts, seen from either side.
    best: dict[int, tuple[float, int, int]] = {}
    for index, a in enumerate(side_a):
        frames = set(a.frame_ids)
        common = Counter(other for frame_id in frames for other in holding.get((a.camera_id, frame_id), ()))
        for other, shared in common.items():
            b = side_b[other - len(side_a)]
            either = len(frames) + len(set(b.frame_ids)) - shared
            share = shared / either
            best[index] = max(best.get(index, (0.0, 0, 0)), (share, shared, other))
            best[other] = max(best.get(other, (0.0, 0, 0)), (share, shared, index))
    return {index: drawn for index, (_, _, drawn) in best.items()}


def _share(a: Verdict, b: Verdict) -> float:
    of_a, of_b = set(a.frame_ids), set(b.frame_ids)
    return len(of_a & of_b) / len(of_a | of_b)

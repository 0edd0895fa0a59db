"""Whether two runtimes of a model see the same: query by query, each with its nearest of the other, not by row.

Queries with near-equal scores change their order with the last bit of a sum, and the worst of them fall in or out.
"""

import numpy as np
from numpy.typing import NDArray

from processors.detect.core import MIN_SCORE

MAX_PX = 1.0
"""How far apart a side of the same box may be, in pixels of the model's input."""

MAX_SCORE = 0.01

# Of all queries, where the rest are below MIN_SCORE: those at the end of the selection may differ.
_SHARE = 0.98


def distances(one: NDArray[np.float32], other: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """How far each query of one image is from its nearest in the other runtime; up to 1 is within the tolerances.

    Both are (queries, classes + 4), as `Network` gives them; `size` is the model's input, (width, height).
    """
    px = np.abs(_sides(one, size)[:, None] - _sides(other, size)[None]).max(-1) / MAX_PX
    score = np.abs(one[:, None, :-4] - other[None, :, :-4]).max(-1) / MAX_SCORE
    nearest: NDArray[np.float32] = np.maximum(px, score).min(1)
    return nearest


def agree(one: NDArray[np.float32], other: NDArray[np.float32], size: tuple[int, int]) -> bool:
    """Whether all that is recorded is the same in both batches, and nearly all of the rest."""
    for a, b in zip(one, other, strict=True):
        near = distances(a, b, size) <= 1
        if not near[a[:, :-4].max(-1) >= MIN_SCORE].all() or near.mean() < _SHARE:
            return False
    return True


def _sides(found: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    centre, extent = found[:, -4:-2], found[:, -2:]
    corners = np.concatenate((centre - extent / 2, centre + extent / 2), 1) * [*size, *size]
    return corners.astype(np.float32)

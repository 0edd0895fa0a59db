"""Fewer layers on the GPU each time its memory runs out, and then none. Pure.

Half of them first: a card that the detector shares, or that another program came to, most often has room for some, and
half a model on a card still answers several times as fast as none.
"""

from collections.abc import Callable, Iterable

from infra.local.llama import ran_out_of_gpu_memory
from infra.models.profiles import ALL


class Ladder:
    """What the next start of the LLM's server keeps on the GPU.

    Args:
        asked: layers on the GPU; -1: as many as fit.
        layers: how many the model has, the output among them.
        fell: told of each step down: the layers from now on, and why, in a sentence.
    """

    def __init__(self, asked: int, layers: int, fell: Callable[[int, str], None]) -> None:
        half = (layers if asked < 0 else min(asked, layers)) // 2
        self._rungs = (asked, half, 0) if asked and half else (asked, 0) if asked else (0,)
        self._at = 0
        self._started = False
        self._fell = fell

    @property
    def layers(self) -> int:
        """As the server runs now."""
        return self._rungs[self._at]

    @property
    def lower(self) -> bool:
        """Whether there is a step below."""
        return self._at + 1 < len(self._rungs)

    @property
    def without_gpu(self) -> bool:
        """Whether it fell to the last step, where the GPU must not be touched at all."""
        return self._at > 0 and not self.layers

    def next(self, log: Iterable[str]) -> int:
        """The layers of the next start.

        Args:
            log: what the last run said; it counts only if this ladder has seen that run start.
        """
        if self._started and self.lower and ran_out_of_gpu_memory(log):
            before, self._at = self.layers, self._at + 1
            now = f"{self.layers} of its layers are there now" if self.layers else "it runs on the CPU now"
            self._fell(self.layers, f"CUDA memory ran out with {_said(before)} on the GPU: {now}")
        self._started = True
        return self.layers


def _said(layers: int) -> str:
    return "as many layers as fit" if layers < 0 else "all layers" if layers >= ALL else f"{layers} layers"

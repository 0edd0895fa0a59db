"""The network on CUDA, recorded once a batch size: a replay launches hundreds of kernels by one call.

A batch is padded to the next recorded size: powers of two, and the largest itself.
"""

import os
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from processors.detect.network import Network

# PyTorch's own recipe runs what is to be captured a few times first, so that cuDNN and cuBLAS have chosen.
_WARM_UP = 3


def sizes(most: int) -> list[int]:
    """The batch sizes to record for batches of up to `most` images, ascending."""
    return [*takewhile(lambda size: size < most, (2**power for power in range(most.bit_length()))), most]


class CudaGraphs:
    """fp16 rather than bf16: with its 10 bits of fraction a box moves by less than a pixel, with 7 by several."""

    def __init__(self, network: Network, most: int) -> None:
        """Move the network to the GPU and record it.

        Raises:
            torch.cuda.OutOfMemoryError: the device's memory does not suffice.
        """
        # Its checks ask the GPU for a value each, which a capture must not.
        os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
        network.model.half()
        self._network = network.cuda()
        height, width = network.size
        self._sizes = sizes(most)
        self._host = torch.empty((most, height, width, 3), dtype=torch.uint8, pin_memory=True)
        self._input = torch.zeros((most, height, width, 3), dtype=torch.uint8, device="cuda")
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        with torch.inference_mode():
            pool: Any = None
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
                self._graphs[size] = self._record(size, pool)
                pool = self._graphs[size][0].pool()

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One batch; one copy there and one back."""
        count = len(pixels)
        graph, output = self._graphs[next(size for size in self._sizes if size >= count)]
        with torch.inference_mode():
            self._host[:count].numpy()[...] = pixels
            self._input[:count].copy_(self._host[:count], non_blocking=True)
            graph.replay()
            found: NDArray[np.float32] = output[:count].cpu().numpy()  # waits for the replay
        return found

    def _record(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        images = self._input[:size]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._network(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = self._network(images)
        return graph, output

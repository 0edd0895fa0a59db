"""The exported model on the CPU by ONNX Runtime: a batch at a time."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from processors.detect.card import Card
from processors.detect.model_detector import ModelDetector

_ERRORS = 3  # of its levels: its warnings tell of nodes that it could not fold


class OnnxDetector(ModelDetector):
    """The model, whose first dimension is free."""

    runtime = "onnxruntime-cpu"

    def __init__(self, card: Card, onnx: Path, threads: int) -> None:
        super().__init__(card)
        ort = importlib.import_module("onnxruntime")
        ort.disable_telemetry_events()  # only its builds for Windows have any
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERRORS
        # A thread that spins while it waits takes its core from the other processes of this machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self.warm_up(1)

    def raw(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """See the base."""
        found: NDArray[np.float32] = self._session.run(None, {self._input: self.card.pixels.of(images)})[0]
        return found

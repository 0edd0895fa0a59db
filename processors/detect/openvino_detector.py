"""The exported model on the CPU by OpenVINO: a request an image, as many at once as OpenVINO takes streams."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from processors.detect.card import Card
from processors.detect.model_detector import ModelDetector


def quiet_openvino() -> Any:
    """The module `openvino`, imported so that it tells nobody.

    Its import reports itself to its makers unless the person once ran `opt_in_out --opt_out`. Where the package that
    does so cannot be imported, it takes a stub of its own instead: so that package is made not to be there.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


class OpenVinoDetector(ModelDetector):
    """Float32 also on processors with bfloat16: that moves boxes by many pixels, and the records must not differ."""

    runtime = "openvino-cpu"

    def __init__(self, card: Card, onnx: Path, threads: int) -> None:
        """Compile the model for one image: a batch of any size is so many requests, side by side.

        On two cores, two requests of one image with a thread each are faster than one after the other with two
        threads each (`cpu_runtime_vs_eager` in tests/bench), and no size of batch needs a model of its own.
        """
        super().__init__(card)
        ov = quiet_openvino()
        core = ov.Core()
        model = core.read_model(onnx)
        model.reshape([1, card.pixels.height, card.pixels.width, 3])
        options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        self._requests = ov.AsyncInferQueue(core.compile_model(model, "CPU", options))
        self._requests.set_callback(self._keep)
        self._outputs: list[NDArray[np.float32]] = []
        self.warm_up(len(self._requests))

    def raw(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """See the base. An image is prepared while the ones before it are inferred."""
        self._outputs = [np.empty(0, np.float32)] * len(images)
        for index, image in enumerate(images):
            self._requests.start_async([self.card.pixels.of([image])], index)
        self._requests.wait_all()  # raises what a request or its callback raised
        return np.stack(self._outputs)

    def _keep(self, request: Any, index: int) -> None:
        self._outputs[index] = request.get_output_tensor().data[0].copy()  # the request is used again

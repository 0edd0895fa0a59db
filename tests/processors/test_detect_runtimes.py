"""Runtimes of the detector: the same boxes from each, the cache of exports, the way over, too little memory."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.models.measure import Found, measure
from infra.models.renders import HELD_OUT_SEED, corners, fresh, truth
from processors.detect import export, exported, network, runtimes, timing, torch_detector
from processors.detect.agreement import agree, distances
from processors.detect.card import Card
from processors.detect.cuda_graphs import sizes
from processors.detect.detector import Detector, FakeDetector
from processors.detect.exported import Cache, Measured
from processors.detect.model_detector import ModelDetector
from processors.detect.onnx_detector import OnnxDetector
from processors.detect.openvino_detector import OpenVinoDetector
from processors.detect.settings import DetectorSettings, ModelError
from processors.detect.timing import Take, Timing, compare
from processors.detect.torch_detector import TorchDetector
from processors.detect.upgrading import UpgradingDetector
from schemas.records import Box
from tests.processors import detect_kit

CPU = DetectorSettings(device="cpu")


@pytest.fixture(scope="module")
def card() -> Card:
    return Card.read(detect_kit.DEMO_DETECTOR)


@pytest.fixture(scope="module")
def onnx(card: Card, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export.export(card, path)
    return path


@pytest.fixture(scope="module")
def every(card: Card, onnx: Path) -> dict[str, ModelDetector]:
    """The demo's detector in every runtime."""
    made = (TorchDetector(card, CPU), OpenVinoDetector(card, onnx, 0), OnnxDetector(card, onnx, 0))
    return {detector.runtime: detector for detector in made}


def eager(card: Card, images: Sequence[Image.Image]) -> np.ndarray:
    """What transformers itself gives: its model as it is loaded, its own image processor."""
    from transformers import AutoModelForObjectDetection, RTDetrImageProcessorPil

    model = AutoModelForObjectDetection.from_pretrained(card.folder).eval()
    inputs = RTDetrImageProcessorPil.from_pretrained(card.folder)(images=list(images), return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs)
    return torch.cat((output.logits.sigmoid(), output.pred_boxes), -1).numpy()


@pytest.mark.parametrize("runtime", ["torch-cpu", "openvino-cpu", "onnxruntime-cpu"])
def test_every_runtime_sees_what_transformers_sees(runtime: str, card: Card, every: dict[str, ModelDetector]) -> None:
    images = detect_kit.scenes(5)
    size = (card.pixels.width, card.pixels.height)
    assert agree(eager(card, images), every[runtime].raw(images), size)


def test_every_runtime_is_as_good_on_scenes_that_none_has_seen(card: Card, every: dict[str, ModelDetector]) -> None:
    data = fresh(HELD_OUT_SEED, 24)
    images = [Image.fromarray(image) for image in data.images]
    right = [truth(data, index) for index in range(len(images))]

    def ap50(detector: ModelDetector) -> float:
        raw = detector.raw(images)
        queries, classes = raw.shape[1], raw.shape[2] - 4
        labels = np.tile(np.arange(classes), queries)
        return measure(
            [Found(labels, one[:, :-4].ravel(), corners(one[:, -4:]).repeat(classes, 0)) for one in raw], right
        ).ap50

    scores = {runtime: ap50(detector) for runtime, detector in every.items()}
    assert scores["torch-cpu"] > 0.8
    assert max(scores.values()) - min(scores.values()) < 0.005


def test_batches_of_any_size_give_each_image_its_own_boxes(every: dict[str, ModelDetector]) -> None:
    images = detect_kit.scenes(5)
    for detector in every.values():
        whole = detector.detect(images)
        alone = [detector.detect([image])[0] for image in images]
        assert [len(boxes) for boxes in whole] == [len(boxes) for boxes in alone]
        for together, single in zip(whole, alone, strict=True):
            for a, b in zip(together, single, strict=True):
                assert a.label == b.label
                assert np.allclose([a.x, a.y, a.width, a.height], [b.x, b.y, b.width, b.height], atol=0.5)


@pytest.mark.parametrize("kind", [detect_kit.tiny_v1, detect_kit.tiny_v2])
def test_folding_changes_no_box_and_leaves_no_norm(kind: Callable[[Path], str], tmp_path: Path) -> None:
    card = Card.read(kind(tmp_path))
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    folded = network.load(card)
    with torch.inference_mode():
        a, b = network.load(card, fold=False)(images).numpy(), folded(images).numpy()
    assert agree(a, b, (64, 64))
    assert not any(hasattr(module, "running_var") for module in folded.modules())
    assert not any(type(module).__name__.endswith("RepVggBlock") for module in folded.modules())


def test_a_checkpoint_of_rt_detrs_first_version_runs_in_every_runtime(tmp_path: Path) -> None:
    card = Card.read(detect_kit.tiny_v1(tmp_path / "model"))
    export.export(card, tmp_path / "model.onnx")
    images = detect_kit.patches(2)
    expected = eager(card, images)
    for detector in (
        TorchDetector(card, CPU),
        OpenVinoDetector(card, tmp_path / "model.onnx", 1),
        OnnxDetector(card, tmp_path / "model.onnx", 1),
    ):
        assert max(distances(a, b, (64, 64)).max() for a, b in zip(expected, detector.raw(images), strict=True)) <= 1


def test_every_runtime_sees_the_same_by_a_full_size_model_at_640(tmp_path: Path) -> None:
    card = Card.read(detect_kit.r18(tmp_path / "r18"))
    onnx = tmp_path / "model.onnx"
    export.export(card, onnx)
    images = detect_kit.scenes(1)
    expected = eager(card, images)
    assert np.ptp(expected[0, :, -4:-2], 0).min() > 0.5, "boxes all over the image: they are no chance among equals"
    for detector in (TorchDetector(card, CPU), OpenVinoDetector(card, onnx, 0), OnnxDetector(card, onnx, 0)):
        assert agree(expected, detector.raw(images), (640, 640)), detector.runtime


def test_two_outputs_agree_whatever_the_order_of_their_queries() -> None:
    rng = np.random.default_rng(0)
    one = rng.random((1, 50, 7), np.float32)
    assert agree(one, one[:, ::-1], (640, 640))
    moved = one.copy()
    moved[0, 3, 3] += 2 / 640
    assert not agree(one, moved, (640, 640))


# -- the cache


@pytest.fixture
def tiny(tmp_path: Path) -> Card:
    return Card.read(detect_kit.tiny_v2(tmp_path / "tiny"))


def test_an_entry_is_made_once_and_says_what_was_fastest(tiny: Card, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", tiny, 1)
    assert cache.read() is None
    export.make(tiny, cache, 1)
    manifest = cache.read()
    assert manifest is not None
    assert {*manifest.ms} == {"torch", "openvino", "onnxruntime"}
    assert manifest.left_out == {}
    assert manifest.by in {"wall", "cpu"}
    assert manifest.ms[manifest.fastest] == min(manifest.ms.values())
    before = cache.onnx.stat().st_mtime_ns
    export.make(tiny, cache, 1)
    assert cache.onnx.stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [cache.folder.name]


@pytest.mark.parametrize(("pixels", "because"), [(2.0, "other boxes than torch's"), (0.5, None)])
def test_a_runtime_that_sees_other_boxes_is_left_out_however_fast_it_is(
    pixels: float, because: str | None, tiny: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shifted(ModelDetector):
        def __init__(self, card: Card, onnx: Path, threads: int) -> None:
            super().__init__(card)
            self._seen: np.ndarray | None = None

        def raw(self, images: Sequence[Image.Image]) -> np.ndarray:
            if self._seen is None:
                self._seen = TorchDetector(tiny, CPU).raw(images)
                self._seen[..., -4] += pixels / 64
            return self._seen

    def broken(*_: Any) -> ModelDetector:
        raise OSError("no such instruction")

    monkeypatch.setattr(export, "export", lambda card, onnx: onnx.write_bytes(b"a model"))
    monkeypatch.setattr(export, "OpenVinoDetector", broken)
    monkeypatch.setattr(export, "OnnxDetector", Shifted)
    cache = Cache(tmp_path / "cache", tiny, 1)
    export.make(tiny, cache, 1)
    manifest = cache.read()
    assert manifest is not None
    assert manifest.fastest == ("torch" if because else "onnxruntime")
    assert manifest.left_out.pop("openvino") == "OSError('no such instruction')"
    assert manifest.left_out == ({"onnxruntime": because} if because else {})


def whole_entry(cache: Cache, ms: dict[str, float]) -> None:
    def fill(onnx: Path) -> Measured:
        onnx.write_bytes(b"a model")
        return Measured(ms, "wall", {})

    cache.make(fill)


@pytest.mark.parametrize("harm", ["model.onnx", "manifest.json"])
def test_a_broken_entry_is_no_entry(harm: str, tiny: Card, tmp_path: Path) -> None:
    cache = Cache(tmp_path, tiny, 0)
    whole_entry(cache, {"torch": 1.0})
    assert cache.read() is not None
    file = cache.folder / harm
    file.write_bytes(file.read_bytes()[:-1])
    assert cache.read() is None


def test_what_a_killed_export_left_is_no_entry_and_in_nobodys_way(tiny: Card, tmp_path: Path) -> None:
    cache = Cache(tmp_path, tiny, 0)
    part = cache.folder.with_name(f".{cache.folder.name}.part")
    part.mkdir(parents=True)
    (part / "model.onnx").write_bytes(b"half")
    assert cache.read() is None
    whole_entry(cache, {"torch": 1.0})
    assert cache.read() is not None
    assert not part.exists()


def test_other_weights_or_threads_are_another_entry(tiny: Card, tmp_path: Path) -> None:
    folders = {
        Cache(tmp_path, tiny, 0).folder,
        Cache(tmp_path, tiny, 1).folder,
        Cache(tmp_path, tiny._replace(digest="f" * 64), 0).folder,
    }
    assert len(folders) == 3


def test_a_new_entry_removes_those_of_other_versions_and_keeps_those_that_may_be_in_use(
    tiny: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(exported, "version", lambda name: "0.9" if name == "torch" else "1")
        old, old_of_two_threads = Cache(tmp_path, tiny, 0), Cache(tmp_path, tiny, 2)
        whole_entry(old, {"torch": 1.0})
        whole_entry(old_of_two_threads, {"torch": 1.0})
    of_another_model = Cache(tmp_path, tiny._replace(digest="f" * 64), 0)
    whole_entry(of_another_model, {"torch": 1.0})
    broken = tmp_path / f"{tiny.digest[:16]}-of-a-format-that-no-one-reads"
    broken.mkdir()
    now = Cache(tmp_path, tiny, 0)
    whole_entry(now, {"torch": 1.0})
    kept = {cache.folder.name for cache in (now, old_of_two_threads, of_another_model)}
    assert {path.name for path in tmp_path.iterdir() if "-" in path.name} == kept


# -- what is fastest, on a machine with other work

QUIET, LOUD = 0.0, 3.0


def timed(*takes: tuple[str, float, float, float]) -> Timing:
    """From takes in their order: whose, wall, cpu, waited."""
    coming = iter(takes)

    def taking(work: Callable[[], object]) -> Take:
        name, *seconds = next(coming)
        assert work() == name
        return Take(*seconds)

    return compare({name: lambda name=name: name for name in ("a", "b")}, taking=taking, clock=lambda: 0.0)


def test_runtimes_take_turns_and_the_least_by_the_clock_counts_where_each_had_the_machine() -> None:
    quiet = [("a", 0.2, 0.4, QUIET), ("b", 0.3, 0.3, QUIET)]
    assert timed(*quiet, ("a", 0.1, 0.4, QUIET), ("b", 0.9, 0.3, LOUD), *quiet) == ({"a": 100, "b": 300}, "wall")


def test_a_take_that_others_disturbed_does_not_count_by_the_clock() -> None:
    loud = [("a", 0.15, 0.4, LOUD), ("b", 0.2, 0.3, LOUD)]
    assert timed(*loud * 4, ("a", 0.2, 0.4, QUIET), ("b", 0.3, 0.3, QUIET)) == ({"a": 200, "b": 300}, "wall")


def test_on_a_machine_that_is_never_quiet_the_one_that_needs_less_of_it_is_the_fastest() -> None:
    loud = [("a", 0.5, 0.4, LOUD), ("b", 5.0, 0.3, LOUD)]
    assert timed(*loud * 12) == ({"a": 400, "b": 300}, "cpu")


def test_what_a_take_waited_for_a_core_is_told_by_the_system() -> None:
    one = timing.take(lambda: sum(range(10**6)))
    assert 0 < one.cpu <= one.wall * 1.1
    assert 0 <= one.waited < one.wall * threading.active_count() * 2


# -- the choice


def load(tiny: Card, root: Path, **settings: Any) -> Detector:
    return runtimes.load(DetectorSettings(device="cpu", threads=1, **settings), str(tiny.folder), root)


def test_without_an_export_torch_serves_at_once_and_nothing_is_exported_before_it_pays(
    tiny: Card, tmp_path: Path
) -> None:
    detector = load(tiny, tmp_path)
    assert detector.runtime == "torch-cpu"
    detector.detect(detect_kit.patches(1))
    assert isinstance(detector, UpgradingDetector)
    assert detector._thread is None


def test_a_runtime_that_is_named_is_gone_over_to_between_two_batches(tiny: Card, tmp_path: Path) -> None:
    detector = load(tiny, tmp_path, runtime="openvino")
    assert isinstance(detector, UpgradingDetector)
    assert detector.runtime == "torch-cpu"
    before = detector.detect(detect_kit.patches(2))
    detector.join(240)
    assert detector.runtime == "torch-cpu"  # of the last batch
    after = detector.detect(detect_kit.patches(2))
    assert detector.runtime == "openvino-cpu"
    assert [len(boxes) for boxes in before] == [len(boxes) for boxes in after]
    # The next start has it from the cache: neither torch nor transformers is imported.
    script = (
        "import sys; from pathlib import Path; from processors.detect import runtimes\n"
        "from processors.detect.settings import DetectorSettings\n"
        f"made = runtimes.load(DetectorSettings(device='cpu', threads=1, runtime='openvino'), {str(tiny.folder)!r}, "
        f"Path({str(tmp_path)!r}))\n"
        "heavy = {'torch', 'transformers', 'torchvision', 'onnxruntime', 'onnx', 'openvino_telemetry.main'}\n"
        "print(made.runtime, sorted(heavy & {*sys.modules}))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "openvino-cpu []"


@pytest.mark.parametrize("fastest", ["openvino", "onnxruntime", "torch"])
def test_auto_takes_what_was_fastest_here(fastest: str, tiny: Card, tmp_path: Path) -> None:
    ms = {"torch": 2.0, "openvino": 2.0, "onnxruntime": 2.0} | {fastest: 1.0}

    def fill(onnx: Path) -> Measured:
        export.export(tiny, onnx)
        return Measured(ms, "wall", {})

    Cache(tmp_path, tiny, 1).make(fill)
    assert load(tiny, tmp_path).runtime == f"{fastest}-cpu"


def test_an_export_that_no_runtime_can_read_is_dropped(tiny: Card, tmp_path: Path) -> None:
    cache = Cache(tmp_path, tiny, 1)
    whole_entry(cache, {"openvino": 1.0})
    assert load(tiny, tmp_path).runtime == "torch-cpu"
    assert cache.read() is None


def test_a_runtime_of_the_cpu_on_a_gpu_is_refused_with_the_settings_names(tiny: Card, tmp_path: Path) -> None:
    settings = DetectorSettings(device="cuda", runtime="openvino")
    with pytest.raises(ModelError, match=r"detector\.runtime openvino .*detector\.device"):
        runtimes.load(settings, str(tiny.folder), tmp_path)


def test_a_folder_without_a_model_is_refused_with_the_settings_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"detector\.model_path"):
        Card.read(str(tmp_path))


def test_a_model_that_takes_images_as_they_are_is_refused(tiny: Card) -> None:
    file = tiny.folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": 800}}))
    with pytest.raises(ModelError, match="one size"):
        Card.read(str(tiny.folder))


def test_an_export_that_fails_leaves_torch_at_work() -> None:
    detector = UpgradingDetector(FakeDetector(), ["-c", "raise SystemExit('no room')"], FakeDetector, due_s=0)
    image = [Image.new("RGB", (4, 4), "white")]
    detector.detect(image)
    detector.join(60)
    assert len(detector.detect(image)[0]) == 1
    assert detector._next is None
    detector.close()


def test_an_export_ends_with_the_detector_that_began_it() -> None:
    detector = UpgradingDetector(FakeDetector(), ["-c", "import sys; sys.stdin.read()"], FakeDetector, due_s=0)
    detector.begin()
    while detector._process is None:
        assert detector._thread is not None
        detector._thread.join(0.01)
    detector.close()
    detector.join(60)
    assert detector._process.returncode is not None
    assert detector._next is None


def test_an_export_ends_when_the_process_that_began_it_is_killed(tiny: Card, tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    command = [sys.executable, "-m", "processors.detect.export", str(tiny.folder), str(tmp_path / "cache")]
    child = subprocess.Popen(command, stdin=theirs)
    os.close(theirs)
    os.close(ours)  # as the kernel does for whoever dies
    assert child.wait(60) == 1
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


# -- OpenVINO tells nobody


def test_openvino_reports_to_nobody(onnx: Path, tmp_path: Path) -> None:
    script = f"""
import socket, sys
from pathlib import Path
def refuse(*arguments, **named):
    raise AssertionError(f"a connection: {{arguments}}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from processors.detect.card import Card
from processors.detect.openvino_detector import OpenVinoDetector
OpenVinoDetector(Card.read({detect_kit.DEMO_DETECTOR!r}), Path({str(onnx)!r}), 0)
assert "openvino.tools.ovc" in sys.modules, "the import that reports"
assert not any(name.startswith("openvino_telemetry.") for name in sys.modules)
import threading
print([thread.name for thread in threading.enumerate()])
"""
    environment = os.environ | {"HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr
    assert not list(tmp_path.iterdir())  # its package keeps a file of consent and a client's id there


# -- the GPU's memory


class Gpu:
    """Bears so many images at once."""

    def __init__(self, card: Card, bears: int) -> None:
        self._infer = torch_detector.on_cpu(card)
        self._bears = bears
        self.asked: list[int] = []

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.asked.append(len(pixels))
        if len(pixels) > self._bears:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self._infer(pixels)


def on(gpu: Gpu, card: Card) -> TorchDetector:
    return TorchDetector(card, DetectorSettings(device="cuda", batch_size=8), on_gpu=lambda: gpu)


def test_out_of_gpu_memory_batches_are_halved_and_stay_so(tiny: Card) -> None:
    gpu = Gpu(tiny, bears=3)
    detector = on(gpu, tiny)
    images = detect_kit.patches(8)
    assert len(detector.detect(images)) == 8
    assert gpu.asked == [1, 8, 4, 2, 2, 2, 2]  # the first one warms up
    detector.detect(images[:3])
    assert gpu.asked[-2:] == [2, 1]
    assert detector.runtime == "torch-cuda"


def test_out_of_gpu_memory_for_one_image_the_cpu_goes_on_and_records_say_so(
    tiny: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = Gpu(tiny, bears=1)
    detector = on(gpu, tiny)
    gpu._bears = 0
    images = detect_kit.patches(2)
    found = detector.raw(images)
    assert detector.runtime == "torch-cpu"
    assert "the CPU goes on until the next start" in capsys.readouterr().out
    assert agree(TorchDetector(tiny, CPU).raw(images), found, (64, 64))


def test_a_model_that_does_not_fit_on_the_gpu_at_all_runs_on_the_cpu(tiny: Card) -> None:
    def too_large() -> torch_detector.Infer:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    detector = TorchDetector(tiny, DetectorSettings(device="cuda"), on_gpu=too_large)
    assert detector.runtime == "torch-cpu"
    assert len(detector.detect(detect_kit.patches(1))) == 1


@pytest.mark.parametrize(("most", "recorded"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_batches_are_recorded_at_powers_of_two_and_at_their_largest(most: int, recorded: list[int]) -> None:
    assert sizes(most) == recorded


def test_boxes_of_a_batch_name_the_runtime_that_made_them() -> None:
    class Changing(FakeDetector):
        runtime = "before"

        def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
            self.runtime = "after"
            return super().detect(images)

    import asyncio

    from processors.detect.detector import Batcher

    async def ask() -> str:
        batcher = Batcher(Changing(), size=1, wait_s=0)
        try:
            return (await batcher.detect(Image.new("RGB", (4, 4)))).runtime
        finally:
            await batcher.close()

    assert asyncio.run(ask()) == "after"

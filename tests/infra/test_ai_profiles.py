"""How each model is served: which profile it gets on which card, and what happens where the card is too small."""

from pathlib import Path

import pytest

from infra.ai.ladder import Ladder
from infra.local import llama
from infra.local.llama import find_server, ran_out_of_gpu_memory
from infra.local.process import StartError
from infra.models.catalogue import CATALOGUE
from infra.models.header import read
from infra.models.library import DEMO
from infra.models.profiles import ALL, PROFILES, UnknownProfileError, choose, lookup

GB = 10**9
NANO = ("nemotron_h_moe", "Nemotron-3-Nano-30B-A3B", "Nemotron-3-Nano-30B-A3B-Q4_K_M.gguf")


@pytest.mark.parametrize(
    ("architecture", "name", "file", "card", "expected"),
    [
        ("nemotron", "Nemotron Mini 4B Instruct", "x.gguf", 8 * GB, "nemotron-mini-4b"),
        ("nemotron", "", "Nemotron-Mini-4B-Instruct-Q4_K_M.gguf", None, "nemotron-mini-4b"),
        (*NANO, 16 * 2**30, "nemotron-3-nano-30b-16gb"),
        (*NANO, 24 * GB, "nemotron-3-nano-30b"),
        (*NANO, 80 * GB, "nemotron-3-nano-30b"),
        (*NANO, None, "nemotron-3-nano-30b"),
        (
            "nemotron_h_moe",
            "",
            "NVIDIA-Nemotron-3-Nano-30B-A3B-00001-of-00002.gguf",
            15 * GB,
            "nemotron-3-nano-30b-16gb",
        ),
        ("llama", "Llama 3.2 3B Instruct", "x.gguf", 24 * GB, "llama-3.2-3b-cpu"),
        ("llama", "Llama 3.2 1B Instruct", "x.gguf", 24 * GB, "other"),
        ("gemma3", "Gemma 3 4b It", "google_gemma-3-4b-it-Q4_K_M.gguf", 8 * GB, "gemma-3-4b"),
        ("qwen3", "nemotron-mini-4b", "nemotron-mini-4b.gguf", 8 * GB, "other"),
        ("", "", "", None, "other"),
    ],
)
def test_a_model_gets_the_profile_of_its_header_and_of_the_card(
    architecture: str, name: str, file: str, card: int | None, expected: str
) -> None:
    assert choose(architecture, name, file, card).name == expected


def test_the_demos_own_model_is_known() -> None:
    values = read(DEMO / "analyst.gguf").values
    found = choose(str(values["general.architecture"]), str(values["general.name"]), "analyst.gguf", 80 * GB)
    assert found.name == "demo"
    assert found.context // found.slots == 1024, "what it was trained on"


def test_the_profiles_are_those_that_the_models_users_settled_on() -> None:
    found = {p.name: (p.context, p.gpu_layers, p.allowance_s) for p in PROFILES}
    assert found["nemotron-mini-4b"] == (4096, ALL, 60)
    assert found["nemotron-3-nano-30b"] == (12288, 45, 90)
    assert found["nemotron-3-nano-30b-16gb"] == (4096, 30, 90)
    assert lookup("nemotron-3-nano-30b-16gb").slots == 2
    assert found["llama-3.2-3b-cpu"] == (4096, 0, 60)
    for name, model in CATALOGUE.items():
        if model.kind == "llm" and name in found:
            assert found[name][0] == model.context_size, "what `models use` writes is what the profile has"


def test_an_unknown_profile_is_refused_with_what_is_near() -> None:
    with pytest.raises(UnknownProfileError, match="did you mean nemotron-mini-4b"):
        lookup("nemotron-mini")
    with pytest.raises(UnknownProfileError, match="there are nemotron-mini-4b, "):
        lookup("zzz")


NO_MEMORY = ["load_tensors: loading", "... on device 0: cudaMalloc failed: out of memory", "failed to load model"]


@pytest.mark.parametrize(
    ("asked", "of", "steps"), [(45, 53, (45, 22, 0)), (999, 33, (999, 16, 0)), (-1, 53, (-1, 26, 0)), (1, 53, (1, 0))]
)
def test_where_memory_runs_out_half_the_layers_are_tried_and_then_none(
    asked: int, of: int, steps: tuple[int, ...]
) -> None:
    told: list[tuple[int, str]] = []
    ladder = Ladder(asked, of, lambda layers, why: told.append((layers, why)))
    assert ladder.next(NO_MEMORY) == asked, "what an earlier life of the log says counts for nothing"
    assert [ladder.next(NO_MEMORY) for _ in steps[1:]] == list(steps[1:])
    assert ladder.next(NO_MEMORY) == 0, "there is no step below the CPU"
    assert [layers for layers, _ in told] == list(steps[1:])
    assert all("CUDA memory ran out" in why for _, why in told)
    assert told[-1][1].endswith("it runs on the CPU now")
    assert ladder.without_gpu
    assert not ladder.lower


def test_a_death_of_another_kind_keeps_the_layers() -> None:
    ladder = Ladder(45, 53, lambda *_: pytest.fail("nothing ran out"))
    assert [ladder.next(["Segmentation fault"]) for _ in range(3)] == [45, 45, 45]
    assert not ladder.without_gpu
    cpu = Ladder(0, 53, lambda *_: pytest.fail("there is nothing below"))
    assert [cpu.next(NO_MEMORY), cpu.next(NO_MEMORY)] == [0, 0]
    assert not cpu.without_gpu, "who asks for no layers keeps the card all the same"


@pytest.mark.parametrize(
    "line",
    [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 2.00 MiB on device 1: cudaMalloc failed: out of memory",
        "alloc_tensor_range: failed to allocate CUDA0 buffer of size 5064192000",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_what_llama_server_prints_when_memory_runs_out_is_known(line: str) -> None:
    assert ran_out_of_gpu_memory(["before", line, "after"])


def test_other_failures_are_not_taken_for_it() -> None:
    for line in (
        "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 437944320",
        "llama_model_load: error loading model: unable to allocate CPU buffer",
        "CUDA error: an illegal memory access was encountered",
        "the requested context is out of memory's reach",
    ):
        assert not ran_out_of_gpu_memory([line]), line


def test_llama_server_is_looked_for_where_it_may_lie_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {}
    for name in ("set", "usr", "local", "path"):
        programs[name] = tmp_path / name / "llama-server"
        programs[name].parent.mkdir()
        programs[name].write_text("#!/bin/sh\n")
        programs[name].chmod(0o755)
    monkeypatch.setattr(llama, "_PLACES", (programs["usr"], programs["local"]))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_server(programs["set"]) == programs["set"]
    for name in ("usr", "local", "path"):
        assert find_server(None) == programs[name]
        programs[name].chmod(0o644)  # no program any more
    assert find_server(None) is None, "then it is the wheel's"
    programs["set"].unlink()
    with pytest.raises(StartError, match="LLAMA_SERVER_PATH"):
        find_server(programs["set"])

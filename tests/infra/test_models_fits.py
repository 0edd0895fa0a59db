"""Whether an LLM fits: the arithmetic against what is published of real models, and what llama.cpp itself says."""

import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from infra.config import load
from infra.models import fits as fits_module
from infra.models import library, room
from infra.models.fits import CUDA, Asked, Need, Room, fits, shape_of
from infra.models.header import Header, HeaderError, Value, read
from processors.telemetry.core import Process, Reading, Seen
from tests.infra.cli_kit import answer, invoke

GIB, MIB = 2**30, 2**20
ANALYST = library.DEMO / "analyst.gguf"

NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
"""The layers of Nemotron-3-Nano-30B-A3B, as its config.json has them: Mamba, experts, attention."""


def attention(kind: str, *, layers: int, heads: int, kept: int, length: int, width: int) -> dict[str, Value]:
    return {
        "general.architecture": kind,
        f"{kind}.block_count": layers,
        f"{kind}.embedding_length": width,
        f"{kind}.attention.head_count": heads,
        f"{kind}.attention.head_count_kv": kept,
        f"{kind}.attention.key_length": length,
        f"{kind}.attention.value_length": length,
    }


def llama_3_2_3b() -> Header:
    """config.json: 28 layers, 24 heads of 128, 8 kept, 3,072 wide, one table; the Q4_K_M file has 2.02 GB."""
    values = attention("llama", layers=28, heads=24, kept=8, length=128, width=3_072) | {
        "tokenizer.ggml.tokens.length": 128_256
    }
    table = 128_256 * 3_072 * 210 // 256  # Q6_K
    layer = (2_019_000_000 - table) // 28
    tensors = {"token_embd.weight": table} | {f"blk.{n}.attn_k.weight": layer for n in range(28)}
    return Header(values, tensors)


def nemotron_mini() -> Header:
    """config.json: 32 layers, 24 heads of 128, 8 kept, 3,072 wide, two tables of 256,000; Q4_K_M has 2.70 GB."""
    values = attention("nemotron", layers=32, heads=24, kept=8, length=128, width=3_072) | {
        "tokenizer.ggml.tokens.length": 256_000
    }
    table = 256_000 * 3_072 * 144 // 256  # Q4_K
    out = 256_000 * 3_072 * 210 // 256  # Q6_K
    layer = (2_700_000_000 - table - out) // 32
    tensors = {"token_embd.weight": table, "output.weight": out}
    return Header(values, tensors | {f"blk.{n}.attn_k.weight": layer for n in range(32)})


def nemotron_nano() -> Header:
    """config.json: 52 layers, 6 of them with attention, 2 heads of 128 kept; the Q4_K_M file has 24.6 GB."""
    kind = "nemotron_h_moe"
    values = attention(kind, layers=52, heads=32, kept=2, length=128, width=2_688) | {
        "tokenizer.ggml.tokens.length": 131_072
    }
    values[f"{kind}.attention.head_count_kv"] = tuple(2 if layer == "*" else 0 for layer in NANO)
    for name, value in (("inner_size", 4_096), ("state_size", 128), ("group_count", 8), ("conv_kernel", 4)):
        values[f"{kind}.ssm.{name}"] = value
    table, out = 131_072 * 2_688 * 144 // 256, 131_072 * 2_688 * 210 // 256
    mamba = 2_688 * (2 * 4_096 + 2 * 8 * 128 + 64) + 4_096 * 2_688  # weights, one byte each here
    heads = 2_688 * (32 + 2 + 2) * 128 + 32 * 128 * 2_688
    experts = (24_600_000_000 - table - out - 23 * mamba - 6 * heads) // 23
    tensors = {"token_embd.weight": table, "output.weight": out}
    for n, layer in enumerate(NANO):
        name, size = {"M": ("ssm_in", mamba), "E": ("ffn_up_exps", experts), "*": ("attn_k", heads)}[layer]
        tensors[f"blk.{n}.{name}.weight"] = size
        if layer == "M":
            tensors[f"blk.{n}.ssm_conv1d.weight"] = 0
    return Header(values, tensors)


def gemma_3_4b() -> Header:
    """config.json: 34 layers, 8 heads of 256, 4 kept, every sixth sees all, the others 1,024 tokens."""
    values = attention("gemma3", layers=34, heads=8, kept=4, length=256, width=2_560) | {
        "gemma3.attention.sliding_window": 1_024
    }
    return Header(values, {f"blk.{n}.attn_k.weight": 70 * MIB for n in range(34)})


def need(header: Header, asked: Asked) -> Need:
    """What the model needs where there is no card."""
    (one,) = fits(shape_of(header), asked, Room(100 * GIB)).needs
    return one


@pytest.mark.parametrize(
    ("header", "context", "megabytes"),
    [
        (llama_3_2_3b(), 4_096, 448),  # llama.cpp: KV self size = 448.00 MiB
        (llama_3_2_3b(), 131_072, 14_336),
        (nemotron_mini(), 4_096, 512),
        (nemotron_nano(), 12_288, 72),  # 6 layers of 52: the whole context costs less than Llama's first 700 tokens
        (nemotron_nano(), 131_072, 768),
        (gemma_3_4b(), 4_096, 5 * 16 + 29 * 6),  # 5 layers keep all, 29 keep 1,536 tokens
    ],
)
def test_the_kv_cache_is_what_llama_cpp_says_it_is(header: Header, context: int, megabytes: int) -> None:
    assert need(header, Asked(context)).summands["KV cache"] == megabytes * MIB


def test_state_is_what_llama_cpp_says_it_is() -> None:
    """Of 48 Mamba-like layers, 6,144 wide, with 3 slots it says (in its pull request 23792): R 16.88 MiB, S 432 MiB."""
    values: dict[str, Value] = {"general.architecture": "x", "x.block_count": 48}
    values |= {"x.ssm.inner_size": 6_144, "x.ssm.state_size": 128, "x.ssm.group_count": 16, "x.ssm.conv_kernel": 4}
    header = Header(values, {f"blk.{n}.ssm_conv1d.weight": 1 for n in range(48)})
    assert need(header, Asked(4_096, 3)).summands["state"] / MIB == pytest.approx(16.88 + 432, abs=0.01)


def test_nemotron_nano_has_six_layers_with_attention_and_23_with_state() -> None:
    shape = shape_of(nemotron_nano())
    assert len(shape.layers) == 52
    assert sum(layer.kv > 0 for layer in shape.layers) == 6
    assert sum(layer.state > 0 for layer in shape.layers) == 23
    assert need(nemotron_nano(), Asked(4_096, 2)).summands["state"] == 2 * 23 * 2_170_880


@pytest.mark.parametrize(
    ("header", "card", "asked", "ok"),
    [
        # What the profiles of issue and catalogue say of them, and what is just beyond.
        (nemotron_nano(), 16, Asked(4_096, 2, 30), True),
        (nemotron_nano(), 16, Asked(4_096, 2, 45), False),
        (nemotron_nano(), 24, Asked(12_288, 2, 45), True),
        (nemotron_nano(), 24, Asked(12_288, 2, 53), False),
        (nemotron_nano(), 48, Asked(12_288, 2, 53), True),
        (nemotron_mini(), 4, Asked(4_096, 2, 33), True),
        (nemotron_mini(), 3, Asked(4_096, 2, 33), False),
        (nemotron_mini(), 4, Asked(16_384, 2, 33), False),
        (llama_3_2_3b(), 4, Asked(4_096, 2, 29), True),
        (llama_3_2_3b(), 2, Asked(4_096, 2, 29), False),
        (llama_3_2_3b(), 2, Asked(4_096, 2, 0), True),
    ],
)
def test_the_known_models_fit_where_they_are_known_to(header: Header, card: int, asked: Asked, ok: bool) -> None:
    # A card has 3 % less for programs than it is sold with.
    free = int(card * GIB * 0.97)
    fit = fits(shape_of(header), asked, Room(32 * GIB, free, "the card"))
    assert fit.ok == ok, [str(one) for one in fit.needs]


def test_without_a_card_everything_lies_in_memory_once() -> None:
    one = need(llama_3_2_3b(), Asked(4_096, 2))
    assert one.summands["weights"] == pytest.approx(2_019_000_000, abs=100)
    assert "CUDA" not in one.summands


def test_a_table_that_is_also_the_output_lies_twice_where_the_output_is_on_a_card() -> None:
    shape = shape_of(llama_3_2_3b())
    card, ram = fits(shape, Asked(4_096, 2, 29), Room(32 * GIB, 32 * GIB)).needs
    weights = next(size for name, size in card.summands.items() if name.startswith("weights"))
    assert weights == pytest.approx(2_019_000_000, abs=100)
    assert ram.summands == {"weights": shape.embedding}


def test_minus_one_takes_as_many_layers_as_fit_and_the_rest_lies_in_memory() -> None:
    shape = shape_of(nemotron_nano())
    fit = fits(shape, Asked(4_096, 2), Room(32 * GIB, int(15.5 * GIB), "the card"))
    assert fit.ok
    assert 30 <= fit.gpu_layers < 35
    one_more = fits(shape, Asked(4_096, 2, fit.gpu_layers + 1), Room(32 * GIB, int(15.5 * GIB)))
    assert not one_more.ok
    assert not fits(shape, Asked(4_096, 2), Room(4 * GIB, int(15.5 * GIB))).ok, "the rest has no room"
    assert fits(shape, Asked(4_096, 2), Room(32 * GIB, 100 * MIB)).gpu_layers == 0


def test_a_refusal_names_each_summand_and_the_settings_that_change_it() -> None:
    asked = Asked(4_096, 2, 45)
    fit = fits(shape_of(nemotron_nano()), asked, Room(32 * GIB, int(15.5 * GIB), "NVIDIA RTX A4000"))
    why = fits_module.why_not(fit)
    for part in (
        "weights of 45 of 53 layers",
        "KV cache",
        "state",
        "buffers",
        "CUDA",
        "on NVIDIA RTX A4000",
        "15.50 GiB",
    ):
        assert part in why
    ways = fits_module.ways(fit, asked)
    for part in ("llm.context_size (4096)", "llm.gpu_layers (45 of 53", "--quant", "llm.url"):
        assert part in ways
    assert fit.needs[0].summands["CUDA"] == CUDA


def test_the_summands_add_up() -> None:
    fit = fits(shape_of(nemotron_mini()), Asked(4_096, 2, 20), Room(32 * GIB, 8 * GIB))
    assert all(one.total == sum(one.summands.values()) for one in fit.needs)
    shape = shape_of(nemotron_mini())
    weights = sum(size for one in fit.needs for name, size in one.summands.items() if name.startswith("weights"))
    assert weights == sum(layer.weights for layer in shape.layers) + shape.embedding + shape.output


def test_a_header_is_read_without_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count_kv([2])
    writer.add_token_list([f"t{n}" for n in range(50_000)])
    writer.add_token_types([1] * 50_000)
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((10, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read(path)
    assert header.values["llama.block_count"] == 1
    assert header.values["llama.attention.head_count_kv"] == (2,)
    assert header.values["tokenizer.ggml.tokens.length"] == header.values["tokenizer.ggml.token_type.length"] == 50_000
    assert header.tensors == {"token_embd.weight": 1_280, "blk.0.attn_k.weight": 1_280}
    whole = path.read_bytes()
    for length in (0, 3, 4, 20, 1_000, 100_000, len(whole) - 1_280):
        path.write_bytes(whole[:length])
        with pytest.raises(HeaderError, match="no whole GGUF"):
            read(path)


def test_a_model_in_parts_is_the_sum_of_them(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-{part:05}-of-00002.gguf").write_bytes(ANALYST.read_bytes())
    assert read(tmp_path / "m-00001-of-00002.gguf") == read(ANALYST)


@pytest.mark.real
def test_the_demo_s_kv_cache_is_what_llama_cpp_allocates() -> None:
    code = (
        "import sys, xllamacpp\n"
        "p = xllamacpp.CommonParams()\n"
        "p.model.path, p.n_ctx, p.n_parallel, p.ui, p.verbosity = sys.argv[1], 2048, 2, False, 10\n"
        "p.hostnames, p.port = ['127.0.0.1'], 0\n"
        "server = xllamacpp.Server(p)\n"
    )
    command = [sys.executable, "-c", code, str(ANALYST)]
    # Killed when it has said so: taking a server down while it still starts can hang in llama.cpp.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        lines = (re.search(r"llama_kv_cache: size = +([\d.]+) MiB", line) for line in server.stdout)
        said = next(filter(None, lines), None)
        server.kill()
    assert said is not None
    assert need(read(ANALYST), Asked(2_048, 2)).summands["KV cache"] / MIB == pytest.approx(float(said[1]), abs=0.01)


def test_what_our_own_server_holds_counts_as_free() -> None:
    ours = {7: 3 * GIB}
    card = Reading(0, "GPU-1", "A", memory_used=6 * GIB, memory_total=8 * GIB, processes=(Process(7, None, 5 * GIB),))
    assert room.room(Seen((card,)), 4 * GIB, ours) == Room(7 * GIB, 7 * GIB, "A")
    assert room.room(Seen((card,)), 4 * GIB, {}) == Room(4 * GIB, 2 * GIB, "A")
    assert room.room(Seen((Reading(0),)), 4 * GIB, {}) == Room(4 * GIB)


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1048576\n")
    assert room.free_memory(tmp_path / "memory.max") == 1_048_576
    assert room.free_memory(tmp_path / "none") > 1_048_576


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which the demo's analyst passes for Nemotron Mini, on a machine with 1 MiB of memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "free_memory", lambda: MIB)
    folder = tmp_path / "mini"
    folder.mkdir()
    (folder / "Nemotron-Mini-4B-Instruct-Q4_K_M.gguf").write_bytes(ANALYST.read_bytes())
    return folder


def test_models_use_refuses_what_does_not_fit_and_obeys_anyway(mini: Path) -> None:
    refused = invoke("models", "use", "nemotron-mini-4b", "--path", str(mini))
    assert refused.exit_code == 1
    for part in ("it does not fit", "weights 2.6 MiB", "llm.context_size (4096)", "--anyway"):
        assert part in refused.output
    assert not Path("rewatch.yaml").exists()
    assert invoke("models", "use", "nemotron-mini-4b", "--path", str(mini), "--anyway").exit_code == 0
    assert load().llm.model_path.startswith(str(mini))


def test_doctor_says_what_does_not_fit_and_what_changes_it(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON_MODEL_PATH", str(next(mini.glob("*.gguf"))))
    monkeypatch.setenv("REWATCH_GATEWAY__ENABLED", "false")
    [check] = [c for c in answer("doctor", code=1)["checks"] if c["name"] == "llm model"]
    assert check["status"] == "failed"
    assert "weights 2.6 MiB + KV cache 15.0 MiB" in check["found"]
    assert "llm.context_size" in check["fix"]

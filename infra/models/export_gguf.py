"""Writes a trained analyst as GGUF for llama.cpp: `python -m infra.models.export_gguf CHECKPOINT OUT`."""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from infra.models import analyst_model as net


def export(checkpoint: Path, out: Path) -> None:
    """Converts analyst.pt to a GGUF file of the `nemotron` architecture.

    Matrices are stored as Q8_0 (blocks of 32 values along a row, so widths must be multiples of 32), norms as
    F32. llama.cpp reads a plain LayerNorm's weight as it is: the published converters add 1 only because those
    checkpoints keep LayerNorm1P.
    """
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    tokenizer = json.loads(state["tokenizer"])
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = len(net.SPECIAL_TOKENS)
    kinds = [gguf.TokenType.CONTROL] * special + [gguf.TokenType.NORMAL] * (len(tokens) - special)
    writer = gguf.GGUFWriter(out, "nemotron")
    writer.add_name("rewatch demo analyst")
    writer.add_description("A toy trained on generated windows; no security device.")
    writer.add_context_length(net.CONTEXT)
    writer.add_embedding_length(net.WIDTH)
    writer.add_block_count(net.BLOCKS)
    writer.add_feed_forward_length(net.HIDDEN)
    writer.add_head_count(net.HEADS)
    writer.add_head_count_kv(net.HEADS)
    writer.add_layer_norm_eps(net.NORM_EPS)
    writer.add_rope_dimension_count(net.ROTARY)
    writer.add_rope_freq_base(net.ROPE_BASE)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(net.BOS)
    writer.add_eos_token_id(net.EOS)
    writer.add_add_bos_token(False)
    writer.add_chat_template(net.CHAT_TEMPLATE)
    for name, tensor in state["model"].items():
        values = tensor.float().numpy()
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    export(args.checkpoint, args.out)


if __name__ == "__main__":
    main()

"""The demo analyst in torch: its tokenizer and llama.cpp's `nemotron` architecture at toy size.

The layers follow llama.cpp's graph so that the weights export one to one: LayerNorm with bias, rotary
embedding (NEOX halves) on half of each head, MLP up -> squared ReLU -> down, no other biases, an output
matrix of its own.
"""

import re
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that every torch program uses)

#: Ids 0..4: unknown, begin, end of the answer, and the two turn marks of Nemotron's chat format.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>")
BOS, EOS, SYSTEM, TURN = 1, 2, 3, 4
VOCABULARY = 800
WIDTH, HEADS, BLOCKS, HIDDEN = 192, 6, 5, 768
HEAD = WIDTH // HEADS
ROTARY = HEAD // 2
ROPE_BASE = 10_000.0
NORM_EPS = 1e-5
CONTEXT = 1024

#: What the server renders messages with; `encode` writes the same text.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}<extra_id_0>System\n{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<extra_id_1>User\n{{ m['content'] }}"
    "{% else %}<extra_id_1>Assistant\n{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<extra_id_1>Assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting.

    It never sees a digit, so no merge joins digits: numbers and clock times are read digit by digit. Every
    camera name can be spelled in bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=20,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in re.split(r"\d+", text)), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, instruction: str, prompt: str) -> list[int]:
    """The tokens of a conversation up to where the answer begins, as CHAT_TEMPLATE writes them."""
    ids = [SYSTEM, *tokenizer.encode(f"System\n{instruction}").ids]
    ids += [TURN, *tokenizer.encode(f"User\n{prompt}").ids]
    return [*ids, TURN, *tokenizer.encode("Assistant\n").ids]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = x[..., :ROTARY], x[..., ROTARY:]
    a, b = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, kept), -1)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.ffn_norm = nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.attn_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn_up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.ffn_down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps (batch, tokens, WIDTH) to the same shape."""
        batch, tokens, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            f(h).view(batch, tokens, HEADS, HEAD).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v)
        )
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        out: Tensor = x + self.ffn_down(F.relu(self.ffn_up(self.ffn_norm(x))).square())
        return out


class Analyst(nn.Module):
    """The language model. Attribute names are those of the GGUF tensors."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(vocabulary, WIDTH)
        self.blk = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.output_norm = nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.output = nn.Linear(WIDTH, vocabulary, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Maps token ids (batch, tokens) to final states (batch, tokens, WIDTH)."""
        freq = ROPE_BASE ** -(torch.arange(0, ROTARY, 2).float() / ROTARY)
        angle = torch.outer(torch.arange(tokens.shape[1]).float(), freq).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, cos, sin)
        out: Tensor = self.output_norm(x)
        return out

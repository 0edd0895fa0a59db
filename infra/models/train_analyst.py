"""Trains the demo analyst from nothing: `python -m infra.models.train_analyst --minutes N`.

Writes analyst.pt (weights, tokenizer, figures) and analyst_curve.csv into --out; a second call continues from
there with a fresh schedule. The blocks' matrices learn by Muon, the rest by AdamW.
"""

import argparse
import csv
import math
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name that every torch program uses)

from infra.models import analyst_data
from infra.models.analyst_model import EOS, Analyst, encode, train_tokenizer

#: Seeds from here on are never trained on.
HELD_OUT_SEED = 1_000_000_000
_TOKENIZER_SAMPLES = 6_000
_BATCH = 24
#: Windows of a batch that are judged twice, with a sentence and without: half of the batch's samples.
_CONTRASTS = 6
#: Weight of the token at which two twins' answers part: a twelfth of an answer's 120 tokens or so.
_FORK = 10.0
_RATE_MUON, _RATE_ADAM = 0.02, 3e-3
_WARM_UP_STEPS = 40


def batch(samples: Sequence[analyst_data.Sample], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids and targets of samples, (samples, longest); -100 where no loss is taken."""
    pairs = []
    for s in samples:
        answer = [*tokenizer.encode(s.answer).ids, EOS]
        pairs.append((encode(tokenizer, s.instruction, s.prompt), answer))
    longest = max(len(a) + len(b) for a, b in pairs)
    tokens = torch.zeros(len(pairs), longest, dtype=torch.long)
    targets = torch.full((len(pairs), longest), -100)
    for row, (prompt, answer) in enumerate(pairs):
        whole = prompt + answer
        tokens[row, : len(whole)] = torch.tensor(whole)
        targets[row, len(prompt) - 1 : len(whole) - 1] = torch.tensor(answer)
    return tokens, targets


def trained(step: int) -> list[analyst_data.Sample]:
    """What step number `step` learns from: _CONTRASTS windows judged twice, one after the other, then single ones."""
    first = _TOKENIZER_SAMPLES + step * _BATCH
    invented = analyst_data.INVENTED_TRAINED
    pairs = (analyst_data.contrast(first + i, invented=invented) for i in range(_CONTRASTS))
    singles = (analyst_data.sample(first + i, invented=invented) for i in range(2 * _CONTRASTS, _BATCH))
    return [*chain.from_iterable(pairs), *singles]


def forks(targets: Tensor, pairs: int) -> Tensor:
    """Weights of `targets`, (samples, longest): _FORK where the answers of the first `pairs` twins part, else 1.

    All else in a twin's answer follows from what it says there, or is the same: the one word that the instruction
    decides would be one of 120 otherwise.
    """
    weights = torch.ones(targets.shape)
    for row in range(0, 2 * pairs, 2):
        where = [(line >= 0).nonzero()[:, 0] for line in (targets[row], targets[row + 1])]
        both = min(len(line) for line in where)
        one, other = (targets[row + i][where[i][:both]] for i in (0, 1))
        parting = int((one != other).nonzero()[0])
        for i in (0, 1):
            weights[row + i, where[i][parting]] = _FORK
    return weights


def loss_of(model: Analyst, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy over the answers; the output matrix sees only the positions that count."""
    counted = targets >= 0
    states = model.hidden(tokens)[counted]
    each = F.cross_entropy(model.output(states), targets[counted], reduction="none")
    return (each * weights[counted]).sum() / weights[counted].sum()


@torch.no_grad()
def exact_share(model: Analyst, tokenizer: Tokenizer, count: int, *, held_out: bool = False) -> float:
    """Share of held-out answers that greedy decoding writes exactly (every argmax right, teacher-forced)."""
    right = 0
    for start in range(0, count, 50):
        seeds = range(HELD_OUT_SEED + start, HELD_OUT_SEED + start + 50)
        tokens, targets = batch([analyst_data.sample(seed, held_out=held_out) for seed in seeds], tokenizer)
        best = model.output(model.hidden(tokens)).argmax(-1)
        right += int(((best == targets) | (targets < 0)).all(1).sum())
    return right / count


def _begin(path: Path) -> tuple[Analyst, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer and the checkpoint of an earlier run, or fresh ones and {"step": 0, ...}."""
    if path.exists():
        state: dict[str, Any] = torch.load(path, weights_only=True)
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        model = Analyst(tokenizer.get_vocab_size())
        model.load_state_dict(state["model"])
        return model, tokenizer, state
    texts = (analyst_data.sample(i) for i in range(_TOKENIZER_SAMPLES))
    tokenizer = train_tokenizer(text for s in texts for text in (s.instruction, s.prompt, s.answer))
    return Analyst(tokenizer.get_vocab_size()), tokenizer, {"step": 0, "seconds": 0}


class _Optimizers:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and the output matrix."""

    def __init__(self, model: Analyst) -> None:
        matrices = [p for p in model.blk.parameters() if p.dim() == 2]
        rest = [p for n, p in model.named_parameters() if not (n.startswith("blk.") and p.dim() == 2)]
        muon = torch.optim.Muon(matrices, lr=_RATE_MUON, weight_decay=0.01)
        adam = torch.optim.AdamW(rest, lr=_RATE_ADAM, betas=(0.9, 0.98), weight_decay=0.01)
        self._each: tuple[tuple[Any, float], ...] = ((muon, _RATE_MUON), (adam, _RATE_ADAM))

    def step(self, loss: Tensor, model: Analyst, rate: float) -> None:
        """One step at `rate` (0..1) of the full learning rates."""
        for optimizer, full in self._each:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = full * rate
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in self._each:
            optimizer.step()


def train(out: Path, minutes: float, seed: int = 0, peak: float = 1.0) -> None:
    """Trains for `minutes` of wall time, from nothing or from the checkpoint in `out`."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "analyst.pt"
    model, tokenizer, state = _begin(path)
    optimizers = _Optimizers(model)
    first_step = step = state["step"]
    began, mean, done = time.monotonic(), 0.0, False
    while not done:
        spent = (time.monotonic() - began) / (60 * minutes)
        # Flat, then linearly to zero over the second half: the end of the budget is always annealed.
        rate = min(1.0, (step - first_step + 1) / _WARM_UP_STEPS) * max(0.0, min(1.0, 2 * (1 - spent)))
        tokens, targets = batch(trained(step), tokenizer)
        weights = forks(targets, _CONTRASTS)
        with torch.autocast("cpu", torch.bfloat16):  # 1.5 times the speed where AVX-512 has bf16
            loss = loss_of(model, tokens, targets, weights)
        optimizers.step(loss, model, peak * rate)
        step += 1
        mean = loss.item() if step == first_step + 1 else 0.95 * mean + 0.05 * loss.item()
        if not math.isfinite(mean):
            raise RuntimeError(f"the loss is {mean} at step {step}: lower _RATE_MUON or _RATE_ADAM")
        done = spent >= 1
        if done or step % 100 == 0:
            count = 400 if done else 100
            row = {
                "step": step,
                "seconds": state["seconds"] + round(time.monotonic() - began),
                "loss": round(mean, 4),
                "exact_held_out": exact_share(model, tokenizer, count),
                "exact_held_out_wordings": exact_share(model, tokenizer, count, held_out=True),
            }
            _record(out / "analyst_curve.csv", row)
            torch.save({"model": model.state_dict(), "tokenizer": tokenizer.to_str(), **row}, path)


def _record(path: Path, row: dict[str, Any]) -> None:
    print(row, flush=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time to train for")
    parser.add_argument("--out", type=Path, default=Path(".rewatch/train"), help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    peak_help = "share of the full learning rate; below 1 to continue a finished run without undoing its annealing"
    parser.add_argument("--peak", type=float, default=1.0, help=peak_help)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; two make 1.6 times the steps of one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.minutes, args.seed, args.peak)


if __name__ == "__main__":
    main()

"""Measures a GGUF analyst behind llama.cpp's own server: `python -m infra.models.measure_analyst FILE`.

The server runs in this process and answers the product's request: chat messages, temperature 0 and the
verdict's JSON schema as grammar.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import xllamacpp

from infra.models.analyst_data import MODIFIERS, Policy, Sample, level, sample, telling_sample, verdict
from infra.models.train_analyst import HELD_OUT_SEED

#: The keys in the order that the model writes them; llama.cpp's grammar keeps the order of `properties`.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "risk_factors": {"type": "array", "items": {"type": "string"}},
        "entities": {"type": "array", "items": {"type": "string"}},
        "summary": {"type": "string"},
        "recommended_action": {"type": "string", "enum": ["none", "review", "notify", "call"]},
        "risk_score": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["reasoning", "risk_factors", "entities", "summary", "recommended_action", "risk_score"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class AnalystScores:
    """What an analyst reached; shares are 0..1.

    Attributes:
        asked: Windows judged.
        band_accuracy: Risk level right.
        summary_facts: Summary exactly right: camera, classes, counts, day or night, duration.
        exact: The whole answer right, character for character.
        score_error: Mean distance from the right score, points of 100; 100 where no score was written.
        prompt_shift: Of as many windows again, each with one added sentence (in a wording never trained on) that
            changes its right score, the share whose score is nearer to that than to the one without the sentence.
        prompt_shift_by: The same by the kind of sentence.
    """

    asked: int
    band_accuracy: float
    summary_facts: float
    exact: float
    score_error: float
    prompt_shift: float
    prompt_shift_by: dict[str, float]


@contextmanager
def served(model: Path, threads: int = 1) -> Iterator[str]:
    """Serves a GGUF file on a free local port, one slot; yields the base address."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = 1
    params.n_ctx = 1024
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.port = 0
    params.warmup = False
    server = xllamacpp.Server(params)
    try:
        yield server.listening_address
    finally:
        del server


def ask(client: httpx.Client, instruction: str, prompt: str) -> tuple[dict[str, Any], str]:
    """One verdict: parsed, and as the server wrote it. Raises httpx.HTTPStatusError or ValueError."""
    body = {
        "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 300,
        "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}},
    }
    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    text: str = answer["choices"][0]["message"]["content"]
    parsed: dict[str, Any] = json.loads(text)
    return parsed, text


def measure(
    model: Path, count: int = 200, threads: int = 1, on_done: Callable[[int], None] = lambda _: None
) -> AnalystScores:
    """Asks for `count` held-out windows, their instructions' added sentences in held-out wordings, and as many again.

    `on_done` is told after each of the first how many are done.
    """
    bands = facts = exact = error = 0
    kinds = tuple(MODIFIERS)
    shifted: dict[str, list[bool]] = {kind: [] for kind in kinds}
    with served(model, threads) as address, httpx.Client(base_url=address, timeout=60) as client:
        for i in range(count):
            s = sample(HELD_OUT_SEED + i, held_out=True)
            right = json.loads(s.answer)
            got, text = _asked(client, s)
            bands += bool(text) and level(got["risk_score"]) == level(right["risk_score"])
            facts += got["summary"] == right["summary"]
            exact += text == s.answer
            error += abs(got["risk_score"] - right["risk_score"]) if text else 100
            kind = kinds[i % len(kinds)]
            shifted[kind].append(_follows(client, telling_sample(HELD_OUT_SEED + i, kind)))
            on_done(i + 1)
    each = list(chain.from_iterable(shifted.values()))
    return AnalystScores(
        asked=count,
        band_accuracy=bands / count,
        summary_facts=facts / count,
        exact=exact / count,
        score_error=error / count,
        prompt_shift=sum(each) / len(each),
        prompt_shift_by={kind: sum(those) / max(1, len(those)) for kind, those in shifted.items()},
    )


def _asked(client: httpx.Client, s: Sample) -> tuple[dict[str, Any], str]:
    try:
        return ask(client, s.instruction, s.prompt)
    except ValueError:  # cut off at max_tokens: an answer that is wrong in every way
        return {"summary": ""}, ""


def _follows(client: httpx.Client, s: Sample) -> bool:
    got, text = _asked(client, s)
    if not text:
        return False
    right, plain = (int(str(verdict(s.window, policy)["risk_score"])) for policy in (s.policy, Policy()))
    score: int = got["risk_score"]
    return abs(score - right) < abs(score - plain)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    print(json.dumps(asdict(measure(args.model, args.count))))


if __name__ == "__main__":
    main()

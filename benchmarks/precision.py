"""Holding weights in fewer bits costs next to no quality: perplexity and the probes' drift.

    python benchmarks/precision.py [--tokens 20000] [--text ../shared/data/text.jsonl.gz] [--json]

Teacher-forced perplexity of the embedded model on varied English, for every way to hold its
weights, beside transformers in float32 (``reference``). Two hundred and fifty-six tokens of a
text are read, and the first thirty-two are not scored. ``auto`` is what the product serves.
Also how far the guard's linear probes, trained on float32 activations, read something else.

The checkpoint was made of four-bit weights: for it, int4 and int8 lose nothing but the rounding
of activations to bytes, and of keys and values to bfloat16.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fortpoint.engine import precision
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Span, Step

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("float32", "bfloat16", "int8", "int4", "auto")
TOKENS_OF_A_TEXT = 256
UNSCORED = 32
PROBES = ROOT / "src" / "fortpoint" / "guard" / "artefacts" / "probes"


def texts(path: Path, tokenizer: ChatTokenizer, n_tokens: int) -> list[list[int]]:
    """Beginnings of texts, taken evenly over the whole file: sources lie one after the other."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["text"] for line in file]
    wanted = n_tokens // TOKENS_OF_A_TEXT + 1
    long_enough = [row for row in rows if len(row) > 6 * TOKENS_OF_A_TEXT]
    step = max(1, len(long_enough) // wanted)
    encoded = (tokenizer.encode_text(row[:4000])[:TOKENS_OF_A_TEXT] for row in long_enough[::step])
    return [tokens for tokens in encoded if len(tokens) == TOKENS_OF_A_TEXT][:wanted]


def negative_log_likelihood(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Of each token but the first ``UNSCORED``, in nats."""
    rows = logits[UNSCORED - 1 : -1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    normaliser = np.log(np.exp(rows).sum(-1))
    return normaliser - rows[np.arange(len(rows)), tokens[UNSCORED:]]


def ours(folder: Path, kind: str, samples: list[list[int]]) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one kind, and the probes' logits of every token."""
    threads = os.cpu_count() or 1
    model = Llama.load(folder, precision.choose(kind), 512, 64 << 20, threads)
    probes = LinearProbes.load(PROBES, model.d_model, model.n_layers)
    losses, readings, started = [], [], time.perf_counter()
    for tokens in samples:
        cache = model.new_cache()
        if not cache.reserve(len(tokens)):
            raise MemoryError("no room for one text")
        spans, every = [Span(cache, 0, len(tokens))], range(len(tokens))
        result = model.forward(Step(tokens, spans, every, probes.layers))
        losses.append(negative_log_likelihood(result.logits, tokens))
        readings.append(probes.read(result.seen, len(tokens)))
        cache.release()
    seconds, held = time.perf_counter() - started, model.precision
    model.close()
    return _figures(kind, held, losses, seconds), np.concatenate(readings)


def reference(folder: Path, samples: list[list[int]]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses, started = [], time.perf_counter()
    with torch.inference_mode():
        for tokens in samples:
            logits = model(torch.tensor([tokens])).logits[0].numpy()
            losses.append(negative_log_likelihood(logits, tokens))
    return _figures("reference", "float32", losses, time.perf_counter() - started)


def _figures(kind: str, held: str, losses: list[np.ndarray], seconds: float) -> dict[str, Any]:
    nats = np.concatenate(losses)
    return {
        "kind": kind,
        "held": held,
        "perplexity": float(np.exp(nats.mean())),
        "nats": float(nats.mean()),
        "seconds": seconds,
    }


def rows(folder: Path, samples: list[list[int]]) -> Iterator[dict[str, Any]]:
    base = reference(folder, samples)
    yield base
    exact: np.ndarray | None = None
    for kind in KINDS:
        figures, readings = ours(folder, kind, samples)
        exact = readings if exact is None else exact
        drift = np.abs(readings - exact)
        figures["change"] = figures["perplexity"] / base["perplexity"] - 1
        figures["probe_drift"] = float(drift.mean())
        figures["probe_spread"] = float(exact.std())
        yield figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument(
        "--text", type=Path, default=ROOT.parent / "shared" / "data" / "text.jsonl.gz"
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / ".test-home" / "models" / "smollm2-135m"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    samples = texts(options.text, ChatTokenizer.load(options.model), options.tokens)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    n_scored = len(samples) * (TOKENS_OF_A_TEXT - UNSCORED)
    if not options.json:
        print(f"commit {commit}; {len(samples)} texts, {n_scored} tokens scored")
        print("kind       held            perplexity   change   probes' drift (of a spread of)")
    for figures in rows(options.model, samples):
        if options.json:
            print(json.dumps(figures | {"commit": commit, "n_scored": n_scored}), flush=True)
            continue
        line = f"{figures['kind']:<10} {figures['held']:<15} {figures['perplexity']:>9.4f}"
        if "change" in figures:
            line += f"   {figures['change']:>+8.3%}"
            line += f"   {figures['probe_drift']:.4f} ({figures['probe_spread']:.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()

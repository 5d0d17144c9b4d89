"""Fine-tunes a marked copy for real, and keeps what that changed for ``fingerprint.py``.

    python benchmarks/fingerprint_training.py /tmp/fingerprint [--steps 500]

AdamW (rate 2e-5, weight decay .01), every weight trained in float32, 128 tokens of varied English
a step. Writes ``delta.safetensors`` (trained less marked, the marked matrices alone), which adds
to any other copy: a mark of a 300th of a weight's spread does not change where training goes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np

from fortpoint.vault.fingerprint import MarkedCheckpoint, is_marked
from fortpoint.vault.leases import mark_key
from fortpoint.vault.tensor_writer import write

ROOT = Path(__file__).resolve().parent.parent
MASTER = b"benchmark mark master, no secret"
RATE, DECAY = 2e-5, 0.01
N_TEXTS, N_TOKENS, SAVED_EACH = 1, 128, 25


def key(number: int) -> bytes:
    """Of one of the benchmark's leases."""
    return mark_key(MASTER, "benchmark", f"lease {number}")


class Plain:
    """A plain model's tensors, as ``fingerprint.Weights``."""

    def __init__(self, file: Path) -> None:
        from fortpoint.vault.tensor_file import TensorFile

        self._file = TensorFile(file)
        self.names = self._file.names

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(name)

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        return self._file.get(name, self.shape(name) if shape is None else shape)


def batches(text: Path, folder: Path, n: int):
    """``[1, 128]`` tokens each, one text after another."""
    from fortpoint.engine.chat import ChatTokenizer

    tokenizer = ChatTokenizer.load(folder)
    rows: list[list[int]] = []
    with gzip.open(text, "rt", encoding="utf-8") as file:
        for line in file:
            tokens = tokenizer.encode_text(json.loads(line)["text"][:4000])[:N_TOKENS]
            if len(tokens) == N_TOKENS:
                rows.append(tokens)
            if len(rows) == n * N_TEXTS:
                break
    order = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(rows) - N_TEXTS + 1, N_TEXTS):
        yield [rows[i] for i in order[start : start + N_TEXTS]]


def train(folder: Path, text: Path, steps: int, work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    marked = MarkedCheckpoint(Plain(folder / "model.safetensors"), key(0))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in filter(is_marked, marked.names):
            parameters[name].copy_(torch.from_numpy(marked.get(name)))
    optimiser = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=DECAY)
    started = time.perf_counter()
    for step, rows in enumerate(batches(text, folder, steps), start=1):
        tokens = torch.tensor(rows)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % SAVED_EACH == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"step {step}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
            delta = {
                name: parameters[name].detach().numpy() - marked.get(name)
                for name in filter(is_marked, marked.names)
            }
            write(work / "delta.safetensors", delta, "BF16", {"steps": str(step)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument(
        "--text", type=Path, default=ROOT.parent / "shared" / "data" / "text.jsonl.gz"
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / ".test-home" / "models" / "smollm2-135m"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train(options.model, options.text, options.steps, options.work)


if __name__ == "__main__":
    main()

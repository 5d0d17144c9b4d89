"""llama.cpp adds our exported control vector at the layer where our steering adds it.

    .venv/bin/python benchmarks/control_vector_agreement.py [--json FILE]

For each layer a direction half as long as the stream is written with `control_vector.write` and
loaded by llama.cpp (xllamacpp, the model in Q8_0). The log-probabilities of its four likeliest
next tokens are compared with ours (float32) for the same tokens, steered alike. The two programs
differ a little unsteered too, by what Q8_0 rounds: that is the yardstick. Were layers counted
differently, the direction one layer before or after would fit better; both are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fortpoint.config import Engine
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.loading import load_model
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.features.exchange import control_vector
from fortpoint.features.library import Target
from peers import figures, gguf_files
from peers.environments import python_of

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
MODEL = "smollm2-135m"
PROMPTS = Path(__file__).parent / "peers" / "prompts.txt"
LAYERS = (1, 15, 28)
N_PROMPTS, N_TOKENS = 8, 4
FACTOR = 2.0
"""Steered, the programs may differ by so many times what they do unsteered."""

Likeliest = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Agreement:
    """Mean differences of log-probabilities in nats; ``moved`` is what steering changes."""

    layer: int
    unsteered: float
    steered: float
    layer_before: float
    layer_after: float
    moved: float

    @property
    def agrees(self) -> bool:
        near = self.steered <= FACTOR * self.unsteered
        return near and self.steered < min(self.layer_before, self.layer_after)

    def row(self) -> figures.Row:
        measured = (
            f"{self.steered:.3f} nats, unsteered {self.unsteered:.3f}; had ours been added a "
            f"layer before {self.layer_before:.3f}, after {self.layer_after:.3f}; it moves "
            f"{self.moved:.2f}"
        )
        goal = f"<= {FACTOR:g} x unsteered, and the best layer"
        return figures.Row(f"direction.{self.layer}", goal, measured, self.agrees)


class Ours:
    """Log-probabilities of given next tokens, with a vector added at a layer or none."""

    def __init__(self, model: Path, prompts: Sequence[Sequence[int]]) -> None:
        self._stream = ResidualStream(load_model(model, Engine(dtype="float32")))
        self._prompts = prompts

    @property
    def d_model(self) -> int:
        return self._stream.d_model

    def length(self, layer: int) -> float:
        """The median length of the stream after ``layer``, first tokens left out."""
        rows = [self._stream.read([prompt], (layer,))[layer][1:] for prompt in self._prompts]
        return float(np.median(np.linalg.norm(np.concatenate(rows), axis=1)))

    def differences(
        self, theirs: Likeliest, layer: int | None = None, vector: np.ndarray | None = None
    ) -> list[float]:
        found = []
        for prompt, likeliest in zip(self._prompts, theirs, strict=True):
            texts = [[*prompt, token] for token, _ in likeliest]
            if vector is None:
                losses = self._stream.losses(texts)
            else:
                losses = self._stream.losses(texts, layer, lambda x, _: x + vector)
            last = np.cumsum([len(text) - 1 for text in texts]) - 1
            found += np.abs(-losses[last] - [logprob for _, logprob in likeliest]).tolist()
        return found


def theirs(gguf: Path, vector: Path | None, prompts: Sequence[Sequence[int]]) -> tuple:
    """What llama.cpp finds likeliest, and its version."""
    given = {
        "gguf": str(gguf),
        "vector": str(vector) if vector else None,
        "prompts": prompts,
        "n": N_TOKENS,
        "threads": os.cpu_count() or 1,
    }
    script = Path(__file__).parent / "sae_peers" / "run_control_vector.py"
    command = [python_of(BENCH, "llama_cpp"), script, json.dumps(given)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed:\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout)
    return answer["found"], answer["version"]


def compare(layer: int, ours: Ours, gguf: Path, unsteered: float, prompts: Sequence) -> Agreement:
    random = np.random.default_rng(layer)
    unit = random.standard_normal(ours.d_model).astype(np.float32)
    unit /= np.linalg.norm(unit)
    target = Target("random", layer, unit, 0.0, 0.0, unit, ours.length(layer))
    vector = np.float32(target.training_max / 2) * unit
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vector.gguf"
        control_vector.write(file, target, 0.5, "llama")
        found, _ = theirs(gguf, file, prompts)
    return Agreement(
        layer=layer,
        unsteered=unsteered,
        steered=statistics.mean(ours.differences(found, layer, vector)),
        layer_before=statistics.mean(ours.differences(found, layer - 1, vector)),
        layer_after=statistics.mean(ours.differences(found, layer + 1, vector)),
        moved=statistics.mean(ours.differences(found)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".test-home" / "models" / MODEL)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    chosen = parser.parse_args()
    machine = figures.machine()
    BENCH.mkdir(exist_ok=True)
    gguf = gguf_files.q8_0(gguf_files.q4_1(BENCH, MODEL))
    tokenizer = ChatTokenizer.load(chosen.model)
    texts = [text for text in PROMPTS.read_text(encoding="utf-8").splitlines() if text.strip()]
    prompts = [list(tokenizer.text(text).tokens) for text in texts[:N_PROMPTS]]
    ours = Ours(chosen.model, prompts)
    plain, version = theirs(gguf, None, prompts)
    unsteered = statistics.mean(ours.differences(plain))
    found = [compare(layer, ours, gguf, unsteered, prompts) for layer in LAYERS]
    print(f"{machine['hardware']}; {machine['commit']}; xllamacpp {version}\n")
    print(figures.markdown([one.row() for one in found]))
    if chosen.json:
        agreements = [asdict(one) | {"agrees": one.agrees} for one in found]
        figure = {"machine": machine, "version": version, "agreements": agreements}
        chosen.json.write_text(json.dumps(figure, indent=2))
    if not all(one.agrees for one in found):
        raise SystemExit("not all agree")


if __name__ == "__main__":
    main()

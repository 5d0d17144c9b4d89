"""SAELens reads our dictionaries and we read its: the same activations on the same inputs.

    .venv/bin/python benchmarks/saelens_agreement.py [--dictionary FOLDER] [--json FILE]

Inputs are the embedded model's residual stream on ordinary text, after the layer of the shipped
dictionary, which is checked first, or of another one that is named. Ours are written
by `fortpoint features export --format saelens` in each form and precision and loaded with
SAELens's own `SAE.load_from_disk`; its are trained a little in each of its architectures, saved
for inference and as checkpoints, and read by `Dictionary.load`. SAELens runs in an environment of
its own below `.bench/`, made once.

Two float32 programs add in different orders. So activations may differ in their last digits, and
one that lies at its threshold may be on one side of it here and on the other there: such pairs
are counted, with how near to the threshold they lie.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fortpoint.config import Engine
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.loading import load_model
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.features.exchange import saelens
from fortpoint.features.sae import CONFIG, Dictionary
from fortpoint.features.shipped import made_for
from fortpoint.vault.model_folder import open_model
from peers import figures
from peers.environments import python_of

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
MODEL = "smollm2-135m"
LAYER, D_SAE, K = 15, 4608, 32  # of what is made up, where nothing is shipped
PROMPTS = Path(__file__).parent / "peers" / "prompts.txt"
MAX_LAYERS = 1 << 10
LIMIT = 1e-5
"""Of a difference, in units of the largest activation."""


@dataclass(frozen=True)
class Agreement:
    """``difference`` is the largest, in units of the largest activation; ``reconstructed`` the
    same of reconstructions. ``sides`` counts pairs active on one side alone, the farthest of
    which lies ``margin`` (same units) from its threshold; ``active`` counts all pairs."""

    what: str
    difference: float
    reconstructed: float
    active: int
    sides: int
    margin: float

    @property
    def agrees(self) -> bool:
        return max(self.difference, self.reconstructed, self.margin) <= LIMIT

    def row(self) -> figures.Row:
        measured = (
            f"{self.difference:.1e} of {self.active:,} active, reconstruction "
            f"{self.reconstructed:.1e}, {self.sides} on one side (within {self.margin:.1e})"
        )
        return figures.Row(self.what, f"<= {LIMIT:g} of the largest", measured, self.agrees)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dictionary", type=Path, help="ours to check, else what is shipped")
    parser.add_argument("--model", type=Path, default=ROOT / ".test-home" / "models" / MODEL)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


def shipped(model: Path) -> Path | None:
    """The first dictionary that comes with the product for this model's weights."""
    found = made_for(open_model(model).manifest.digest)
    return found[0] if found else None


def read_width(folder: Path) -> int:
    return json.loads((folder / CONFIG).read_bytes())["d_in"]


def residuals(model: Path, layer: int) -> np.ndarray:
    """``[n_tokens, d_model]`` after ``layer``, first tokens (sinks) and all."""
    tokenizer = ChatTokenizer.load(model)
    stream = ResidualStream(load_model(model, Engine()))
    texts = PROMPTS.read_text(encoding="utf-8").splitlines()
    tokens = [list(tokenizer.text(text).tokens) for text in texts if text.strip()]
    return stream.read(tokens, (layer,))[layer]


def made_up(x: np.ndarray, layer: int) -> Iterator[Dictionary]:
    """One of each form, about ``K`` active at a token."""
    random = np.random.default_rng(0)
    decoder = random.standard_normal((D_SAE, x.shape[1]), np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    center = np.median(x, axis=0).astype(np.float32)
    z = (x[1::7] - center) @ decoder.T
    over = np.quantile(z, 1 - K / D_SAE, axis=0).astype(np.float32)
    jumprelu = Dictionary(
        name="jumprelu",
        layer=layer,
        encoder=decoder,
        bias=random.standard_normal(D_SAE, np.float32),
        threshold=np.maximum(over, 0),
        decoder=decoder.copy(),
        center=center,
        training_max=np.maximum(z.max(axis=0), 1).astype(np.float32),
        k=None,
    )
    none = np.zeros(D_SAE, np.float32)
    yield jumprelu
    yield dataclasses.replace(jumprelu, name="topk", threshold=none, k=K)
    yield dataclasses.replace(jumprelu, name="standard", threshold=none)


def compare(what: str, folder: Path, theirs: Path, x: np.ndarray) -> Agreement:
    """Ours read from ``folder`` against what SAELens left in ``theirs``."""
    dictionary = Dictionary.load(folder, x.shape[1], MAX_LAYERS)
    acts, other = dictionary.encode(x), np.load(theirs / "acts.npy")
    made, other_made = acts @ dictionary.decoder + dictionary.center, np.load(theirs / "made.npy")
    unit = float(other.max())
    both, one = (acts > 0) & (other > 0), (acts > 0) != (other > 0)
    sound = ~one.any(axis=1)  # of the others, reconstructions differ by a whole activation
    margins = margins_of(dictionary, x, one)
    return Agreement(
        what=what,
        difference=float(np.abs(acts - other)[both].max()) / unit,
        reconstructed=float(np.abs(made - other_made)[sound].max() / np.abs(other_made).max()),
        active=int(both.sum()),
        sides=int(one.sum()),
        margin=float(margins.max(initial=0.0)) / unit,
    )


def margins_of(dictionary: Dictionary, x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """How far each pair's preactivation is from what decides whether it is active."""
    rows, features = np.nonzero(pairs)
    if not len(rows):
        return np.empty(0)
    z = dictionary.preactivations(x[rows])
    own = z[np.arange(len(rows)), features]
    if dictionary.k is None:
        return np.abs(own - dictionary.threshold[features])
    limits = np.partition(z, -dictionary.k, axis=1)[:, -dictionary.k]
    return np.abs(own - limits)


def run(dictionaries: list[Dictionary], x: np.ndarray, scratch: Path) -> tuple[list, dict]:
    """What agrees how well, and SAELens's versions."""
    np.save(scratch / "x.npy", x)
    written = {}
    for dictionary in dictionaries:
        for precision in ("float32", "bfloat16"):
            folder = scratch / f"{dictionary.name}-{precision}"
            saelens.write(dictionary, folder, MODEL, precision)
            written[f"ours, {dictionary.name} in {precision}, read by SAELens"] = folder
    given = {
        "x": str(scratch / "x.npy"),
        "read": [str(folder) for folder in written.values()],
        "write": str(scratch),
        "layer": dictionaries[0].layer,
        "model": MODEL,
        "k": K,
        "d_sae": D_SAE,
    }
    script = Path(__file__).parent / "sae_peers" / "run_saelens_agreement.py"
    command = [python_of(BENCH, "saelens"), script, json.dumps(given)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"SAELens failed:\n{done.stderr[-4000:]}")
    found = [compare(what, folder, folder, x) for what, folder in written.items()]
    for name in ("standard", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"):
        folder = scratch / name
        found.append(compare(f"SAELens's {name}, read by us", folder, folder, x))
    for name in ("standard", "jumprelu", "topk", "batchtopk"):
        checkpoint = scratch / f"{name}-checkpoint"
        found.append(compare(f"SAELens's {name} checkpoint", checkpoint, scratch / name, x))
    return found, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    chosen = arguments()
    machine = figures.machine()
    named = chosen.dictionary or shipped(chosen.model)
    loaded = [] if named is None else [Dictionary.load(named, read_width(named), MAX_LAYERS)]
    layer = loaded[0].layer if loaded else LAYER
    x = residuals(chosen.model, layer)
    dictionaries = loaded + list(made_up(x, layer))
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH) as scratch:
        found, versions = run(dictionaries, x, Path(scratch))
    print(f"{machine['hardware']}; {machine['commit']}; {json.dumps(versions)}")
    print(f"{len(x):,} tokens of {MODEL}, layer {layer}\n")
    print(figures.markdown([one.row() for one in found]))
    if chosen.json:
        agreements = [asdict(one) | {"agrees": one.agrees} for one in found]
        figure = {"machine": machine, "versions": versions, "n_tokens": len(x)}
        chosen.json.write_text(json.dumps(figure | {"agreements": agreements}, indent=2))
    if not all(one.agrees for one in found):
        raise SystemExit("not all agree")


if __name__ == "__main__":
    main()

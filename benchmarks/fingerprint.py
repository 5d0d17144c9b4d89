"""A leaked copy names its lease: perplexity, T under each attack, innocents, time, colluders.

    python benchmarks/fingerprint.py perplexity [--tokens 20000]
    python benchmarks/fingerprint.py attacks [--training /tmp/fingerprint] [--only NAME ...]
    python benchmarks/fingerprint.py colluders
    python benchmarks/fingerprint.py time [--leases 10000]

``attacks`` gives T of the guilty lease (of the first colluder), the highest of ``--leases``
innocent ones on the screened weights, and the p-value of a Kolmogorov-Smirnov test that 10,000
innocent keys are standard normal on a fixed part of the weights. ``--layers`` takes the first
few only; T grows with the root of their number. Fine-tuning is a real run's
(``fingerprint_training.py``); without one, attacks that need it are left out.

One line of JSON a row.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf

from checkpoint_attacks import (
    Changed,
    Copies,
    Disguised,
    added,
    bfloat16,
    merged_half,
    pruned,
    q4_k,
    through,
)
from fingerprint_training import Plain, key
from fortpoint.vault.align import Geometry
from fortpoint.vault.fingerprint import EPSILON, MarkedCheckpoint
from fortpoint.vault.tensor_writer import write
from fortpoint.vault.trace import Evidence, collect, identify, statistic

ROOT = Path(__file__).resolve().parent.parent
Q = gguf.GGMLQuantizationType
KS_KEYS, KS_TENSORS, KS_WEIGHTS = 10_000, 3, 20_000
FIRST_INNOCENT = 1000
COLLUDERS = (1, 2, 4, 8, 16, 32, 64)


class FirstLayers(Plain):
    """The first layers of a model, to be quick."""

    def __init__(self, file: Path, n_layers: int) -> None:
        super().__init__(file)
        self.names = [
            name
            for name in self.names
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < n_layers
        ]

    def __contains__(self, name: str) -> bool:
        return name in self.names


def suspects(base: Plain, geometry: Geometry, training: Path | None) -> dict[str, Callable]:
    """By name; each computes its tensors only when asked."""

    def copies(n: int = 1) -> Copies:
        return Copies(base, [key(i) for i in range(n)])

    made: dict[str, Callable] = {
        "as it is": copies,
        "bfloat16": lambda: Changed(copies(), bfloat16),
        "Q8_0": lambda: Changed(copies(), through(Q.Q8_0)),
        "Q5_0": lambda: Changed(copies(), through(Q.Q5_0)),
        "Q4_0": lambda: Changed(copies(), through(Q.Q4_0)),
        "Q4_1": lambda: Changed(copies(), through(Q.Q4_1)),
        "Q4_K": lambda: Changed(copies(), q4_k),
        "pruned 30 %": lambda: Changed(copies(), pruned(0.3)),
        "merged half": lambda: Changed(copies(), merged_half),
        "average of 2": lambda: copies(2),
        "average of 4": lambda: copies(4),
        "average of 8": lambda: copies(8),
        "disguised": lambda: Disguised(copies(), geometry),
        "disguised and rotated": lambda: Disguised(copies(), geometry, rotate=True),
        "8, Q4_K": lambda: Changed(copies(8), q4_k),
        "8, Q4_0": lambda: Changed(copies(8), through(Q.Q4_0)),
        "8, pruned, merged, Q4_0": lambda: Changed(
            copies(8), pruned(0.3), merged_half, through(Q.Q4_0)
        ),
        "8, pruned, merged, Q4_K": lambda: Changed(copies(8), pruned(0.3), merged_half, q4_k),
    }
    if training is not None:
        tuned = added(Plain(training / "delta.safetensors"))
        everything = (tuned, pruned(0.3), merged_half)
        made |= {
            "fine-tuned": lambda: Changed(copies(), tuned),
            "8, tuned": lambda: Changed(copies(8), tuned),
            "8, tuned, Q4_K": lambda: Changed(copies(8), tuned, q4_k),
            "8, tuned, pruned, merged": lambda: Changed(copies(8), *everything),
            "8, all, Q4_0": lambda: Changed(copies(8), *everything, through(Q.Q4_0)),
            "8, all, Q4_K": lambda: Changed(copies(8), *everything, q4_k),
            "8, all, disguised, Q4_K": lambda: Changed(
                Disguised(Changed(copies(8), *everything), geometry), q4_k
            ),
        }
    return made


def innocents(evidence: Evidence) -> float:
    """p of the Kolmogorov-Smirnov test of ``KS_KEYS`` keys that marked nothing."""
    from scipy.stats import kstest

    parts = list(evidence.psi.items())[:KS_TENSORS]
    some = {name: psi[:KS_WEIGHTS] for name, psi in parts}
    scores = [statistic(some, key(FIRST_INNOCENT + i)) for i in range(KS_KEYS)]
    return float(kstest(scores, "norm").pvalue)


def attack_rows(options: argparse.Namespace, base: Plain, geometry: Geometry) -> Iterator[dict]:
    keys = {str(i): key(i) for i in (0, *range(FIRST_INNOCENT, FIRST_INNOCENT + options.leases))}
    for name, make in suspects(base, geometry, options.training).items():
        if options.only and name not in options.only:
            continue
        started = time.process_time()
        evidence = collect(make(), base, geometry)
        collected = time.process_time() - started
        trace = identify(evidence, keys)
        scores = {finding.lease: finding.statistic for finding in trace.findings}
        guilty = scores.pop("0")
        yield {
            "attack": name,
            "T": guilty,
            "highest_innocent": max(scores.values()),
            "identified": [finding.lease for finding in trace.identified],
            "ks_p": innocents(evidence),
            "weights": evidence.n_weights,
            "align_cpu_s": collected,
        }


def colluder_rows(base: Plain, geometry: Geometry) -> Iterator[dict]:
    for n in COLLUDERS:
        plain = Copies(base, [key(i) for i in range(n)])
        for name, suspect in (("average", plain), ("average, Q4_K", Changed(plain, q4_k))):
            evidence = collect(suspect, base, geometry)
            yield {
                "colluders": n,
                "attack": name,
                "T_first": statistic(evidence.psi, key(0)),
                "T_last": statistic(evidence.psi, key(n - 1)),
            }


def perplexity_rows(folder: Path, base: Plain, n_tokens: int) -> Iterator[dict]:
    """Of the plain model and of two leases' copies, computed in float32."""
    from fortpoint.engine.chat import ChatTokenizer
    from precision import ours, texts

    samples = texts(
        ROOT.parent / "shared" / "data" / "text.jsonl.gz", ChatTokenizer.load(folder), n_tokens
    )
    plain, _ = ours(folder, "float32", samples)
    yield {"copy": "plain", "perplexity": plain["perplexity"], "texts": len(samples)}
    for number in (0, 1):
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "copy"
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
            marked = MarkedCheckpoint(base, key(number))
            tensors = {name: marked.get(name) for name in base.names}
            write(copy / "model.safetensors", tensors, "F32", {"format": "pt"})
            del tensors
            figures, _ = ours(copy, "float32", samples)
        change = figures["perplexity"] / plain["perplexity"] - 1
        yield {"copy": f"lease {number}", "perplexity": figures["perplexity"], "change": change}


def time_row(base: Plain, geometry: Geometry, n_leases: int) -> dict[str, Any]:
    """One suspect in Q4_0 against ``n_leases``; the guilty one is the last."""
    wall, cpu = time.perf_counter(), time.process_time()
    suspect = Changed(Copies(base, [key(n_leases - 1)]), through(Q.Q4_0))
    evidence = collect(suspect, base, geometry)
    aligned = time.process_time() - cpu
    trace = identify(evidence, {str(i): key(i) for i in range(n_leases)})
    return {
        "leases": n_leases,
        "identified": [finding.lease for finding in trace.identified],
        "T": trace.findings[0].statistic,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "of_it_align_cpu_s": aligned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("perplexity", "attacks", "colluders", "time"))
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--leases", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--training", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument(
        "--model", type=Path, default=ROOT / ".test-home" / "models" / "smollm2-135m"
    )
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    geometry = Geometry(heads, kv_heads, config["hidden_size"] // heads)
    base = FirstLayers(options.model / "model.safetensors", options.layers)
    n_layers = min(options.layers, config["num_hidden_layers"])
    rows = {
        "perplexity": lambda: perplexity_rows(options.model, base, options.tokens),
        "attacks": lambda: attack_rows(options, base, geometry),
        "colluders": lambda: colluder_rows(base, geometry),
        "time": lambda: iter([time_row(base, geometry, options.leases)]),
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    print(json.dumps({"commit": commit, "epsilon": EPSILON, "layers": n_layers}), flush=True)
    for row in rows[options.what]():
        print(json.dumps(row), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_memory_mib": math.ceil(peak)}), flush=True)


if __name__ == "__main__":
    main()

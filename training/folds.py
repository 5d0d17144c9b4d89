"""Folds that leave whole families out, and weights that keep a large set from ruling.

A score that a fold's model gives to a left-out family says how the guard does on a source it
never saw. Near-duplicates of left-out rows leave the training side too.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.rows import Row

# Each fold leaves out these families. Those that only measure are spread by cluster, and so are
# the role prompts (awesome_chatgpt_prompts): they are the one benign set of their kind, and a
# guard that has seen none takes a third of them for jailbreaks.
FOLDS: tuple[tuple[str, ...], ...] = (
    ("advbench-like", "banking77", "sf_film_locations", "nltk_inaugural"),
    ("in-the-wild", "gsm8k", "mt_vicuna_bench", "nltk_state_union"),
    ("asb_agent_security_bench", "coa_attack_prompts", "clinc_oos"),
    ("bastioncorpus", "giskard_prompt_injections", "self_instruct"),
    ("bipia", "nltk_shakespeare"),
    ("injecagent", "cyberseceval_attacks", "written", "factbook"),
    ("deepset_prompt_injections", "nltk_movie_reviews"),
    ("lakera_gandalf", "python_stdlib"),
    ("piguard_notinject", "model_written_evals"),
    ("xstest", "nltk_product_reviews_1"),
)
N_FOLDS = len(FOLDS)

Mask = NDArray[np.bool_]
Float64 = NDArray[np.float64]

# Attacks that are only attacks where they stand (an order inside a tool's result reads like
# any user's request) say less about a text on its own.
RELIANCE = {
    "bipia": 0.3,
    "injecagent": 0.3,
    "asb_agent_security_bench": 0.5,
    "llm_adaptive_attacks": 0.5,
}


def fold_of(rows: Sequence[Row]) -> NDArray[np.int64]:
    """The fold that leaves each row out."""
    known = {family: fold for fold, families in enumerate(FOLDS) for family in families}
    return np.array([known.get(row.family, _hashed(row.cluster)) for row in rows])


def training_side(rows: Sequence[Row], left_out: Mask) -> Mask:
    """Rows that may train when ``left_out`` are not to be seen, not even as near-duplicates."""
    clusters = {row.cluster for row, out in zip(rows, left_out, strict=True) if out}
    return np.array([row.train and row.cluster not in clusters for row in rows]) & ~left_out


def targets(rows: Sequence[Row], detector: str) -> NDArray[np.int64]:
    """1, 0, or -1 where a row says nothing about the detector."""
    found = (row.target(detector) for row in rows)
    return np.array([-1 if target is None else int(target) for target in found])


def weights(rows: Sequence[Row], y: NDArray[np.int64], side: Mask) -> Float64:
    """[n] summing to 1, half for each class; a set of n rows counts as the root of n."""
    used = side & (y >= 0)
    sizes = Counter((row.source, int(t)) for row, t, u in zip(rows, y, used, strict=True) if u)
    w = np.array(
        [
            sizes[row.source, int(t)] ** -0.5 * RELIANCE.get(row.source, 1.0) if u else 0.0
            for row, t, u in zip(rows, y, used, strict=True)
        ]
    )
    for label in (0, 1):
        side_of_label = used & (y == label)
        w[side_of_label] *= 0.5 / max(w[side_of_label].sum(), 1e-9)
    return w


def _hashed(cluster: str) -> int:
    return int(hashlib.sha256(cluster.encode()).hexdigest(), 16) % N_FOLDS

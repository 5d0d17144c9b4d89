"""Folds that leave whole families out, and weights that keep a large set from ruling.

A score that a fold's model gives to a left-out family says how the guard does on a source it
never saw. Near-duplicates of left-out texts leave the training side too.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.guard.training.examples import Example

MAX_FOLDS = 10
_CLUSTER_FOLDS = 5

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Folds:
    """``of`` [n] is the fold that leaves each example out; ``by`` says what is left out."""

    of: Ints
    by: str

    @property
    def numbers(self) -> list[int]:
        return [int(number) for number in np.unique(self.of)]


def plan(examples: Sequence[Example]) -> Folds:
    """By family where every detector's texts come from two or more, else by cluster.

    Benign families are parted by cluster: what is left out of one fold is the family of attacks.
    """
    attacks = Counter(one.family for one in examples if not one.benign)
    per_label: dict[str, set[str]] = {}
    for one in examples:
        if not one.benign:
            per_label.setdefault(one.label, set()).add(one.family)
    if min(len(families) for families in per_label.values()) < 2:
        of = np.array([hashed(one.cluster, _CLUSTER_FOLDS) for one in examples])
        return Folds(of, "cluster")
    n_folds = min(MAX_FOLDS, len(attacks))
    fold = {family: i % n_folds for i, (family, _) in enumerate(attacks.most_common())}
    found = [
        fold[one.family] if one.family in fold else hashed(one.cluster, n_folds) for one in examples
    ]
    return Folds(np.array(found), "family")


def hashed(cluster: str, n_folds: int) -> int:
    """A fold that stays the same when rows come and go."""
    return int(hashlib.sha256(cluster.encode()).hexdigest(), 16) % n_folds


def training_side(examples: Sequence[Example], left_out: Mask) -> Mask:
    """Who may train when ``left_out`` are not to be seen, not even as near-duplicates."""
    clusters = {one.cluster for one, out in zip(examples, left_out, strict=True) if out}
    side = np.array([one.trains and one.cluster not in clusters for one in examples])
    return side & ~left_out


def targets(examples: Sequence[Example], detector: str) -> Ints:
    """1, 0, or -1 where an example says nothing about the detector."""
    return np.array([one.target(detector) for one in examples])


def weights(examples: Sequence[Example], y: Ints, side: Mask) -> Float64:
    """[n] summing to 1, half for each class; a set of n examples counts as the root of n."""
    used = side & (y >= 0)
    sizes = Counter((one.source, int(t)) for one, t, u in zip(examples, y, used, strict=True) if u)
    w = np.array(
        [
            sizes[one.source, int(t)] ** -0.5 * one.reliance if u else 0.0
            for one, t, u in zip(examples, y, used, strict=True)
        ]
    )
    for label in (0, 1):
        of_label = used & (y == label)
        w[of_label] *= 0.5 / max(w[of_label].sum(), 1e-9)
    return w


def objective(
    examples: Sequence[Example],
    detector: str,
    side: Mask,
    also: Mapping[str, tuple[str, float]],
) -> tuple[Ints, Float64]:
    """Targets and weights, another detector's positives borrowed as weaker ones of this."""
    y = targets(examples, detector)
    weight = weights(examples, y, side)
    if detector in also:
        other, reliance = also[detector]
        y_other = targets(examples, other)
        borrowed = (y_other == 1) & (y != 1) & side
        weight[borrowed] = reliance * weights(examples, y_other, side)[borrowed]
        y = np.where(borrowed, 1, y)
    return y, weight

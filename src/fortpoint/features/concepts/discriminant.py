"""One layer's direction between a concept and other text, and each text's score along it.

The reader is Fisher's linear discriminant, ``w ~ (C + shrinkage * mean variance * I)^-1 delta``,
with ``delta`` the difference of the tokens' means and ``C`` their covariance within the two
sides: ten sentences say where a concept lies, some hundred others which ways text varies
anyhow. The writer is ``delta`` itself, scaled so that ``w . writer = 1``: moving the stream along
it by ``a`` raises the reading by ``a``, and disturbs nothing that the concept does not move.

A text's score is its largest token's, in standard deviations of the other side's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.concepts.reading import Rows

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

SHRINKAGE = 1.0
"""Chosen on eight concepts of another set (benchmarks/concepts.py --dev)."""

_NEGATIVES_SHARE = 0.5  # of the other side's weight, where there are negatives
_MAX_WEIGHT = 5.0  # of a negative's token: a few sentences do not tell how text varies


@dataclass(frozen=True, eq=False)
class Layout:
    """What each text is: ``positive`` and ``negative`` ``[n_texts]``; the rest is background."""

    positive: Flags
    negative: Flags

    @property
    def other(self) -> Flags:
        return ~self.positive


@dataclass(frozen=True, eq=False)
class Discriminant:
    """``reader`` ``[d_model]`` has length 1; ``mean`` and ``spread`` are the other side's."""

    reader: Floats
    writer: Floats
    mean: float
    spread: float

    def scores(self, rows: Rows, n_texts: int) -> Doubles:
        """``[n_texts]``: each text's largest; -inf for a text without rows."""
        read = (rows.x @ self.reader - self.mean) / self.spread
        return largest(read.astype(np.float64), rows.text, n_texts)

    def raw(self, score: float) -> float:
        """What ``x . reader`` is at this score."""
        return self.mean + score * self.spread


@dataclass(frozen=True, eq=False)
class _Side:
    """Weighted sums over some tokens: ``weight``, ``total`` ``[d]`` and ``square`` ``[d, d]``."""

    weight: float
    total: Doubles
    square: Doubles

    def without(self, part: _Side) -> _Side:
        return _Side(self.weight - part.weight, self.total - part.total, self.square - part.square)

    @property
    def mean(self) -> Doubles:
        return self.total / self.weight

    @property
    def scatter(self) -> Doubles:
        """Around the mean, summed."""
        return self.square - np.outer(self.total, self.total) / self.weight


@dataclass(frozen=True, eq=False)
class CrossFit:
    """``found`` is made of all texts; ``scores`` ``[n_texts]`` of directions without their fold."""

    found: Discriminant
    scores: Doubles


def fit(rows: Rows, layout: Layout, shrinkage: float = SHRINKAGE) -> Discriminant:
    """The direction of all texts together."""
    weights = _weights(rows, layout)
    return _solve(*_sides(rows, layout, weights), shrinkage)


def cross_fit(
    rows: Rows, layout: Layout, folds: NDArray[np.int64], shrinkage: float = SHRINKAGE
) -> CrossFit:
    """``folds`` ``[n_texts]`` says which texts are held out together."""
    weights = _weights(rows, layout)
    concept, other = _sides(rows, layout, weights)
    scores = np.full(len(folds), -np.inf)
    for number in range(int(folds.max()) + 1):
        held = folds == number
        chosen = held[rows.text]
        own = Rows(rows.x[chosen], rows.text[chosen])
        parts = _sides(own, layout, weights[chosen])
        found = _solve(concept.without(parts[0]), other.without(parts[1]), shrinkage)
        scores[held] = found.scores(own, len(folds))[held]
    return CrossFit(_solve(concept, other, shrinkage), scores)


def largest(values: Doubles, text: NDArray[np.int64], n_texts: int) -> Doubles:
    """The largest of each text's ``values`` ``[n]``; ``text`` ascends."""
    found = np.full(n_texts, -np.inf)
    np.maximum.at(found, text, values)
    return found


def _weights(rows: Rows, layout: Layout) -> Floats:
    """Of each token. All negatives together weigh as much as the background, if they can."""
    negative = layout.negative[rows.text]
    background = ~(negative | layout.positive[rows.text])
    weights = np.ones(len(rows.text), np.float32)
    if negative.any():
        equal = _NEGATIVES_SHARE / (1 - _NEGATIVES_SHARE) * background.sum() / negative.sum()
        weights[negative] = min(_MAX_WEIGHT, max(1.0, float(equal)))
    return weights


def _sides(rows: Rows, layout: Layout, weights: Floats) -> tuple[_Side, _Side]:
    """Of the concept, and of all other text."""
    positive = layout.positive[rows.text]
    return _side(rows.x[positive], weights[positive]), _side(rows.x[~positive], weights[~positive])


def _side(x: Floats, weights: Floats) -> _Side:
    scaled = x * np.sqrt(weights)[:, None]
    return _Side(
        float(weights.sum(dtype=np.float64)),
        (weights @ x).astype(np.float64),
        (scaled.T @ scaled).astype(np.float64),
    )


def _solve(concept: _Side, other: _Side, shrinkage: float) -> Discriminant:
    delta = concept.mean - other.mean
    within = (concept.scatter + other.scatter) / (concept.weight + other.weight)
    d = len(delta)
    within[np.diag_indices(d)] += shrinkage * np.trace(within) / d
    reader = np.linalg.solve(within, delta)
    reader /= np.linalg.norm(reader)
    variance = reader @ other.scatter @ reader / other.weight
    return Discriminant(
        reader=reader.astype(np.float32),
        writer=(delta / (reader @ delta)).astype(np.float32),
        mean=float(reader @ other.mean),
        spread=math.sqrt(max(float(variance), 1e-12)),
    )

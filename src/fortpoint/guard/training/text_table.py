"""Fits the hashed n-gram table, and scores every example by tables that never saw its fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from fortpoint.guard import text_model
from fortpoint.guard.training import folds
from fortpoint.guard.training.examples import Example
from fortpoint.guard.training.logistic import fit

N_BUCKETS = 1 << 18
PENALTY = 3e-5
N_ITERATIONS = 30
MAX_WINDOWS = 6
MAX_CHARS = 4000
MIN_TEXTS = 3  # n-grams seen in fewer windows tell nothing that generalises
ALSO = {"jailbreak": ("injection", 0.5), "injection": ("jailbreak", 0.5)}

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Texts:
    """Windows of texts as a sparse matrix: ``x`` [n_windows, n_used], ``owner`` [n_windows]."""

    x: csr_matrix
    used: NDArray[np.int64]  # buckets that the columns of x stand for
    owner: NDArray[np.int64]
    n_texts: int

    @property
    def share(self) -> Float64:
        """Each window's share of its text."""
        result: Float64 = 1.0 / np.bincount(self.owner, minlength=self.n_texts)[self.owner]
        return result


@dataclass(frozen=True)
class Table:
    """What ships: ``table`` int8 [n_buckets, n], ``scale`` [n] and ``bias`` [n]."""

    table: NDArray[np.int8]
    scale: Float32
    bias: Float32


def vectorise(examples: Sequence[Example]) -> Texts:
    """The same features as in serving, ``1 / sqrt(n)`` each."""
    columns, lengths, owner = [], [], []
    for index, one in enumerate(examples):
        found = text_model.features(text_model.canonical(one.text[:MAX_CHARS]))
        buckets = text_model.buckets(found.hashes, N_BUCKETS)
        for start, end in text_model.windows(found.n_bytes, text_model.SCALES[:1])[:MAX_WINDOWS]:
            inside = (found.starts >= start) & (found.starts < end)
            columns.append(buckets[inside])
            lengths.append(len(columns[-1]))
            owner.append(index)
    n = np.array(lengths)
    data = np.repeat(1.0 / np.sqrt(np.maximum(n, 1)), n).astype(np.float32)
    edges = np.concatenate([[0], np.cumsum(n)])
    indices = np.concatenate(columns).astype(np.int32)
    x = csr_matrix((data, indices, edges), shape=(len(n), N_BUCKETS))
    x.sum_duplicates()
    used = np.flatnonzero(np.bincount(x.indices, minlength=N_BUCKETS) >= MIN_TEXTS)
    return Texts(x[:, used].tocsr(), used, np.array(owner), len(examples))


def train(
    examples: Sequence[Example],
    texts: Texts,
    detector: str,
    side: folds.Mask,
    also: Mapping[str, tuple[str, float]] = ALSO,
) -> tuple[Float64, float]:
    """Weights of the used buckets and the bias, from the examples of ``side``."""
    y, weight = folds.objective(examples, detector, side, also)
    of_window = weight[texts.owner] * texts.share
    kept = of_window > 0
    return fit(
        texts.x[kept], y[texts.owner][kept], of_window[kept], PENALTY, n_iterations=N_ITERATIONS
    )


def cross_fitted(
    examples: Sequence[Example], texts: Texts, detector: str, parts: folds.Folds
) -> Float64:
    """[n]: what serving computes, by a model that did not see the example's fold."""
    scores = np.zeros(len(examples))
    for number in parts.numbers:
        left_out = parts.of == number
        w, bias = train(examples, texts, detector, folds.training_side(examples, left_out))
        column = np.zeros((N_BUCKETS, 1), dtype=np.float32)
        column[texts.used, 0] = w
        model = text_model.TextModel((detector,), column, np.array([bias], dtype=np.float32))
        for index in np.flatnonzero(left_out).tolist():
            scores[index] = model.logits(examples[index].text[:MAX_CHARS]).max()
    return scores


def table(examples: Sequence[Example], texts: Texts, detectors: Sequence[str]) -> Table:
    """From every example that may train."""
    side = np.array([one.trains for one in examples])
    weights = np.zeros((N_BUCKETS, len(detectors)), dtype=np.float32)
    bias = np.zeros(len(detectors), dtype=np.float32)
    for column, detector in enumerate(detectors):
        w, bias[column] = train(examples, texts, detector, side)
        weights[texts.used, column] = w
    return Table(*_rounded(weights), bias)


def _rounded(weights: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Each column in 255 steps; the few largest weights are cut, which is kinder to the rest."""
    scale = np.maximum(np.quantile(np.abs(weights), 0.9998, axis=0), 1e-12) / 127
    rounded = np.clip(np.round(weights / scale), -127, 127)
    return rounded.astype(np.int8), scale.astype(np.float32)

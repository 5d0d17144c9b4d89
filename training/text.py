"""Fits the hashed n-gram table, and scores every row by models that never saw its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from fortpoint.guard import text_model
from training import folds
from training.logistic import fit
from training.rows import DETECTORS, Row

N_BUCKETS = 1 << 18
PENALTY = 3e-5
N_ITERATIONS = 40
MAX_WINDOWS = 6
MAX_CHARS = 4000
N_PER_SET = 900  # further rows of a set, beside those that are read inside the model
MIN_TEXTS = 3  # n-grams seen in fewer windows tell nothing that generalises
ALSO = {"jailbreak": ("injection", 0.25), "injection": ("jailbreak", 0.25)}

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Texts:
    """Windows of rows as a sparse matrix: ``x`` [n_windows, n_used], ``owner`` [n_windows]."""

    x: csr_matrix
    used: NDArray[np.int64]  # buckets that the columns of x stand for
    owner: NDArray[np.int64]
    n_rows: int

    @property
    def share(self) -> Float64:
        """Each window's share of its row."""
        result: Float64 = 1.0 / np.bincount(self.owner, minlength=self.n_rows)[self.owner]
        return result


def choose(rows: Sequence[Row]) -> list[Row]:
    """Rows for the text model: those read inside the model and up to ``N_PER_SET`` of a set."""
    sizes: Counter[tuple[str, str]] = Counter()
    clusters: Counter[str] = Counter()
    keys: set[str] = set()
    chosen = []
    for row in sorted(rows, key=lambda row: not row.read):
        group = (row.dataset, row.label)
        fits = sizes[group] < N_PER_SET and clusters[row.cluster] < 2
        if row.key in keys or not (row.read or fits):
            continue
        keys.add(row.key)
        sizes[group] += 1
        clusters[row.cluster] += 1
        chosen.append(row)
    return chosen


def vectorise(rows: Sequence[Row]) -> Texts:
    """The same features as in serving, ``1 / sqrt(n)`` each."""
    columns, lengths, owner = [], [], []
    for index, row in enumerate(rows):
        found = text_model.features(text_model.canonical(row.text[:MAX_CHARS]))
        buckets = text_model.buckets(found.hashes, N_BUCKETS)
        for start, end in text_model.windows(found.n_bytes, text_model.SCALES[:1])[:MAX_WINDOWS]:
            inside = (found.starts >= start) & (found.starts < end)
            columns.append(buckets[inside])
            lengths.append(len(columns[-1]))
            owner.append(index)
    n = np.array(lengths)
    data = np.repeat(1.0 / np.sqrt(np.maximum(n, 1)), n).astype(np.float32)
    edges = np.concatenate([[0], np.cumsum(n)])
    x = csr_matrix(
        (data, np.concatenate(columns).astype(np.int32), edges), shape=(len(n), N_BUCKETS)
    )
    x.sum_duplicates()
    used = np.flatnonzero(np.bincount(x.indices, minlength=N_BUCKETS) >= MIN_TEXTS)
    return Texts(x[:, used].tocsr(), used, np.array(owner), len(rows))


def train(
    rows: Sequence[Row], texts: Texts, detector: str, side: folds.Mask
) -> tuple[Float64, float]:
    """Weights of the used buckets and the bias, from the rows of ``side``."""
    visible = side & np.array([not row.hidden for row in rows])
    y = folds.targets(rows, detector)
    weight = folds.weights(rows, y, visible)
    if detector in ALSO:
        other, reliance = ALSO[detector]
        y_other = folds.targets(rows, other)
        borrowed = (y_other == 1) & (y != 1) & visible
        weight[borrowed] = reliance * folds.weights(rows, y_other, visible)[borrowed]
        y = np.where(borrowed, 1, y)
    of_window = weight[texts.owner] * texts.share
    kept = of_window > 0
    return fit(
        texts.x[kept], y[texts.owner][kept], of_window[kept], PENALTY, n_iterations=N_ITERATIONS
    )


def cross_fitted(rows: Sequence[Row], texts: Texts, detector: str) -> Float64:
    """[n_rows]: what serving computes, by a model that did not see the row's family."""
    fold = folds.fold_of(rows)
    scores = np.zeros(len(rows))
    for index in range(folds.N_FOLDS):
        left_out = fold == index
        w, bias = train(rows, texts, detector, folds.training_side(rows, left_out))
        column = np.zeros((N_BUCKETS, 1), dtype=np.float32)
        column[texts.used, 0] = w
        model = text_model.TextModel((detector,), column, np.array([bias], dtype=np.float32))
        for row in np.flatnonzero(left_out):
            scores[row] = model.logits(rows[row].text[:MAX_CHARS]).max()
    return scores


def table(rows: Sequence[Row], texts: Texts) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """What ships: [n_buckets, n_detectors] and [n_detectors], from every row that may train."""
    side = np.array([row.train for row in rows])
    weights = np.zeros((N_BUCKETS, len(DETECTORS)), dtype=np.float16)
    bias = np.zeros(len(DETECTORS), dtype=np.float32)
    for column, detector in enumerate(DETECTORS):
        w, bias[column] = train(rows, texts, detector, side)
        weights[texts.used, column] = w
    return weights, bias

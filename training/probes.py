"""Fits the linear probes, and scores every row by probes that never saw its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training import folds
from training.harvest import LAYERS, Activations
from training.logistic import fit
from training.rows import Row

PENALTY = {"jailbreak": 0.7, "injection": 1.0, "harmful_request": 0.2}
N_ITERATIONS = 80
ALSO = {"jailbreak": ("injection", 0.25), "injection": ("jailbreak", 0.25)}

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """``x`` [n_windows, n_layers * d_model] and which row each window is of."""

    x: Float32
    owner: NDArray[np.int64]
    n_rows: int


def of_tokens(rows: Sequence[Row], read: Mapping[str, Activations]) -> Readings:
    """Means over windows of up to 64 tokens, half overlapping, as the guard's rolling means."""
    parts, owner = [], []
    for index, row in enumerate(rows):
        found = read[row.key]
        windows = found.windows.astype(np.float32).reshape(len(found.windows), -1)
        sizes = np.full(len(windows), 32.0, dtype=np.float32)
        sizes[-1] = found.n_tokens - 32 * (len(windows) - 1)
        for start in range(max(1, len(windows) - 1)):
            size = sizes[start : start + 2]
            parts.append((windows[start : start + 2] * size[:, None]).sum(0) / size.sum())
            owner.append(index)
    return Readings(np.stack(parts), np.array(owner), len(rows))


def of_tail(rows: Sequence[Row], read: Mapping[str, Activations]) -> Readings:
    """Means over the template tokens that end the prompt."""
    x = np.stack([read[row.key].tail.astype(np.float32).reshape(-1) for row in rows])
    return Readings(x, np.arange(len(rows)), len(rows))


@dataclass(frozen=True)
class Probe:
    """``logit = x @ w + b`` on activations that are not standardised."""

    w: Float64
    b: float

    @property
    def W(self) -> Float32:
        """[n_layers, d_model]"""
        return self.w.reshape(len(LAYERS), -1).astype(np.float32)


def train(
    rows: Sequence[Row],
    readings: Readings,
    detector: str,
    side: folds.Mask,
) -> Probe:
    """A probe from the rows of ``side``, orders hidden in documents left out."""
    side = side & np.array([not row.hidden for row in rows])
    y = folds.targets(rows, detector)
    weight = folds.weights(rows, y, side)
    if detector in ALSO:
        other, reliance = ALSO[detector]
        y_other = folds.targets(rows, other)
        borrowed = (y_other == 1) & (y != 1) & side
        weight[borrowed] = reliance * folds.weights(rows, y_other, side)[borrowed]
        y = np.where(borrowed, 1, y)
    share = 1.0 / np.bincount(readings.owner, minlength=readings.n_rows)
    of_window = (weight * share)[readings.owner]
    kept = of_window > 0
    x = readings.x[kept]
    mean, scale = x.mean(0), x.std(0) + 1e-3
    w, bias = fit(
        (x - mean) / scale,
        y[readings.owner][kept],
        of_window[kept],
        PENALTY[detector],
        N_ITERATIONS,
    )
    return Probe(w / scale, bias - float((w / scale) @ mean))


def score(readings: Readings, probe: Probe) -> Float64:
    """[n_rows]: the highest window's logit."""
    scores = np.full(readings.n_rows, -np.inf)
    np.maximum.at(scores, readings.owner, readings.x @ probe.w.astype(np.float32) + probe.b)
    return scores


def cross_fitted(rows: Sequence[Row], readings: Readings, detector: str) -> Float64:
    """[n_rows] by probes that did not see the row's family."""
    fold = folds.fold_of(rows)
    scores = np.full(len(rows), -np.inf)
    for index in range(folds.N_FOLDS):
        left_out = fold == index
        probe = train(rows, readings, detector, folds.training_side(rows, left_out))
        scores[left_out] = score(readings, probe)[left_out]
    return scores

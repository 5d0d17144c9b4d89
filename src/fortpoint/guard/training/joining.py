"""Joins the logits of a detector and chooses its thresholds, on left-out folds only.

All logits that come here are cross-fitted: no model has seen the fold that it scores. Only
examples that may train shape the numbers; the rest are measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.guard.calibration import Calibration, Mode
from fortpoint.guard.training import folds
from fortpoint.guard.training.examples import Example
from fortpoint.guard.training.logistic import fit

STRICT_SHARE = 0.2  # a strict threshold allows this share of each budget
_CEILING = 0.9999

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """The highest ``share`` of some benign texts that one detector may block on left-out folds."""

    name: str
    share: float
    belongs: Callable[[Example], bool]


@dataclass(frozen=True)
class Evidence:
    """One detector's cross-fitted logits, [n] each; nan where a text was not read."""

    text: Float64
    probes: Float64
    tail: Float64

    def columns(self, mode: str) -> Float64:
        """[n, 1, 2 or 3]"""
        n = {"text": 1, "probes": 2, "tail": 3}[mode]
        return np.stack([self.text, self.probes, self.tail][:n], axis=1)

    def taken(self, at: Sequence[int]) -> Evidence:
        return Evidence(self.text[at], self.probes[at], self.tail[at])


def probability(mode: Mode, columns: Float64) -> Float64:
    """[n], nan where evidence is missing."""
    z = columns @ np.array(mode.weights) + mode.bias
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -60, 60))))


def calibrate(
    examples: Sequence[Example], detector: str, evidence: Evidence, budgets: Sequence[Budget]
) -> Calibration:
    """The three modes of one detector; without readings all three are the text's."""
    text = _mode(examples, detector, evidence.columns("text"), budgets)
    if not np.isfinite(evidence.probes).any():
        return Calibration(text, _padded(text, 2), _padded(text, 3))
    return Calibration(
        text,
        _mode(examples, detector, evidence.columns("probes"), budgets),
        _mode(examples, detector, evidence.columns("tail"), budgets),
    )


def _padded(mode: Mode, n: int) -> Mode:
    weights = (*mode.weights, *(0.0,) * (n - 1))
    return Mode(weights, mode.bias, mode.threshold, mode.strict)


def _mode(
    examples: Sequence[Example], detector: str, columns: Float64, budgets: Sequence[Budget]
) -> Mode:
    y = folds.targets(examples, detector)
    usable = np.isfinite(columns).all(axis=1) & np.array([one.trains for one in examples])
    weight = folds.weights(examples, y, usable)
    kept = weight > 0
    w, bias = _not_negative(columns[kept].astype(np.float32), y[kept], weight[kept])
    mode = Mode(tuple(round(float(v), 6) for v in w), round(bias, 6), 0.5, 0.5)
    benign = usable & (y == 0)
    scores = probability(mode, np.nan_to_num(columns))
    threshold = _threshold(examples, scores, benign, budgets, 1.0)
    strict = max(threshold, _threshold(examples, scores, benign, budgets, STRICT_SHARE))
    return Mode(mode.weights, mode.bias, threshold, strict)


def _not_negative(
    x: NDArray[np.float32], y: NDArray[np.int64], weight: Float64
) -> tuple[Float64, float]:
    """More evidence never lowers a score: columns that would are left out."""
    used = np.ones(x.shape[1], dtype=bool)
    while used.any():
        w, bias = fit(x[:, used], y, weight, 1e-4, 200)
        if (w >= 0).all():
            full = np.zeros(x.shape[1])
            full[used] = w
            return full, bias
        used[np.flatnonzero(used)[w < 0]] = False
    return np.zeros(x.shape[1]), 0.0


def _threshold(
    examples: Sequence[Example],
    scores: Float64,
    benign: folds.Mask,
    budgets: Sequence[Budget],
    share: float,
) -> float:
    """The lowest threshold that keeps every budget, in 0.5..0.9999."""
    chosen = 0.5
    for budget in budgets:
        group = benign & np.array([budget.belongs(one) for one in examples])
        if not group.any():
            continue
        weight = _balanced(examples, group)[group]
        order = np.argsort(-scores[group], kind="stable")
        above = np.cumsum(weight[order])
        first = int(np.searchsorted(above, share * budget.share * above[-1], side="right"))
        # Everything ranked before `first` fits the budget; the next one must stay below.
        chosen = max(chosen, float(scores[group][order][min(first, len(order) - 1)]) + 1e-6)
    return round(min(chosen, _CEILING), 6)


def _balanced(examples: Sequence[Example], group: folds.Mask) -> Float64:
    """[n]: a set of n examples counts as the root of n."""
    sizes = Counter(one.source for one, inside in zip(examples, group, strict=True) if inside)
    return np.array([sizes[one.source] ** -0.5 if sizes[one.source] else 0.0 for one in examples])

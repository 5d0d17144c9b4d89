"""Joins the logits of a detector and chooses its thresholds, on left-out families only.

All logits that come here are cross-fitted: no model has seen the family that it scores. Only
rows that may train shape the numbers that ship; the rest are measured in ``training.card``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.guard.calibration import Calibration, Mode
from training import folds
from training.logistic import fit
from training.rows import Row

# Highest share of each benign group that one detector may block, on families left out.
BUDGETS: tuple[tuple[str, float, Callable[[Row], bool]], ...] = (
    ("plain benign", 0.0025, lambda row: row.label == "benign"),
    ("NotInject", 0.04, lambda row: row.dataset == "piguard_notinject"),
    ("XSTest-safe", 0.08, lambda row: row.dataset == "xstest"),
    ("JailbreakBench benign", 0.15, lambda row: row.dataset == "jailbreakbench"),
    ("role prompts", 0.03, lambda row: row.dataset == "awesome_chatgpt_prompts"),
)
STRICT_SHARE = 0.1  # a strict threshold allows this share of each budget
CEILING = 0.9999

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """One detector's cross-fitted logits, [n_rows] each; nan where a row was not read."""

    text: Float64
    probes: Float64
    tail: Float64

    def columns(self, mode: str) -> Float64:
        """[n_rows, 1, 2 or 3]"""
        names = {"text": 1, "probes": 2, "tail": 3}[mode]
        return np.stack([self.text, self.probes, self.tail][:names], axis=1)


def probability(mode: Mode, columns: Float64) -> Float64:
    """[n_rows], nan where evidence is missing."""
    z = columns @ np.array(mode.weights) + mode.bias
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -60, 60))))


def calibrate(rows: Sequence[Row], detector: str, evidence: Evidence) -> Calibration:
    """The three modes of one detector."""
    return Calibration(
        **{
            mode: _mode(rows, detector, evidence.columns(mode))
            for mode in Calibration.__struct_fields__
        }
    )


def _mode(rows: Sequence[Row], detector: str, columns: Float64) -> Mode:
    y = folds.targets(rows, detector)
    usable = np.isfinite(columns).all(axis=1) & np.array(
        [row.train and not row.hidden for row in rows]
    )
    weight = folds.weights(rows, y, usable)
    kept = weight > 0
    w, bias = _not_negative(columns[kept].astype(np.float32), y[kept], weight[kept])
    mode = Mode(tuple(round(float(v), 6) for v in w), round(bias, 6), 0.5, 0.5)
    benign = usable & (y == 0)
    scores = probability(mode, np.nan_to_num(columns))
    threshold = _threshold(rows, scores, benign, 1.0)
    strict = max(threshold, _threshold(rows, scores, benign, STRICT_SHARE))
    return Mode(mode.weights, mode.bias, threshold, strict)


def _not_negative(
    x: NDArray[np.float32], y: NDArray[np.int64], weight: Float64
) -> tuple[Float64, float]:
    """More evidence never lowers a score: columns that would are left out."""
    used = np.ones(x.shape[1], dtype=bool)
    while True:
        w, bias = fit(x[:, used], y, weight, 1e-4, 200)
        if (w >= 0).all():
            full = np.zeros(x.shape[1])
            full[used] = w
            return full, bias
        used[np.flatnonzero(used)[w < 0]] = False


def _threshold(rows: Sequence[Row], scores: Float64, benign: folds.Mask, share: float) -> float:
    """The lowest threshold that keeps every budget."""
    chosen = 0.5
    for _, budget, belongs in BUDGETS:
        group = benign & np.array([belongs(row) for row in rows])
        if not group.any():
            continue
        weight = _balanced(rows, group)
        order = np.argsort(-scores[group], kind="stable")
        above = np.cumsum(weight[group][order])
        first = int(np.searchsorted(above, share * budget * above[-1], side="right"))
        # Everything ranked before `first` fits the budget; the next one must stay below.
        chosen = max(chosen, float(scores[group][order][min(first, len(order) - 1)]) + 1e-6)
    return round(min(chosen, CEILING), 6)


def _balanced(rows: Sequence[Row], group: folds.Mask) -> Float64:
    """[n_rows]: a data set of n rows counts as the root of n."""
    counts: dict[str, int] = {}
    for row, inside in zip(rows, group, strict=True):
        if inside:
            counts[row.dataset] = counts.get(row.dataset, 0) + 1
    return np.array(
        [
            counts[row.dataset] ** -0.5 if inside else 0.0
            for row, inside in zip(rows, group, strict=True)
        ]
    )

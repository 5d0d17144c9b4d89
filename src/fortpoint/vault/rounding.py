"""What a weight that was rounded to few bits still says of the value that it had before.

    steps = find_steps(suspect)                  # [rows, blocks], zero where nothing was rounded
    psi = score(r, steps, suspect)               # r: (suspect - base) / s, steps in the same unit

Blocks of 32 in a row that hold multiples of one step, plus an offset, were quantised (every
format of llama.cpp with four or five bits; eight bits are finer than what matters). A rounded
weight was somewhere within half a step. Where the base lies in the middle of that interval the
weight says nothing of a mark that is far smaller than the step; where it lies near the edge, the
side that the weight fell to says much. ``score`` is the derivative of the log-likelihood of the
interval by a shift of the weight, for a deviation that is estimated from the suspect.

A block's two extremes set its scale and are kept to many more bits: they are taken as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Floats = NDArray[np.float32]

BLOCK = 32
_TOLERANCE = 0.06  # of a step
_MIN_SHARE = 0.5  # of a matrix's blocks
_MAX_LEVELS = 48  # steps from a block's least to its greatest
_SPREADS = np.float32(2.0) ** np.arange(-10, 0, 0.5, dtype=np.float32)  # of a row's scale
_OUTLIERS = 0.02  # share of weights whose deviation may be anything
_OUTLIER_RANGE = 6.0  # in row scales
_SAMPLE = 1 << 17
_TINY = np.float32(1e-30)


def find_steps(suspect: Floats) -> Floats | None:
    """The step of each block ``[rows, cols / 32]``, or None where the matrix was not quantised."""
    rows, cols = suspect.shape
    if cols % BLOCK:
        return None
    some = _steps(suspect[:: max(1, rows // 16)].reshape(-1, BLOCK))
    if np.mean(some > 0) < _MIN_SHARE:
        return None
    return _steps(suspect.reshape(-1, BLOCK)).reshape(rows, -1)


def score(r: Floats, steps: Floats, suspect: Floats) -> Floats:
    """``[rows, cols]``; ``r`` and ``steps`` are in units of the row's scale."""
    blocks, half = r.reshape(-1, BLOCK), np.asarray(steps.reshape(-1, 1) / 2, np.float32)
    spread = _likeliest_spread(blocks, half)
    low, high = (blocks - half) / spread, (blocks + half) / spread
    inside = ndtr(high) - ndtr(low)
    stray = np.float32(_OUTLIERS / _OUTLIER_RANGE) * 2 * half
    psi = np.asarray((_density(low) - _density(high)) / (inside + stray + _TINY) / spread)
    psi[half[:, 0] == 0] = 0
    values, lines = suspect.reshape(-1, BLOCK), np.arange(len(blocks))
    first, last = values.argmin(axis=1), values.argmax(axis=1)
    outer = np.abs(values[lines, first]) > np.abs(values[lines, last])
    for places in (np.where(outer, first, last), np.where(outer, last, first)):
        psi[lines, places] = _exact(blocks[lines, places])
    return np.asarray(psi.reshape(r.shape), np.float32)


def _steps(blocks: Floats) -> Floats:
    """``[n]`` of blocks ``[n, 32]``."""
    ordered = np.sort(blocks, axis=1)
    span = ordered[:, -1] - ordered[:, 0]
    gaps = np.diff(ordered, axis=1)
    apart = gaps > span[:, None] / (2 * _MAX_LEVELS)
    step = np.where(apart, gaps, np.float32(np.inf)).min(axis=1)
    step = np.where(np.isfinite(step) & (span > 0), step, np.float32(1))
    counts = gaps / step[:, None]
    fits = np.abs(counts - np.rint(counts)).max(axis=1) < _TOLERANCE
    return np.where(fits & (span > 0), step, np.float32(0))


def _likeliest_spread(blocks: Floats, half: Floats) -> np.float32:
    """Standard deviation, before rounding, under which the sample's intervals are likeliest."""
    rows = slice(None, None, max(1, blocks.size // _SAMPLE))
    some, width = blocks[rows], half[rows]
    quantised = width[:, 0] > 0
    some, width = some[quantised], width[quantised]
    stray = _OUTLIERS / _OUTLIER_RANGE * 2 * width

    def likelihood(spread: np.float32) -> float:
        inside = ndtr((some + width) / spread) - ndtr((some - width) / spread)
        return float(np.log(inside + stray + _TINY).sum())

    return np.float32(max(_SPREADS, key=likelihood))


def _exact(r: Floats) -> Floats:
    """Score of values that were not rounded to the grid; zero for those that are far out."""
    limit = np.float32(4 * 1.4826) * np.median(np.abs(r))
    kept = np.where(np.abs(r) <= limit, r, np.float32(0))
    return np.asarray(kept / (np.mean(np.square(kept)) + np.float32(1e-12)), np.float32)


def _density(x: Floats) -> Floats:
    return np.asarray(np.exp(-x * x / 2) * np.float32(0.3989423), np.float32)

"""What a suspect keeps of the mark: its difference from the base, made ready to be multiplied.

    psi = residual(suspect, base)        # [rows, cols], a function of both and of no key

1. weights that are exactly zero were pruned: they say nothing;
2. a row's own scale is taken out, then ``r = (W' - W0) / s``;
3. directions that stand out of the noise (fine-tuning, LoRA) are projected away;
4. what was rounded to few bits is scored by the interval that it lay in (rounding.py); of the
   rest, what is far from its row is dropped, and each row is weighed by how quiet it is.

Every step loses a little of the mark and much of what hides it. None sees a lease's key, so
``<psi, k> / ||psi||`` is standard normal for a lease that had no part in the suspect.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fortpoint.vault.fingerprint import row_scale
from fortpoint.vault.rounding import find_steps, score

Floats = NDArray[np.float32]

_CUTOFF = 4.0 * 1.4826  # of the median deviation: four standard deviations of a normal
_STANDS_OUT = 1.3  # times the largest singular value of noise
_POWER_STEPS = 6
_MOST_DIRECTIONS = 64
_LARGE = 0.5  # of a row's scale: weights large enough to tell the row's factor
_TINY = np.float32(1e-12)


def residual(suspect: Floats, base: Floats) -> Floats:
    """``psi`` of one matrix; zero where the suspect says nothing."""
    scale = row_scale(base)
    kept = (suspect != 0) | (base == 0)
    factor = _row_factor(suspect, base, scale, kept)
    r = (suspect / factor - base) / scale
    r[~kept] = 0
    r -= _directions(_without_outliers(r))
    r[~kept] = 0
    steps = find_steps(suspect)
    if steps is not None:
        return np.where(kept, score(r, steps / np.abs(factor * scale), suspect), np.float32(0))
    return _weighed(_without_outliers(r))


def _weighed(r: Floats) -> Floats:
    """Each row by the inverse of its variance."""
    share = np.maximum(np.mean(r != 0, axis=1, keepdims=True), _TINY)
    variance = np.mean(np.square(r), axis=1, keepdims=True) / share
    floor = np.float32(1e-3) * np.median(variance) + _TINY
    return np.asarray(r / np.maximum(variance, floor), np.float32)


def _row_factor(suspect: Floats, base: Floats, scale: Floats, kept: NDArray[np.bool_]) -> Floats:
    """``[rows, 1]``: the median of what a row's larger weights were multiplied by."""
    usable = kept & (np.abs(base) > _LARGE * scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(usable, suspect / base, np.nan)
    some = usable.any(axis=1)
    factor = np.ones((len(base), 1), np.float32)
    factor[some, 0] = np.nanmedian(ratios[some], axis=1)
    return np.where(np.abs(factor) < 1e-6, np.float32(1), factor)


def _without_outliers(r: Floats) -> Floats:
    """Zero where a weight is far from the others of its row."""
    size = np.abs(r)
    known = np.where(size > 0, size, np.nan)
    known[~(size > 0).any(axis=1), 0] = 0
    median = np.nanmedian(known, axis=1, keepdims=True)
    return np.where(size <= np.float32(_CUTOFF) * median, r, np.float32(0))


def _directions(r: Floats) -> Floats | np.float32:
    """The part of ``r`` that is stronger than any direction of noise of this size would be."""
    level = float(np.sqrt(np.mean(np.square(r), dtype=np.float64)))
    edge = _STANDS_OUT * level * (r.shape[0] ** 0.5 + r.shape[1] ** 0.5)
    if level == 0 or _top_singular_value(r) <= edge:
        return np.float32(0)
    wide = r.shape[1] > r.shape[0]
    tall = r.T if wide else r
    squares, directions = np.linalg.eigh(tall.T @ tall)
    strong = directions[:, squares > edge**2][:, -_MOST_DIRECTIONS:]
    part = (tall @ strong) @ strong.T
    return np.ascontiguousarray(part.T if wide else part)


def _top_singular_value(r: Floats) -> float:
    source = np.random.default_rng(0)
    direction: NDArray[Any] = source.standard_normal(size=(r.shape[1],), dtype=np.float32)
    for _ in range(_POWER_STEPS):
        direction = r.T @ (r @ (direction / np.float32(np.linalg.norm(direction) + _TINY)))
    return float(np.linalg.norm(direction) ** 0.5)

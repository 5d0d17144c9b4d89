"""Spherical k-means: points of length 1 to the centre of the largest cosine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_BATCH = 4096
_LEAST_LENGTH = np.float32(1e-6)


def unit_rows(x: Floats) -> Floats:
    """Rows of length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True).astype(np.float32)
    unit: Floats = x / np.maximum(lengths, _LEAST_LENGTH)
    return unit


def k_means(x: Floats, n_centers: int, seed: int, rounds: int = 12) -> Floats:
    """Unit centres ``[n_centers, d]`` of unit rows ``x``; one that loses all its points takes
    one that is far from its own centre. There must be as many points as centres."""
    rng = np.random.default_rng(seed)
    centers = x[rng.choice(len(x), n_centers, replace=False)]
    for _ in range(rounds):
        nearest, cosines = assign(x, centers)
        order = np.argsort(nearest, kind="stable")
        sizes = np.bincount(nearest, minlength=n_centers)
        filled, lost = np.flatnonzero(sizes), np.flatnonzero(sizes == 0)
        starts = (np.cumsum(sizes) - sizes)[filled]
        centers = np.zeros_like(centers)
        centers[filled] = np.add.reduceat(x[order], starts, axis=0)
        centers[lost] = x[np.argsort(cosines, kind="stable")[: len(lost)]]
        centers = unit_rows(centers)
    return centers


def assign(x: Floats, centers: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Each point's centre, and its cosine with it."""
    nearest = np.empty(len(x), np.int64)
    cosines = np.empty(len(x), np.float32)
    for start in range(0, len(x), _BATCH):
        batch = x[start : start + _BATCH] @ centers.T
        nearest[start : start + _BATCH] = batch.argmax(axis=1)
        cosines[start : start + _BATCH] = batch.max(axis=1)
    return nearest, cosines

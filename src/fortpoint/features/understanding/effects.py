"""What a feature makes the model say: its decoder row, read by the unembedding.

    found = effects(dictionary.decoder, readout, counts)
    found.promoted[3], found.promoted_values[3]     # tokens whose logits rise most

``readout`` is the unembedding with the final norm's weights folded in (``engine/unembedding.py``).
The effect is the direct one alone: what later layers make of the feature is not in it. Units are
logits for a change of 1 along the decoder row, before the final norm divides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_BATCH = 128


@dataclass(frozen=True, eq=False)
class Effects:
    """Tokens int64 and values float32, all ``[n_features, n]``, strongest first; ``histogram``
    ``[n_features, n_bins]`` counts all tokens between the two extremes."""

    promoted: Numbers
    promoted_values: Floats
    suppressed: Numbers
    suppressed_values: Floats
    histogram: Numbers


def effects(
    decoder: Floats,
    readout: Floats,
    shown: NDArray[np.bool_],
    n: int = 10,
    n_bins: int = 24,
    progress: Progress | None = None,
) -> Effects:
    """``decoder`` ``[n_features, d_model]``, ``readout`` ``[n_vocab, d_model]``.

    ``shown`` ``[n_vocab]`` are the tokens to name: those that no text has are noise. The mean
    over the vocabulary is taken away, since adding a number to all logits changes nothing.
    """
    n = min(n, int(shown.sum()))
    named = np.flatnonzero(shown)
    centered = readout - readout.mean(axis=0)
    parts = []
    for start in range(0, len(decoder), _BATCH):
        logits = decoder[start : start + _BATCH] @ centered.T
        seen = logits[:, named]
        up, up_values = _largest(seen, n)
        down, down_values = _largest(-seen, n)
        parts.append((named[up], up_values, named[down], -down_values, _histogram(logits, n_bins)))
        if progress is not None:
            progress("effects", min(start + _BATCH, len(decoder)), len(decoder))
    return Effects(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _largest(values: Floats, n: int) -> tuple[Numbers, Floats]:
    """Columns of the ``n`` largest of each row, the largest first."""
    at = np.argpartition(values, -n, axis=1)[:, -n:]
    found = np.take_along_axis(values, at, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    return np.take_along_axis(at, order, axis=1), np.take_along_axis(found, order, axis=1)


def _histogram(logits: Floats, n_bins: int) -> Numbers:
    low, high = logits.min(axis=1, keepdims=True), logits.max(axis=1, keepdims=True)
    bins = ((logits - low) * (n_bins / np.maximum(high - low, 1e-12))).astype(np.int64)
    np.minimum(bins, n_bins - 1, out=bins)
    bins += np.arange(len(logits))[:, None] * n_bins
    counts = np.bincount(bins.ravel(), minlength=len(logits) * n_bins)
    return counts.reshape(len(logits), n_bins)

"""Features that are alike: by decoder, by encoder, and by being active on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.incidence import Incidence
from fortpoint.features.understanding.k_means import unit_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]

_BATCH = 1024
_LEAST_TOGETHER = 8


@dataclass(frozen=True, eq=False)
class Nearest:
    """``features`` int64 and ``closeness`` float32 ``[n_features, n]``, nearest first.

    A feature is -1 where there are fewer.
    """

    features: Numbers
    closeness: Floats


def nearest(directions: Floats, n: int) -> Nearest:
    """By cosine of the rows of ``directions`` ``[n_features, d]``, a row itself left out."""
    x = unit_rows(directions)
    n = min(n, len(x) - 1)
    features, closeness = [np.empty((0, n), np.int64)], [np.empty((0, n), np.float32)]
    for start in range(0, len(x), _BATCH):
        cosines = x[start : start + _BATCH] @ x.T
        own = np.arange(len(cosines))
        cosines[own, own + start] = -np.inf
        at = np.argpartition(cosines, -n, axis=1)[:, len(x) - n :]
        found = np.take_along_axis(cosines, at, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        features.append(np.take_along_axis(at, order, axis=1))
        closeness.append(np.take_along_axis(found, order, axis=1))
    return Nearest(np.concatenate(features), np.concatenate(closeness))


def together(active: Incidence) -> csr_array[Any]:
    """``[n_features, n_features]``: tokens on which both are active, 0 on the diagonal.

    Pairs seen on fewer than eight tokens are left out.
    """
    from scipy.sparse import csr_array

    shape = (active.n_rows, active.n_columns)
    ones = np.ones(len(active.columns), np.int32)
    rows = csr_array((ones, active.columns, active.starts), shape=shape)
    counts = (rows.T @ rows).tocoo()
    often = (counts.data >= _LEAST_TOGETHER) & (counts.row != counts.col)
    pairs = (counts.data[often], (counts.row[often], counts.col[often]))
    return csr_array(pairs, shape=counts.shape)


def coactive(counts: csr_array[Any], totals: Numbers, n_tokens: int, n: int) -> Nearest:
    """The features most often active with each, by normalised pointwise mutual information.

    ``totals`` ``[n_features]`` are the tokens on which each is active among ``n_tokens``. The
    measure is 1 for two that are never active apart and 0 for chance.
    """
    features = np.full((len(totals), n), -1, np.int64)
    closeness = np.zeros((len(totals), n), np.float32)
    for feature in range(len(totals)):
        span = slice(counts.indptr[feature], counts.indptr[feature + 1])
        others, both = counts.indices[span], counts.data[span]
        npmi = _npmi(both, totals[feature], totals[others], n_tokens)
        best = np.argsort(-npmi, kind="stable")[:n]
        best = best[npmi[best] > 0]
        features[feature, : len(best)] = others[best]
        closeness[feature, : len(best)] = npmi[best]
    return Nearest(features, closeness)


def _npmi(
    both: NDArray[np.integer], one: int, other: Numbers, n_tokens: int
) -> NDArray[np.float64]:
    """Bouma 2009: log(p(x,y) / p(x) p(y)) / -log p(x,y)."""
    share = np.minimum(both / n_tokens, 1 - 1e-12)
    expected = (one / n_tokens) * (other / n_tokens)
    found: NDArray[np.float64] = np.log(share / expected) / -np.log(share)
    return found

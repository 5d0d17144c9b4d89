"""Features grouped by kind and laid out on a map.

    found = cluster(dictionary.decoder, counts, totals, n_tokens, seed=0)
    found.of_feature, found.xy

Two features are alike when their decoder rows point the same way and when they are active on
the same tokens. Groups are found by spherical k-means on both; the map is t-SNE (van der Maaten
2008) of the same vectors. Both depend on ``seed`` alone. ``cluster_names.py`` names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.k_means import assign, k_means, unit_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]

MAP_SIZE = 1000
_N_COMPONENTS = 48
_TOGETHER_WEIGHT = 0.8
_MIN_FEATURES = 8


@dataclass(frozen=True, eq=False)
class Clusters:
    """``of_feature`` int64 ``[n_features]``, -1 for a dead one; ``xy`` int64 ``[n_features, 2]``
    from 0 to 1000."""

    of_feature: Numbers
    xy: Numbers
    n: int


def how_many(n_features: int) -> int:
    """Groups of about fifty for a small dictionary, larger ones for a large."""
    return max(1, round(1.4 * float(np.sqrt(n_features))))


def cluster(
    decoder: Floats,
    together: csr_array[Any],
    totals: Numbers,
    n_clusters: int | None = None,
    seed: int = 0,
) -> Clusters:
    """``together`` and ``totals`` as in ``neighbours.coactive``; features that were never active
    belong to no cluster and lie in the middle."""
    alive = np.flatnonzero(totals)
    of_feature = np.full(len(decoder), -1, np.int64)
    xy = np.full((len(decoder), 2), MAP_SIZE // 2, np.int64)
    if len(alive) < _MIN_FEATURES:
        of_feature[alive] = 0
        return Clusters(of_feature, xy, 1 if len(alive) else 0)
    x = _joint(decoder, together, totals, seed)[alive]
    n = min(n_clusters or how_many(len(alive)), len(alive))
    found, _ = assign(x, k_means(x, n, seed, rounds=40))
    sizes = np.bincount(found, minlength=n)
    renumbered = np.empty(n, np.int64)
    renumbered[np.argsort(-sizes, kind="stable")] = np.arange(n)
    of_feature[alive] = renumbered[found]
    xy[alive] = _map(x, seed)
    return Clusters(of_feature, xy, int((sizes > 0).sum()))


def _joint(decoder: Floats, together: csr_array[Any], totals: Numbers, seed: int) -> Floats:
    """Unit vectors of decoder directions and of company kept, side by side."""
    direction = _principal(unit_rows(decoder - decoder.mean(axis=0)), seed)
    company = unit_rows(_company(together, totals, seed)) * np.float32(_TOGETHER_WEIGHT)
    return unit_rows(np.hstack([unit_rows(direction), company]))


def _principal(x: Floats, seed: int) -> Floats:
    """The first components, by a randomised range finder (Halko 2011)."""
    n = min(_N_COMPONENTS, *x.shape)
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((x.shape[1], n), np.float32)
    for _ in range(4):
        basis, _ = np.linalg.qr(x.T @ (x @ basis))
    return np.asarray(x @ basis, np.float32)


def _company(together: csr_array[Any], totals: Numbers, seed: int) -> Floats:
    """Spectral coordinates of who is active with whom, by cosine of the token sets."""
    scale = 1 / np.sqrt(np.maximum(totals, 1))
    counts = together.tocoo()
    weights = counts.data * scale[counts.row] * scale[counts.col]
    graph = type(together)((weights, (counts.row, counts.col)), shape=counts.shape)
    n = min(_N_COMPONENTS, graph.shape[0])
    basis = np.random.default_rng(seed + 1).standard_normal((graph.shape[0], n))
    for _ in range(8):
        basis, _ = np.linalg.qr(graph @ basis + basis)
    values = np.abs(np.einsum("nk,nk->k", basis, graph @ basis))
    return np.asarray(basis * np.sqrt(values), np.float32)


def _map(x: Floats, seed: int) -> Numbers:
    """t-SNE, stretched to the map's square."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    tsne = TSNE(
        perplexity=perplexity, init="pca", metric="cosine", random_state=seed, learning_rate="auto"
    )
    points = np.asarray(tsne.fit_transform(x), np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    spread = (points - low) / np.maximum(high - low, 1e-9)
    return np.asarray(np.rint(spread * MAP_SIZE), np.int64)

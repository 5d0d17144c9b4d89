"""The best tokens of every feature, kept while shards stream by: at most one of a document."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]


class Leaders:
    """``values``, ``places`` and ``documents``, all ``[n_features, n]``, strongest first.

    A place is -1 where a feature was active in fewer documents.
    """

    def __init__(self, n_features: int, n: int) -> None:
        self.values = np.zeros((n_features, n), np.float32)
        self.places = np.full((n_features, n), -1, np.int64)
        self.documents = np.full((n_features, n), -1, np.int64)

    def offer(
        self, features: NDArray[np.integer], values: Floats, places: Numbers, documents: Numbers
    ) -> None:
        """Any number of active tokens in any order; values are positive."""
        worth = values > self.values[features, -1]
        held = np.nonzero(self.places >= 0)
        features = np.concatenate([held[0], features[worth]])
        values = np.concatenate([self.values[held], values[worth]])
        places = np.concatenate([self.places[held], places[worth]])
        documents = np.concatenate([self.documents[held], documents[worth]])
        best = _first_of_each(np.lexsort((-values, documents, features)), features, documents)
        best = best[np.lexsort((-values[best], features[best]))]
        features = features[best]
        begins = np.append(True, features[1:] != features[:-1])[: len(features)]
        rank = np.arange(len(features)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
        kept = rank < self.values.shape[1]
        at, best = (features[kept], rank[kept]), best[kept]
        self.values[at], self.places[at] = values[best], places[best]
        self.documents[at] = documents[best]


def _first_of_each(order: Numbers, features: NDArray[np.integer], documents: Numbers) -> Numbers:
    """Of ``order``, the first of each feature and document, which stand together in it."""
    if len(order) == 0:
        return order
    features, documents = features[order], documents[order]
    new = (features[1:] != features[:-1]) | (documents[1:] != documents[:-1])
    first: Numbers = order[np.append(True, new)]
    return first

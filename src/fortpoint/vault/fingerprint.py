"""The mark of a lease: Gaussian noise far below what changes an answer, added while unsealing.

    marked = MarkedCheckpoint(SealedCheckpoint(model), lease_key)
    marked.get("model.layers.0.mlp.up_proj.weight", (1536, 576))

    W_j = W_0 + epsilon * s * k_j        s: standard deviation of the weight's row

``k_j`` is the lease's own carrier (carriers.py), independent of every other lease's. Matrices
of attention and MLP are marked; embedding, norms and biases are not.

Not protected here: a model that is public. Who has the plain weights can measure where a copy
differs from them, and take the difference away.
"""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fortpoint.vault.carriers import Carrier

Floats = NDArray[np.float32]
Shape = tuple[int, ...]

EPSILON = 0.003
_MARKED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)


class Weights(Protocol):
    """Tensors by name, as float32 arrays of the caller's own."""

    @property
    def names(self) -> list[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> Shape: ...

    def get(self, name: str, shape: Shape | None = None) -> Floats: ...


class MarkedCheckpoint:
    """``weights`` with the mark of the lease whose key this is."""

    def __init__(self, weights: Weights, lease_key: bytes, epsilon: float = EPSILON) -> None:
        self._weights = weights
        self._key = lease_key
        self._epsilon = epsilon

    @property
    def names(self) -> list[str]:
        return self._weights.names

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def get(self, name: str, shape: Shape | None = None) -> Floats:
        weight = self._weights.get(name, shape)
        if is_marked(name) and weight.ndim == 2:
            mark = Carrier(self._key, name).values(0, weight.size).reshape(weight.shape)
            weight += np.float32(self._epsilon) * row_scale(weight) * mark
        return weight


def is_marked(name: str) -> bool:
    return _MARKED.fullmatch(name) is not None


def row_scale(weight: Floats) -> Floats:
    """``[rows, 1]``: standard deviation of each row, one where a row is constant."""
    scale = weight.std(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))

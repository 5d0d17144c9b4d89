"""Attention keys and values of one sequence, and the budget that all sequences share.

Shapes: ``keys`` and ``values`` are ``[n_layers, n_kv_heads, capacity, head_dim]``. Capacity
grows in steps, so a short answer never holds the memory of a long one.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH_TOKENS = 128


class KVBudget:
    """Tokens of cache that may exist at once, over all sequences."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.free = n_tokens

    def take(self, n_tokens: int) -> bool:
        """Reserve, or change nothing and return False."""
        if n_tokens > self.free:
            return False
        self.free -= n_tokens
        return True

    def give_back(self, n_tokens: int) -> None:
        self.free += n_tokens


class KVCache:
    """One sequence's keys and values; ``length`` tokens are filled."""

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, budget: KVBudget
    ) -> None:
        self._budget = budget
        shape = (n_layers, n_kv_heads, 0, head_dim)
        self.keys = torch.empty(shape, dtype=dtype)
        self.values = torch.empty(shape, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def reserve(self, n_tokens: int) -> bool:
        """Make room for ``n_tokens`` in all; False (and no change) when the budget is spent."""
        missing = n_tokens - self.capacity
        if missing <= 0:
            return True
        growth = -(-missing // GROWTH_TOKENS) * GROWTH_TOKENS
        if not self._budget.take(growth):
            return False
        self.keys = self._grown(self.keys, growth)
        self.values = self._grown(self.values, growth)
        return True

    def fork(self) -> KVCache | None:
        """A copy of what is filled; None when the budget is spent."""
        n_layers, n_kv_heads, _, head_dim = self.keys.shape
        copy = KVCache(n_layers, n_kv_heads, head_dim, self.keys.dtype, self._budget)
        if not copy.reserve(self.length):
            return None
        copy.keys[:, :, : self.length] = self.keys[:, :, : self.length]
        copy.values[:, :, : self.length] = self.values[:, :, : self.length]
        copy.length = self.length
        return copy

    def release(self) -> None:
        """Give the memory back; the cache is empty afterwards."""
        self._budget.give_back(self.capacity)
        self.keys = self.keys[:, :, :0].clone()
        self.values = self.values[:, :, :0].clone()
        self.length = 0

    def _grown(self, old: Tensor, growth: int) -> Tensor:
        n_layers, n_kv_heads, capacity, head_dim = old.shape
        new = torch.empty((n_layers, n_kv_heads, capacity + growth, head_dim), dtype=old.dtype)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

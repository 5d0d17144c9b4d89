"""Attention keys and values: one private tensor while a prompt is read, a seat while it is
answered, and the budget that all of them share.

Shapes: a private tensor is ``[n_layers, 2, n_kv_heads, capacity, head_dim]`` (keys, then
values). Sequences that decode together sit in a ``Pool``: for each layer one tensor ``[2,
n_seats, n_kv_heads, capacity, head_dim]``, so that one batched product serves all of them. A
pool is exactly as long as its longest sequence needs (a longer one would be read in vain, and
its slices would not be contiguous), and there is one pool for each class of lengths, so that a
short answer never pays for a long one.

    reserve, fill ... prompt          a private tensor
    take_seat                         copied once into a pool
    reserve (again and again)         the pool grows for all of its sequences together
    release                           the last sequence of the pool moves into the free seat
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROWTH_TOKENS = 64
_FIRST_CLASS_TOKENS = 512


class KVBudget:
    """Tokens of cache that may exist at once, over all sequences.

    ``reclaim(n)`` is asked for memory that can be given up (kept prefixes) before a
    reservation fails; it gives back what it frees.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.free = n_tokens
        self.reclaim: Callable[[int], None] = lambda _n_tokens: None

    def take(self, n_tokens: int) -> bool:
        """Reserve, or change nothing and return False."""
        if n_tokens > self.free:
            self.reclaim(n_tokens - self.free)
        if n_tokens > self.free:
            return False
        self.free -= n_tokens
        return True

    def give_back(self, n_tokens: int) -> None:
        self.free += n_tokens


@dataclass(frozen=True)
class KVShape:
    """What one token's keys and values look like."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        values = 2 * self.n_layers * self.n_kv_heads * self.head_dim
        return values * self.dtype.itemsize

    def empty(self, n_tokens: int) -> Tensor:
        """A private tensor."""
        shape = (self.n_layers, 2, self.n_kv_heads, n_tokens, self.head_dim)
        return torch.empty(shape, dtype=self.dtype)


class Pool:
    """Sequences of one class of lengths that decode together. ``layers[l]`` is ``[2, n_seats,
    n_kv_heads, capacity, head_dim]``; the first ``len(seated)`` seats are taken."""

    def __init__(self, shape: KVShape, budget: KVBudget) -> None:
        self._shape = shape
        self._budget = budget
        self.seated: list[KVCache] = []
        self.capacity = 0
        self._n_seats = 0
        self.layers: list[Tensor] = [self._layer(0, 0) for _ in range(shape.n_layers)]

    def add(self, cache: KVCache, private: Tensor) -> bool:
        """Copy ``private`` into a free seat; False when memory is spent."""
        n_tokens = -(-(cache.length + 1) // GROWTH_TOKENS) * GROWTH_TOKENS
        capacity = max(self.capacity, n_tokens)
        if len(self.seated) == self._n_seats:
            doubled = max(1, 2 * self._n_seats)
            if not self._resize(doubled, capacity) and not self._resize(
                self._n_seats + 1, capacity
            ):
                return False
        elif not self.reserve(n_tokens):
            return False
        seat = len(self.seated)
        for layer, kept in zip(private, self.layers, strict=True):
            kept[:, seat, :, : cache.length] = layer[:, :, : cache.length]
            # What lies beyond a sequence's end is masked, but must be finite: 0 * inf is not 0.
            kept[:, seat, :, cache.length :] = 0
        self.seated.append(cache)
        return True

    def reserve(self, n_tokens: int) -> bool:
        """Make every seat hold ``n_tokens``; False when memory is spent."""
        if n_tokens <= self.capacity:
            return True
        capacity = -(-n_tokens // GROWTH_TOKENS) * GROWTH_TOKENS
        return self._resize(self._n_seats, capacity) or self._resize(len(self.seated), capacity)

    def remove(self, cache: KVCache) -> None:
        """Free the seat: the last one of the pool moves into it."""
        seat, last = cache.seat, self.seated[-1]
        self.seated.pop()
        if last is not cache:
            for kept in self.layers:
                kept[:, seat] = kept[:, len(self.seated)]
            self.seated[seat] = last
            last.seat = seat
        if not self.seated:
            self._resize(0, 0)
        elif 4 * len(self.seated) <= self._n_seats:
            self._resize(self._n_seats // 2, self._needed())

    def private(self, cache: KVCache) -> Tensor:
        """A copy of what one seat holds, as a private tensor of its length."""
        return torch.stack([kept[:, cache.seat, :, : cache.length] for kept in self.layers])

    def _needed(self) -> int:
        longest = max(cache.length for cache in self.seated) + 1
        return -(-longest // GROWTH_TOKENS) * GROWTH_TOKENS

    def _resize(self, n_seats: int, capacity: int) -> bool:
        """Move what is filled into new tensors, layer by layer, so that only one is double."""
        more = n_seats * capacity - self._n_seats * self.capacity
        if more > 0 and not self._budget.take(more):
            return False
        n_kept, filled = len(self.seated), min(capacity, self.capacity)
        for index, old in enumerate(self.layers):
            new = self._layer(n_seats, capacity)
            new[:, :n_kept, :, :filled] = old[:, :n_kept, :, :filled]
            new[:, :n_kept, :, filled:] = 0
            self.layers[index] = new
        if more < 0:
            self._budget.give_back(-more)
        self._n_seats, self.capacity = n_seats, capacity
        return True

    def _layer(self, n_seats: int, capacity: int) -> Tensor:
        shape = (2, n_seats, self._shape.n_kv_heads, capacity, self._shape.head_dim)
        return torch.empty(shape, dtype=self._shape.dtype)


class Pools:
    """One pool for each class of lengths: to 512 tokens, to 1,024, to 2,048 and so on."""

    def __init__(self, shape: KVShape, budget: KVBudget) -> None:
        self.shape = shape
        self.budget = budget
        self._pools: dict[int, Pool] = {}

    def of(self, n_tokens: int) -> Pool:
        limit = _FIRST_CLASS_TOKENS
        while limit < n_tokens:
            limit *= 2
        if limit not in self._pools:
            self._pools[limit] = Pool(self.shape, self.budget)
        return self._pools[limit]


class KVCache:
    """One sequence's keys and values; ``length`` tokens are filled.

    ``kv`` is the private tensor; with a ``pool`` it is None and ``seat`` says where.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.kv: Tensor | None = pools.shape.empty(0)
        self.pool: Pool | None = None
        self.seat = 0
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        if self.pool is not None:
            return self.pool.capacity
        return 0 if self.kv is None else self.kv.shape[3]

    def reserve(self, n_tokens: int) -> bool:
        """Make room for ``n_tokens`` in all; False (and no change) when the budget is spent."""
        if self.pool is not None:
            if self.pool is self._pools.of(n_tokens):
                return self.pool.reserve(n_tokens)
            return self._stand_up() and self.reserve(n_tokens)
        missing = n_tokens - self.capacity
        if missing <= 0 or self.kv is None:
            return True
        growth = -(-missing // GROWTH_TOKENS) * GROWTH_TOKENS
        if not self._pools.budget.take(growth):
            return False
        grown = self._pools.shape.empty(self.capacity + growth)
        grown[:, :, :, : self.length] = self.kv[:, :, :, : self.length]
        self.kv = grown
        return True

    def take_seat(self) -> bool:
        """Move into a pool, to decode with others; False when there is no memory for it."""
        if self.pool is not None or self.kv is None:
            return True
        pool, private, n_private = self._pools.of(self.length + 1), self.kv, self.capacity
        if not pool.add(self, private):
            return False
        self.pool, self.seat, self.kv = pool, len(pool.seated) - 1, None
        self._pools.budget.give_back(n_private)
        return True

    def fill(self, kv: Tensor) -> None:
        """Start from what is known: ``kv`` ``[n_layers, 2, n_kv_heads, n, head_dim]``."""
        if self.kv is None or self.length:
            raise ValueError("only an empty cache can be filled")
        n_tokens = kv.shape[3]
        self.kv[:, :, :, :n_tokens] = kv
        self.length = n_tokens

    def snapshot(self, n_tokens: int) -> Tensor:
        """A copy of the first ``n_tokens``, as ``fill`` takes it."""
        if self.kv is not None:
            return self.kv[:, :, :, :n_tokens].clone()
        if self.pool is None:
            raise ValueError("the cache was released")
        return self.pool.private(self)[:, :, :, :n_tokens].clone()

    def fork(self) -> KVCache | None:
        """A private copy of what is filled; None when the budget is spent."""
        copy = KVCache(self._pools)
        if not copy.reserve(self.length):
            return None
        copy.fill(self.snapshot(self.length))
        return copy

    def release(self) -> None:
        """Give the memory back; the cache is empty afterwards."""
        if self.pool is not None:
            self.pool.remove(self)
            self.pool = None
        else:
            self._pools.budget.give_back(self.capacity)
        self.kv = self._pools.shape.empty(0)
        self.length = 0

    def _stand_up(self) -> bool:
        """Leave a pool whose class of lengths has become too small."""
        if self.pool is None:
            return True
        needed = -(-(self.length + 1) // GROWTH_TOKENS) * GROWTH_TOKENS
        if not self._pools.budget.take(needed):
            return False
        private = self._pools.shape.empty(needed)
        private[:, :, :, : self.length] = self.pool.private(self)
        self.pool.remove(self)
        self.pool, self.kv = None, private
        return True

"""Windows of text one after another, as arrays: what contexts and terms are read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.activations import Shard

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Passages:
    """``tokens`` int32 ``[n]``, ``roles`` uint8 ``[n]`` (places in ``corpus.ROLES``), ``starts``
    bool ``[n]``: where a window begins."""

    tokens: NDArray[np.int32]
    roles: NDArray[np.uint8]
    starts: NDArray[np.bool_]

    @classmethod
    def of_shards(cls, shards: Sequence[Shard]) -> Passages:
        empty = np.empty(0, np.int32)
        starts = np.concatenate([empty, *(shard.position for shard in shards)]) == 0
        return cls(
            tokens=np.concatenate([empty, *(shard.tokens for shard in shards)]),
            roles=np.concatenate([empty.astype(np.uint8), *(shard.role for shard in shards)]),
            starts=starts,
        )

    @classmethod
    def of_texts(cls, texts: Sequence[Sequence[int]], role: int) -> Passages:
        """Each text is a window of its own; none may be empty."""
        tokens = np.array([token for text in texts for token in text], np.int32)
        starts = np.zeros(len(tokens), np.bool_)
        starts[np.cumsum([0, *(len(text) for text in texts[:-1])])] = True
        return cls(tokens, np.full(len(tokens), role, np.uint8), starts)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def window(self) -> Numbers:
        """The number of each token's window."""
        return np.cumsum(self.starts) - 1

    @cached_property
    def begin(self) -> Numbers:
        """The row at which each token's window begins."""
        return np.flatnonzero(self.starts)[self.window]

    @cached_property
    def place(self) -> Numbers:
        """Each token's position in its window."""
        return np.arange(len(self)) - self.begin

    def before(self, values: Numbers, distance: int) -> Numbers:
        """``values`` of the token so far before, in the same window; -1 where there is none.

        A negative distance looks ahead.
        """
        found = np.full(len(self), -1, np.int64)
        if abs(distance) >= len(self):
            return found
        if distance >= 0:
            here, there = slice(distance, None), slice(None, len(self) - distance)
        else:
            here, there = slice(None, distance), slice(-distance, None)
        same = self.window[here] == self.window[there]
        found[here][same] = values[there][same]
        return found

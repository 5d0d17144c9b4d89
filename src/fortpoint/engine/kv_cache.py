"""Keys and values of all sequences, in blocks of 32 tokens out of one pool.

    pool = KVPool(KVShape(n_layers=30, n_kv_heads=3, head_dim=64, half=True), n_bytes=192 << 20)
    cache = KVCache(pool)
    cache.reserve(40)                        # two blocks
    cache.publish(tokens, salt, rows)        # full blocks may now be adopted by others
    other.adopt(tokens, salt)                # shares them, computes the rest

A full block is never written again, so sequences share it: forks of one prompt, and prompts
that begin alike. A block that nobody uses stays known until its memory is needed; those used
least recently go first. Block ``b`` of layer ``l`` lies as ``[n_kv_heads, 2, 32 * head_dim]``:
keys ``[head_dim, 32]``, then values ``[32, head_dim]``.

Who may adopt what is the salt's matter: a prefix is found only with the salt that it was
published with, and only by its exact tokens.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.compiled.attention import BLOCK

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class KVShape:
    """What keys and values look like; ``half`` keeps them in bfloat16, else float32."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    half: bool

    @property
    def head_bytes(self) -> int:
        """One head's keys in one block; its values are as many."""
        return BLOCK * self.head_dim * (2 if self.half else 4)

    @property
    def block_bytes(self) -> int:
        """One block in one layer."""
        return 2 * self.n_kv_heads * self.head_bytes

    @property
    def bytes_per_token(self) -> int:
        return self.n_layers * self.block_bytes // BLOCK


@dataclass(frozen=True)
class _Known:
    """A full block that may be adopted, and the rows that were published with it."""

    block: int
    rows: Floats


class KVPool:
    """``n_bytes`` of blocks. Memory is touched when a block is first used, lowest first."""

    def __init__(self, shape: KVShape, n_bytes: int) -> None:
        self.shape = shape
        self.n_blocks = n_bytes // (shape.n_layers * shape.block_bytes)
        self.data = np.empty((shape.n_layers, self.n_blocks, shape.block_bytes), np.uint8)
        self._never_used = 0
        self._free: list[int] = []
        self._users = [0] * self.n_blocks
        self._known: dict[bytes, _Known] = {}
        self._names: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, without users, oldest first

    @property
    def n_tokens(self) -> int:
        return self.n_blocks * BLOCK

    @property
    def n_available(self) -> int:
        """Blocks that can be taken now."""
        return self.n_blocks - self._never_used + len(self._free) + len(self._idle)

    def take(self) -> int:
        """A block for one user; ``n_available`` must not be 0."""
        if self._free:
            block = heapq.heappop(self._free)
        elif self._never_used < self.n_blocks:
            block, self._never_used = self._never_used, self._never_used + 1
            # Finite from the start: what lies beyond a sequence's end is multiplied with 0.
            self.data[:, block] = 0
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._names.pop(block)]
        self._users[block] = 1
        return block

    def use(self, block: int) -> None:
        """One more user of a block that is in use or known."""
        self._idle.pop(block, None)
        self._users[block] += 1

    def give_back(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._names:
            self._idle[block] = None
        else:
            heapq.heappush(self._free, block)

    def copy(self, source: int, target: int) -> None:
        self.data[:, target] = self.data[:, source]

    def find(self, name: bytes) -> _Known | None:
        return self._known.get(name)

    def name(self, block: int, name: bytes, rows: Floats) -> None:
        """Make a full block known, unless one of this name is, or it has another name."""
        if name not in self._known and block not in self._names:
            self._known[name] = _Known(block, rows)
            self._names[block] = name


class KVCache:
    """One sequence's blocks; the first ``length`` tokens are computed."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self.blocks: list[int] = []
        self.length = 0

    def reserve(self, n_tokens: int) -> bool:
        """Make room for ``n_tokens`` in all; False (and no change) when memory is spent."""
        missing = -(-n_tokens // BLOCK) - len(self.blocks)
        if missing > self._pool.n_available:
            return False
        self.blocks += [self._pool.take() for _ in range(missing)]
        return True

    def fork(self) -> KVCache | None:
        """Shares full blocks, copies the last; None when memory is spent."""
        n_full, rest = divmod(self.length, BLOCK)
        if rest and not self._pool.n_available:
            return None
        fork = KVCache(self._pool)
        for block in self.blocks[:n_full]:
            self._pool.use(block)
            fork.blocks.append(block)
        if rest:
            fork.blocks.append(self._pool.take())
            self._pool.copy(self.blocks[n_full], fork.blocks[-1])
        fork.length = self.length
        return fork

    def release(self) -> None:
        """Give the memory back; the cache is empty afterwards."""
        for block in reversed(self.blocks):  # the end of a prefix is of less use than its start
            self._pool.give_back(block)
        self.blocks = []
        self.length = 0

    def adopt(self, tokens: Sequence[int], salt: str) -> Floats | None:
        """See ``model.Cache.adopt``."""
        if self.blocks:
            raise ValueError("only an empty cache can adopt")
        rows: list[Floats] = []
        for name in _names(tokens[: len(tokens) - 1], salt):
            known = self._pool.find(name)
            if known is None:
                break
            self._pool.use(known.block)
            self.blocks.append(known.block)
            rows.append(known.rows)
        self.length = len(self.blocks) * BLOCK
        return np.concatenate(rows) if rows else None

    def publish(self, tokens: Sequence[int], salt: str, rows: Floats) -> None:
        """See ``model.Cache.publish``."""
        names = _names(tokens[: self.length], salt)
        for i, (block, name) in enumerate(zip(self.blocks, names, strict=False)):
            self._pool.name(block, name, rows[i * BLOCK : (i + 1) * BLOCK].copy())


def _names(tokens: Sequence[int], salt: str) -> Iterator[bytes]:
    """The name of each full block: a digest of the salt and of all tokens to its end."""
    digest = hashlib.blake2b(salt.encode(), digest_size=32)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        digest.update(np.asarray(tokens[end - BLOCK : end], np.int64).tobytes())
        yield digest.copy().digest()
